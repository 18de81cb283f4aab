"""From the confidences of a step to the positions that keep their tokens.

Shapes: B sequences, D positions, R active rows of all sequences, E deferred tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..draw.api import sample
from ..heads import Head
from .loop import Answer, single_logits

NEG_INF = float("-inf")


def choose(
    confidence: Tensor,
    ranking: Tensor,
    rows: Tensor,
    counts: Tensor | None,
    active: Tensor,
    threshold: float | None,
    factor: float | None,
) -> Tensor:
    """Which active positions (B, D) keep their tokens; confidence and ranking are (R,)."""
    batch, positions = active.shape

    def spread(values: Tensor) -> Tensor:
        full = torch.full((batch * positions,), NEG_INF, dtype=values.dtype, device=values.device)
        return full.index_copy(0, rows, values).view(batch, positions)

    order = spread(ranking).argsort(dim=1, descending=True, stable=True)
    sure, rank = spread(confidence).gather(1, order), torch.arange(positions, device=rows.device)
    passes = torch.ones_like(active) if threshold is None else sure >= threshold
    if factor is not None:
        passes = sure >= 1.0 - factor / (rank + 2).double()
    passes[:, 0] = True
    if factor is not None:
        passes = passes.int().cumprod(1).bool()
    if counts is not None:
        passes &= rank < counts.unsqueeze(1)
    return torch.zeros_like(active).scatter_(1, order, passes) & active


def defer(confidence: Tensor, answer: Answer, mask_id: int | None, ids: Tensor) -> Tensor:
    """Confidences p(x)/(1 − p(ids)), and 0 for the ids (E,) themselves."""
    total = answer.draw.logsumexp
    if total is None:  # of the logits without temperature and filters
        plain: dict[str, Any] = {"guidance": answer.guidance, "mask_id": mask_id}
        total = sample(answer.head, temperature=0.0, want=("logsumexp",), **plain).logsumexp
    assert total is not None
    own = _columns(answer.head, ids)
    if answer.guidance is not None:
        head, scale = answer.guidance
        other = _columns(head, ids)
        guided = other + (scale + 1) * (own - other)
        own = torch.where(own == NEG_INF, own, guided)
    share = (own - total.unsqueeze(1)).exp().sum(1)
    others = (confidence / (1.0 - share).clamp(min=1e-30)).clamp(max=1.0)
    return torch.where(torch.isin(answer.draw.token, ids), 0.0, others).to(confidence.dtype)


def _columns(head: Head, ids: Tensor) -> Tensor:
    """The logits of some columns, (R, E) in fp32 or fp64, without the others."""
    count = head.shape[0]
    return torch.stack([single_logits(head, token.expand(count)) for token in ids], 1)
