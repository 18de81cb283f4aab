"""Mixture backward: the gradient of the loss with respect to the student's logits.

Shapes: B batch, N student components, D positions, V vocabulary, J targets. With p = exp l, r, q
and mass of `mixture_forward`, kappa of `_tl.kappa_tile`, e_n = e^{a_n} and the upstream gradient g
of the example, at every visited position

    coefficient_n = mass_n + component_weight e_n - sum_j kappa_jn
    dz_nv = g (coefficient_n p_nv - q_v r_nv - component_weight e_n qT_v)      everywhere, then
    dz_nv += g sum_j kappa_jn [v = x_j]                                        at the targets

The first line is one pass over the logits, the kernel of this file. The second concerns J columns
of V; `target_gradient` writes those few elements, so that the pass needs no comparison with tokens.
The gradient may take the place of the logits.

Moves: one read of the visited rows of z, one write of all rows of dz (zeros where not visited), one
row of V per position for each of qT and qu.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._tl import (
    distribution_tile,
    load_logsumexp,
    logits_tile,
    position_at,
    row_offset,
    split_position,
)
from .mixture_forward import mixture_tiles
from .operands import Operand, Visit, load_align
from .target_gradient import BackwardSums, coefficients, target_gradient, teacher_source
from .tuning import launch_parameters, power_of_two


@triton.jit
def gradient_tile(
    log_prob,  # [N, W]
    a,  # [N]
    coefficient,  # [N]
    factor,  # [N]
    q,  # [W]
    qt,  # [W]
    HAS_Q: tl.constexpr,
    HAS_C: tl.constexpr,
):
    """coefficient p - q r - factor qT of a tile that holds all components, [N, W]."""
    grad = coefficient[:, None] * tl.exp(log_prob)
    if HAS_Q:
        weighted = log_prob + a[:, None]
        peak = tl.max(weighted, axis=0)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        part = tl.exp(weighted - peak[None, :])
        # The largest part is 1, so a total below 1 is 0: no component has the class.
        total = tl.maximum(tl.sum(part, axis=0), 1.0)
        grad -= part * (q / total)[None, :]
    if HAS_C:
        grad -= factor[:, None] * qt[None, :]
    return grad


@triton.jit
def _mixture_backward_kernel(
    z_ptr,  # student logits, in
    t_ptr,  # teacher logits (or mu), in, with T_SOURCE TEACHER
    ty_ptr,
    lse_ptr,  # [B * D, N] fp32, in
    lse_t_ptr,  # [B * D] fp32, in, with T_SOURCE TEACHER
    log_weights_ptr,  # [B, N] fp32, in
    teacher_weight_ptr,  # [B] fp32, in, with HAS_Q
    consistency_weight_ptr,  # [B] fp32, in, with HAS_U
    component_weight_ptr,  # [B] fp32, in, with HAS_C
    upstream_ptr,  # [B] fp32, in
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
    grad_ptr,  # student's gradient, out; may be z
    first,
    slots,
    N,
    J,
    D,
    V,
    split,
    mask_id,
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
    g_i,
    g_b,
    g_n,
    g_d,
    qt_i,
    qu_i,
    T_KIND: tl.constexpr,
    Z_ALIGN: tl.constexpr,
    T_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
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
    STAGES: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * split
    position, active = position_at(slot, slot < slots, rows_ptr, count_ptr, first, HAS_ROWS)
    b, _ = split_position(position, D)
    stop = tl.minimum(start + split, V)
    full = start + (stop - start) // BLOCK_V * BLOCK_V
    index = tl.arange(0, BLOCK_N).to(tl.int64)
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
        if ONE_TILE:
            n = index
            inside = n < N
            lse = load_logsumexp(lse_ptr + position * N + n, inside)
            a = tl.load(log_weights_ptr + b * N + n, mask=inside, other=float("-inf"))
            z_offset = row_offset(slot, position, n, D, z_i, z_b, z_n, z_d, Z_ALIGN)
            g_offset = row_offset(slot, position, n, D, g_i, g_b, g_n, g_d, G_ALIGN)
            coefficient, factor = coefficients(
                picked_ptr, marginal_ptr, joint_ptr, alpha_ptr, mass_ptr, divergence_ptr,
                component_weight, lse, a, position, b, n, J, N,
                HAS_Q, HAS_C, CORRELATION, BLOCK_J, BLOCK_N,
            )  # fmt: skip
        for TAIL in tl.static_range(2):
            for begin in tl.range(
                full if TAIL else start, stop if TAIL else full, BLOCK_V, num_stages=STAGES
            ):
                cols = begin + tl.arange(0, BLOCK_V)
                q = tl.zeros([BLOCK_V], tl.float32)
                qt = q
                if T_SOURCE != 0:
                    qt = distribution_tile(
                        qt_row, t_ptr, ty_ptr, t_offset, lse_t, cols, V, mask_id, t_eps,
                        T_SOURCE, T_KIND, TAIL,
                    )  # fmt: skip
                if HAS_Q:
                    q = teacher_weight * qt
                if HAS_U:
                    qu = distribution_tile(
                        qu_row, t_ptr, ty_ptr, t_offset, lse_t, cols, V, mask_id, t_eps,
                        1, T_KIND, TAIL,
                    )  # fmt: skip
                    q += consistency_weight * qu
                if ONE_TILE:
                    z = logits_tile(z_ptr, z_ptr, z_offset, inside, cols, V, mask_id, 0.0, 0, TAIL)
                    log_prob = z - lse[:, None]
                    grad = gradient_tile(log_prob, a, coefficient, factor, q, qt, HAS_Q, HAS_C)
                    keep = inside[:, None]
                    if TAIL:
                        keep = keep & (cols < V)[None, :]
                    value = (grad * upstream).to(grad_ptr.dtype.element_ty)
                    tl.store(grad_ptr + g_offset[:, None] + cols[None, :], value, mask=keep)
                else:
                    # First m over all components, then each of them. The gradient may take the
                    # place of the logits: both runs read only the columns of this program.
                    peak = tl.full([BLOCK_V], -3.0e38, tl.float32)
                    total = tl.zeros([BLOCK_V], tl.float32)
                    if HAS_Q:
                        for n0 in range(0, N, BLOCK_N):
                            n = n0 + index
                            inside = n < N
                            lse = load_logsumexp(lse_ptr + position * N + n, inside)
                            a = tl.load(
                                log_weights_ptr + b * N + n, mask=inside, other=float("-inf")
                            )
                            z_offset = row_offset(slot, position, n, D, z_i, z_b, z_n, z_d, Z_ALIGN)
                            z = logits_tile(
                                z_ptr, z_ptr, z_offset, inside, cols, V, mask_id, 0.0, 0, TAIL
                            )
                            weighted = z - lse[:, None] + a[:, None]
                            top = tl.maximum(peak, tl.max(weighted, axis=0))
                            total = total * tl.exp(peak - top)
                            total += tl.sum(tl.exp(weighted - top[None, :]), axis=0)
                            peak = top
                    ratio = q / tl.where(total > 0.0, total, 1.0)
                    for n0 in range(0, N, BLOCK_N):
                        n = n0 + index
                        inside = n < N
                        lse = load_logsumexp(lse_ptr + position * N + n, inside)
                        a = tl.load(log_weights_ptr + b * N + n, mask=inside, other=float("-inf"))
                        z_offset = row_offset(slot, position, n, D, z_i, z_b, z_n, z_d, Z_ALIGN)
                        g_offset = row_offset(slot, position, n, D, g_i, g_b, g_n, g_d, G_ALIGN)
                        coefficient, factor = coefficients(
                            picked_ptr, marginal_ptr, joint_ptr, alpha_ptr, mass_ptr,
                            divergence_ptr, component_weight, lse, a, position, b, n, J, N,
                            HAS_Q, HAS_C, CORRELATION, BLOCK_J, BLOCK_N,
                        )  # fmt: skip
                        z = logits_tile(
                            z_ptr, z_ptr, z_offset, inside, cols, V, mask_id, 0.0, 0, TAIL
                        )
                        log_prob = z - lse[:, None]
                        grad = coefficient[:, None] * tl.exp(log_prob)
                        if HAS_Q:
                            part = tl.exp(log_prob + a[:, None] - peak[None, :])
                            grad -= part * ratio[None, :]
                        if HAS_C:
                            grad -= factor[:, None] * qt[None, :]
                        keep = inside[:, None]
                        if TAIL:
                            keep = keep & (cols < V)[None, :]
                        value = (grad * upstream).to(grad_ptr.dtype.element_ty)
                        tl.store(grad_ptr + g_offset[:, None] + cols[None, :], value, mask=keep)
    elif slot < slots:
        zero = tl.zeros([BLOCK_N, BLOCK_V], grad_ptr.dtype.element_ty)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + index
            g_offset = row_offset(slot, position, n, D, g_i, g_b, g_n, g_d, G_ALIGN)
            for begin in range(start, stop, BLOCK_V):
                cols = begin + tl.arange(0, BLOCK_V)
                keep = (n < N)[:, None] & (cols < V)[None, :]
                tl.store(grad_ptr + g_offset[:, None] + cols[None, :], zero, mask=keep)


def mixture_backward(
    student: Operand,
    teacher: Operand | None,
    visit: Visit,
    positions: int,
    mask_id: int | None,
    known: BackwardSums,
    *,
    upstream: Tensor,
    scale: float,
    grad: Tensor,
    grad_strides: tuple[int, int, int, int],
    q_teacher: Tensor | None = None,
    q_consistency: Tensor | None = None,
) -> None:
    """Write the gradient of every visited slot, zeros where it is not active.

    `grad` is addressed like an operand by `grad_strides`; it may be the memory of the logits.
    `upstream` (B,) fp32 is read on the device. `teacher` is read where `q_teacher` is not given.
    """
    if visit.slots == 0 or student.vocabulary == 0:
        return
    tuned = launch_parameters(student.x.device)
    tiles = mixture_tiles(
        student.components,
        student.vocabulary,
        tuned.backward_elements,
        tuned.backward_warps,
        tuned,
    )
    target = Operand(grad, grad, student.components, student.vocabulary, grad_strides)
    source = student if teacher is None else teacher
    rows, count, first, has_rows = visit.arguments(known.lse)
    t_source = teacher_source(known, q_teacher)
    has_u = known.has_q and q_consistency is not None
    q_strides = [0 if x is None else x.stride(0) for x in (q_teacher, q_consistency)]
    targets = known.tokens.shape[1]
    mask = -1 if mask_id is None else mask_id
    nothing = known.lse
    # A split of the columns shares no gradient with another, so it may be as wide as one likes;
    # with many components every program would read them all for each of its tiles.
    _mixture_backward_kernel[(visit.slots, tiles.splits)](
        student.x,
        source.x,
        source.y,
        known.lse,
        known.lse_teacher,
        known.log_weights,
        known.teacher_weight,
        known.consistency_weight,
        known.component_weight,
        upstream,
        known.picked,
        known.marginal,
        known.joint,
        known.alpha,
        known.mass,
        known.divergence,
        rows,
        count,
        nothing if q_teacher is None else q_teacher,
        nothing if q_consistency is None else q_consistency,
        grad,
        first,
        visit.slots,
        student.components,
        targets,
        positions,
        student.vocabulary,
        tiles.split,
        mask,
        source.eps,
        scale,
        *student.strides,
        *source.strides,
        *grad_strides,
        *q_strides,
        T_KIND=source.kind,
        Z_ALIGN=load_align(student, tiles.block_n),
        T_ALIGN=load_align(source, tiles.block_n),
        G_ALIGN=load_align(target, tiles.block_n),
        HAS_ROWS=has_rows,
        T_SOURCE=t_source,
        HAS_U=has_u,
        HAS_Q=known.has_q,
        HAS_C=known.has_c,
        CORRELATION=known.correlation,
        ONE_TILE=tiles.one_tile,
        BLOCK_J=max(1, min(power_of_two(max(targets, 1)), 32)),
        BLOCK_N=tiles.block_n,
        BLOCK_V=tiles.block_v,
        STAGES=tuned.backward_stages,
        num_warps=tiles.warps,
    )
    target_gradient(
        student,
        teacher,
        visit,
        positions,
        mask_id,
        known,
        upstream=upstream,
        scale=scale,
        grad=grad,
        grad_strides=grad_strides,
        q_teacher=q_teacher,
        q_consistency=q_consistency,
    )
