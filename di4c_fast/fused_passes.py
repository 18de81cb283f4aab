"""The sweeps of the triton backend over the positions: which kernel runs when, on which memory.

Shapes as in `fused_plan`.

Forward, for every chunk of positions: the draws (or the row statistics) of the consistency logits,
the row statistics of the teacher and of the student, the marginals, mixture forward; then, over
all positions, the joint terms. Backward, for every chunk: mixture backward. Logits that exist
already are one chunk; those of a linear head are computed chunk by chunk under a byte budget, and
kept for the backward pass as far as the budget goes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fused_heads import LINEAR, LOGISTIC, HeadSpec, LinearGradient, Source, padded
from .fused_plan import Batch, Chunk, Known, Request, part_of, walk
from .kernels.triton.draw import draw
from .kernels.triton.joint import joint_terms
from .kernels.triton.logistic import logistic_backward
from .kernels.triton.marginal import marginal
from .kernels.triton.mixture_backward import BackwardSums, mixture_backward
from .kernels.triton.mixture_forward import ForwardSums, mixture_forward, new_forward_sums
from .kernels.triton.operands import Operand, Visit, chunk_operand, order_positions
from .kernels.triton.row_statistics import row_statistics


def forward(
    batch: Batch, request: Request, loss: bool = True
) -> tuple[Tensor, Tensor, Tensor, Known]:
    """Loss (B,), terms (5, B), values of the target rows (B, J), and what is left for backward.

    Without `loss` only the values are computed.
    """
    spec, teacher_spec, consistency_spec = batch.specs
    student = Source(spec, batch.student)
    needs_teacher = teacher_spec is not None and (request.has_q or request.has_c)
    teacher = Source(teacher_spec, batch.teacher) if needs_teacher and teacher_spec else None
    consistency = None
    draws = 0
    if request.has_u and consistency_spec is not None:
        draws = consistency_spec.shape(batch.consistency)[1]
        if request.has_q or batch.consistency_x is None:
            consistency = Source(consistency_spec, batch.consistency)
    positions, total = student.positions, student.batch * student.positions
    device = batch.student[0].device
    draws = (
        consistency_spec.shape(batch.consistency)[1] if request.has_u and consistency_spec else 0
    )
    plan = batch.plan(request)

    def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    rows, count = buffer(0, dtype=torch.int64), buffer(dtype=torch.int64)
    if batch.active is not None:
        rows, count = order_positions(batch.active)
    tokens = _tokens(batch, request, draws)
    targets = tokens.shape[1]
    lse = buffer(total, student.components)
    picked = buffer(total, targets, student.components)
    lse_teacher = buffer(total if teacher else 0, teacher.components if teacher else 1)
    lse_consistency = buffer(total if consistency else 0, max(draws, 1))
    row = padded(student.vocabulary)
    kept_teacher, kept_consistency = (
        buffer(plan.kept_teacher, row),
        buffer(plan.kept_consistency, row),
    )
    rows_of = _Distributions(row, device)
    logits = batch.student[0].new_empty(plan.kept_logits, student.components, row)

    linear = any(s is not None and s.linear for s in (student, teacher, consistency))
    draws_here = request.has_u and batch.consistency_x is None
    xu = batch.xu if request.has_u else None
    mask_id = request.mask_id
    sums: ForwardSums | None = None
    if teacher is not None:
        sums = new_forward_sums(
            total,
            student.components,
            student.vocabulary,
            spec.kind == LOGISTIC,
            device,
            has_q=request.has_q,
            has_u=request.has_u,
            has_c=request.has_c,
        )
    for chunk in walk(plan, total, rows, count, linear, batch.student[0]):
        visit, u, t = chunk.visit, None, None
        if consistency is not None:
            u = consistency.operand(chunk.index)
            if draws_here:
                assert batch.seed is not None
                draw(u, visit, positions, mask_id, batch.seed, lse_consistency, tokens, xu=xu)
            else:
                row_statistics(u, visit, positions, mask_id, lse_consistency, xu=xu)
        if teacher is not None:
            t = teacher.operand(chunk.index)
            row_statistics(t, visit, positions, mask_id, lse_teacher)
        z = student.operand(chunk.index, part_of(logits, visit) if student.linear else None)
        row_statistics(z, visit, positions, mask_id, lse, tokens=tokens, picked=picked)
        if t is None or sums is None:
            continue
        q_teacher = part_of(kept_teacher, visit)
        if q_teacher is None and t.components > 1:
            q_teacher = rows_of.teacher(visit)
        if q_teacher is not None:
            marginal(t, visit, positions, mask_id, lse_teacher, q_teacher)
        q_consistency = None
        if u is not None and request.has_q:
            q_consistency = part_of(kept_consistency, visit)
            if q_consistency is None:
                q_consistency = rows_of.consistency(visit)
            marginal(u, visit, positions, mask_id, lse_consistency, q_consistency, xu=xu)
        mixture_forward(
            z,
            t,
            visit,
            positions,
            mask_id,
            lse=lse,
            lse_teacher=lse_teacher,
            log_weights=batch.log_weights,
            teacher_weight=batch.weights[1],
            consistency_weight=batch.weights[2],
            sums=sums,
            has_q=request.has_q,
            has_c=request.has_c,
            q_teacher=q_teacher,
            q_consistency=q_consistency,
        )

    joint = joint_terms(
        picked,
        lse,
        batch.active,
        batch.log_weights,
        correlation=request.correlation,
        weights=batch.weights if loss else None,
        sums=sums,
        has_q=request.has_q and sums is not None,
        has_u=request.has_u and request.has_q and sums is not None,
        has_c=request.has_c and sums is not None,
        scale=request.scale,
    )
    empty = buffer(0)
    known = Known(
        tokens,
        lse,
        lse_teacher,
        lse_consistency,
        picked,
        joint["marginal"],
        joint["joint"],
        joint["alpha"],
        sums.mass.sum(1) if sums is not None and request.has_q else empty,
        sums.divergence.sum(1) if sums is not None and request.has_c else empty.clone(),
        kept_teacher,
        kept_consistency,
        logits,
        rows,
        count,
    )
    return joint["loss"], joint["terms"], joint["values"], known


def _tokens(batch: Batch, request: Request, draws: int) -> Tensor:
    """The target rows (B, J, D); rows of draws that are made here are still to be filled."""
    x0 = batch.x0 if batch.x0.ndim == 3 else batch.x0.unsqueeze(1)
    tokens = torch.zeros(
        x0.shape[0], x0.shape[1] + draws, x0.shape[2], dtype=torch.int64, device=x0.device
    )
    tokens[:, : x0.shape[1]] = x0
    given = batch.consistency_x
    if request.has_u and given is not None:
        if batch.xu is not None:
            assert request.mask_id is not None
            given = torch.where(batch.xu != request.mask_id, batch.xu, given)
        tokens[:, x0.shape[1] :] = given
    return tokens


def backward(
    batch: Batch,
    request: Request,
    known: Known,
    upstream: Tensor,
    alpha: Tensor,
    needs: tuple[bool, ...],
    in_place: bool,
) -> list[Tensor | None]:
    """Gradients with respect to the student's tensors; None for those not in `needs`.

    upstream: (B,) fp32, gradient with respect to the loss of every example; alpha: (B, J) fp32,
    weights of the target rows, 0 where their value is infinite.
    """
    spec, teacher_spec, consistency_spec = batch.specs
    if not any(needs):
        return [None] * len(batch.student)
    student = Source(spec, batch.student)
    plan = batch.plan(request)
    positions, total = student.positions, student.batch * student.positions
    uses_u = request.has_q and request.has_u
    teacher = consistency = None
    uses_t = request.has_q or request.has_c
    if teacher_spec is not None and uses_t and plan.kept_teacher < total:
        teacher = Source(teacher_spec, batch.teacher)
    if consistency_spec is not None and uses_u and plan.kept_consistency < total:
        consistency = Source(consistency_spec, batch.consistency)
    rows_of = _Distributions(padded(student.vocabulary), upstream.device)
    xu = batch.xu if request.has_u else None

    sums = BackwardSums(
        known.tokens,
        known.lse,
        known.lse_teacher,
        batch.log_weights,
        batch.weights[1],
        batch.weights[2],
        batch.weights[3],
        known.picked,
        known.marginal,
        known.joint,
        alpha,
        known.mass,
        known.divergence,
        request.correlation,
        request.has_q,
        request.has_c,
    )
    linear = student.linear
    gradient = LinearGradient(student, batch.student, needs) if linear else None
    results = [] if linear else _new_gradients(batch.student, spec, in_place)
    scratch: Tensor | None = None
    any_linear = any(
        s is not None and s.kind == LINEAR for s in (spec, teacher_spec, consistency_spec)
    )
    # Chunks without an active position have nothing to add to a linear head's gradients, but a
    # gradient of logits has to be written everywhere.
    for chunk in walk(plan, total, known.rows, known.count, linear, batch.student[0]):
        visit = chunk.visit
        index = chunk.index
        if any_linear and not linear and known.rows.numel():
            index = known.rows[visit.first : visit.first + visit.slots]
        elif any_linear and not linear:
            index = torch.arange(visit.first, visit.first + visit.slots, device=upstream.device)
        t = None
        q_teacher = part_of(known.q_teacher, visit)
        if q_teacher is None and teacher is not None:
            t = teacher.operand(index)
            if t.components > 1:
                q_teacher = rows_of.teacher(visit)
                marginal(t, visit, positions, request.mask_id, known.lse_teacher, q_teacher)
        q_consistency = part_of(known.q_consistency, visit)
        if q_consistency is None and consistency is not None:
            u = consistency.operand(index)
            q_consistency = rows_of.consistency(visit)
            marginal(
                u, visit, positions, request.mask_id, known.lse_consistency, q_consistency, xu=xu
            )

        if spec.kind == LOGISTIC:
            grad_mu, grad_log_scale = results
            assert student.whole is not None
            logistic_backward(
                student.whole,
                t,
                visit,
                positions,
                request.mask_id,
                sums,
                upstream=upstream,
                scale=request.scale,
                grad_mu=grad_mu,
                grad_log_scale=grad_log_scale,
                q_teacher=q_teacher,
                q_consistency=q_consistency,
            )
            continue
        grad, strides, z, scratch = _gradient_memory(student, known, chunk, results, scratch)
        mixture_backward(
            z,
            t,
            visit,
            positions,
            request.mask_id,
            sums,
            upstream=upstream,
            scale=request.scale,
            grad=grad,
            grad_strides=strides,
            q_teacher=q_teacher,
            q_consistency=q_consistency,
        )
        if gradient is not None:
            gradient.add(index, grad)
    if gradient is not None:
        return gradient.results()
    return list(results)


def _new_gradients(tensors: list[Tensor], spec: HeadSpec, in_place: bool) -> list[Tensor]:
    if in_place:
        return list(tensors)
    if spec.kind == LOGISTIC:
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    return [new_like(tensors[0])]


def is_dense(logits: Tensor) -> bool:
    """Whether the strides address every element once, with rows that may be padded."""
    reach = 0
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return logits.numel() > 0 and logits.stride(-1) == 1 and reach <= 2 * logits.numel()


def new_like(logits: Tensor) -> Tensor:
    """Uninitialised, with the strides of `logits` where those are dense, else contiguous.

    Rows that the caller has padded stay padded, so that autograd need not copy the gradient.
    """
    if not is_dense(logits):
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    return torch.empty_strided(
        logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device
    )


def _gradient_memory(
    student: Source, known: Known, chunk: Chunk, results: list[Tensor], scratch: Tensor | None
) -> tuple[Tensor, tuple[int, int, int, int], Operand, Tensor | None]:
    """Where a chunk's gradient goes, and its logits."""
    if student.whole is not None:
        grad = results[0]
        stride_b, stride_n, stride_d, _ = grad.stride()
        return grad, (0, stride_b, stride_n, stride_d), student.whole, scratch
    slots = chunk.visit.slots
    kept = part_of(known.logits, chunk.visit)
    if scratch is None or scratch.shape[0] < slots:
        scratch = student.new_logits(slots)
    grad = scratch[:slots]
    if kept is not None:
        # Kept logits stay as they are: backward may run again.
        z = chunk_operand(kept[..., : student.vocabulary])
    else:
        z = student.operand(chunk.index, grad)  # the gradient takes their place
    return grad, (grad.stride(0), 0, grad.stride(1), 0), z, scratch


