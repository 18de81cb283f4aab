"""Joint terms: what couples the positions, in one launch; the equations of `di4c_fast.loss.joint`.

Shapes: B examples, N components, J target rows, D positions, A slots, W slots of a tile. One
program per example and target row takes the slots of its example twice: once for the sums over
positions, which run in fp64, once for rho - w.

Moves: two reads of log_prob and one write of the difference, 4 A J N bytes each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .random import LOG2_E
from .tuning import power_of_two


@triton.jit
def _shares(
    log_prob_ptr, rows_ptr, alive_ptr, log_weights, begin, stop, b, j, N, J, D,
    HAS_ROWS: tl.constexpr, CORRELATION: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Of slots begin .. begin + W - 1: which are of example b and alive, where the target counts,
    and l - m + a, or l without correlation, [W, N]; with the offset of each."""
    slot = begin + tl.arange(0, W).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    mine = slot < stop
    if HAS_ROWS:
        mine = mine & (tl.load(rows_ptr + slot, mask=mine, other=-1) // D == b)
    mine = mine & (tl.load(alive_ptr + slot, mask=mine, other=0) != 0)
    entry = (slot[:, None] * J + j) * N + n[None, :]
    inside = mine[:, None] & (n < N)[None, :]
    share = tl.load(log_prob_ptr + entry, mask=inside, other=float("-inf"))
    counted = mine
    if CORRELATION:
        share += log_weights[None, :]
        peak = tl.max(share, axis=1)  # without any NaN; a sum has it
        sums = tl.sum(tl.where(inside, share, 0.0), axis=1)
        counted = counted & ((peak > float("-inf")) | (sums != sums))
        peak = tl.where(peak > float("-inf"), peak, 0.0)[:, None]
        total = tl.sum(tl.exp2((share - peak) * LOG2_E), axis=1)
        share = share - peak - tl.log(tl.where(counted, total, 1.0))[:, None]
    return mine, counted, share, entry, inside


@triton.jit(do_not_specialize=["A"])
def _joint_kernel(
    log_prob_ptr,  # [A, J, N] fp32, in
    alive_ptr,  # [A] bool, in
    log_weights_ptr,  # [B, N] fp32, in
    rows_ptr,  # [A] int64, in, with HAS_ROWS
    value_ptr,  # [B, J] fp64, out
    difference_ptr,  # [A, J, N] fp32, out
    weights_ptr,  # [B, J, N] fp32, out
    counted_ptr,  # [B, J] fp32, out
    A,
    N,
    J,
    D,
    HAS_ROWS: tl.constexpr,
    CORRELATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    W: tl.constexpr,
):
    b, j = (tl.program_id(0) // J).to(tl.int64), tl.program_id(0) % J
    n = tl.arange(0, BLOCK_N)
    a = tl.load(log_weights_ptr + b * N + n, mask=n < N, other=float("-inf"))
    # Of a component of weight 0 the share is -inf already.
    present = tl.where((a == float("-inf")) | (not CORRELATION), 0.0, a)
    start = 0
    stop = A
    if not HAS_ROWS:
        start = b * D
        stop = start + D
    joint = a.to(tl.float64)
    occupied = 0
    number = 0
    for begin in range(start, stop, W):
        mine, counted, share, _, _ = _shares(
            log_prob_ptr, rows_ptr, alive_ptr, a, begin, stop, b, j, N, J, D,
            HAS_ROWS, CORRELATION, BLOCK_N, W,
        )  # fmt: skip
        share = tl.where(counted[:, None], share - present[None, :], 0.0)
        joint += tl.sum(share.to(tl.float64), axis=0)
        occupied += tl.sum(mine.to(tl.int32), axis=0)
        number += tl.sum(counted.to(tl.int32), axis=0)
    sums = tl.sum(tl.where(n < N, joint, 0.0), axis=0)  # NaN if any is
    joint = tl.where(n < N, joint, float("-inf"))
    peak = tl.max(joint, axis=0)
    possible = (peak > float("-inf")) | (sums != sums)
    peak = tl.where(peak > float("-inf"), peak, 0.0)
    part = tl.exp(joint - peak)
    total = tl.sum(part, axis=0)
    defined = (occupied > 0) & possible
    value = tl.where(possible, -(peak + tl.log(total)), float("inf"))
    weights = tl.where(defined, part / total, 0.0).to(tl.float32)
    row = b * J + j
    tl.store(value_ptr + row, tl.where(occupied > 0, value, 0.0))
    tl.store(weights_ptr + row * N + n, weights, mask=n < N)
    tl.store(counted_ptr + row, tl.where(defined, number, 0).to(tl.float32))
    for begin in range(start, stop, W):
        mine, counted, share, entry, inside = _shares(
            log_prob_ptr, rows_ptr, alive_ptr, a, begin, stop, b, j, N, J, D,
            HAS_ROWS, CORRELATION, BLOCK_N, W,
        )  # fmt: skip
        rho = -weights[None, :]
        if CORRELATION:
            rho += tl.exp2(share * LOG2_E)
        rho = tl.where((counted & defined)[:, None], rho, 0.0)
        tl.store(difference_ptr + entry, rho, mask=inside)


def joint_rows(
    log_prob: Tensor,
    alive: Tensor,
    log_weights: Tensor,
    places: Any,  # Places
    correlation: bool,
    out: Any,  # Joint
) -> Tensor:
    """See `joint_terms` of `di4c_fast.loss.joint`."""
    slots, targets, components = log_prob.shape
    batch, rows = log_weights.shape[0], places.rows
    value = log_prob.new_empty(batch, targets, dtype=torch.float64)
    out.difference.zero_()  # where no program counts a slot among its own
    if batch * targets == 0:
        return value
    block_n = power_of_two(components)
    _joint_kernel[(batch * targets,)](
        log_prob,
        alive,
        log_weights.contiguous(),  # equal weights are one number
        alive if rows is None else rows,
        value,
        out.difference,
        out.weights,
        out.counted,
        slots,
        components,
        targets,
        places.sizes[1],
        HAS_ROWS=rows is not None,
        CORRELATION=correlation,
        BLOCK_N=block_n,
        W=max(1, 2048 // block_n),
        num_warps=4,
    )
    return value
