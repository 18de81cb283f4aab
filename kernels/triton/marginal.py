"""Marginal: the mean over components of softmax, the distribution that a mixture is pulled towards.

Shapes: B batch, C components (M of a teacher, K draws), D positions, V vocabulary.

    q[slot, v] = mean_c softmax(x[c])_v          one-hot where xu[c] shows a token

For the consistency draws this is q_u; for a teacher that is itself a mixture, q_T. Mixture forward
and backward read the one row that it leaves instead of C rows each, and need far fewer registers
than if they formed the mean themselves.

Moves: one read of the visited rows of x, one fp32 row of V per position written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._tl import mean_softmax_tile, position_at
from .operands import Operand, Visit, load_align
from .tuning import launch_parameters, power_of_two


@triton.jit
def _marginal_kernel(
    x_ptr,  # logits (or mu), in
    y_ptr,  # log_scale, in, for logistic kinds
    lse_ptr,  # [B * D, C] fp32, in
    xu_ptr,  # [B, C, D] int64, in, with HAS_XU
    rows_ptr,
    count_ptr,
    q_ptr,  # [slots, V] fp32, out
    first,
    slots,
    C,
    D,
    V,
    split,  # columns per program, a multiple of BLOCK_V
    mask_id,
    eps,
    stride_i,
    stride_b,
    stride_c,
    stride_d,
    q_i,
    KIND: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_XU: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The pass before this one went upwards: what it read last is still in the cache.
    slot = slots - 1 - tl.program_id(0).to(tl.int64)
    position, active = position_at(slot, slot >= 0, rows_ptr, count_ptr, first, HAS_ROWS)
    if not active:
        return
    start = tl.program_id(1) * split
    stop = tl.minimum(start + split, V)
    full = start + (stop - start) // BLOCK_V * BLOCK_V
    for TAIL in tl.static_range(2):
        for begin in tl.range(
            full if TAIL else start, stop if TAIL else full, BLOCK_V, num_stages=STAGES
        ):
            cols = begin + tl.arange(0, BLOCK_V)
            q = mean_softmax_tile(
                x_ptr, y_ptr, lse_ptr, xu_ptr, slot, position, C, D, cols, V, mask_id, eps,
                stride_i, stride_b, stride_c, stride_d,
                KIND, ALIGN, HAS_XU, TAIL, SINGLE, BLOCK_C, BLOCK_V,
            )  # fmt: skip
            tl.store(q_ptr + slot * q_i + cols, q, mask=(cols < V) if TAIL else None)


def marginal(
    operand: Operand,
    visit: Visit,
    positions: int,
    mask_id: int | None,
    lse: Tensor,
    q: Tensor,
    *,
    xu: Tensor | None = None,
) -> None:
    """Fill `q` ((slots, >= V) fp32, rows are slots of the visit) at active slots.

    Equivalent PyTorch, without `xu`: `q = x.softmax(-1).mean(1)`. `lse` (B·D, C) is that of
    `row_statistics` or `draw`; `xu` (B, C, D) as there.
    """
    if visit.slots == 0:
        return
    tuned = launch_parameters(operand.x.device)
    elements = tuned.marginal_elements if operand.kind == 0 else tuned.logistic_elements
    block_c = min(power_of_two(operand.components), tuned.component_tile)
    block_v = max(1, min(power_of_two(operand.vocabulary), elements // block_c))
    split = max(tuned.split_columns, block_v)
    rows, count, first, has_rows = visit.arguments(lse)
    _marginal_kernel[(visit.slots, triton.cdiv(operand.vocabulary, split))](
        operand.x,
        operand.y,
        lse,
        lse if xu is None else xu,
        rows,
        count,
        q,
        first,
        visit.slots,
        operand.components,
        positions,
        operand.vocabulary,
        split,
        -1 if mask_id is None else mask_id,
        operand.eps,
        *operand.strides,
        q.stride(0),
        KIND=operand.kind,
        ALIGN=load_align(operand, block_c),
        HAS_ROWS=has_rows,
        HAS_XU=xu is not None,
        SINGLE=block_c >= operand.components,
        BLOCK_C=block_c,
        BLOCK_V=block_v,
        STAGES=tuned.marginal_stages,
        num_warps=min(tuned.marginal_warps, power_of_two(max(1, block_c * block_v // 128))),
    )
