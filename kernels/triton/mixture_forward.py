"""Mixture forward: divergences and responsibilities of every visited position.

Shapes: A slots, N student components, D positions, V vocabulary, S splits of the vocabulary. With
l = z - shift - log total and log-weights a, per position:

    m_v          = logsumexp_n(a_n + l_nv)          r_nv = exp(a_n + l_nv - m_v)
    q_v          = teacher_weight qT_v + consistency_weight qu_v
    kl_teacher   = sum_v qT_v (log qT_v - m_v)      kl_consistency the same of qu
    mass_n       = sum_v q_v r_nv
    divergence_n = sum_v qT_v (log qT_v - l_nv)

qu and, for a teacher of several components, qT are rows that `marginal` has left; an ordinary
teacher's qT is formed from its logits on the way. Rows of q, and of qT, are left for backward where
it keeps them; q may take the place of qu. Each program leaves its split's part of the sums, so
results repeat exactly.

Moves: one read of the visited rows of z, one row of V per position for each of qT, qu and q.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logistic import bins_flag, pointers_of
from .random import LN_2, log2_positive
from .tiles import (
    LOWEST,
    add_components,
    load_align,
    load_log2_weights,
    mixture_tiles,
    position_at,
    responsibility_tile,
    row_offset,
    row_tile,
    softmax_rows,
    softmax_tile,
    split_position,
    visit_arguments,
    visit_flags,
)
from .tuning import launch_parameters, tunable


@tunable("mixture_forward")
@dataclasses.dataclass(frozen=True)
class MixtureForward:
    elements: int = 2048  # of a tile, N · BLOCK_V, in 2 bytes; half as many in fp32
    # As in mixture backward: 55 instructions per logit with 8 warps, 17 with 2.
    warps: int = 2  # for tiles of up to 16 components; twice as many for 32
    bins_elements: int = 512  # of a tile of bins
    stages: int = 3
    split_columns: int = 4096  # columns of one program

    powers_of_two = ("elements", "bins_elements", "warps", "split_columns")


@triton.jit
def _divergence(q, log2_q, log2_p):
    """q (log2 q - log2 p), 0 where q is 0, inf where only p is 0; NaN stays NaN."""
    return tl.where(q == 0.0, 0.0, q * (log2_q - log2_p))


@triton.jit(do_not_specialize=["first", "slots"])
def _mixture_forward_kernel(
    z_ptr,  # student logits, or mu of its bins, in
    z_scale_ptr,  # log_scale of its bins, in
    t_ptr,  # the same of the teacher, in, unless STORED_T
    t_scale_ptr,
    shift_ptr,  # [A, N] fp32, in, and so total: the student's row sums
    total_ptr,
    shift_t_ptr,  # [A] fp32, in, unless STORED_T, and so total: the teacher's row sums
    total_t_ptr,
    log_weights_ptr,  # [B, N] fp32, in
    teacher_weight_ptr,  # [B] fp32, in, with HAS_Q
    consistency_weight_ptr,  # [B] fp32, in, with HAS_U
    rows_ptr,
    count_ptr,
    qt_ptr,  # [slots, V] fp32, in with STORED_T, else out with KEEP_T
    qu_ptr,  # [slots, V] fp32, in, with HAS_U
    q_ptr,  # [slots, V] fp32, out, with KEEP_Q; may be qu
    kl_t_ptr,  # [slots, S] fp32, out, with HAS_Q
    kl_u_ptr,  # [slots, S] fp32, out, with HAS_Q and HAS_U
    mass_ptr,  # [slots, S, N] fp32, out, with HAS_Q
    divergence_ptr,  # [slots, S, N] fp32, out, with HAS_C
    first,
    slots,
    N,
    D,
    V,
    S,
    split,  # columns per split, a multiple of BLOCK_V
    mask_id,
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
    q_i,
    Z_BINS: tl.constexpr,
    T_BINS: tl.constexpr,
    Z_ALIGN: tl.constexpr,
    T_ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_Q: tl.constexpr,  # the marginal divergences are asked for
    HAS_U: tl.constexpr,
    HAS_C: tl.constexpr,  # the component divergence is asked for
    STORED_T: tl.constexpr,
    KEEP_Q: tl.constexpr,
    KEEP_T: tl.constexpr,
    ONE_TILE: tl.constexpr,  # all components in one tile; else one block of columns per split
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    place, position, active = position_at(
        slot, slot < slots, rows_ptr, count_ptr, first, HAS_ROWS, HAS_COUNT
    )
    if not active:
        return
    b, d = split_position(position, D)
    part_of = slot * S + s
    if HAS_Q:
        teacher_weight = tl.load(teacher_weight_ptr + b)
        if HAS_U:
            consistency_weight = tl.load(consistency_weight_ptr + b)
    one = tl.arange(0, 1).to(tl.int64)
    if not STORED_T:
        t_offset = row_offset(slot, b, one, d, t_i, t_b, t_m, t_d, T_ALIGN)
        t_rows = softmax_rows(
            t_ptr, t_scale_ptr, t_offset, shift_t_ptr, total_t_ptr, place + one, one == 0, V, T_BINS
        )
    qt_row = qt_ptr + slot * qt_i
    qu_row = qu_ptr + slot * qu_i
    q_row = q_ptr + slot * q_i

    n = tl.arange(0, BLOCK_N)
    # A position without any class in any component counts as if q were 0 there.
    dead = 1
    for n0 in range(0, N, BLOCK_N):
        some = tl.load(total_ptr + place * N + n0 + n, mask=n0 + n < N, other=0.0) != 0.0
        dead = tl.where(tl.max(some.to(tl.int32), axis=0) == 1, 0, dead)
    if ONE_TILE:
        inside = n < N
        a = load_log2_weights(log_weights_ptr, b * N + n, inside)
        offset = row_offset(slot, b, n.to(tl.int64), d, z_i, z_b, z_n, z_d, Z_ALIGN)
        rows = softmax_rows(
            z_ptr, z_scale_ptr, offset, shift_ptr, total_ptr, place * N + n, inside, V, Z_BINS
        )

    kl_t = tl.zeros([BLOCK_V], tl.float32)
    kl_u = tl.zeros([BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    divergence = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    start = s * split
    stop = tl.minimum(start + split, V)
    full = start + (stop - start) // BLOCK_V * BLOCK_V
    for TAIL in tl.static_range(2):
        for begin in tl.range(
            full if TAIL else start, stop if TAIL else full, BLOCK_V, num_stages=STAGES
        ):
            cols = begin + tl.arange(0, BLOCK_V)
            if STORED_T:
                qt = row_tile(qt_row, cols, V, TAIL)
                log2_qt = tl.log2(qt)
            else:
                scale, t, _t_edges = softmax_tile(
                    t_ptr, t_rows, begin, BLOCK_V, V, mask_id, TAIL, T_BINS
                )
                qt = tl.sum(scale * tl.exp2(t), axis=0)
                qt = tl.where(dead == 1, 0.0, qt)
                log2_qt = tl.sum(t, axis=0)  # of one row
                if T_BINS is not None:
                    log2_qt += tl.log2(tl.sum(scale, axis=0))
                if KEEP_T:
                    tl.store(qt_row + cols, qt, mask=cols < V)
            if HAS_Q:
                q = teacher_weight * qt
                if HAS_U:
                    qu = row_tile(qu_row, cols, V, TAIL)
                    q += consistency_weight * qu
                if KEEP_Q:
                    tl.store(q_row + cols, q, mask=cols < V)

            if ONE_TILE:
                factor, log2_prob, _ = softmax_tile(
                    z_ptr, rows, begin, BLOCK_V, V, mask_id, TAIL, Z_BINS
                )
                if HAS_Q:
                    part, total, peak = responsibility_tile(factor, log2_prob, a)
                    mass += part * (q / tl.where(total == 0.0, 1.0, total))[None, :]
                    m = peak + tl.where(total == 0.0, float("-inf"), log2_positive(total))
                    kl_t += _divergence(qt, log2_qt, m)
                    if HAS_U:
                        kl_u += _divergence(qu, log2_positive(qu), m)
                if HAS_C:
                    if Z_BINS is not None:
                        log2_prob += tl.log2(factor)
                    gap = _divergence(qt[None, :], log2_qt[None, :], log2_prob)
                    divergence += tl.where(inside[:, None], gap, 0.0)
            else:
                # Two runs over the components: m first, then what needs it.
                peak = tl.full([BLOCK_V], LOWEST, tl.float32)
                total = tl.zeros([BLOCK_V], tl.float32)
                if HAS_Q:
                    for n0 in range(0, N, BLOCK_N):
                        c = n0 + n.to(tl.int64)
                        inside = c < N
                        a = load_log2_weights(log_weights_ptr, b * N + c, inside)
                        offset = row_offset(slot, b, c, d, z_i, z_b, z_n, z_d, Z_ALIGN)
                        rows = softmax_rows(
                            z_ptr, z_scale_ptr, offset, shift_ptr, total_ptr, place * N + c,
                            inside, V, Z_BINS,
                        )  # fmt: skip
                        factor, log2_prob, _ = softmax_tile(
                            z_ptr, rows, begin, BLOCK_V, V, mask_id, TAIL, Z_BINS
                        )
                        peak, total = add_components(peak, total, factor, log2_prob + a[:, None])
                    m = peak + tl.where(total == 0.0, float("-inf"), log2_positive(total))
                    kl_t += _divergence(qt, log2_qt, m)
                    if HAS_U:
                        kl_u += _divergence(qu, log2_positive(qu), m)
                for n0 in range(0, N, BLOCK_N):
                    c = n0 + n.to(tl.int64)
                    inside = c < N
                    a = load_log2_weights(log_weights_ptr, b * N + c, inside)
                    offset = row_offset(slot, b, c, d, z_i, z_b, z_n, z_d, Z_ALIGN)
                    rows = softmax_rows(
                        z_ptr, z_scale_ptr, offset, shift_ptr, total_ptr, place * N + c,
                        inside, V, Z_BINS,
                    )  # fmt: skip
                    factor, log2_prob, _ = softmax_tile(
                        z_ptr, rows, begin, BLOCK_V, V, mask_id, TAIL, Z_BINS
                    )
                    if HAS_Q:
                        part = factor * tl.exp2(log2_prob + a[:, None] - peak[None, :])
                        sums = part * (q / tl.where(total == 0.0, 1.0, total))[None, :]
                        tl.store(mass_ptr + part_of * N + c, tl.sum(sums, axis=1), mask=inside)
                    if HAS_C:
                        if Z_BINS is not None:
                            log2_prob += tl.log2(factor)
                        gap = _divergence(qt[None, :], log2_qt[None, :], log2_prob)
                        gap = tl.where(inside[:, None], gap, 0.0)
                        tl.store(
                            divergence_ptr + part_of * N + c,
                            tl.sum(gap, axis=1) * LN_2,
                            mask=inside,
                        )

    if HAS_Q:
        tl.store(kl_t_ptr + part_of, tl.sum(kl_t, axis=0) * LN_2)
        if HAS_U:
            tl.store(kl_u_ptr + part_of, tl.sum(kl_u, axis=0) * LN_2)
    if ONE_TILE:
        if HAS_Q:
            tl.store(mass_ptr + part_of * N + n, tl.sum(mass, axis=1), mask=n < N)
        if HAS_C:
            sums = tl.sum(divergence, axis=1) * LN_2
            tl.store(divergence_ptr + part_of * N + n, sums, mask=n < N)


def mixture_forward(
    student,
    teacher,
    visit,
    mixture,
    statistics,
    *,
    q_teacher: Tensor | None,
    stored_teacher: bool,
    q_consistency: Tensor | None,
    q: Tensor | None,
) -> None:
    """Fill mass, divergences and KLs of `statistics` at the visited slots, and the rows of `q`.

    q_teacher, q_consistency and q are (slots, >= V) fp32 rows of the visit. With `stored_teacher`
    q_teacher is read, else it is written where it is given, and the teacher has one component.
    """
    if visit.slots == 0:
        return
    like = statistics.student.total
    tuned = launch_parameters("mixture_forward", like.device)
    components = student.components
    tiles = mixture_tiles(student, tuned)
    size = (visit.slots, tiles.splits)

    part = visit.part

    def parts(wanted: bool, whole: Tensor, *shape: int) -> Tensor:
        """Memory for the parts of the splits: with one split the statistics themselves."""
        if not wanted or tiles.splits == 1:
            return whole[part] if wanted else like
        # Zeros: slots that are not active leave nothing in them.
        return torch.zeros(*size, *shape, dtype=torch.float32, device=like.device)

    kl_teacher = parts(mixture.marginal, statistics.teacher_kl)
    has_u = mixture.marginal and q_consistency is not None
    kl_consistency = parts(has_u, statistics.consistency_kl)
    mass = parts(mixture.marginal, statistics.mass, components)
    divergence = parts(mixture.component, statistics.divergence, components)
    _mixture_forward_kernel[size](
        *pointers_of(student),
        *pointers_of(teacher),
        statistics.student.shift,
        statistics.student.total,
        statistics.teacher.shift,
        statistics.teacher.total,
        mixture.log_weights,
        mixture.teacher_weight,
        mixture.consistency_weight,
        *visit_arguments(visit, like)[:2],
        like if q_teacher is None else q_teacher,
        like if q_consistency is None else q_consistency,
        like if q is None else q,
        kl_teacher,
        kl_consistency,
        mass,
        divergence,
        visit.first,
        visit.slots,
        components,
        visit.positions,
        student.vocabulary,
        tiles.splits,
        tiles.split,
        -1 if mixture.mask_id is None else mixture.mask_id,
        *student.strides,
        *teacher.strides,
        *(0 if rows is None else rows.stride(0) for rows in (q_teacher, q_consistency, q)),
        Z_BINS=bins_flag(student),
        T_BINS=bins_flag(teacher),
        Z_ALIGN=load_align(student, tiles.block_n),
        T_ALIGN=load_align(teacher, tiles.block_n),
        **visit_flags(visit),
        HAS_Q=mixture.marginal,
        HAS_U=q_consistency is not None,
        HAS_C=mixture.component,
        STORED_T=stored_teacher,
        KEEP_Q=q is not None,
        KEEP_T=q_teacher is not None and not stored_teacher,
        ONE_TILE=tiles.one_tile,
        BLOCK_N=tiles.block_n,
        BLOCK_V=tiles.block_v,
        STAGES=tuned.stages,
        num_warps=tiles.warps,
    )
    if tiles.splits > 1:
        for whole, found in (
            (statistics.mass, mass),
            (statistics.teacher_kl, kl_teacher),
            (statistics.consistency_kl, kl_consistency),
            (statistics.divergence, divergence),
        ):
            if found is not like:
                whole[part] = found.sum(1)
