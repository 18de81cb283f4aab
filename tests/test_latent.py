"""λ: its draws, its embedding, and how a student starts at its teacher."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn
from wrong_arguments import Wrong, wrong

from di4c_fast.models.latent import (
    LatentEmbedding,
    LatentShift,
    LatentToken,
    draw_latents,
    sinusoid,
)


def test_latents_are_uniform_and_a_function_of_the_generator():
    draw = lambda: draw_latents(50, 40, 3, generator=torch.Generator().manual_seed(1))  # noqa: E731
    latents = draw()
    assert latents.shape == (50, 40, 3)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, draw())
    # A correct implementation fails here once in a million seeds.
    assert stats.kstest(latents.flatten().numpy(), "uniform").pvalue > 1e-6


def test_the_sinusoid_has_the_stated_frequencies():
    x = torch.tensor([0.0, 0.3, 700.0], dtype=torch.float64)
    features = sinusoid(x, 8)
    frequencies = [1.0, 10 ** (-4 / 3), 10 ** (-8 / 3), 1e-4]
    for row, value in zip(features, x.tolist(), strict=True):
        expected = [math.sin(value * w) for w in frequencies]
        expected += [math.cos(value * w) for w in frequencies]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64))


def test_the_embedding_is_two_layers_over_the_sinusoid_of_scaled_latents():
    torch.manual_seed(0)
    embedding = LatentEmbedding(6)
    latent = torch.rand(5, 1)
    out = embedding(latent)
    assert out.shape == (5, 1, 6)
    hidden = nn.functional.gelu(embedding.hidden(sinusoid(1000 * latent, 128)))
    torch.testing.assert_close(out, embedding.project(hidden))
    # Nearby latents are told apart: the point of the scale.
    near = embedding(torch.tensor([[0.500], [0.501]]))
    assert float((near[0] - near[1]).detach().abs().max()) > 1e-2


def test_latent_dimensions_are_told_apart():
    torch.manual_seed(0)
    embedding = LatentEmbedding(6, dim=2)
    out = embedding(torch.tensor([[0.3, 0.3]]))
    assert out.shape == (1, 2, 6)
    assert not torch.allclose(out[:, 0], out[:, 1])


@pytest.mark.parametrize("dim", [1, 3])
def test_a_zero_initialised_embedding_is_zero_and_learns(dim):
    embedding = LatentEmbedding(6, dim=dim, zero_init=True)
    out = embedding(torch.rand(4, dim))
    assert torch.equal(out, torch.zeros(4, dim, 6))
    out.sum().backward()
    assert embedding.project.weight.grad.abs().min() > 0
    assert embedding.project.bias.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_embedding_follows_the_dtype_of_its_parameters(dtype):
    out = LatentEmbedding(6).to(dtype)(torch.rand(4, 1))
    assert out.dtype == dtype
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("first", [False, True])
def test_extra_tokens_are_added_at_one_end_and_stripped_again(dim, first):
    module = LatentToken(6, dim, first=first)
    x, latent = torch.randn(3, 5, 6), torch.rand(3, dim)
    extended = module(x, latent)
    assert extended.shape == (3, 5 + dim, 6)
    assert torch.equal(module.strip(extended), x)
    tokens = extended[:, :dim] if first else extended[:, 5:]
    assert torch.equal(tokens, module.embedding(latent))


def test_extra_tokens_take_the_dtype_of_the_embeddings():
    extended = LatentToken(6)(torch.randn(3, 5, 6, dtype=torch.bfloat16), torch.rand(3, 1))
    assert extended.dtype == torch.bfloat16


def test_a_zero_extra_token_has_no_latent_in_it_but_takes_part_in_attention():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).double()
    token = LatentToken(16, zero_init=True).double()
    x = torch.randn(1, 5, 16, dtype=torch.float64).expand(3, -1, -1)
    out = token.strip(block(token(x, torch.rand(3, 1))))
    # Rows of one matrix product may round in their own ways.
    torch.testing.assert_close(out, out[:1].expand_as(out), rtol=1e-13, atol=1e-14)
    assert not torch.allclose(out, block(x), atol=1e-6)


def test_a_shift_of_a_time_embedding_is_one_vector_per_row():
    torch.manual_seed(0)
    module = LatentShift(16, dim=2, zero_init=False)
    x, latent = torch.randn(4, 16), torch.rand(4, 2)
    torch.testing.assert_close(module(x, latent), x + module.embedding(latent).sum(1))
    positions = module(x.unsqueeze(1).expand(4, 3, 16), latent)
    torch.testing.assert_close(positions, module(x, latent).unsqueeze(1).expand(4, 3, 16))


one, x = torch.zeros(3, 1), torch.zeros(3, 4, 8)


@wrong(
    [
        (lambda: draw_latents(-1, 2), "batch must be at least 0, got -1"),
        (lambda: draw_latents(1, 0), "components must be at least 1, got 0"),
        (lambda: draw_latents(1, 2, 0), "dim must be at least 1, got 0"),
        (lambda: draw_latents(1, 2.0), TypeError, "components must be an int"),
        (lambda: sinusoid(torch.zeros(2), 5), "features must be even, got 5"),
        (lambda: sinusoid(torch.zeros(2), 2), "features must be at least 4, got 2"),
        (lambda: sinusoid(torch.zeros(2).long(), 8), TypeError, "x must be floating point"),
        (lambda: LatentEmbedding(0), "width must be at least 1, got 0"),
        (lambda: LatentEmbedding(8, frequencies=7), "frequencies must be even, got 7"),
        (lambda: LatentEmbedding(8, scale=math.inf), "scale must be finite, got inf"),
        (lambda: LatentEmbedding(8)(x[:, :2, 0]), "(R, L) = (3, 1), got (3, 2)"),
        (lambda: LatentEmbedding(8)(one.long()), TypeError, "latent must be floating point"),
        (lambda: LatentToken(8)(x[..., :6], one), "(R, D, C) with C = 8, got (3, 4, 6)"),
        (lambda: LatentToken(8)(x, one[:2]), "latent must have shape (R, L) = (3, 1), got (2, 1)"),
        (lambda: LatentToken(8, dim=5).strip(x), "x must have at least L = 5 positions"),
        (lambda: LatentShift(8)(x[0, 0], one), "(R, D, C) or (R, C) with C = 8, got (8"),
    ]
)
def test_what_is_wrong_is_named(wrong: Wrong):
    with wrong.raises():
        wrong.what()
