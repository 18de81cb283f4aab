"""From the confidences of a step to the positions that keep their tokens.

Shapes: B sequences, D positions, R active rows of all sequences, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..heads import Head, LinearHead, TensorHead

NEG_INF = float("-inf")


def choose(
    confidence: Tensor,
    ranking: Tensor,
    flat: Tensor,
    counts: Tensor | None,
    active: Tensor,
    threshold: float | None,
    factor: float | None,
) -> Tensor:
    """Which active positions (B, D) keep their tokens; confidence and ranking are (R,)."""
    batch, positions = active.shape

    def spread(values: Tensor) -> Tensor:
        full = torch.full((batch * positions,), NEG_INF, dtype=values.dtype, device=values.device)
        return full.index_copy(0, flat, values).view(batch, positions)

    order = spread(ranking).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(positions, device=flat.device)
    passes = torch.ones_like(active)
    if threshold is not None:
        passes = spread(confidence).gather(1, order) >= threshold
    if factor is not None:
        bound = 1.0 - factor / (rank + 2).double()
        enough = spread(confidence).gather(1, order) >= bound
        enough[:, 0] = True
        passes = enough.int().cumprod(1).bool()
    passes = passes | (rank == 0)
    if counts is not None:
        passes = passes & (rank < counts.unsqueeze(1))
    return torch.zeros_like(active).scatter_(1, order, passes) & active


def without(head: Head, ids: Tensor) -> Head:
    """The head with some columns at -inf."""
    if not ids.numel():
        return head
    if isinstance(head, LinearHead):
        bias = head.bias
        if bias is None:
            bias = head.hidden.new_zeros(head.shape[-1])
        bias = bias.index_fill(-1, ids, NEG_INF)
        return head.with_tensors([head.hidden, head.weight, bias])
    return TensorHead(head.logits().index_fill(-1, ids, NEG_INF))


def columns(head: Head, at: Tensor) -> Tensor:
    """The logits of some columns, (R, len(at)) in fp32 or fp64, without the others."""
    if isinstance(head, LinearHead):
        bias = None if head.bias is None else head.bias[..., at]
        values = head.with_tensors([head.hidden, head.weight[at], bias]).logits()
    else:
        values = head.logits()[..., at]
    return values.to(torch.promote_types(head.dtype, torch.float32))


def defer(
    confidence: Tensor,
    drawn: Tensor,
    logsumexp: Tensor,
    ids: Tensor,
    head: Head,
    guidance: tuple[Head, float] | None,
) -> Tensor:
    """Confidences p(x)/(1 − p(ids)), and 0 for the ids themselves."""
    own = columns(head, ids)
    if guidance is not None:
        other = columns(guidance[0], ids)
        guided = other + (guidance[1] + 1) * (own - other)
        own = torch.where(own == NEG_INF, own, guided)
    share = (own - logsumexp.unsqueeze(1)).exp().sum(1)
    others = (confidence / (1.0 - share).clamp(min=1e-30)).clamp(max=1.0)
    return torch.where(torch.isin(drawn, ids), 0.0, others).to(confidence.dtype)
