"""What the tests of `sample` share."""

from __future__ import annotations

import torch

from di4c_fast.draw.api import Draw, sample
from di4c_fast.draw.law import (
    SAMPLE_BLOCK,
    block_sums,
    block_uniforms,
    blocks_of,
    choose_block,
    run_race,
    token_uniforms,
)


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def streamed(logits, **arguments) -> Draw:
    return sample(logits, backend="torch", **arguments)


def assert_same_draw(draw: Draw, other: Draw) -> None:
    """Bit for bit."""
    for name, value, expected in zip(Draw._fields, draw, other, strict=True):
        assert (value is None) == (expected is None), name
        assert value is None or value.equal(expected), name


def assert_near(draw: Draw, truth: Draw) -> None:
    """Equal tokens, statistics within the rounding of a few hundred fp32 operations."""
    for name, value, expected in zip(Draw._fields, draw, truth, strict=True):
        assert value.dtype == expected.dtype, name
        if value.dtype == torch.int64:
            assert value.equal(expected), name
        else:
            assert torch.allclose(value, expected, rtol=1e-5, atol=3e-6), name


def draws_of_one_row(logits: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    """What `sample(logits.expand(rows, -1))` draws, with one pass over the row for all draws."""
    weights = (logits - logits.amax()).exp()[None]
    sums = block_sums(weights)
    blocks = torch.zeros(blocks_of(weights.shape[1]) * SAMPLE_BLOCK)
    blocks[: weights.shape[1]] = weights[0]
    blocks = blocks.view(-1, SAMPLE_BLOCK)
    drawn = []
    for keys in torch.arange(rows).split(20_000):
        uniforms = block_uniforms(seed, 0, keys, weights.shape[1], weights.dtype)
        chosen = choose_block(sums.expand(len(keys), -1), uniforms)
        _, winner = run_race(blocks[chosen], token_uniforms(seed, 0, keys, chosen, weights.dtype))
        drawn.append(chosen * SAMPLE_BLOCK + winner)
    return torch.cat(drawn)
