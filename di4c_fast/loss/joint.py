"""The joint terms: what couples the positions. Plain tensor operations for every backend.

Shapes: B examples, N components, D positions, J target rows, A slots (B·D, or the active ones where
their number is known on the host).

With l[d,j,n] the log-probability of target j at position d, m[d,j] = logsumexp_n(a_n + l[d,j,n]),

    cor(x_j)   = -logsumexp_n(a_n + sum_d (l[d,j,n] - m[d,j]))       (m = 0 without correlation)
    w[j,n]     = softmax_n of the same
    rho[d,j,n] = exp(a_n + l[d,j,n] - m[d,j])                         (0 without correlation)

    d cor(x_j) / d l[d,j,n] = rho[d,j,n] - w[j,n]      d cor(x_j) / d a_n = sum_d rho - w

Sums over positions are in fp64: a joint likelihood is the difference of sums of size thousands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..passes.base import Joint, Places

NEG_INF = float("-inf")


def joint_terms(
    log_prob: Tensor,
    alive: Tensor,
    log_weights: Tensor,
    places: Places,
    correlation: bool,
    out: Joint,
) -> Tensor:
    """cor(x_j), or the negative log-likelihood, (B, J) in fp64; `out` is filled.

    log_prob (A, J, N), alive (A,), log_weights (B, N).
    """
    dtype = log_prob.dtype
    counted = alive.unsqueeze(-1).expand(log_prob.shape[:2])
    summand = log_prob
    if correlation:
        weighted = log_prob + places.spread(log_weights).unsqueeze(1)
        # A target that no component can produce is left out.
        counted = counted & (weighted.amax(-1) != NEG_INF)
        share = weighted.log_softmax(-1)
        # l - m = log_softmax - a; a component of weight 0 stays at -inf.
        present = torch.where(log_weights == NEG_INF, 0.0, log_weights)
        summand = share - places.spread(present).unsqueeze(1)
    summand = torch.where(counted.unsqueeze(-1), summand, 0.0)
    joint = places.sum(summand) + log_weights.unsqueeze(1)  # [B, J, N]
    value = -joint.logsumexp(-1)
    occupied = places.sum(alive) > 0  # [B]
    # Without a position that counts the value is 0 to the last bit, not a rounded logsumexp; it
    # then has no gradient, and neither has a row that is impossible.
    value = torch.where(occupied.unsqueeze(-1), value, 0.0)
    defined = occupied.unsqueeze(-1) & (value != -NEG_INF)
    weights = torch.where(defined.unsqueeze(-1), joint.softmax(-1), 0.0).to(dtype)
    difference = -places.spread(weights)
    if correlation:
        difference += share.exp_()
    counted = counted & places.spread(defined)
    out.difference.copy_(torch.where(counted.unsqueeze(-1), difference, 0.0))
    out.weights.copy_(weights)
    out.counted.copy_(places.sum(counted))
    return value
