"""Logistic backward: the gradient of the loss with respect to mu and log_scale of the student.

Shapes: B batch, N student components, D positions, V bins, J targets.
With dz of `mixture_backward` and the slopes of the bins,

    dmu_n        = sum_v dz_nv (d logit_v / d mu_n)
    dlog_scale_n = sum_v dz_nv (d logit_v / d log_scale_n)

The bins exist only in registers. The one-hot part of dz is added per target, from the slopes of
the J bins concerned. The other passes are those of `row_statistics` and `mixture_forward`,
which compute the bins of a tile from the two numbers as they go.

Moves: two numbers per row read and two written, one row of V per position for
each of qT and qu.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._tl import (
    distribution_tile,
    kappa_tile,
    load_logsumexp,
    logistic_slopes,
    logits_tile,
    position_at,
    row_offset,
    slopes_at,
    split_position,
)
from .mixture_backward import gradient_tile
from .mixture_forward import mixture_tiles
from .operands import Operand, Visit
from .target_gradient import BackwardSums, coefficients, teacher_source
from .tuning import launch_parameters, power_of_two


@triton.jit
def _logistic_backward_kernel(
    mu_ptr,  # student's mu, in
    scale_ptr,  # student's log_scale, in
    t_ptr,  # teacher logits (or mu), in, with T_SOURCE TEACHER
    ty_ptr,
    lse_ptr,  # [B * D, N] fp32, in
    lse_t_ptr,  # [B * D] fp32, in, with T_SOURCE TEACHER
    log_weights_ptr,  # [B, N] fp32, in
    teacher_weight_ptr,  # [B] fp32, in, with HAS_Q
    consistency_weight_ptr,  # [B] fp32, in, with HAS_U
    component_weight_ptr,  # [B] fp32, in, with HAS_C
    upstream_ptr,  # [B] fp32, in
    tokens_ptr,  # [B, J, D] int64, in
    picked_ptr,  # [B * D, J, N] fp32, in
    marginal_ptr,  # [B * D, J] fp32, in, with CORRELATION
    joint_ptr,  # [B, J, N] fp32, in
    alpha_ptr,  # [B, J] fp32, in
    mass_ptr,  # [B * D, N] fp32, in, with HAS_Q
    divergence_ptr,  # [B * D, N] fp32, in, with HAS_C
    rows_ptr,
    count_ptr,
    qt_ptr,  # [slots, V] fp32, in, with T_SOURCE STORED
    qu_ptr,  # [slots, V] fp32, in, with HAS_U
    grad_mu_ptr,  # [B, N, D], out
    grad_scale_ptr,  # [B, N, D], out
    first,
    slots,
    N,
    J,
    D,
    V,
    mask_id,
    z_eps,
    t_eps,
    scale,
    z_i,
    z_b,
    z_n,
    z_d,
    t_i,
    t_b,
    t_m,
    t_d,
    qt_i,
    qu_i,
    Z_KIND: tl.constexpr,
    T_KIND: tl.constexpr,
    T_ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    T_SOURCE: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_Q: tl.constexpr,
    HAS_C: tl.constexpr,
    CORRELATION: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    position, active = position_at(slot, slot < slots, rows_ptr, count_ptr, first, HAS_ROWS)
    b, d = split_position(position, D)
    index = tl.arange(0, BLOCK_N).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + index
    inside = n < N
    grad_place = (b * N + n) * D + d
    if active:
        upstream = tl.load(upstream_ptr + b) * scale
        component_weight = 0.0
        if HAS_C:
            component_weight = tl.load(component_weight_ptr + b)
        lse_t = 0.0
        t_offset = slot
        if T_SOURCE == 2:
            lse_t = load_logsumexp(lse_t_ptr + position, active)
            t_offset = row_offset(slot, position, 0, D, t_i, t_b, t_m, t_d, T_ALIGN)
        qt_row = qt_ptr + slot * qt_i
        qu_row = qu_ptr + slot * qu_i
        teacher_weight = 0.0
        consistency_weight = 0.0
        if HAS_Q:
            teacher_weight = tl.load(teacher_weight_ptr + b)
        if HAS_U:
            consistency_weight = tl.load(consistency_weight_ptr + b)
        lse = load_logsumexp(lse_ptr + position * N + n, inside)
        a = tl.load(log_weights_ptr + b * N + n, mask=inside, other=float("-inf"))
        z_offset = row_offset(slot, position, n, D, z_i, z_b, z_n, z_d, 1)
        mu = tl.load(mu_ptr + z_offset, mask=inside, other=0.0).to(tl.float32)
        log_scale = tl.load(scale_ptr + z_offset, mask=inside, other=0.0).to(tl.float32)
        coefficient, factor = coefficients(
            picked_ptr, marginal_ptr, joint_ptr, alpha_ptr, mass_ptr, divergence_ptr,
            component_weight, lse, a, position, b, n, J, N,
            HAS_Q, HAS_C, CORRELATION, BLOCK_J, BLOCK_N,
        )  # fmt: skip
        grad_mu = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        grad_scale = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for begin in range(0, V, BLOCK_V):
            cols = begin + tl.arange(0, BLOCK_V)
            q = tl.zeros([BLOCK_V], tl.float32)
            qt = q
            if T_SOURCE != 0:
                qt = distribution_tile(
                    qt_row, t_ptr, ty_ptr, t_offset, lse_t, cols, V, mask_id, t_eps,
                    T_SOURCE, T_KIND, True,
                )  # fmt: skip
            if HAS_Q:
                q = teacher_weight * qt
            if HAS_U:
                qu = distribution_tile(
                    qu_row, t_ptr, ty_ptr, t_offset, lse_t, cols, V, mask_id, t_eps,
                    1, T_KIND, True,
                )  # fmt: skip
                q += consistency_weight * qu
            z = logits_tile(
                mu_ptr, scale_ptr, z_offset, inside, cols, V, mask_id, z_eps, Z_KIND, True
            )
            log_prob = z - lse[:, None]
            if ONE_TILE:
                grad = gradient_tile(log_prob, a, coefficient, factor, q, qt, HAS_Q, HAS_C)
            else:
                peak = tl.full([BLOCK_V], -3.0e38, tl.float32)
                total = tl.zeros([BLOCK_V], tl.float32)
                if HAS_Q:
                    for n0 in range(0, N, BLOCK_N):
                        c = n0 + index
                        c_lse = load_logsumexp(lse_ptr + position * N + c, c < N)
                        c_a = tl.load(log_weights_ptr + b * N + c, mask=c < N, other=float("-inf"))
                        c_offset = row_offset(slot, position, c, D, z_i, z_b, z_n, z_d, 1)
                        c_z = logits_tile(
                            mu_ptr, scale_ptr, c_offset, c < N, cols, V, mask_id, z_eps, Z_KIND,
                            True,
                        )  # fmt: skip
                        weighted = c_z - c_lse[:, None] + c_a[:, None]
                        top = tl.maximum(peak, tl.max(weighted, axis=0))
                        total = total * tl.exp(peak - top)
                        total += tl.sum(tl.exp(weighted - top[None, :]), axis=0)
                        peak = top
                grad = coefficient[:, None] * tl.exp(log_prob)
                if HAS_Q:
                    part = tl.exp(log_prob + a[:, None] - peak[None, :])
                    grad -= part * (q / tl.where(total > 0.0, total, 1.0))[None, :]
                if HAS_C:
                    grad -= factor[:, None] * qt[None, :]
            slope_mu, slope_scale = logistic_slopes(mu, log_scale, cols, V, z_eps, Z_KIND)
            keep = inside[:, None] & (cols < V)[None, :]
            grad_mu += tl.where(keep, grad * slope_mu, 0.0)
            grad_scale += tl.where(keep, grad * slope_scale, 0.0)
        sum_mu = tl.sum(grad_mu, axis=1)
        sum_scale = tl.sum(grad_scale, axis=1)

        for begin in range(0, J, BLOCK_J):
            j = begin + tl.arange(0, BLOCK_J)
            tokens = tl.load(tokens_ptr + (b * J + j) * D + d, mask=j < J, other=0)
            kappa = kappa_tile(
                picked_ptr, marginal_ptr, joint_ptr, alpha_ptr, a, position, b, j, n, J, N,
                CORRELATION,
            )  # fmt: skip
            # In a row without any class the targets are not counted.
            kappa = tl.where((lse < float("inf"))[None, :] & (j < J)[:, None], kappa, 0.0)
            slope_mu, slope_scale = slopes_at(mu, log_scale, tokens, V, z_eps, Z_KIND)
            sum_mu += tl.sum(kappa * slope_mu, axis=0)
            sum_scale += tl.sum(kappa * slope_scale, axis=0)
        dtype = grad_mu_ptr.dtype.element_ty
        tl.store(grad_mu_ptr + grad_place, (sum_mu * upstream).to(dtype), mask=inside)
        tl.store(grad_scale_ptr + grad_place, (sum_scale * upstream).to(dtype), mask=inside)
    elif slot < slots:
        zero = tl.zeros([BLOCK_N], grad_mu_ptr.dtype.element_ty)
        tl.store(grad_mu_ptr + grad_place, zero, mask=inside)
        tl.store(grad_scale_ptr + grad_place, zero, mask=inside)


def logistic_backward(
    student: Operand,
    teacher: Operand | None,
    visit: Visit,
    positions: int,
    mask_id: int | None,
    known: BackwardSums,
    *,
    upstream: Tensor,
    scale: float,
    grad_mu: Tensor,
    grad_log_scale: Tensor,
    q_teacher: Tensor | None = None,
    q_consistency: Tensor | None = None,
) -> None:
    """Write the gradients (B, N, D), contiguous, of every visited slot; zeros where not active.

    Arguments as for `mixture_backward`.
    """
    if visit.slots == 0:
        return
    tuned = launch_parameters(student.x.device)
    tiles = mixture_tiles(
        student.components,
        student.vocabulary,
        tuned.logistic_elements,
        tuned.logistic_warps,
        tuned,
    )
    source = student if teacher is None else teacher
    rows, count, first, has_rows = visit.arguments(known.lse)
    targets = known.tokens.shape[1]
    grid = (visit.slots, triton.cdiv(student.components, tiles.block_n))
    _logistic_backward_kernel[grid](
        student.x,
        student.y,
        source.x,
        source.y,
        known.lse,
        known.lse_teacher,
        known.log_weights,
        known.teacher_weight,
        known.consistency_weight,
        known.component_weight,
        upstream,
        known.tokens,
        known.picked,
        known.marginal,
        known.joint,
        known.alpha,
        known.mass,
        known.divergence,
        rows,
        count,
        known.lse if q_teacher is None else q_teacher,
        known.lse if q_consistency is None else q_consistency,
        grad_mu,
        grad_log_scale,
        first,
        visit.slots,
        student.components,
        targets,
        positions,
        student.vocabulary,
        -1 if mask_id is None else mask_id,
        student.eps,
        source.eps,
        scale,
        *student.strides,
        *source.strides,
        0 if q_teacher is None else q_teacher.stride(0),
        0 if q_consistency is None else q_consistency.stride(0),
        Z_KIND=student.kind,
        T_KIND=source.kind,
        T_ALIGN=source.align,
        HAS_ROWS=has_rows,
        T_SOURCE=teacher_source(known, q_teacher),
        HAS_U=known.has_q and q_consistency is not None,
        HAS_Q=known.has_q,
        HAS_C=known.has_c,
        CORRELATION=known.correlation,
        ONE_TILE=tiles.one_tile,
        BLOCK_J=max(1, min(power_of_two(max(targets, 1)), 32)),
        BLOCK_N=tiles.block_n,
        BLOCK_V=tiles.block_v,
        num_warps=tiles.warps,
    )
