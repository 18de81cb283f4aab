"""The pieces of the torch backend's sweeps: row statistics, joint terms, marginal terms.

Shapes: B batch, N components, D positions, V vocabulary, J target rows, A active positions,
P positions of a chunk. Everything is in nats. The equations stand in `streaming.py`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .streaming_sources import Chunk, Source

NEG_INF = float("-inf")


@dataclasses.dataclass
class Statistics:
    """What the first sweep leaves of the student's active rows."""

    b: Tensor  # [A] example of each active position
    d: Tensor  # [A]
    log_prob: Tensor  # [A, N, J] of the targets, -inf where impossible
    # The two parts of the logsumexp, [A, N]: added up, they would carry the rounding of large
    # logits, which a logit minus the first and then the second does not.
    peak: Tensor  # the largest logit, 0 for a row without a class
    log_total: Tensor  # log sum exp(logit - peak), -inf for a row without a class

    @classmethod
    def empty(cls, b: Tensor, d: Tensor, components: int, targets: int, dtype: torch.dtype):
        rows, device = b.shape[0], b.device
        return cls(
            b,
            d,
            torch.empty(rows, components, targets, dtype=dtype, device=device),
            torch.empty(rows, components, dtype=dtype, device=device),
            torch.empty(rows, components, dtype=dtype, device=device),
        )

    def put(self, chunk: Chunk, picked: Tensor, peak: Tensor, log_total: Tensor) -> None:
        """Record the shifted target logits (P, N, J) and the parts (P, N) of the logsumexp."""
        self.peak[chunk.part] = peak
        self.log_total[chunk.part] = log_total
        self.log_prob[chunk.part] = picked.sub_(finite_or_zero(log_total).unsqueeze(-1))

    def normalise_(self, chunk: Chunk, logits: Tensor) -> Tensor:
        """Turn logits (P, N, ...) of a chunk into log-probabilities, in place."""
        logits.sub_(self.peak[chunk.part].unsqueeze(-1))
        return logits.sub_(finite_or_zero(self.log_total[chunk.part]).unsqueeze(-1))

    @property
    def alive(self) -> Tensor:
        """Positions at which some component allows some class: (A,)."""
        return (self.log_total > NEG_INF).any(1)

    def occupied(self, batch: int) -> Tensor:
        """Examples with a position that counts: (B,)."""
        counts = self.peak.new_zeros(batch).index_add_(0, self.b, self.alive.to(self.peak.dtype))
        return counts > 0


def finite_or_zero(values: Tensor) -> Tensor:
    return torch.where(values == NEG_INF, 0.0, values)


