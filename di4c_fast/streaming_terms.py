"""The pieces of the torch backend's two sweeps: row statistics, joint terms, marginal terms.

Shapes: B batch, N components, D positions, V vocabulary, J target rows, A active positions,
P positions of a chunk. Everything is in nats. The equations stand in `streaming.py`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .streaming_sources import Chunk, Source, chunks

NEG_INF = float("-inf")


@dataclasses.dataclass
class Statistics:
    """What the first sweep leaves of the student."""

    b: Tensor  # [A] example of each active position
    d: Tensor  # [A]
    log_prob: Tensor  # [A, N, J] of the targets, -inf where impossible
    lse: Tensor  # [A, N]


def active_positions(active: Tensor | None, batch: int, positions: int, device: torch.device):
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


def softmax_and_lse(logits: Tensor) -> tuple[Tensor, Tensor]:
    """softmax and logsumexp over the last dimension; 0 and -inf for rows without a class."""
    prob = torch.softmax(logits, -1)
    peak = logits.amax(-1)
    # The probability of the largest logit is at least 1/V, so its logarithm is exact enough.
    lse = peak - prob.amax(-1).log()
    dead = peak == NEG_INF
    if dead.device.type != "cpu" or bool(dead.any()):  # a look is cheaper than a pass
        prob.masked_fill_(dead.unsqueeze(-1), 0.0)
    return prob, torch.where(dead, peak, lse)


def first_sweep(
    source: Source,
    b: Tensor,
    d: Tensor,
    targets: Tensor,
    mask_id: int | None,
    keep: bool,
    chunk_size: int,
) -> Statistics:
    """Read every active row once. targets: (B, J, D)."""
    rows, components = b.shape[0], source.components
    log_prob = torch.empty(rows, components, targets.shape[1], dtype=source.dtype, device=b.device)
    lse = torch.empty(rows, components, dtype=source.dtype, device=b.device)
    for chunk in chunks(b, d, chunk_size):
        part = slice(chunk.start, chunk.start + chunk.size)
        logits = load_logits(source, chunk, mask_id)
        index = targets[chunk.b, :, chunk.d].unsqueeze(1).expand(-1, components, -1)
        picked = logits.gather(-1, index)
        if keep:
            prob, lse[part] = softmax_and_lse(logits)
            source.keep(chunk, prob)
        else:
            lse[part] = torch.logsumexp(logits, -1)
        alive = lse[part] > NEG_INF
        picked -= torch.where(alive, lse[part], 0.0).unsqueeze(-1)
        log_prob[part] = picked
    return Statistics(b, d, log_prob, lse)


def masked_logsumexp(values: Tensor, dim: int) -> Tensor:
    """logsumexp that is -inf, not NaN, where every entry is -inf."""
    peak = values.amax(dim, keepdim=True)
    peak = torch.where(peak == NEG_INF, 0.0, peak)
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
    alive = (stats.lse > NEG_INF).any(1, keepdim=True)  # [A, 1]
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
    finite = torch.where(total == NEG_INF, 0.0, total)
    return Joint(-total, (joint - finite.unsqueeze(1)).exp(), local, counted)


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
    """What one chunk yields for given distributions q_T and q = weighted sum of q_T and q_u."""

    log_marginal: Tensor  # [P, V]
    mass: Tensor  # [P, N] R_n
    divergence: Tensor | None  # [P, N] KL(q_T || p_n), where the component term is asked for
    gradient: Tensor | None  # [P, N, V] everything but the one-hot part of dL/dz


def marginal_from_probs(
    prob: Tensor,
    weights: Tensor,
    wanted: Tensor,
    teacher: Tensor,
    row_term: Tensor | None,
    component_weight: Tensor | None,
    want_component: bool,
) -> Marginal | None:
    """The chunk from probabilities (P, N, V); None where they underflow and logs are needed.

    `row_term` (P, N) is what every p_nv is multiplied with beside R_n; None: no gradient.
    """
    tiny = torch.finfo(prob.dtype).tiny / torch.finfo(prob.dtype).eps
    mixture = torch.bmm(weights.unsqueeze(1), prob).squeeze(1)  # [P, V]
    if bool(((mixture < tiny) & ((wanted > 0) | (teacher > 0))).any()):
        return None
    ratio = wanted / mixture.clamp_min(tiny)
    mass = torch.bmm(prob, ratio.unsqueeze(-1)).squeeze(-1) * weights
    divergence = None
    if want_component:
        divergence = -torch.xlogy(teacher.unsqueeze(1), prob).sum(-1)
        if not bool(torch.isfinite(divergence).all()):
            return None
        divergence += torch.xlogy(teacher, teacher).sum(-1, keepdim=True)
    gradient = None
    if row_term is not None:
        # row_n - w_n ratio_v as a product of rank 2: one pass, whatever the weights.
        rows = torch.stack([mass + row_term, -weights], dim=-1)  # [P, N, 2]
        columns = torch.stack([torch.ones_like(ratio), ratio], dim=1)  # [P, 2, V]
        gradient = torch.bmm(rows, columns).mul_(prob)
        if component_weight is not None:
            factor = (component_weight * weights).unsqueeze(-1)
            gradient.addcmul_(factor, teacher.unsqueeze(1), value=-1.0)
    return Marginal(mixture.log(), mass, divergence, gradient)


def marginal_from_logs(
    log_prob: Tensor,
    log_weights: Tensor,
    wanted: Tensor,
    teacher: Tensor,
    row_term: Tensor | None,
    component_weight: Tensor | None,
    want_component: bool,
) -> Marginal:
    """The chunk from log-probabilities (P, N, V), for every range of values."""
    weights = log_weights.exp()
    weighted = log_prob + log_weights.unsqueeze(-1)
    marginal = masked_logsumexp(weighted, 1)  # [P, V]
    finite = torch.where(marginal == NEG_INF, 0.0, marginal)
    share = (weighted - finite.unsqueeze(1)).exp()  # r, [P, N, V]
    mass = torch.bmm(share, wanted.unsqueeze(-1)).squeeze(-1)
    divergence = None
    if want_component:
        divergence = kl_divergence(teacher.unsqueeze(1), log_prob)
    gradient = None
    if row_term is not None:
        gradient = log_prob.exp() * (mass + row_term).unsqueeze(-1)
        gradient -= share.mul_(wanted.unsqueeze(1))
        if component_weight is not None:
            factor = (component_weight * weights).unsqueeze(-1)
            gradient.addcmul_(factor, teacher.unsqueeze(1), value=-1.0)
    return Marginal(marginal, mass, divergence, gradient)


def kl_divergence(target: Tensor, log_prob: Tensor) -> Tensor:
    """sum_v q (log q - log p), (..., V) -> (...), with 0 log 0 = 0; +inf where q > 0 = p."""
    cross = torch.where(target > 0, target * log_prob, 0.0)
    return (torch.xlogy(target, target) - cross).sum(-1)
