"""Order of positions: the active ones first, and how many those are, in one launch.

Shapes: A positions, W of a tile. One program takes all positions twice: once for their number, once
for the place of each. Within both groups the order is kept.

Moves: A bytes read twice, 8 A written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_POSITIONS = 1 << 15  # one program; a sort is faster beyond
TILE = 1024


@triton.jit(do_not_specialize=["A"])
def _order_kernel(
    active_ptr,  # [A] bool, in
    rows_ptr,  # [A] int64, out
    count_ptr,  # [] int64, out
    A,
    W: tl.constexpr,
):
    count = tl.full([], 0, tl.int32)
    for begin in range(0, A, W):
        position = begin + tl.arange(0, W)
        active = tl.load(active_ptr + position, mask=position < A, other=0) != 0
        count += tl.sum(active.to(tl.int32), axis=0)
    tl.store(count_ptr, count.to(tl.int64))
    before = 0
    for begin in range(0, A, W):
        position = begin + tl.arange(0, W)
        active = tl.load(active_ptr + position, mask=position < A, other=0) != 0
        ahead = before + tl.cumsum(active.to(tl.int32), axis=0)  # active ones up to and with this
        place = tl.where(active, ahead - 1, count + position - ahead)
        tl.store(rows_ptr + place, position.to(tl.int64), mask=position < A)
        before += tl.sum(active.to(tl.int32), axis=0)


def order(active: Tensor) -> tuple[Tensor, Tensor]:
    """`order_positions` of `di4c_fast.loss.plan` for up to MAX_POSITIONS positions."""
    flat = active.reshape(-1)
    rows = torch.empty(flat.shape, dtype=torch.int64, device=flat.device)
    count = torch.empty((), dtype=torch.int64, device=flat.device)
    _order_kernel[(1,)](flat.contiguous(), rows, count, len(flat), W=TILE, num_warps=4)
    return rows, count
