"""The joint terms: what couples the positions. Plain tensor operations for every backend.

Shapes: B examples, N components, D positions, J target rows, A = B·D positions by slot.

With l[d,j,n] the log-probability of target j at position d, m[d,j] = logsumexp_n(a_n + l[d,j,n]),

    cor(x_j)  = -logsumexp_n(a_n + sum_d (l[d,j,n] - m[d,j]))        (m = 0 without correlation)
    w[j,n]    = softmax_n of the same
    rho[d,j,n] = exp(a_n + l[d,j,n] - m[d,j])                          (0 without correlation)

    d cor(x_j) / d l[d,j,n] = rho[d,j,n] - w[j,n]      d cor(x_j) / d a_n = sum_d rho - w

Sums over positions are in fp64: a joint likelihood is the difference of sums of size thousands.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

NEG_INF = float("-inf")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where every slot lies, and which slots count."""

    sizes: tuple[int, int]  # B, D
    rows: (
        Tensor | None
    )  # (A,) int64 position of each slot, active ones first; None: slot = position
    count: Tensor | None  # () int64, how many are active; None: all

    def examples(self, device: torch.device) -> Tensor:
        """(A,) the example of every slot."""
        batch, positions = self.sizes
        index = self.rows
        if index is None:
            index = torch.arange(batch * positions, device=device)
        return index // max(positions, 1)

    def active(self, device: torch.device) -> Tensor:
        """(A,) bool."""
        batch, positions = self.sizes
        slots = torch.arange(batch * positions, device=device)
        return slots >= 0 if self.count is None else slots < self.count

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the positions of every example, in fp64: (A, ...) -> (B, ...)."""
        batch, positions = self.sizes
        if self.rows is not None:  # back into the order of positions, so that sums repeat
            values = torch.empty_like(values).index_copy_(0, self.rows, values)
        return values.reshape(batch, positions, *values.shape[1:]).sum(1, dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Joint:
    value: Tensor  # (B, J) cor(x_j), or the negative log-likelihood; fp64
    weights: Tensor  # (B, J, N) w, fp64
    local: Tensor | None  # (A, J, N) rho; None without correlation
    counted: Tensor  # (A, J) False where the target is left out
    alive: Tensor  # (A,) active positions at which the student allows some class


def log_sum(values: Tensor) -> Tensor:
    """logsumexp over the last dimension that is -inf, not NaN, where every entry is -inf."""
    peak = values.amax(-1, keepdim=True)
    peak = torch.where(peak == NEG_INF, 0.0, peak)
    return (values - peak).exp().sum(-1).log() + peak.squeeze(-1)


def joint_terms(
    log_prob: Tensor, total: Tensor, log_weights: Tensor, places: Places, correlation: bool
) -> Joint:
    """log_prob (A, J, N), total (A, N) of the student's row sums, log_weights (B, N)."""
    device = log_prob.device
    b = places.examples(device)
    alive = places.active(device) & (total != 0).any(-1)
    local = None
    if correlation:
        joint = log_prob + log_weights[b].unsqueeze(1)
        marginal = log_sum(joint)  # [A, J]
        counted = (marginal != NEG_INF) & alive.unsqueeze(-1)
        offset = torch.where(counted, marginal, 0.0).unsqueeze(-1)
        local = torch.where(counted.unsqueeze(-1), (joint - offset).exp(), 0.0)
        summand = log_prob - offset
    else:
        counted = alive.unsqueeze(-1).expand(-1, log_prob.shape[1])
        summand = log_prob
    joint = places.sum(torch.where(counted.unsqueeze(-1), summand, 0.0))
    joint = joint + log_weights.unsqueeze(1)  # [B, J, N] fp64
    total_joint = log_sum(joint)
    finite = torch.where(total_joint == NEG_INF, 0.0, total_joint)
    weights = (joint - finite.unsqueeze(-1)).exp()
    # Without a position that counts the value is 0 to the last bit, and so is its gradient.
    occupied = (places.sum(alive) > 0).unsqueeze(-1)
    value = torch.where(occupied, -total_joint, 0.0)
    return Joint(value, torch.where(occupied.unsqueeze(-1), weights, 0.0), local, counted, alive)


def kappa_coefficients(joint: Joint, alpha: Tensor, examples: Tensor, dtype: torch.dtype) -> Tensor:
    """kappa[d,j,n] = alpha_j (rho - w), (A, J, N), for upstream gradients alpha (B, J)."""
    difference = -joint.weights.to(dtype)[examples]
    if joint.local is not None:
        difference = difference + joint.local
    difference = difference * alpha[examples].unsqueeze(-1)
    return torch.where(joint.counted.unsqueeze(-1), difference, 0.0)
