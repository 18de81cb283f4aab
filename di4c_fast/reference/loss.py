"""The loss, dense and literal: the truth that every other backend is held to.

Shapes: B batch, N student components, M teacher components, K draws, D positions, V vocabulary,
J target rows. Everything is in nats. Works in fp64 for fp64 logits, in fp32 otherwise, and is
differentiable by autograd. Impossible events are carried as boolean masks next to the values,
so that -inf columns and excluded rows give finite gradients.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads import Head
from ..loss.joint import loss_of
from ..loss.problem import Problem
from ..passes.base import Values
from .draw import draw_ref

NEG_INF = float("-inf")


def masked_logsumexp(values: Tensor, mask: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """logsumexp over the entries where `mask` holds, and whether there are any.

    -inf where there are none. Entries outside the mask receive exactly zero gradient, whatever
    their value.
    """
    log_total, peak, any_left = _log_total(values, mask, dim)
    result = log_total + peak.squeeze(dim)
    return result.masked_fill(~any_left, NEG_INF), any_left


def _log_total(values: Tensor, mask: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithm of the sum of exp(values - peak) over the mask, the peak (with `dim` of size
    1), and whether the mask holds anywhere; 0 and 0 where it does not."""
    any_left = mask.any(dim)
    peak = values.detach().masked_fill(~mask, NEG_INF).amax(dim, keepdim=True)
    peak = peak.masked_fill(~any_left.unsqueeze(dim), 0.0)
    shifted = torch.where(mask, values - peak, torch.zeros_like(values))
    total = torch.where(mask, shifted.exp(), torch.zeros_like(values)).sum(dim)
    return torch.where(any_left, total, torch.ones_like(total)).log(), peak, any_left


def log_softmax_ref(logits: Tensor, mask_id: int | None = None) -> Tensor:
    """log_softmax over the last dimension without the mask column; all -inf in excluded rows."""
    allowed = logits != NEG_INF
    if mask_id is not None:
        column = torch.arange(logits.shape[-1], device=logits.device) == mask_id
        allowed = allowed & ~column
    finite = torch.where(allowed, logits, torch.zeros_like(logits))
    # The peak first: a logsumexp of large logits would carry the rounding of their size.
    log_total, peak, _ = _log_total(finite, allowed, -1)
    return (finite - peak - log_total.unsqueeze(-1)).masked_fill(~allowed, NEG_INF)


def marginal_log_prob(log_prob: Tensor, log_weights: Tensor) -> Tensor:
    """m[b,d,v] = logsumexp_n(a[b,n] + l[b,n,d,v]); -inf where no component has probability."""
    weighted = log_prob + log_weights[:, :, None, None]
    return masked_logsumexp(weighted, weighted != NEG_INF, 1)[0]


def kl_divergence(target: Tensor, log_prob: Tensor) -> Tensor:
    """Sum over v of q log(q / p) with 0 log 0 = 0; +inf where q > 0 = p. (..., V) -> (...)

    NaN wherever one of them is NaN, even beside q = 0 or an infinite divergence.
    """
    possible = log_prob != NEG_INF
    needed = target > 0
    finite = torch.where(possible, log_prob, torch.zeros_like(log_prob))
    divergence = (torch.xlogy(target, target) - target * finite).sum(-1)
    impossible = (needed & ~possible).any(-1) & ~divergence.isnan()
    return torch.where(impossible, torch.full_like(divergence, float("inf")), divergence)


def target_log_probs(log_prob: Tensor, targets: Tensor) -> Tensor:
    """l[b,n,d,x[b,j,d]] for targets (B, J, D): (B, N, D, J)."""
    components = log_prob.shape[1]
    index = targets.transpose(1, 2).unsqueeze(1).expand(-1, components, -1, -1)
    return log_prob.gather(-1, index)


def joint_logsumexp(
    log_prob_targets: Tensor, offset: Tensor, log_weights: Tensor, counted: Tensor
) -> Tensor:
    """logsumexp_n(a_n + sum over counted d of (l[n,d,x_d] - offset[d])).

    log_prob_targets (B, N, D, J), offset and counted (B, D, J), log_weights (B, N) -> (B, J).
    """
    keep = counted.unsqueeze(1)  # [B, 1, D, J]
    finite = log_prob_targets != NEG_INF
    zeros = torch.zeros_like(log_prob_targets)
    values = torch.where(finite, log_prob_targets, zeros) - offset.unsqueeze(1)
    weighted = torch.where(keep, values, zeros).sum(2) + log_weights.unsqueeze(-1)  # [B, N, J]
    possible = (finite | ~keep).all(2) & (weighted != NEG_INF)
    return masked_logsumexp(weighted, possible, 1)[0]


def joint_log_prob(log_prob_targets: Tensor, log_weights: Tensor, active: Tensor) -> Tensor:
    """log sum_n e^{a_n} prod_d p[n,d,x_d] over active positions: (B, J)."""
    counted = active.unsqueeze(-1).expand(-1, -1, log_prob_targets.shape[-1])
    offset = torch.zeros_like(log_prob_targets[:, 0])
    return joint_logsumexp(log_prob_targets, offset, log_weights, counted)


def dimensional_correlation(
    log_prob_targets: Tensor, log_weights: Tensor, active: Tensor
) -> Tensor:
    """cor(x) = -logsumexp_n(a_n + sum_d (l[n,d,x_d] - m[d,x_d])): (B, J).

    A position whose target no component can produce is left out of the sum.
    """
    weighted = log_prob_targets + log_weights[:, :, None, None]
    marginal, possible = masked_logsumexp(weighted, weighted != NEG_INF, 1)  # [B, D, J]
    marginal = torch.where(possible, marginal, torch.zeros_like(marginal))
    return -joint_logsumexp(
        log_prob_targets, marginal, log_weights, active.unsqueeze(-1) & possible
    )


