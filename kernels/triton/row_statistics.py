"""Row statistics: the logsumexp of every row, and the log-probabilities of the target tokens.

Shapes: B batch, N components, D positions, V vocabulary, J targets per position, R rows of a tile.

    lse[b,d,n]      = logsumexp_v z[b,n,d,v]          without column mask_id
    picked[b,d,j,n] = z[b,n,d,x[b,j,d]] - lse[b,d,n]

Moves: one read of the visited rows of z, 4 bytes written per row and per (row, target).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tl import LOGITS, logits_at, logits_tile, position_at, row_offset, split_position
from .operands import Operand, Visit
from .tuning import launch_parameters, power_of_two


@triton.jit
def _row_statistics_kernel(
    x_ptr,  # logits of the operand, or mu; in
    y_ptr,  # log_scale of a logistic operand; in
    tokens_ptr,  # [B, J, D] int64, in, with HAS_TARGETS
    xu_ptr,  # [B, N, D] int64, in, with HAS_XU: rows that show a token are skipped
    rows_ptr,  # [B * D] int64, in, with HAS_ROWS
    count_ptr,  # [] int64, in, with HAS_ROWS
    lse_ptr,  # [B * D, N] fp32, out
    picked_ptr,  # [B * D, J, N] fp32, out, with HAS_TARGETS
    first,
    slots,
    N,
    J,
    D,
    V,
    mask_id,
    eps,
    stride_i,
    stride_b,
    stride_n,
    stride_d,
    KIND: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_XU: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Rows fit in 32 bits (their elements need not), and 32-bit division is far cheaper.
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot, n = (row // N).to(tl.int64), (row % N).to(tl.int64)
    position, wanted = position_at(slot, slot < slots, rows_ptr, count_ptr, first, HAS_ROWS)
    b, d = split_position(position, D)
    if HAS_XU:
        shown = tl.load(xu_ptr + (b * N + n) * D + d, mask=wanted, other=-1)
        wanted = wanted & (shown == mask_id)
    if tl.max(wanted.to(tl.int32), axis=0) == 0:
        return
    offset = row_offset(slot, position, n, D, stride_i, stride_b, stride_n, stride_d, ALIGN)

    # Every lane keeps its own maximum and sum; they meet once, after the loop.
    peak = tl.full([BLOCK_R, BLOCK_V], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    full = V // BLOCK_V * BLOCK_V
    for TAIL in tl.static_range(2):
        for begin in tl.range(full if TAIL else 0, V if TAIL else full, BLOCK_V, num_stages=STAGES):
            cols = begin + tl.arange(0, BLOCK_V)
            z = logits_tile(x_ptr, y_ptr, offset, wanted, cols, V, mask_id, eps, KIND, TAIL)
            # One exponential per element: of minus the distance to the larger of the two.
            ratio = tl.exp(-tl.abs(z - peak))
            total = tl.where(z > peak, total * ratio + 1.0, total + ratio)
            peak = tl.maximum(peak, z)
    top = tl.max(peak, axis=1)
    lse = top + tl.log(tl.sum(total * tl.exp(peak - top[:, None]), axis=1))
    tl.store(lse_ptr + position * N + n, lse, mask=wanted)

    if HAS_TARGETS:
        alive = lse > float("-inf")
        shift = tl.where(alive, lse, 0.0)[:, None]
        for begin in range(0, J, BLOCK_J):
            j = begin + tl.arange(0, BLOCK_J)
            inside = wanted[:, None] & (j < J)[None, :]
            where_j = (b[:, None] * J + j[None, :]) * D + d[:, None]
            tokens = tl.load(tokens_ptr + where_j, mask=inside, other=0)
            readable = inside & alive[:, None]
            z = logits_at(x_ptr, y_ptr, offset[:, None], tokens, readable, V, mask_id, eps, KIND)
            entry = (position[:, None] * J + j[None, :]) * N + n[:, None]
            tl.store(picked_ptr + entry, z - shift, mask=inside)


def row_statistics(
    operand: Operand,
    visit: Visit,
    positions: int,
    mask_id: int | None,
    lse: Tensor,
    *,
    tokens: Tensor | None = None,
    picked: Tensor | None = None,
    xu: Tensor | None = None,
) -> None:
    """Fill `lse` (B·D, N) and, with `tokens` (B, J, D), `picked` (B·D, J, N) at visited positions.

    Equivalent PyTorch: `lse = z.logsumexp(-1)`; `picked = z.log_softmax(-1).gather(-1, tokens)`.
    Rows without any class have lse = -inf and picked = -inf. With `xu` (B, N, D) rows that show a
    token (xu != mask_id) are left out.
    """
    total = visit.slots * operand.components
    if total == 0:
        return
    tuned = launch_parameters(operand.x.device)
    # As many bytes in flight whatever the dtype. Bins take registers of their own.
    elements = tuned.row_elements * 2 // operand.x.element_size()
    if operand.kind != LOGITS:
        elements = tuned.logistic_elements // 2
    block_v = max(1, min(power_of_two(operand.vocabulary), elements))
    block_r = max(1, elements // block_v)
    targets = 0 if tokens is None else tokens.shape[1]
    rows, count, first, has_rows = visit.arguments(lse)
    grid = (triton.cdiv(total, block_r),)
    _row_statistics_kernel[grid](
        operand.x,
        operand.y,
        lse if tokens is None else tokens,
        lse if xu is None else xu,
        rows,
        count,
        lse,
        lse if picked is None else picked,
        first,
        visit.slots,
        operand.components,
        targets,
        positions,
        operand.vocabulary,
        -1 if mask_id is None else mask_id,
        operand.eps,
        *operand.strides,
        KIND=operand.kind,
        ALIGN=operand.align,
        HAS_ROWS=has_rows,
        HAS_XU=xu is not None,
        HAS_TARGETS=tokens is not None,
        BLOCK_R=block_r,
        BLOCK_V=block_v,
        BLOCK_J=max(1, min(power_of_two(max(targets, 1)), 32)),
        STAGES=tuned.row_stages,
        num_warps=tuned.row_warps,
    )


def new_statistics(count: int, components: int, device: torch.device) -> Tensor:
    """An uninitialised (count, components) fp32 buffer for logsumexps."""
    return torch.empty(count, components, dtype=torch.float32, device=device)
