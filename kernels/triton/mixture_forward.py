"""Mixture forward: marginals, divergences and responsibilities of every visited position.

Shapes: B batch, N student components, D positions, V vocabulary, S splits of the vocabulary. With
l = z - lse and log-weights a, per position:

    m_v   = logsumexp_n(a_n + l_nv)                r_nv = exp(a_n + l_nv - m_v)
    q_v   = teacher_weight qT_v + consistency_weight qu_v
    kl_teacher     = sum_v qT_v (log qT_v - m_v)   kl_consistency the same of qu
    mass_n         = sum_v q_v r_nv
    divergence_n   = sum_v qT_v (log qT_v - l_nv)

qu and, for a teacher of several components, qT are rows that `marginal` has left; an ordinary
teacher's qT is formed from its logits on the way. Each program leaves its split's part of the sums,
so results repeat exactly.

Moves: one read of the visited rows of z, one row of V per position for each of qT and qu.
"""

from __future__ import annotations

import dataclasses

import torch
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
from .operands import Operand, Visit, load_align
from .tuning import LaunchParameters, launch_parameters, power_of_two


@triton.jit
def _mixture_forward_kernel(
    z_ptr,  # student logits (or mu), in
    zy_ptr,  # student log_scale, in, for logistic kinds
    t_ptr,  # teacher logits (or mu), in, with T_SOURCE TEACHER
    ty_ptr,
    lse_ptr,  # [B * D, N] fp32, in
    lse_t_ptr,  # [B * D] fp32, in, with T_SOURCE TEACHER
    log_weights_ptr,  # [B, N] fp32, in
    teacher_weight_ptr,  # [B] fp32, in
    consistency_weight_ptr,  # [B] fp32, in, with HAS_U
    rows_ptr,
    count_ptr,
    qt_ptr,  # [slots, V] fp32, in, with T_SOURCE STORED
    qu_ptr,  # [slots, V] fp32, in, with HAS_U
    kl_t_ptr,  # [B * D, S] fp32, out, with HAS_Q
    kl_u_ptr,  # [B * D, S] fp32, out, with HAS_Q and HAS_U
    mass_ptr,  # [B * D, S, N] fp32, out, with HAS_Q
    divergence_ptr,  # [B * D, S, N] fp32, out, with HAS_C
    first,
    slots,
    N,
    D,
    V,
    S,
    split,  # columns per split, a multiple of BLOCK_V
    mask_id,
    z_eps,
    t_eps,
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
    Z_ALIGN: tl.constexpr,
    T_ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_Q: tl.constexpr,  # the marginal divergences are asked for
    HAS_U: tl.constexpr,
    HAS_C: tl.constexpr,  # the component divergence is asked for
    T_SOURCE: tl.constexpr,
    ONE_TILE: tl.constexpr,  # all components in one tile; else one block of columns per split
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    position, active = position_at(slot, slot < slots, rows_ptr, count_ptr, first, HAS_ROWS)
    if not active:
        return
    b, _ = split_position(position, D)
    place = position * S + s
    if HAS_Q:
        teacher_weight = tl.load(teacher_weight_ptr + b)
        if HAS_U:
            consistency_weight = tl.load(consistency_weight_ptr + b)

    lse_t = 0.0
    t_offset = slot
    if T_SOURCE == 2:
        lse_t = load_logsumexp(lse_t_ptr + position, active)
        t_offset = row_offset(slot, position, 0, D, t_i, t_b, t_m, t_d, T_ALIGN)
    qt_row = qt_ptr + slot * qt_i
    qu_row = qu_ptr + slot * qu_i

    n = tl.arange(0, BLOCK_N)
    kl_t = tl.zeros([BLOCK_V], tl.float32)
    kl_u = tl.zeros([BLOCK_V], tl.float32)
    mass = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    divergence = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    dead = 1.0
    if ONE_TILE:
        inside = n < N
        lse = load_logsumexp(lse_ptr + position * N + n, inside)
        a = tl.load(log_weights_ptr + b * N + n, mask=inside, other=float("-inf"))
        offset = row_offset(slot, position, n.to(tl.int64), D, z_i, z_b, z_n, z_d, Z_ALIGN)
        dead = tl.where(tl.min(lse, axis=0) == float("inf"), 0.0, 1.0)

    start = s * split
    stop = tl.minimum(start + split, V)
    full = start + (stop - start) // BLOCK_V * BLOCK_V
    for TAIL in tl.static_range(2):
        for begin in tl.range(
            full if TAIL else start, stop if TAIL else full, BLOCK_V, num_stages=STAGES
        ):
            cols = begin + tl.arange(0, BLOCK_V)
            qt = distribution_tile(
                qt_row, t_ptr, ty_ptr, t_offset, lse_t, cols, V, mask_id, t_eps,
                T_SOURCE, T_KIND, TAIL,
            )  # fmt: skip
            log_qt = tl.log(qt)
            q = qt
            if HAS_Q:
                q = teacher_weight * qt
                if HAS_U:
                    qu = distribution_tile(
                        qu_row, t_ptr, ty_ptr, t_offset, lse_t, cols, V, mask_id, t_eps,
                        1, T_KIND, TAIL,
                    )  # fmt: skip
                    q += consistency_weight * qu

            if ONE_TILE:
                z = logits_tile(
                    z_ptr, zy_ptr, offset, inside, cols, V, mask_id, z_eps, Z_KIND, TAIL
                )
                log_prob = z - lse[:, None]
                if HAS_Q:
                    weighted = log_prob + a[:, None]
                    peak = tl.max(weighted, axis=0)
                    peak = tl.where(peak == float("-inf"), 0.0, peak)
                    part = tl.exp(weighted - peak[None, :])
                    total = tl.sum(part, axis=0)
                    m = peak + tl.log(total)
                    # The largest part is 1, so a total below 1 is 0: no component has the class.
                    mass += part * (q / tl.maximum(total, 1.0))[None, :]
                    kl_t += tl.where(qt > 0.0, qt * (log_qt - m), 0.0)
                    if HAS_U:
                        kl_u += tl.where(qu > 0.0, qu * (tl.log(qu) - m), 0.0)
                if HAS_C:
                    gap = qt[None, :] * (log_qt[None, :] - log_prob)
                    divergence += tl.where((qt > 0.0)[None, :] & inside[:, None], gap, 0.0)
            else:
                # Two runs over the components: m first, then what needs it.
                peak = tl.full([BLOCK_V], -3.0e38, tl.float32)
                total = tl.zeros([BLOCK_V], tl.float32)
                lowest = float("inf")
                if HAS_Q:
                    for n0 in range(0, N, BLOCK_N):
                        c = n0 + n.to(tl.int64)
                        inside = c < N
                        lse = load_logsumexp(lse_ptr + position * N + c, inside)
                        a = tl.load(log_weights_ptr + b * N + c, mask=inside, other=float("-inf"))
                        offset = row_offset(slot, position, c, D, z_i, z_b, z_n, z_d, Z_ALIGN)
                        z = logits_tile(
                            z_ptr, zy_ptr, offset, inside, cols, V, mask_id, z_eps, Z_KIND, TAIL
                        )
                        weighted = z - lse[:, None] + a[:, None]
                        top = tl.maximum(peak, tl.max(weighted, axis=0))
                        total = total * tl.exp(peak - top)
                        total += tl.sum(tl.exp(weighted - top[None, :]), axis=0)
                        peak = top
                m = tl.where(total > 0.0, peak + tl.log(total), float("-inf"))
                finite = tl.where(total > 0.0, m, 0.0)
                if HAS_Q:
                    kl_t += tl.where(qt > 0.0, qt * (log_qt - m), 0.0)
                    if HAS_U:
                        kl_u += tl.where(qu > 0.0, qu * (tl.log(qu) - m), 0.0)
                for n0 in range(0, N, BLOCK_N):
                    c = n0 + n.to(tl.int64)
                    inside = c < N
                    lse = load_logsumexp(lse_ptr + position * N + c, inside)
                    lowest = tl.minimum(lowest, tl.min(lse, axis=0))
                    a = tl.load(log_weights_ptr + b * N + c, mask=inside, other=float("-inf"))
                    offset = row_offset(slot, position, c, D, z_i, z_b, z_n, z_d, Z_ALIGN)
                    z = logits_tile(
                        z_ptr, zy_ptr, offset, inside, cols, V, mask_id, z_eps, Z_KIND, TAIL
                    )
                    log_prob = z - lse[:, None]
                    if HAS_Q:
                        part = tl.exp(log_prob + a[:, None] - finite[None, :])
                        sums = tl.sum(part * q[None, :], axis=1)
                        tl.store(mass_ptr + place * N + c, sums, mask=inside)
                    if HAS_C:
                        gap = qt[None, :] * (log_qt[None, :] - log_prob)
                        gap = tl.where((qt > 0.0)[None, :] & inside[:, None], gap, 0.0)
                        sums = tl.sum(gap, axis=1)
                        tl.store(divergence_ptr + place * N + c, sums, mask=inside)
                dead = tl.where(lowest == float("inf"), 0.0, 1.0)

    # A position without any class in any component counts for nothing, not for infinity.
    if HAS_Q:
        tl.store(kl_t_ptr + place, tl.where(dead == 0.0, 0.0, tl.sum(kl_t, axis=0)))
        if HAS_U:
            tl.store(kl_u_ptr + place, tl.where(dead == 0.0, 0.0, tl.sum(kl_u, axis=0)))
    if ONE_TILE:
        if HAS_Q:
            tl.store(mass_ptr + place * N + n, tl.sum(mass, axis=1), mask=n < N)
        if HAS_C:
            sums = tl.where(dead == 0.0, 0.0, tl.sum(divergence, axis=1))
            tl.store(divergence_ptr + place * N + n, sums, mask=n < N)


# Values of `T_SOURCE`: where the teacher's distribution comes from.
STORED, TEACHER = 1, 2


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of the mixture kernels for one problem."""

    one_tile: bool
    block_n: int
    block_v: int
    split: int
    splits: int
    warps: int


def mixture_tiles(
    components: int, vocabulary: int, elements: int, warps: int, tuned: LaunchParameters
) -> Tiles:
    """All components in a tile up to `component_tile`; beyond, one block of columns per split."""
    one_tile = components <= tuned.component_tile
    block_n = power_of_two(min(components, tuned.component_tile))
    block_v = max(1, min(power_of_two(vocabulary), elements // block_n))
    split = max(tuned.split_columns, block_v) if one_tile else block_v
    splits = triton.cdiv(vocabulary, split)
    if one_tile:  # even splits
        split = triton.cdiv(triton.cdiv(vocabulary, splits), block_v) * block_v
        splits = triton.cdiv(vocabulary, split)
    # A warp should have at least 128 elements: small tiles of single components need few.
    most = max(1, block_n * block_v // 128)
    return Tiles(one_tile, block_n, block_v, split, splits, min(warps, power_of_two(most)))


@dataclasses.dataclass(frozen=True)
class ForwardSums:
    """What mixture forward leaves; parts of S splits, unwritten at positions not visited."""

    kl_teacher: Tensor  # [B * D, S] fp32
    kl_consistency: Tensor  # [B * D, S] fp32
    mass: Tensor  # [B * D, S, N] fp32
    divergence: Tensor  # [B * D, S, N] fp32
    tiles: Tiles


def new_forward_sums(
    positions: int,
    components: int,
    vocabulary: int,
    logistic: bool,
    device: torch.device,
    *,
    has_q: bool,
    has_u: bool,
    has_c: bool,
) -> ForwardSums:
    """Buffers for `mixture_forward` over `positions` = B·D positions; empty where not asked for."""
    tuned = launch_parameters(device)
    warps = tuned.logistic_warps if logistic else tuned.forward_warps
    elements = tuned.logistic_elements if logistic else tuned.forward_elements
    tiles = mixture_tiles(components, vocabulary, elements, warps, tuned)

    def buffer(wanted: bool, *shape: int) -> Tensor:
        return torch.empty(shape if wanted else (0,), dtype=torch.float32, device=device)

    size = (positions, tiles.splits)
    return ForwardSums(
        buffer(has_q, *size),
        buffer(has_q and has_u, *size),
        buffer(has_q, *size, components),
        buffer(has_c, *size, components),
        tiles,
    )


def mixture_forward(
    student: Operand,
    teacher: Operand,
    visit: Visit,
    positions: int,
    mask_id: int | None,
    *,
    lse: Tensor,
    lse_teacher: Tensor,
    log_weights: Tensor,
    teacher_weight: Tensor,
    consistency_weight: Tensor,
    sums: ForwardSums,
    has_q: bool,
    has_c: bool,
    q_teacher: Tensor | None = None,
    q_consistency: Tensor | None = None,
) -> None:
    """Fill `sums` at the visited positions.

    `positions` is D. `q_teacher` and `q_consistency` are (slots, >= V) fp32, as `marginal` leaves
    them; without `q_teacher` the teacher has one component. Weights are (B,) fp32, `log_weights`
    (B, N) fp32.
    """
    if visit.slots == 0 or not (has_q or has_c):
        return
    tiles = sums.tiles
    tuned = launch_parameters(student.x.device)
    rows, count, first, has_rows = visit.arguments(lse)
    _mixture_forward_kernel[(visit.slots, tiles.splits)](
        student.x,
        student.y,
        teacher.x,
        teacher.y,
        lse,
        lse_teacher,
        log_weights,
        teacher_weight,
        consistency_weight,
        rows,
        count,
        lse if q_teacher is None else q_teacher,
        lse if q_consistency is None else q_consistency,
        sums.kl_teacher,
        sums.kl_consistency,
        sums.mass,
        sums.divergence,
        first,
        visit.slots,
        student.components,
        positions,
        student.vocabulary,
        tiles.splits,
        tiles.split,
        -1 if mask_id is None else mask_id,
        student.eps,
        teacher.eps,
        *student.strides,
        *teacher.strides,
        0 if q_teacher is None else q_teacher.stride(0),
        0 if q_consistency is None else q_consistency.stride(0),
        Z_KIND=student.kind,
        T_KIND=teacher.kind,
        Z_ALIGN=load_align(student, tiles.block_n),
        T_ALIGN=load_align(teacher, tiles.block_n),
        HAS_ROWS=has_rows,
        HAS_Q=has_q,
        HAS_U=q_consistency is not None,
        HAS_C=has_c,
        T_SOURCE=TEACHER if q_teacher is None else STORED,
        ONE_TILE=tiles.one_tile,
        BLOCK_N=tiles.block_n,
        BLOCK_V=tiles.block_v,
        STAGES=tuned.forward_stages,
        num_warps=tiles.warps,
    )
