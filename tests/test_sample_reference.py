"""The reference of `sample`, held by scalar arithmetic, closed forms and enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from di4c_fast.draw.api import sample
from di4c_fast.draw.law import SAMPLE_BLOCK
from di4c_fast.reference.draw import draw_ref, transformed_logits_ref
from di4c_fast.rng import BLOCKS, TOKENS, uniform
from di4c_fast.testing import assert_draws_match

INF = math.inf


def reference(logits, **arguments):
    return sample(logits, backend="reference", **arguments)


def log(*probs: float) -> torch.Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def draw_by_hand(probs, seed, step, key):
    """The sequential algorithm of a draw in Python floats, one token and one block at a time."""
    keys = torch.tensor([key])
    count = -(-len(probs) // SAMPLE_BLOCK)
    block_u = uniform(seed, step, keys, count, stream=BLOCKS, dtype=torch.float64)[0].tolist()
    token_u = uniform(seed, step, keys, len(probs), stream=TOKENS, dtype=torch.float64)[0].tolist()
    total, token = 0.0, None
    for block in range(count):
        ids = range(block * SAMPLE_BLOCK, min((block + 1) * SAMPLE_BLOCK, len(probs)))
        mass = math.fsum(probs[v] for v in ids)
        total += mass
        if block_u[block] * total < mass:
            times = {v: -math.log1p(-token_u[v]) / probs[v] for v in ids if probs[v] > 0}
            token = min(times, key=times.__getitem__)
    return token


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 300, 641])
def test_draws_follow_the_sequential_algorithm(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    log_prob = torch.randn(40, vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_prob[:, vocabulary // 2 + 1 :: 3] = -INF
    keys = torch.randint(0, 2**62, (40,), generator=generator)
    drawn = draw_ref(log_prob, 5, step=3, row_keys=keys)
    by_hand = [
        draw_by_hand(row, 5, 3, key)
        for row, key in zip(log_prob.exp().tolist(), keys.tolist(), strict=True)
    ]
    assert drawn.tolist() == by_hand


def test_draws_have_the_shape_of_the_leading_dimensions_and_default_keys():
    log_prob = torch.randn(2, 3, 4, 200).log_softmax(-1)
    drawn = draw_ref(log_prob, 1)
    assert drawn.shape == (2, 3, 4)
    keys = torch.arange(24).view(2, 3, 4)
    assert drawn.equal(draw_ref(log_prob, 1, row_keys=keys))
    assert drawn[1].equal(draw_ref(log_prob[1], 1, row_keys=keys[1]))


def test_a_row_without_mass_gives_token_zero():
    assert draw_ref(torch.full((2, 300), -INF), 0).tolist() == [0, 0]


@pytest.mark.parametrize("vocabulary", [5, 400])
def test_draws_follow_the_law(vocabulary):
    log_prob = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    log_prob[2] = -INF
    assert_draws_match(draw_ref(log_prob.expand(40_000, -1), 8), log_prob.exp())


def transformed(logits, **arguments):
    return transformed_logits_ref(logits[None], **arguments)[0]


def test_guidance_is_that_of_llada_and_of_maskgit():
    conditional, unconditional = log(0.2, 0.8), log(0.5, 0.5)
    for scale in (0.0, 0.5, 3.0, -0.5):
        out = transformed(conditional, unconditional=unconditional[None], guidance_scale=scale)
        llada = unconditional + (scale + 1) * (conditional - unconditional)
        maskgit = (1 + scale) * conditional - scale * unconditional
        torch.testing.assert_close(out, llada, rtol=0, atol=1e-15)
        torch.testing.assert_close(out, maskgit, rtol=0, atol=1e-14)


def test_guidance_keeps_excluded_tokens_excluded():
    conditional = torch.tensor([1.0, -INF, -INF])
    unconditional = torch.tensor([[0.0, -INF, 5.0]])
    out = transformed(conditional, unconditional=unconditional, guidance_scale=1.0)
    assert out.tolist() == [2.0, -INF, -INF]


@pytest.mark.parametrize(
    ("probs", "top_p", "kept"),
    [
        ((0.5, 0.3, 0.2), 0.4, [0]),
        ((0.5, 0.3, 0.2), 0.6, [0, 1]),
        ((0.2, 0.3, 0.5), 0.9, [0, 1, 2]),
        ((0.2, 0.3, 0.5), 0.7, [1, 2]),
        ((0.25, 0.25, 0.25, 0.25), 0.25, [0, 1]),  # the sum must pass top_p, not reach it
        ((0.25, 0.25, 0.25, 0.25), 0.3, [0, 1]),  # ties: the lower id first
        ((0.1, 0.9), 0.01, [1]),
        ((1.0, 0.0, 0.0), 0.9, [0]),
    ],
)
def test_top_p_keeps_the_first_token_that_passes_it(probs, top_p, kept):
    out = transformed(log(*probs), top_p=top_p)
    assert out.isfinite().nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize(
    ("logits", "top_k", "kept"),
    [
        ((1.0, 3.0, 2.0), 1, [1]),
        ((1.0, 3.0, 2.0), 2, [1, 2]),
        ((1.0, 3.0, 1.0, 3.0), 1, [1, 3]),  # ties are all kept
        ((1.0, 3.0, 1.0), 2, [0, 1, 2]),
        ((1.0, -INF, -INF), 2, [0]),
        ((1.0, 2.0), 9, [0, 1]),
    ],
)
def test_top_k_keeps_ties(logits, top_k, kept):
    out = transformed(torch.tensor(logits), top_k=top_k)
    assert out.isfinite().nonzero()[:, 0].tolist() == kept


def test_temperature_comes_before_top_p_and_top_p_before_top_k():
    probs = (0.4, 0.3, 0.2, 0.1)
    # At temperature 1/2 the probabilities are 16:9:4:1 thirtieths; 16 + 9 = 25 of 30 pass 0.8.
    out = transformed(log(*probs), temperature=0.5, top_p=0.8)
    assert out.isfinite().tolist() == [True, True, False, False]
    assert transformed(log(*probs), top_p=0.8).isfinite().tolist() == [True, True, True, False]
    # Ties at the second place: top-p cuts them by id first, then top-k sees one only.
    ties = log(0.5, 0.2, 0.2, 0.1)
    assert transformed(ties, top_p=0.6, top_k=2).isfinite().tolist() == [True, True, False, False]
    assert transformed(ties, top_k=2).isfinite().tolist() == [True, True, True, False]


def test_the_mask_takes_no_part_in_the_filters():
    out = transformed(log(0.6, 0.2, 0.1, 0.1), mask_id=0, top_p=0.4)
    assert out.isfinite().tolist() == [False, True, False, False]


def test_statistics_have_their_closed_forms():
    probs = [0.5, 0.3, 0.2]
    logits = log(*probs)[None] + 7.0
    draw = reference(logits, seed=0, want="all")
    token = int(draw.token)
    entropy = -sum(p * math.log(p) for p in probs)
    expected = {
        "log_prob": math.log(probs[token]),
        "logsumexp": 7.0,
        "max_log_prob": math.log(0.5),
        "entropy": entropy,
        "margin": 0.2,
        "prob": probs[token],
        "raw_prob": probs[token],
    }
    for name, value in expected.items():
        result = getattr(draw, name)
        assert result.dtype == torch.float64
        assert result.item() == pytest.approx(value, abs=1e-14), name
    assert draw.argmax.tolist() == [0]


def test_statistics_are_those_of_the_tempered_distribution_but_for_raw_prob():
    draw = reference(log(0.4, 0.6)[None], temperature=0.5, seed=2, want="all")
    token = int(draw.token)
    assert draw.prob.item() == pytest.approx([16 / 52, 36 / 52][token])
    assert draw.raw_prob.item() == pytest.approx([0.4, 0.6][token])
    assert draw.logsumexp.item() == pytest.approx(math.log(0.16 + 0.36))
    assert draw.margin.item() == pytest.approx(20 / 52)


def test_temperature_zero_is_the_lowest_argmax_with_the_statistics_of_temperature_one():
    draw = reference(log(0.2, 0.4, 0.4)[None], temperature=0, want="all")
    assert draw.token.tolist() == [1]
    assert draw.argmax.tolist() == [1]
    assert draw.prob.item() == pytest.approx(0.4)
    assert draw.margin.item() == 0.0


def test_one_hot_rows_have_no_entropy_and_full_margin():
    draw = reference(torch.tensor([[-INF, 3.0, -INF]]), seed=0, want="all")
    assert draw.token.tolist() == [1]
    values = (draw.log_prob, draw.entropy, draw.margin, draw.logsumexp)
    assert [value.item() for value in values] == [0.0, 0.0, 1.0, 3.0]


def test_confidence_dtype_rounds_the_confidences_only():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    draw = reference(logits, seed=0, want="all", confidence_dtype=torch.bfloat16)
    for name in ("prob", "raw_prob", "margin", "entropy"):
        assert getattr(draw, name).dtype == torch.bfloat16
    for name in ("log_prob", "logsumexp", "max_log_prob"):
        assert getattr(draw, name).dtype == torch.float32
    exact = logits.bfloat16().softmax(-1).gather(1, draw.token[:, None])[:, 0]
    assert draw.prob.equal(exact)