def row_values(
    log_prob: Tensor, targets: Tensor, log_weights: Tensor, active: Tensor, correlation: bool
) -> Tensor:
    """cor(x) or the joint log-likelihood of targets (B, J, D): (B, J).

    Without an active position it is 0 to the last bit, not the rounded logsumexp of the weights.
    """
    gathered = target_log_probs(log_prob, targets)
    score = dimensional_correlation if correlation else joint_log_prob
    value = score(gathered, log_weights, active)
    return torch.where(active.any(-1, keepdim=True), value, torch.zeros_like(value))


def head_log_prob(
    head: Head, dtype: torch.dtype, mask_id: int | None, counted: Tensor | None
) -> Tensor:
    """Log-probabilities of a head. Where `counted` (B, D) or (B, C, D) does not hold, logits may be
    anything, even NaN, and count as 0."""
    logits = head.logits().to(dtype)
    if counted is not None:
        by_row = counted if counted.ndim + 1 == logits.ndim else counted.unsqueeze(1)
        logits = torch.where(by_row.unsqueeze(-1), logits, 0.0)
    return log_softmax_ref(logits, mask_id)


def alive_positions(log_prob: Tensor, active: Tensor | None) -> Tensor:
    """Active positions at which some component allows some class: (B, D)."""
    alive = (log_prob != NEG_INF).any(-1).any(1)
    return alive if active is None else alive & active


def evaluate(problem: Problem) -> Values:
    """The values of a problem, dense; differentiable by autograd as often as one likes."""
    dtype, mask_id, log_weights = problem.dtype, problem.mask_id, problem.log_weights
    log_prob = head_log_prob(problem.student, dtype, mask_id, problem.active)  # [B, N, D, V]
    active = alive_positions(log_prob, problem.active)  # [B, D]
    tokens = problem.tokens
    q_consistency = None
    if problem.consistency is not None:
        q_consistency, tokens = consistency_targets(problem)
    rows = row_values(log_prob, tokens, log_weights, active, problem.correlation)
    rows = rows if problem.correlation else -rows

    def over_active(values: Tensor) -> Tensor:
        return torch.where(active, values, torch.zeros_like(values)).sum(-1)

    zeros = log_weights.detach().new_zeros(rows.shape[0])
    teacher_kl, consistency_kl, component = zeros, zeros, zeros
    if problem.teacher is not None:
        teacher = head_log_prob(problem.teacher, dtype, mask_id, problem.active).exp()
        if teacher.ndim == 4:
            teacher = teacher.mean(1)  # [B, D, V]
    if problem.marginal:
        m = marginal_log_prob(log_prob, log_weights)  # [B, D, V]
        teacher_kl = over_active(kl_divergence(teacher, m))
        if q_consistency is not None:
            consistency_kl = over_active(kl_divergence(q_consistency, m))
    if problem.component:
        divergence = kl_divergence(teacher.unsqueeze(1), log_prob)  # [B, N, D]
        # A component of weight 0 is as good as absent, even where its divergence is infinite.
        counted = active.unsqueeze(1) & (log_weights != NEG_INF).unsqueeze(-1)
        infinite = torch.isinf(divergence)
        finite = torch.where(counted & ~infinite, divergence, torch.zeros_like(divergence)).sum(-1)
        component = (log_weights.exp() * finite).sum(1)
        # An infinite divergence has no gradient; NaN stays NaN.
        beyond = (counted & infinite).any(-1).any(-1) & ~component.isnan()
        component = component.masked_fill(beyond, float("inf"))
    terms = (component, teacher_kl, consistency_kl)
    loss = zeros
    if problem.data_weight is not None:
        loss = loss_of(problem, rows, teacher_kl, consistency_kl, component)
    return Values(rows, loss, *(term.detach() for term in terms))


def with_draws(problem: Problem) -> Problem:
    """The problem with its target rows drawn."""
    if problem.seed is None:
        return problem
    _, tokens = consistency_targets(problem)
    return dataclasses.replace(problem, tokens=tokens, seed=None)


def consistency_targets(problem: Problem) -> tuple[Tensor, Tensor]:
    """q_u (B, D, V), the mean over draws of the student at x_u, and all target rows (B, J, D).

    A position that draw k has revealed counts as a one-hot at its token.
    """
    assert problem.consistency is not None
    tokens = problem.tokens
    counted, revealed = problem.active, None
    if problem.xu is not None:
        assert problem.mask_id is not None
        revealed = problem.xu.ne(problem.mask_id)
        counted = ~revealed if counted is None else counted.unsqueeze(1) & ~revealed
    with torch.no_grad():
        log_prob = head_log_prob(problem.consistency, problem.dtype, problem.mask_id, counted)
        prob = log_prob.exp()  # [B, K, D, V]
        given = problem.targets - prob.shape[1]
        draws = tokens[:, given:]
        if problem.seed is not None:
            draws = draw_ref(log_prob, problem.seed)
        if revealed is not None:
            assert problem.xu is not None
            one_hot = F.one_hot(problem.xu, prob.shape[-1]).to(prob.dtype)
            prob = torch.where(revealed.unsqueeze(-1), one_hot, prob)
            draws = torch.where(revealed, problem.xu, draws)
        return prob.mean(1), torch.cat([tokens[:, :given], draws], 1)
