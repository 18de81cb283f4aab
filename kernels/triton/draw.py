"""Draws: one token per row of the consistency logits, and the rows' logsumexp, in one pass.

Shapes: B batch, K draws, D positions, V vocabulary, R rows of a tile, G blocks of a tile,
W = 128 tokens of a block.

    s_g = sum of exp(u - max) over block g            S_g = s_0 + ... + s_g
    chosen block = the last g with random_g S_g < s_g
    token        = argmax over the chosen block of u_v - log E_v,   E_v = -log(1 - random'_v)

with one Philox number per block and one per token of the chosen block: key = seed, counter =
(stream · 2^30 + index div 4, row key mod 2^32, row key div 2^32, step), word index mod 4, row key
(b·K + k)·D + d. The token is a function of the seed, the row key and the row alone.

Moves: one read of the rows, plus 128 logits per row again.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._tl import (
    BLOCKS,
    LOGITS,
    TOKENS,
    log_exponential,
    logits_at,
    logits_tile,
    position_at,
    row_offset,
    split_position,
    uniform,
)
from .operands import Operand, Visit
from .tuning import launch_parameters, power_of_two

WIDTH = 128  # tokens per block: part of the definition of a draw


@triton.jit
def _draw_kernel(
    x_ptr,  # logits of the operand, or mu; in
    y_ptr,  # log_scale of a logistic operand; in
    xu_ptr,  # [B, K, D] int64, in, with HAS_XU: rows that show a token keep it
    seed_ptr,  # [] int64, in
    rows_ptr,
    count_ptr,
    lse_ptr,  # [B * D, K] fp32, out
    tokens_ptr,  # [B, J, D] int64, out: row k goes to entry k + J - K
    first,
    slots,
    K,
    J,
    D,
    V,
    mask_id,
    eps,
    stride_i,
    stride_b,
    stride_k,
    stride_d,
    KIND: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_XU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot, k = (row // K).to(tl.int64), (row % K).to(tl.int64)
    position, wanted = position_at(slot, slot < slots, rows_ptr, count_ptr, first, HAS_ROWS)
    b, d = split_position(position, D)
    key = (b * K + k) * D + d
    token_place = (b * J + k + (J - K)) * D + d
    if HAS_XU:
        shown = tl.load(xu_ptr + key, mask=wanted, other=mask_id)
        tl.store(tokens_ptr + token_place, shown, mask=wanted & (shown != mask_id))
        wanted = wanted & (shown == mask_id)
    if tl.max(wanted.to(tl.int32), axis=0) == 0:
        return
    offset = row_offset(slot, position, k, D, stride_i, stride_b, stride_k, stride_d, ALIGN)
    seed = tl.load(seed_ptr)
    step = seed * 0  # the loss draws once per seed

    peak = tl.full([BLOCK_R], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    chosen = tl.zeros([BLOCK_R], tl.int32)
    tile_columns: tl.constexpr = BLOCK_G * WIDTH
    full = V // tile_columns * tile_columns
    for TAIL in tl.static_range(2):
        for begin in tl.range(
            full if TAIL else 0, V if TAIL else full, tile_columns, num_stages=STAGES
        ):
            cols = begin + tl.arange(0, tile_columns)
            z = logits_tile(x_ptr, y_ptr, offset, wanted, cols, V, mask_id, eps, KIND, TAIL)
            top = tl.maximum(peak, tl.max(z, axis=1))
            total = total * tl.exp(peak - top)
            peak = top
            mass = tl.reshape(tl.exp(z - top[:, None]), (BLOCK_R, BLOCK_G, WIDTH))
            mass = tl.sum(mass, axis=2)  # [R, G]
            upto = total[:, None] + tl.cumsum(mass, axis=1)
            g = begin // WIDTH + tl.arange(0, BLOCK_G)
            number = uniform(seed, step, key[:, None], g[None, :], BLOCKS)
            hit = tl.where(number * upto < mass, g[None, :], -1)
            chosen = tl.maximum(chosen, tl.max(hit, axis=1))
            total += tl.sum(mass, axis=1)
    tl.store(lse_ptr + position * K + k, peak + tl.log(total), mask=wanted)

    v = chosen[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [R, WIDTH]
    keep = wanted[:, None] & (v < V)
    z = logits_at(x_ptr, y_ptr, offset[:, None], v, keep, V, mask_id, eps, KIND)
    number = uniform(seed, step, key[:, None], v, TOKENS)
    race = z - log_exponential(number)
    best = tl.max(race, axis=1)
    ties = tl.where(race == best[:, None], v, 2147483647)
    token = tl.where(total > 0.0, tl.min(ties, axis=1), 0)
    tl.store(tokens_ptr + token_place, token.to(tl.int64), mask=wanted)


def draw(
    operand: Operand,
    visit: Visit,
    positions: int,
    mask_id: int | None,
    seed: Tensor,
    lse: Tensor,
    tokens: Tensor,
    *,
    xu: Tensor | None = None,
) -> None:
    """Draw one token per visited row: fill `lse` (B·D, K), the last K rows of `tokens` (B, J, D).

    Rows in which `xu` (B, K, D) shows a token (xu != mask_id) keep that token, and their logits are
    not read. A row without any class gives token 0. `seed` is () int64 and read on the device.
    """
    total = visit.slots * operand.components
    if total == 0:
        return
    tuned = launch_parameters(operand.x.device)
    elements, warps = tuned.draw_elements, tuned.draw_warps
    if operand.kind != LOGITS:  # bins take registers of their own
        elements, warps = tuned.logistic_elements // 2, max(1, warps // 2)
    block_g = max(1, min(power_of_two(triton.cdiv(operand.vocabulary, WIDTH)), elements // WIDTH))
    block_r = max(1, min(elements // (block_g * WIDTH), tuned.draw_kernel_rows))
    rows, count, first, has_rows = visit.arguments(lse)
    _draw_kernel[(triton.cdiv(total, block_r),)](
        operand.x,
        operand.y,
        lse if xu is None else xu,
        seed,
        rows,
        count,
        lse,
        tokens,
        first,
        visit.slots,
        operand.components,
        tokens.shape[1],
        positions,
        operand.vocabulary,
        -1 if mask_id is None else mask_id,
        operand.eps,
        *operand.strides,
        KIND=operand.kind,
        ALIGN=operand.align,
        HAS_ROWS=has_rows,
        HAS_XU=xu is not None,
        BLOCK_R=block_r,
        BLOCK_G=block_g,
        WIDTH=WIDTH,
        STAGES=tuned.draw_stages,
        num_warps=warps,
    )
