"""Row statistics: the parts of the logsumexp of every row, and log-probabilities of the targets.

Shapes: A slots, C components, D positions, V vocabulary, J targets per position, R rows of a tile.

    shift[s,c]      = max_v x[c,v]        total[s,c] = sum_v exp(x[c,v] - shift)
    log_prob[s,j,c] = x[c, token_j] - shift - log total

without column mask_id; shift and total are 0 in a row without a class.

Moves: one read of the visited rows of x, 8 bytes written per row and 4 per (row, target).
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from .logistic import bins_flag, bins_logits, bins_of_rows, bins_tile, pointers_of
from .random import LN_2, LOG2_E
from .tiles import (
    LOWEST,
    align_of,
    block_columns,
    position_at,
    row_offset,
    split_position,
    visit_arguments,
    visit_flags,
    widened,
)
from .tuning import launch_parameters, power_of_two, tunable


@tunable("row_statistics")
@dataclasses.dataclass(frozen=True)
class RowStatistics:
    elements: int = 2048  # of 2 bytes in a tile, half as many of fp32: as many bytes in flight
    warps: int = 2
    stages: int = 2  # blocks of columns on their way from memory

    powers_of_two = ("elements", "warps")


@triton.jit(do_not_specialize=["first", "slots"])
def _row_statistics_kernel(
    x_ptr,  # logits of the operand, or mu of its bins, in
    scale_ptr,  # log_scale of its bins, in
    tokens_ptr,  # [B, J, D] int64, in, with HAS_TARGETS
    rows_ptr,  # [A] int64, in, with HAS_ROWS
    count_ptr,  # [] int64, in, with HAS_COUNT
    shift_ptr,  # [A, C] fp32, out
    total_ptr,  # [A, C] fp32, out
    log_prob_ptr,  # [A, J, C] fp32, out, with HAS_TARGETS
    first,
    slots,
    C,
    J,
    D,
    V,
    mask_id,
    stride_i,
    stride_b,
    stride_c,
    stride_d,
    BINS: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    W: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Rows fit in 32 bits (their elements need not), and 32-bit division is far cheaper.
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot, c = (row // C).to(tl.int64), (row % C).to(tl.int64)
    place, position, wanted = position_at(
        slot, slot < slots, rows_ptr, count_ptr, first, HAS_ROWS, HAS_COUNT
    )
    if tl.max(wanted.to(tl.int32), axis=0) == 0:
        return
    b, d = split_position(position, D)
    offset = row_offset(slot, b, c, d, stride_i, stride_b, stride_c, stride_d, ALIGN)

    # Every lane of W columns keeps its own maximum and sum; they meet once, after the loop. A
    # thread holds K columns of each lane, so that the maximum of a lane moves once in K logits.
    K: tl.constexpr = BLOCK_V // W
    column = tl.arange(0, K)[:, None, None] * W + tl.arange(0, W)[None, None, :]
    at = x_ptr + offset[None, :, None] + column
    UNIT: tl.constexpr = LOG2_E if BINS is None else 1.0  # exponents of bins are to base 2
    if BINS is not None:
        there = wanted[None, :, None]
        bins = bins_of_rows(x_ptr, scale_ptr, offset[None, :, None], there, V)
    peak = tl.full([BLOCK_R, W], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R, W], tl.float32)
    full = V // BLOCK_V * BLOCK_V
    for TAIL in tl.static_range(2):
        for begin in tl.range(full if TAIL else 0, V if TAIL else full, BLOCK_V, num_stages=STAGES):
            keep = wanted[None, :, None]
            if TAIL:
                keep = keep & (begin + column < V)
            if BINS is None:
                factor = 1.0
                x = widened(tl.load(at + begin, mask=keep, other=float("-inf")))  # [K, R, W]
            else:
                _, factor, x = bins_tile(bins, begin + column, V, BINS)
                x = tl.where(keep, x, float("-inf"))
            if (mask_id >= begin) & (mask_id < begin + BLOCK_V):
                x = tl.where(begin + column == mask_id, float("-inf"), x)
            top = tl.maximum(peak, tl.max(x, axis=0))
            total *= tl.exp2((peak - top) * UNIT)
            total += tl.sum(factor * tl.exp2((x - top[None, :, :]) * UNIT), axis=0)
            peak = top
    top = tl.max(peak, axis=1)
    sums = tl.sum(total * tl.exp2((peak - top[:, None]) * UNIT), axis=1)
    shift = tl.where(sums == 0.0, 0.0, top if BINS is None else top * LN_2)
    tl.store(shift_ptr + place * C + c, shift, mask=wanted)
    tl.store(total_ptr + place * C + c, sums, mask=wanted)

    if HAS_TARGETS:
        log_total = tl.log(tl.where(sums == 0.0, 1.0, sums))
        for begin in range(0, J, BLOCK_J):
            j = begin + tl.arange(0, BLOCK_J)
            inside = wanted[:, None] & (j < J)[None, :]
            where_j = (b[:, None] * J + j[None, :]) * D + d[:, None]
            tokens = tl.load(tokens_ptr + where_j, mask=inside, other=0)
            readable = inside & (tokens != mask_id) & (tokens < V)
            if BINS is None:
                x = tl.load(x_ptr + offset[:, None] + tokens, mask=readable, other=float("-inf"))
            else:
                x = bins_logits(x_ptr, scale_ptr, offset[:, None], readable, tokens, V, BINS)
                x = tl.where(readable, x, float("-inf"))
            log_prob = x.to(tl.float32) - shift[:, None] - log_total[:, None]
            entry = (place[:, None] * J + j[None, :]) * C + c[:, None]
            tl.store(log_prob_ptr + entry, log_prob, mask=inside)


def row_statistics(
    operand,
    visit,
    mask_id: int | None,
    sums,
    *,
    tokens: Tensor | None = None,
    log_prob: Tensor | None = None,
) -> None:
    """Fill `sums` (a `RowSums`) and, with `tokens` (B, J, D), `log_prob` (A, J, C).

    Equivalent PyTorch: `shift = x.amax(-1)`, `total = (x - shift).exp().sum(-1)`,
    `log_prob = x.log_softmax(-1).gather(-1, tokens)`.
    """
    rows = visit.slots * operand.components
    if rows == 0:
        return
    tuned = launch_parameters("row_statistics", operand.logits.device)
    align = align_of(operand)
    elements = tuned.elements * 2 // operand.logits.element_size()
    block_v = block_columns(operand.vocabulary, elements)
    block_r = max(1, min(elements // block_v, 16)) if block_v >= operand.vocabulary else 1
    warps = 1 if operand.bins is not None else min(tuned.warps, max(1, block_v * block_r // 256))
    lanes = min(block_v, 32 * warps * max(align, 4 // operand.logits.element_size()))
    targets = 0 if tokens is None else tokens.shape[1]
    like = sums.total
    _row_statistics_kernel[(triton.cdiv(rows, block_r),)](
        *pointers_of(operand),
        like if tokens is None else tokens,
        *visit_arguments(visit, like)[:2],
        sums.shift,
        sums.total,
        like if log_prob is None else log_prob,
        visit.first,
        visit.slots,
        operand.components,
        targets,
        visit.positions,
        operand.vocabulary,
        -1 if mask_id is None else mask_id,
        *operand.strides,
        BINS=bins_flag(operand),
        ALIGN=align,
        **visit_flags(visit),
        HAS_TARGETS=tokens is not None and targets > 0,
        BLOCK_R=block_r,
        BLOCK_V=block_v,
        W=lanes,
        BLOCK_J=max(1, min(power_of_two(max(targets, 1)), 32)),
        STAGES=tuned.stages,
        num_warps=warps,
    )
