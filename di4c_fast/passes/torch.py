"""The passes as plain tensor operations: any device, any dtype, no compiler.

Shapes as in `base`; everything of a chunk is (P, C, V) in the work dtype. All formulas are in the
log domain, so that nothing underflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Chunk, Factors, Operand, RowSums, Visit
from .torch_draw import draw

__all__ = ["backward", "chunk_bytes", "draw", "forward", "temporary_bytes", "unavailable"]

WRITES_ZEROS = False  # `backward` visits active slots only
NEG_INF = float("-inf")


def unavailable(device: torch.device) -> str | None:
    """Why these passes cannot run on `device`; None: they can."""
    return None


def chunk_bytes(device: torch.device) -> int:
    """On a CPU a chunk should stay in the caches, on an accelerator it should fill the device."""
    return 8 << 20 if device.type == "cpu" else 128 << 20


def temporary_bytes(components: int, row_bytes: int) -> int:
    """What a slot takes beside its operands."""
    return 2 * components * row_bytes


def forward(chunk: Chunk) -> None:
    """See `base`."""
    z, t, _, visit, mixture, statistics = chunk
    b, d = visit.split(z.logits.device)
    part, index = visit.part, statistics.tokens[b, :, d]  # [P, J]
    log_prob = _load(z, visit, mixture.mask_id, statistics.mass.dtype)
    _shift_(log_prob, visit, statistics.student, statistics.all_known)
    if not statistics.all_known:
        statistics.student.total[part] = log_prob.exp().sum(-1)
    total = statistics.student.total[part]
    log_prob.sub_(_log(total).unsqueeze(-1))
    index = index.clamp_max(z.vocabulary - 1).unsqueeze(1).expand(-1, z.components, -1)
    targets = log_prob.gather(-1, index)
    statistics.log_prob[part] = targets.transpose(1, 2)
    if t is None:
        return
    alive = (total != 0).any(-1, keepdim=True)
    q_teacher, q_consistency, q = _distributions(chunk, alive, statistics.all_known)
    if mixture.component:
        divergence = _divergence(q_teacher.unsqueeze(1), log_prob)
        statistics.divergence[part] = divergence
    if mixture.marginal:
        marginal, responsibility = _responsibility(log_prob, mixture.log_weights[b])
        statistics.mass[part] = torch.linalg.vecdot(responsibility, q.unsqueeze(1))
        statistics.teacher_kl[part] = _divergence(q_teacher, marginal)
        if q_consistency is not None:
            statistics.consistency_kl[part] = _divergence(q_consistency, marginal)
    for rows, values in ((statistics.q, q), (statistics.q_teacher, q_teacher)):
        kept = statistics.kept(rows, visit)
        if kept is not None:
            kept[:, : z.vocabulary] = values


def backward(chunk: Chunk, factors: Factors, gradient: Operand) -> None:
    """See `base`."""
    z, t, _, visit, mixture, statistics = chunk
    b, d = visit.split(z.logits.device)
    part, index = visit.part, statistics.tokens[b, :, d]
    sums, dtype = statistics.student, factors.kappa.dtype
    log_prob = _load(z, visit, mixture.mask_id, dtype)
    _shift_(log_prob, visit, sums, known=True)
    log_prob.sub_(_log(sums.total[part]).unsqueeze(-1))
    q, q_teacher = (
        rows if rows is None else rows[:, : z.vocabulary]
        for rows in (
            statistics.kept(statistics.q, visit),
            statistics.kept(statistics.q_teacher, visit),
        )
    )
    if t is not None:
        alive = (sums.total[part] != 0).any(-1, keepdim=True)
        q_teacher, _, q = _distributions(chunk, alive, known=True)
    if mixture.marginal:
        assert q is not None
        _, responsibility = _responsibility(log_prob, mixture.log_weights[b])
        pull = q * factors.marginal[part].unsqueeze(-1)
    dz = log_prob.exp_().mul_(factors.probability[part].unsqueeze(-1))
    if mixture.marginal:
        dz.sub_(responsibility.mul_(pull.unsqueeze(1)))
    if mixture.component:
        assert q_teacher is not None
        dz.addcmul_(factors.component[part].unsqueeze(-1), q_teacher.unsqueeze(1), value=-1.0)
    own = index < z.vocabulary
    kappa = torch.where(own.unsqueeze(-1), factors.kappa[part], 0.0).transpose(1, 2)
    index = index.where(own, 0).unsqueeze(1).expand(-1, z.components, -1)
    dz.scatter_add_(-1, index, kappa)
    if mixture.mask_id is not None:
        dz[..., mixture.mask_id] = 0.0
    if gradient.strides[0]:
        gradient.of_visit(visit).copy_(dz)
    else:
        gradient.logits[b, :, d] = dz.to(gradient.logits.dtype)


def _load(x: Operand, visit: Visit, mask_id: int | None, dtype: torch.dtype) -> Tensor:
    """Logits (P, C, V) in memory of their own; -inf in the excluded column."""
    logits = x.of_visit(visit)
    shared = logits.untyped_storage()._cdata == x.logits.untyped_storage()._cdata
    logits = logits.clone() if shared and logits.dtype == dtype else logits.to(dtype)
    if mask_id is not None:
        logits[..., mask_id] = NEG_INF
    return logits


def _shift_(logits: Tensor, visit: Visit, sums: RowSums, known: bool) -> None:
    """Subtract the largest logit of every row, which is recorded unless it is `known`."""
    if not known:
        shift = logits.amax(-1)
        sums.shift[visit.part] = torch.where(shift == NEG_INF, 0.0, shift)
    logits.sub_(sums.shift[visit.part].unsqueeze(-1))


def _log(total: Tensor) -> Tensor:
    """log(total), 0 for a row without a class: its logits, all -inf, then stay as they are."""
    return torch.where(total == 0, 1.0, total).log()


def _softmax_mean(
    x: Operand,
    visit: Visit,
    mask_id: int | None,
    sums: RowSums,
    known: bool,
    shown: Tensor | None = None,
) -> Tensor:
    """Mean over components of softmax (P, V); one-hot where `shown` (P, C) holds a token."""
    values = _load(x, visit, mask_id, sums.total.dtype)
    _shift_(values, visit, sums, known)
    values.exp_()
    if not known:
        sums.total[visit.part] = values.sum(-1)
    total = sums.total[visit.part]
    share = torch.where(total == 0, 0.0, 1.0 / total) / x.components
    if shown is not None:
        revealed = shown.ne(-1 if mask_id is None else mask_id)
        share = share.masked_fill(revealed, 0.0)
        values[revealed] = 0.0  # NaN stays NaN if it is multiplied by 0
    mean = torch.linalg.vecdot(values.transpose(1, 2), share.unsqueeze(1))
    if shown is not None:
        inside = revealed & (shown < x.vocabulary)
        mean.scatter_add_(-1, shown.where(inside, 0), inside.to(mean.dtype) / x.components)
    return mean


def _distributions(
    chunk: Chunk, alive: Tensor, known: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """q_T, q_u and their weighted sum q: (P, V), zero where the student allows no class.

    `known`: the sums of both heads' rows are there, as they are in `backward`.
    """
    _, t, u, visit, mixture, statistics = chunk
    assert t is not None
    assert statistics.teacher is not None
    (b, d), mask_id = visit.split(t.logits.device), mixture.mask_id
    q_teacher = _softmax_mean(t, visit, mask_id, statistics.teacher, known)
    q_teacher = torch.where(alive, q_teacher, 0.0)
    q = q_teacher * mixture.teacher_weight[b].unsqueeze(-1)
    if u is None:
        return q_teacher, None, q
    assert statistics.consistency is not None
    shown = None if mixture.xu is None else mixture.xu[b, :, d]
    known = known or statistics.sums_known
    q_consistency = _softmax_mean(u, visit, mask_id, statistics.consistency, known, shown)
    q_consistency = torch.where(alive, q_consistency, 0.0)
    return q_teacher, q_consistency, q + q_consistency * mixture.consistency_weight[b, None]


def _responsibility(log_prob: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """m (P, V) and r (P, N, V)."""
    joint = log_prob + log_weights.unsqueeze(-1)
    peak = joint.amax(1, keepdim=True)
    peak = torch.where(peak == NEG_INF, 0.0, peak)
    joint.sub_(peak).exp_()
    total = joint.sum(1, keepdim=True)
    joint.mul_(torch.where(total == 0, 0.0, 1.0 / total))
    return (total.log() + peak).squeeze(1), joint


def _divergence(target: Tensor, log_prob: Tensor) -> Tensor:
    """sum_v q (log q - log p), (..., V) -> (...), with 0 log 0 = 0; +inf where q > 0 = p."""
    difference = target.clamp_min(torch.finfo(target.dtype).tiny).log() - log_prob
    return torch.where(target == 0, 0.0, target * difference).sum(-1)
