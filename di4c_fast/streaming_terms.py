"""The pieces of the torch backend's sweeps: row statistics, joint terms, marginal terms.

Shapes: B batch, N components, D positions, V vocabulary, J target rows, A active positions,
P positions of a chunk. Everything is in nats. The equations stand in `streaming.py`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .streaming_sample import block_sums
from .streaming_sources import Chunk, Source

NEG_INF = float("-inf")
# Between these bounds sums of exponentials of logits that were not shifted, and their inverses, are
# far from the ends of fp32; a class 60 nats below the largest is far from them, too.
UNSHIFTED = (1e-9, 1e17)


@dataclasses.dataclass
class Statistics:
    """What the first sweep leaves of the student's active rows."""

    b: Tensor  # [A] example of each active position
    d: Tensor  # [A]
    log_prob: Tensor  # [A, N, J] of the targets, -inf where impossible
    # The two parts of the logsumexp, [A, N]: added up, they would carry the rounding of large
    # logits, which a logit minus the first and then the second does not.
    shift: Tensor  # the largest logit, or 0
    total: Tensor  # sum exp(logit - shift), 0 for a row without a class

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

    def put(self, chunk: Chunk, loaded: Exponentials) -> None:
        """Record a chunk: its targets and the parts of its logsumexp."""
        assert loaded.log_prob is not None
        self.log_prob[chunk.part] = loaded.log_prob
        self.put_total(chunk, loaded)

    def forget_targets(self) -> None:
        """Free what only the joint terms need."""
        self.log_prob = self.log_prob.new_empty(0)

    def put_total(self, chunk: Chunk, loaded: Exponentials) -> None:
        self.shift[chunk.part] = loaded.shift
        self.total[chunk.part] = loaded.total

    def normalise_(self, chunk: Chunk, logits: Tensor) -> Tensor:
        """Turn logits (P, N, ...) of a chunk into log-probabilities, in place."""
        logits.sub_(self.shift[chunk.part].unsqueeze(-1))
        return logits.sub_(finite_or_zero(self.total[chunk.part].log()).unsqueeze(-1))

    @property
    def alive(self) -> Tensor:
        """Positions at which some component allows some class: (A,)."""
        return (self.total > 0).any(1)

    def occupied(self, batch: int) -> Tensor:
        """Examples with a position that counts: (B,)."""
        counts = self.total.new_zeros(batch).index_add_(0, self.b, self.alive.to(self.total.dtype))
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


def target_index(rows: Tensor, chunk: Chunk, components: int) -> Tensor:
    """Targets (A, J) of all active positions as an index (P, N, J) into the chunk's logits."""
    return rows[chunk.part].unsqueeze(1).expand(-1, components, -1)


@dataclasses.dataclass
class Exponentials:
    """A chunk as exponentials: the softmax is `values * inverse`."""

    values: Tensor  # [P, N, V] exp(logit - shift)
    shift: Tensor | float  # [P, N], the largest logit, or 0.0 if none was needed
    total: Tensor  # [P, N] sum of the values, 0 for a row without a class
    inverse: Tensor  # [P, N] 1 / total, 0 for a row without a class
    log_prob: Tensor | None = None  # [P, N, J] at the index that was given
    sums: Tensor | None = None  # [P * N, G] sums over blocks, if asked for

    @property
    def shifted(self) -> bool:
        """False only if no logit needed a shift; then no row is without a class either."""
        return isinstance(self.shift, Tensor)


