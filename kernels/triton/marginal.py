"""Marginal of a head: the weighted mean over components of softmax, one row per position.

Shapes: A slots, C components (M of a teacher, K draws), N components of the student, D positions,
V vocabulary.

    q[slot, v] (+)= weight_b mean_c softmax(x[c])_v         one-hot where xu[c] shows a token

and 0 at positions where the student allows no class. For the consistency draws this is q_u, for a
teacher q_T; two launches, the second adding, give q = teacher_weight q_T + consistency_weight q_u.
Mixture forward and backward read the one row that it leaves instead of C rows each, and need far
fewer registers than if they formed the mean themselves.

Moves: one read of the visited rows of x, one fp32 row of V per position written, and read
before if it is added to.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from .logistic import bins_flag, pointers_of
from .tiles import (
    COMPONENT_TILE,
    load_align,
    position_at,
    row_offset,
    softmax_rows,
    softmax_tile,
    split_position,
    visit_arguments,
    visit_flags,
)
from .tuning import launch_parameters, power_of_two, tunable


@tunable("marginal")
@dataclasses.dataclass(frozen=True)
class Marginal:
    elements: int = 2048  # of a tile, C · BLOCK_V, in 2 bytes; half as many in fp32
    warps: int = 1  # so that a thread holds whole columns, and sums over components need no other
    stages: int = 3
    split_columns: int = 4096  # columns of one program

    powers_of_two = ("elements", "warps", "split_columns")


@triton.jit
def _load_rows(
    x_ptr, scale_ptr, shift_ptr, total_ptr, xu_ptr, slot, place, b, d, c0, C, D, V, mask_id,
    stride_i, stride_b, stride_c, stride_d,
    BINS: tl.constexpr, ALIGN: tl.constexpr, HAS_XU: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The BLOCK_C components from c0 on for `softmax_tile`, without those that show a token; and
    the token that each shows, mask_id for none."""
    c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)
    hidden = c < C
    shown = tl.full([BLOCK_C], 0, tl.int32) + mask_id
    if HAS_XU:
        # int32: one comparison per element below
        shown = tl.load(xu_ptr + (b * C + c) * D + d, mask=hidden, other=mask_id).to(tl.int32)
        hidden = hidden & (shown == mask_id)
    offset = row_offset(slot, b, c, d, stride_i, stride_b, stride_c, stride_d, ALIGN)
    entry = place * C + c
    rows = softmax_rows(x_ptr, scale_ptr, offset, shift_ptr, total_ptr, entry, hidden, V, BINS)
    return rows, shown