def active_positions(
    active: Tensor | None, batch: int, positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Example and position of every active position, both (A,). Reads `active` on the host."""
    if active is None:
        index = torch.arange(batch * positions, device=device)
        return index // max(positions, 1), index % max(positions, 1)
    b, d = active.nonzero(as_tuple=True)
    return b, d


def load_logits(source: Source, chunk: Chunk, mask_id: int | None) -> Tensor:
    logits = source.load(chunk)
    if mask_id is not None:
        logits[..., mask_id] = NEG_INF
    return logits


def target_index(targets: Tensor, chunk: Chunk, components: int) -> Tensor:
    """Targets (B, J, D) as an index (P, N, J) into the chunk's logits."""
    return targets[chunk.b, :, chunk.d].unsqueeze(1).expand(-1, components, -1)


def exponentials_(shifted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite shifted logits (..., V), at most 0, with their exponentials.

    Returns these, 1 / their sum (0 for a row without a class) and the log of the sum, so that
    the softmax is the first times the second.
    """
    values = shifted.exp_()
    total = values.sum(-1)
    inverse = torch.where(total > 0, 1.0 / total, 0.0)
    return values, inverse, total.log()


def masked_logsumexp(values: Tensor, dim: int) -> Tensor:
    """logsumexp that is -inf, not NaN, where every entry is -inf."""
    peak = finite_or_zero(values.amax(dim, keepdim=True))
    return (values - peak).exp().sum(dim).log() + peak.squeeze(dim)


@dataclasses.dataclass
class Joint:
    """Joint quantities of the J target rows."""

    value: Tensor  # [B, J] the correlation, or the negative log-likelihood
    weights: Tensor  # [B, N, J] posterior probability of each component given the row
    local: Tensor | None  # [A, N, J] responsibilities at the targets; None without marginals
    counted: Tensor  # [A, J] False where the target is left out


def joint_terms(stats: Statistics, log_weights: Tensor, correlation: bool) -> Joint:
    batch = log_weights.shape[0]
    log_prob = stats.log_prob
    alive = stats.alive.unsqueeze(-1)  # [A, 1]
    if correlation:
        weighted = log_prob + log_weights[stats.b].unsqueeze(-1)  # [A, N, J]
        marginal = masked_logsumexp(weighted, 1)  # [A, J]
        counted = (marginal > NEG_INF) & alive
        offset = torch.where(counted, marginal, 0.0).unsqueeze(1)
        local = torch.where(counted.unsqueeze(1), (weighted - offset).exp(), 0.0)
        summand = log_prob - offset
    else:
        counted = alive.expand(-1, log_prob.shape[-1])
        local = None
        summand = log_prob
    summand = torch.where(counted.unsqueeze(1), summand, 0.0)
    joint = summand.new_zeros(batch, *summand.shape[1:]).index_add_(0, stats.b, summand)
    joint = joint + log_weights.unsqueeze(-1)  # [B, N, J]
    total = masked_logsumexp(joint, 1)  # [B, J]
    weights = (joint - finite_or_zero(total).unsqueeze(1)).exp()
    # Without an active position the value is 0 to the last bit, not a rounded logsumexp, and so
    # is its gradient.
    occupied = stats.occupied(batch).unsqueeze(-1)
    value = torch.where(occupied, -total, 0.0)
    weights = torch.where(occupied.unsqueeze(-1), weights, 0.0)
    return Joint(value, weights, local, counted)


def kappa_coefficients(joint: Joint, b: Tensor, alpha: Tensor) -> Tensor:
    """kappa (A, N, J) for row weights alpha (B, J)."""
    difference = -joint.weights[b]
    if joint.local is not None:
        difference = difference + joint.local
    return torch.where(joint.counted.unsqueeze(1), difference * alpha[b].unsqueeze(1), 0.0)


def joint_grad_log_weights(joint: Joint, b: Tensor, alpha: Tensor) -> Tensor:
    """dL/da (B, N) of sum_j alpha_j value_j."""
    gradient = -(joint.weights * alpha.unsqueeze(1)).sum(-1)
    if joint.local is not None:
        gradient.index_add_(0, b, (joint.local * alpha[b].unsqueeze(1)).sum(-1))
    return gradient


@dataclasses.dataclass
class Marginal:
    """What the marginal terms need of one chunk, for the distributions q_T and q of `Wanted`."""

    log_marginal: Tensor  # [P, V] m, at least where q or q_T is positive
    mass: Tensor  # [P, N] R_n
    divergence: Tensor | None  # [P, N] KL(q_T || p_n), where the component term is asked for
    ratio: Tensor | None  # [P, V] q / exp(m); None if it was computed from logs


def marginal_from_values(
    values: Tensor,
    inverse: Tensor,
    weights: Tensor,
    wanted: Tensor,
    teacher: Tensor,
    reported: Tensor | None,
    want_component: bool,
) -> Marginal | None:
    """The chunk from exponentials (P, N, V); None where they underflow and logs are needed.

    inverse (P, N) normalises the exponentials; weights (P, N) are those of the components;
    reported (P, V) is positive where the marginal is asked for beside the support of `wanted`.
    """
    tiny = torch.finfo(values.dtype).tiny / torch.finfo(values.dtype).eps
    scaled = weights * inverse
    mixture = mixture_of(values, scaled)  # e^m, [P, V]
    needed = wanted if reported is None else wanted + reported
    if bool(((mixture <= tiny) & (needed > 0)).any()):
        return None
    ratio = wanted / mixture
    mass = torch.bmm(values, ratio.unsqueeze(-1)).squeeze(-1) * scaled
    divergence = None
    if want_component:
        if bool(((values.amin(1) < tiny) & (teacher > 0)).any()):
            return None
        cross = torch.xlogy(teacher.unsqueeze(1), values).sum(-1)  # the peak has value 1
        divergence = negative_entropy(teacher).unsqueeze(-1) - cross
        divergence -= teacher.sum(-1, keepdim=True) * torch.where(inverse > 0, inverse.log(), 0.0)
    return Marginal(mixture.log(), mass, divergence, ratio)


def mixture_of(values: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n values_nv, (P, N, V) -> (P, V), at least a number far above underflow."""
    info = torch.finfo(values.dtype)
    return torch.bmm(weights.unsqueeze(1), values).squeeze(1).clamp_min_(info.tiny / info.eps)


def marginal_from_logs(
    log_prob: Tensor, log_weights: Tensor, wanted: Tensor, teacher: Tensor, want_component: bool
) -> Marginal:
    """The chunk from log-probabilities (P, N, V), for every range of values."""
    log_marginal, share = shares(log_prob, log_weights)
    # Not a matrix product: with TF32 allowed it would round to 10 bits.
    mass = share.mul_(wanted.unsqueeze(1)).sum(-1)
    divergence = None
    if want_component:
        divergence = kl_divergence(teacher.unsqueeze(1), log_prob)
    return Marginal(log_marginal, mass, divergence, None)


def shares(log_prob: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The marginal m (P, V) and the responsibilities r (P, N, V)."""
    weighted = log_prob + log_weights.unsqueeze(-1)
    log_marginal = masked_logsumexp(weighted, 1)
    share = weighted.sub_(finite_or_zero(log_marginal).unsqueeze(1)).exp_()
    return log_marginal, share


def negative_entropy(prob: Tensor) -> Tensor:
    """sum_v q log q, (..., V) -> (...), with 0 log 0 = 0."""
    return (prob * prob.clamp_min(torch.finfo(prob.dtype).tiny).log()).sum(-1)


def kl_divergence(target: Tensor, log_prob: Tensor) -> Tensor:
    """sum_v q (log q - log p), (..., V) -> (...), with 0 log 0 = 0; +inf where q > 0 = p."""
    cross = torch.where(target > 0, target * log_prob, 0.0).sum(-1)
    return negative_entropy(target) - cross