class _Distributions:
    """Buffers for the distributions of one chunk that are not kept, made when first needed."""

    def __init__(self, row: int, device: torch.device):
        self.row, self.device = row, device
        self._buffers: dict[str, Tensor] = {}

    def _get(self, name: str, visit: Visit) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < visit.slots:
            buffer = torch.empty(visit.slots, self.row, dtype=torch.float32, device=self.device)
            self._buffers[name] = buffer
        return buffer[: visit.slots]

    def teacher(self, visit: Visit) -> Tensor:
        return self._get("teacher", visit)

    def consistency(self, visit: Visit) -> Tensor:
        return self._get("consistency", visit)


def grad_log_weights(
    batch: Batch, request: Request, known: Known, upstream: Tensor, alpha: Tensor
) -> Tensor:
    """dL/da (B, N), the gradient with respect to the normalised component log-weights.

    For every n: sum_j alpha_j (sum_d rho_jnd - w_jn) - sum_d mass_nd + component_weight e^{a_n}
    times the sum over positions of KL(qT || p_n).
    """
    log_weights = batch.log_weights
    size, components = log_weights.shape
    if known.lse.numel() == 0:
        return torch.zeros_like(log_weights)
    lse = known.lse.view(size, -1, components)
    counted = (lse > float("-inf")).any(-1)  # [B, D]
    if batch.active is not None:
        counted = counted & batch.active
    result = -(known.joint * alpha.unsqueeze(-1)).sum(1)
    if request.correlation:
        targets = known.picked.shape[1]
        marginal_value = known.marginal.view(size, -1, targets, 1)
        wanted = counted[:, :, None, None] & (marginal_value > float("-inf"))
        weighted = known.picked.view(size, -1, targets, components) + log_weights[:, None, None]
        local = torch.where(wanted, (weighted - marginal_value).exp(), 0.0)
        result = result + (local * alpha[:, None, :, None]).sum((1, 2))
    if request.has_q:
        mass = known.mass.view(size, -1, components)
        result = result - torch.where(counted.unsqueeze(-1), mass, 0.0).sum(1)
    if request.has_c:
        divergence = known.divergence.view(size, -1, components)
        finite = counted.unsqueeze(-1) & (divergence < float("inf"))
        sums = torch.where(finite, divergence, 0.0).sum(1)
        result = result + batch.weights[3].unsqueeze(-1) * log_weights.exp() * sums
    return result * (upstream * request.scale).unsqueeze(-1)