@triton.jit
def _softmax_sum(
    x_ptr, rows, shown, begin, V, mask_id,
    BINS: tl.constexpr, HAS_XU: tl.constexpr, TAIL: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Sum over the rows of softmax, one-hot where a token is shown: [W]."""
    factor, log2_prob, _ = softmax_tile(x_ptr, rows, begin, W, V, mask_id, TAIL, BINS)
    total = tl.sum(factor * tl.exp2(log2_prob), axis=0)
    if HAS_XU:
        here = (shown != mask_id) & (shown >= begin) & (shown < begin + W)
        if tl.max(here.to(tl.int32), axis=0) == 1:  # few tiles hold a token that is shown
            cols = begin + tl.arange(0, W)
            one_hot = here[:, None] & (cols[None, :] == shown[:, None])
            total += tl.sum(one_hot.to(tl.float32), axis=0)
    return total


@triton.jit(do_not_specialize=["first", "slots"])
def _marginal_kernel(
    x_ptr,  # logits of the operand, or mu of its bins, in
    scale_ptr,  # log_scale of its bins, in
    shift_ptr,  # [A, C] fp32, in
    total_ptr,  # [A, C] fp32, in
    alive_ptr,  # [A, N] fp32, in: `total` of the student's rows
    weight_ptr,  # [B] fp32, in, with HAS_WEIGHT
    xu_ptr,  # [B, C, D] int64, in, with HAS_XU
    rows_ptr,
    count_ptr,
    q_ptr,  # [slots, V] fp32, out (in and out with ADD)
    first,
    slots,
    C,
    N,
    D,
    V,
    split,  # columns per program, a multiple of BLOCK_V
    mask_id,
    stride_i,
    stride_b,
    stride_c,
    stride_d,
    q_i,
    BINS: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_XU: tl.constexpr,
    ADD: tl.constexpr,
    SINGLE: tl.constexpr,  # all components in one tile
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The pass before this one went upwards: what it read last is still in the cache.
    slot = slots - 1 - tl.program_id(0).to(tl.int64)
    place, position, active = position_at(
        slot, slot >= 0, rows_ptr, count_ptr, first, HAS_ROWS, HAS_COUNT
    )
    if not active:
        return
    b, d = split_position(position, D)
    n = tl.arange(0, BLOCK_N)
    some = tl.load(alive_ptr + place * N + n, mask=n < N, other=0.0) != 0.0
    scale = 1.0 / C
    if HAS_WEIGHT:
        scale = scale * tl.load(weight_ptr + b)
    scale = tl.where(tl.max(some.to(tl.int32), axis=0) == 0, 0.0, scale)
    start = tl.program_id(1) * split
    stop = tl.minimum(start + split, V)
    full = start + (stop - start) // BLOCK_V * BLOCK_V
    if SINGLE:
        rows, shown = _load_rows(
            x_ptr, scale_ptr, shift_ptr, total_ptr, xu_ptr, slot, place, b, d, 0,
            C, D, V, mask_id, stride_i, stride_b, stride_c, stride_d, BINS, ALIGN, HAS_XU,
            BLOCK_C,
        )  # fmt: skip
    for TAIL in tl.static_range(2):
        for begin in tl.range(
            full if TAIL else start, stop if TAIL else full, BLOCK_V, num_stages=STAGES
        ):
            cols = begin + tl.arange(0, BLOCK_V)
            if SINGLE:  # without a loop inside, this one can be pipelined
                total = _softmax_sum(
                    x_ptr, rows, shown, begin, V, mask_id, BINS, HAS_XU, TAIL, BLOCK_V
                )
            else:
                total = tl.zeros([BLOCK_V], tl.float32)
                for c0 in range(0, C, BLOCK_C):
                    rows, shown = _load_rows(
                        x_ptr, scale_ptr, shift_ptr, total_ptr, xu_ptr, slot, place, b, d, c0,
                        C, D, V, mask_id, stride_i, stride_b, stride_c, stride_d, BINS, ALIGN,
                        HAS_XU, BLOCK_C,
                    )  # fmt: skip
                    total += _softmax_sum(
                        x_ptr, rows, shown, begin, V, mask_id, BINS, HAS_XU, TAIL, BLOCK_V
                    )
            q = total * scale
            keep = cols < V
            if ADD:
                q += tl.load(q_ptr + slot * q_i + cols, mask=keep, other=0.0)
            tl.store(q_ptr + slot * q_i + cols, q, mask=keep)


def marginal(
    operand,
    visit,
    mask_id: int | None,
    sums,
    alive: Tensor,
    q: Tensor,
    *,
    weight: Tensor | None = None,
    xu: Tensor | None = None,
    add: bool = False,
) -> None:
    """Fill `q` ((slots, >= V) fp32, rows are slots of the visit), or add to it.

    Equivalent PyTorch, without `xu`: `q = weight * x.softmax(-1).mean(1)`. `sums` are those of
    `row_statistics`; alive (A, N) is `total` of the student's; weight (B,); xu (B, C, D).
    """
    if visit.slots == 0:
        return
    tuned = launch_parameters("marginal", operand.logits.device)
    block_c = min(power_of_two(operand.components), COMPONENT_TILE)
    wide = max(1, block_c // 16)  # 32 components do not fit the registers of as few threads
    elements = tuned.elements * 2 // operand.logits.element_size()
    # One row alone is cut in two: 64 columns of it per thread spill 8 bytes on sm_100.
    block_v = max(1, min(power_of_two(operand.vocabulary), elements // max(block_c, 2)))
    split = max(tuned.split_columns, block_v)
    _marginal_kernel[(visit.slots, triton.cdiv(operand.vocabulary, split))](
        *pointers_of(operand),
        sums.shift,
        sums.total,
        alive,
        alive if weight is None else weight,
        alive if xu is None else xu,
        *visit_arguments(visit, alive)[:2],
        q,
        visit.first,
        visit.slots,
        operand.components,
        alive.shape[1],
        visit.positions,
        operand.vocabulary,
        split,
        -1 if mask_id is None else mask_id,
        *operand.strides,
        q.stride(0),
        BINS=bins_flag(operand),
        ALIGN=load_align(operand, block_c),
        **visit_flags(visit),
        HAS_WEIGHT=weight is not None,
        HAS_XU=xu is not None,
        ADD=add,
        SINGLE=block_c >= operand.components,
        BLOCK_C=block_c,
        BLOCK_N=power_of_two(alive.shape[1]),
        BLOCK_V=block_v,
        STAGES=tuned.stages,
        num_warps=min(tuned.warps * wide, power_of_two(max(1, block_c * block_v // 128))),
    )
