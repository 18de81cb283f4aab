"""The joint terms: what couples the positions. Plain tensor operations for every backend.

Shapes: B examples, N components, D positions, J target rows, A slots (B·D, or the active ones where
their number is known on the host).

With l[d,j,n] the log-probability of target j at position d, m[d,j] = logsumexp_n(a_n + l[d,j,n]),

    cor(x_j)   = -logsumexp_n(a_n + sum_d (l[d,j,n] - m[d,j]))       (m = 0 without correlation)
    w[j,n]     = softmax_n of the same
    rho[d,j,n] = exp(a_n + l[d,j,n] - m[d,j])                         (0 without correlation)

    d cor(x_j) / d l[d,j,n] = rho[d,j,n] - w[j,n]      d cor(x_j) / d a_n = sum_d rho - w

The loss weighs the first target row with data_weight, each of the K others with consistency_weight
/ K. Sums over positions are in fp64: a joint likelihood is the difference of sums of size
thousands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..passes.base import Factors, Joint, Mixture, Places, Swept, Values

if TYPE_CHECKING:
    from .problem import Problem

NEG_INF = float("-inf")


def joint_terms(swept: Swept, out: Joint) -> Values:
    """The values from the statistics of all positions; `out` is filled."""
    statistics, mixture, places = swept
    part = slice(0, places.slots)
    alive = places.alive(statistics.student.total[part])
    rows = _joint_rows(statistics.log_prob[part], alive, mixture, places, out)

    def total(values: Tensor) -> Tensor:
        values = values[part] + _broken(swept).sum(-1)
        return places.sum(torch.where(alive, values, 0.0)).to(rows.dtype)

    def nothing() -> Tensor:  # an op returns no tensor twice
        return mixture.log_weights.new_zeros(len(mixture.log_weights))

    teacher_kl, consistency_kl, component = nothing(), nothing(), nothing()
    if mixture.marginal:
        teacher_kl = total(statistics.teacher_kl)
        if statistics.consistency is not None:
            consistency_kl = total(statistics.consistency_kl)
    if mixture.component:
        sums = places.sum(counted_divergence(swept))
        share = mixture.log_weights.exp() * sums
        # However small its weight, a component that excludes a class of q_T is infinitely far.
        component = torch.where(sums == float("inf"), sums, share).sum(-1).to(rows.dtype)
    loss = nothing()
    if mixture.data_weight is not None:
        loss = loss_of(mixture, rows, teacher_kl, consistency_kl, component)
    return Values(rows, loss, component, teacher_kl, consistency_kl)


def _joint_rows(
    log_prob: Tensor, alive: Tensor, mixture: Mixture, places: Places, out: Joint
) -> Tensor:
    """cor(x_j), or the negative log-likelihood, (B, J), of log_prob (A, J, N) and alive (A,)."""
    dtype, log_weights = log_prob.dtype, mixture.log_weights
    counted = alive.unsqueeze(-1).expand(log_prob.shape[:2])
    summand = log_prob
    if mixture.correlation:
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
    if mixture.correlation:
        difference += share.exp_()
    counted = counted & places.spread(defined)
    out.difference.copy_(torch.where(counted.unsqueeze(-1), difference, 0.0))
    out.weights.copy_(weights)
    out.counted.copy_(places.sum(counted))
    return value.to(dtype)


def counted_divergence(swept: Swept) -> Tensor:
    """KL(q_T || p_n) (A, N); 0 where it does not count: components of weight 0 are absent."""
    statistics, mixture, places = swept
    part = slice(0, places.slots)
    counted = places.alive(statistics.student.total[part]).unsqueeze(-1)
    present = places.spread(mixture.log_weights != NEG_INF)
    return torch.where(counted & present, statistics.divergence[part] + _broken(swept), 0.0)


def _broken(swept: Swept) -> Tensor:
    """NaN where the sum of a row of the student is NaN, else 0 (A, N): divergences from such a row
    are NaN even where q is 0."""
    return 0.0 * swept.statistics.student.total[: swept.places.slots]


# The loss -----------------------------------------------------------------------------------------


def loss_of(
    weights: Mixture | Problem,
    rows: Tensor,
    teacher_kl: Tensor,
    consistency_kl: Tensor,
    component: Tensor,
) -> Tensor:
    """The weighted sum of the terms, (B,); terms that are not asked for are 0."""
    loss = _weighted(rows, _row_weights(weights, rows.shape[1])).sum(1)
    kl = ((teacher_kl, weights.teacher_weight), (consistency_kl, weights.consistency_weight))
    for asked, term, weight in (
        *((weights.marginal, *pair) for pair in kl),
        (weights.component, component, weights.component_weight),
    ):
        if asked and weight is not None:
            loss = loss + _weighted(term, weight)
    return loss


def _row_weights(weights: Mixture | Problem, targets: int) -> Tensor:
    """The weight of every target row in the loss, (B, J)."""
    assert weights.data_weight is not None
    first, draws = weights.data_weight.unsqueeze(1), targets - 1
    if not draws:
        return first
    assert weights.consistency_weight is not None
    share = (weights.consistency_weight / draws).unsqueeze(1)
    return torch.cat([first, share.expand(-1, draws)], dim=1)


def _weighted(term: Tensor, weight: Tensor) -> Tensor:
    """term · weight, left out where the weight is 0: an infinite term must not give NaN."""
    return torch.where(weight > 0, term, 0.0) * weight


# Gradients ----------------------------------------------------------------------------------------


def row_gradients(
    mixture: Mixture, targets: int, rows: Tensor | None, loss: Tensor | None
) -> Tensor:
    """dL/d cor(x_j) (B, J), from the gradients of `Values.rows` and `Values.loss`; None is 0."""
    alpha = torch.zeros_like(mixture.log_weights[:, :1]).expand(-1, targets)
    if loss is not None and mixture.data_weight is not None:
        weight = _row_weights(mixture, targets)
        alpha = torch.where(weight > 0, weight * loss.unsqueeze(1), 0.0)
    return alpha if rows is None else alpha + rows


def component_gradient(mixture: Mixture, loss: Tensor | None) -> Tensor:
    """dL/d `Values.component` (B,)."""
    weight = mixture.component_weight
    if loss is None or weight is None:
        return torch.zeros_like(mixture.log_weights[:, 0])
    return torch.where(weight > 0, weight * loss, 0.0)


def factors(swept: Swept, joint: Joint, rows: Tensor | None, loss: Tensor | None) -> Factors:
    """The factors of `backward` from the gradients of `Values.rows` and `Values.loss`."""
    statistics, mixture, places = swept
    part = slice(0, places.slots)
    alpha = row_gradients(mixture, joint.difference.shape[1], rows, loss)
    kappa = joint.difference * places.spread(alpha).unsqueeze(-1)
    probability = -kappa.sum(1)
    marginal = torch.zeros_like(mixture.log_weights[:, 0]) if loss is None else loss
    by_slot = places.spread(marginal)
    factor = torch.zeros_like(probability)
    if mixture.marginal:
        probability = probability + by_slot.unsqueeze(-1) * statistics.mass[part]
    if mixture.component:
        assert statistics.teacher is not None
        # An infinite divergence has no gradient.
        infinite = statistics.divergence[part] == float("inf")
        component = component_gradient(mixture, loss)
        factor = places.spread(component.unsqueeze(-1) * mixture.log_weights.exp())
        factor = torch.where(infinite, 0.0, factor)
        # A teacher's component without any class takes its share out of q_T.
        whole = (statistics.teacher.total[part] != 0).to(alpha.dtype).mean(-1, keepdim=True)
        probability = probability + factor * whole
    return Factors(probability, by_slot, factor, kappa)


def log_weights_gradient(
    swept: Swept, joint: Joint, rows: Tensor | None, loss: Tensor | None
) -> Tensor:
    """dL/da (B, N), with respect to the normalised log-weights."""
    statistics, mixture, places = swept
    part = slice(0, places.slots)
    alpha = row_gradients(mixture, joint.difference.shape[1], rows, loss)
    # sum_d rho - w = sum_d (rho - w) + (number of positions - 1) w
    by_row = places.sum(joint.difference) + (joint.counted - 1).unsqueeze(-1) * joint.weights
    gradient = (by_row * alpha.unsqueeze(-1)).sum(1)
    if mixture.marginal and loss is not None:
        alive = places.alive(statistics.student.total[part]).unsqueeze(-1)
        mass = torch.where(alive, statistics.mass[part], 0.0)
        gradient = gradient - loss.unsqueeze(-1) * places.sum(mass)
    if mixture.component:
        divergence = counted_divergence(swept)
        sums = places.sum(torch.where(divergence == float("inf"), 0.0, divergence))
        component = component_gradient(mixture, loss).unsqueeze(-1)
        gradient = gradient + component * mixture.log_weights.exp() * sums
    return gradient.to(alpha.dtype)
