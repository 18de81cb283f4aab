"""The law of draws: what makes a token a pure function of (seed, step, row key, logits).

Shapes: R rows, V vocabulary, W = SAMPLE_BLOCK, G = ceil(V / W) blocks.

A draw from weights w (R, V), proportional to the probabilities, is

    s[g] = sum of w over block g             S[g] = s[0] + ... + s[g]
    chosen block = the last g with u[g] · S[g] < s[g]
    token = argmax of w[v] / E[v] over the chosen block,  E[v] = −log(1 − u'[v])

with u and u' the uniform numbers of the streams BLOCKS (index g) and TOKENS (index v) of `rng`.
The second line is a reservoir: block g replaces the choice with probability s[g]/S[g], so it is
chosen at the end with probability s[g]/S[G-1]. The last line is an exponential race, that is
argmax(log w − log E). A cumulative sum over all tokens would round a tail of tiny
probabilities away; the race compares each on its own.

Every backend follows this law: the torch passes call these functions, the kernels take
SAMPLE_BLOCK as an argument, and the reference states the same in another way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rng import BLOCKS, TOKENS, Integer, exponential, uniform

# Divisible by 4 (one Philox call). 816 rows of 8193 took 4.8 ms with 128 and 6.8 ms with 256 on
# one core: a draw costs V/W + W random numbers.
SAMPLE_BLOCK = 128


def blocks_of(vocabulary: int) -> int:
    """G, the number of blocks of a row.

    >>> blocks_of(128), blocks_of(129)
    (1, 2)
    """
    return -(-vocabulary // SAMPLE_BLOCK)


def block_sums(weights: Tensor) -> Tensor:
    """Sums over the blocks of each row, (R, V) of any row stride -> (R, G).

    A plain sum over a long row is split between threads if the row is alone, and so rounds
    differently than in a batch; sums over blocks do not.
    """
    rows, vocabulary = weights.shape
    full = vocabulary // SAMPLE_BLOCK
    sums = weights.new_empty(rows, blocks_of(vocabulary))
    if full:
        head = weights[:, : full * SAMPLE_BLOCK].unflatten(1, (full, SAMPLE_BLOCK))
        torch.sum(head, -1, out=sums[:, :full])
    if full < sums.shape[1]:
        torch.sum(weights[:, full * SAMPLE_BLOCK :], -1, out=sums[:, full])
    return sums


def block_uniforms(
    seed: Integer, step: Integer, row_keys: Tensor, vocabulary: int, dtype: torch.dtype
) -> Tensor:
    """u, one for every block: (R, G)."""
    return uniform(seed, step, row_keys, blocks_of(vocabulary), stream=BLOCKS, dtype=dtype)


def choose_block(sums: Tensor, uniforms: Tensor) -> Tensor:
    """The block that a sequential reservoir ends with, (R, G) each -> (R,) int64.

    0 where no block has mass, or where a sum is NaN.
    """
    replaced = uniforms * sums.cumsum(-1) < sums
    index = torch.arange(sums.shape[-1], device=sums.device)
    return torch.where(replaced, index, 0).amax(-1)


def token_uniforms(
    seed: Integer, step: Integer, row_keys: Tensor, chosen: Tensor, dtype: torch.dtype
) -> Tensor:
    """u' of the tokens of the chosen block, (R, W)."""
    first = chosen * SAMPLE_BLOCK
    return uniform(seed, step, row_keys, SAMPLE_BLOCK, stream=TOKENS, first=first, dtype=dtype)


def run_race(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The speed w / E and the column of the winner of an exponential race within a block.

    (R, W) -> (R,) each; weight 0 never wins.
    """
    speed, winner = (weights / exponential(uniforms)).max(-1)
    return speed, winner