def exponentials(
    source: Source,
    chunk: Chunk,
    mask_id: int | None,
    index: Tensor | None = None,
    *,
    blocks: bool = False,
    shift: bool = False,
) -> Exponentials:
    """Load a chunk as exponentials; index (P, N, J) names classes whose log-probability is wanted.

    Logits of a usual size need no shift. Whether they did shows in the result, which costs less
    than a pass for their maximum. `shift=True` shifts them in any case.
    """

    def total_of(values: Tensor) -> tuple[Tensor, Tensor | None]:
        if not blocks:
            return values.sum(-1), None
        sums = block_sums(values.flatten(0, 1))
        return sums.sum(-1).view(values.shape[:2]), sums

    values = None if shift else source.load_exponentials(chunk, mask_id)
    if values is not None:
        total, sums = total_of(values)
        if _within(total, *UNSHIFTED):
            inverse, log_prob = total.reciprocal(), None
            picked = None if index is None else values.gather(-1, index)
            if picked is not None and _within(picked, smallest(picked.dtype)):
                # Not log(value) - log(total), which rounds as large logits do.
                log_prob = picked.mul_(inverse.unsqueeze(-1)).log_()
            if index is None or log_prob is not None:
                return Exponentials(values, 0.0, total, inverse, log_prob, sums)
    shifted, peak = source.load_shifted(chunk, mask_id)
    picked = None if index is None else shifted.gather(-1, index)
    values = shifted.exp_()
    total, sums = total_of(values)
    inverse = torch.where(total > 0, 1.0 / total, 0.0)
    if picked is not None:
        picked.sub_(finite_or_zero(total.log()).unsqueeze(-1))
    return Exponentials(values, peak, total, inverse, picked, sums)


def _within(values: Tensor, low: float, high: float = math.inf) -> bool:
    """Whether all values lie between the bounds; False for NaN."""
    if not values.numel():
        return True
    least, most = values.aminmax()
    return low < float(least) and float(most) < high


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
    """What the marginal terms need of one chunk."""

    log_marginal: Tensor  # [P, V] m, finite wherever q_T, q_u and q are zero
    mass: Tensor  # [P, N] R_n
    divergence: Tensor | None  # [P, N] KL(q_T || p_n), where the component term is asked for
    ratio: Tensor | None  # [P, V] q / exp(m); None if it was computed from logs


def marginal_from_values(
    values: Tensor,
    inverse: Tensor,
    weights: Tensor,
    wanted: Tensor,
    teacher: Tensor,
    reported: list[Tensor],
    want_component: bool,
    mask_id: int | None,
) -> Marginal | None:
    """The chunk from exponentials (P, N, V); None where they underflow and logs are needed.

    inverse (P, N) normalises the exponentials; weights (P, N) are those of the components;
    reported: distributions (P, V) on whose support the marginal is needed beside that of `wanted`.
    """
    tiny = smallest(values.dtype)
    scaled = weights * inverse
    mixture = mixture_of(values, scaled)  # e^m, [P, V]
    if mask_id is not None:  # nobody asks for it
        mixture[:, mask_id].fill_(1.0)
    # Most often nothing is small. What is may be a class that nobody allows or asks for.
    if not float(mixture.amin()) > tiny:
        low = mixture <= tiny
        if any(bool((low & (asked > 0)).any()) for asked in (wanted, *reported)):
            return None
        mixture.clamp_min_(tiny)
    ratio = wanted / mixture
    mass = torch.bmm(ratio.unsqueeze(1), values.transpose(1, 2)).squeeze(1) * scaled
    divergence = None
    if want_component:
        if bool(((values.amin(1) < tiny) & (teacher > 0)).any()):
            return None
        cross = torch.xlogy(teacher.unsqueeze(1), values).sum(-1)
        divergence = negative_entropy(teacher).unsqueeze(-1) - cross
        divergence -= teacher.sum(-1, keepdim=True) * torch.where(inverse > 0, inverse.log(), 0.0)
    return Marginal(mixture.log_(), mass, divergence, ratio)


def smallest(dtype: torch.dtype) -> float:
    """A number from which on nothing is lost to denormal numbers."""
    info = torch.finfo(dtype)
    return info.tiny / info.eps


def mixture_of(values: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n values_nv, (P, N, V) -> (P, V)."""
    return torch.bmm(weights.unsqueeze(1), values).squeeze(1)


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
    difference = target.clamp_min(torch.finfo(target.dtype).tiny).log_() - log_prob
    return torch.where(target > 0, target * difference, 0.0).sum(-1)


def kl_divergence_finite(target: Tensor, log_prob: Tensor) -> Tensor:
    """The same for log-probabilities that are finite where the target is 0."""
    difference = target.clamp_min(torch.finfo(target.dtype).tiny).log_().sub_(log_prob)
    return torch.linalg.vecdot(target, difference)
