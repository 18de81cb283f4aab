"""Row draws, dense and literal: the truth that the other backends of `sample` are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rng import BLOCKS, TOKENS, Integer, uniform
from ..streaming_sample import SAMPLE_BLOCK


def draw_ref(
    log_prob: Tensor, seed: Integer, *, step: Integer = 0, row_keys: Tensor | None = None
) -> Tensor:
    """One token per row of log-probabilities, by the sequential algorithm of a draw.

    Args:
        log_prob: (..., V), normalised or not; -inf for excluded tokens.
        seed, step, row_keys: as for `draw_from_probs`.

    Returns:
        int64 of the leading shape; 0 for a row that is -inf throughout.
    """
    vocabulary = log_prob.shape[-1]
    rows = log_prob.detach().reshape(-1, vocabulary)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    if row_keys is None:
        row_keys = torch.arange(rows.shape[0], device=rows.device)
    row_keys = row_keys.reshape(-1)
    blocks = list(range(0, vocabulary, SAMPLE_BLOCK))
    block_u = uniform(seed, step, row_keys, len(blocks), stream=BLOCKS, dtype=dtype)
    token_u = uniform(seed, step, row_keys, vocabulary, stream=TOKENS, dtype=dtype)

    peak = rows.to(dtype).amax(-1, keepdim=True)
    weights = (rows - peak.clamp_min(torch.finfo(dtype).min)).exp()
    race = rows - torch.log(-torch.log1p(-token_u))
    total = torch.zeros_like(peak[:, 0])
    token = torch.zeros_like(row_keys)
    for index, begin in enumerate(blocks):
        mass = weights[:, begin : begin + SAMPLE_BLOCK].sum(-1)
        total = total + mass
        winner = begin + race[:, begin : begin + SAMPLE_BLOCK].argmax(-1)
        token = torch.where(block_u[:, index] * total < mass, winner, token)
    return token.view(log_prob.shape[:-1])
