"""Block sums: the first of the two kernels of a row draw, and what both share.

Shapes: R rows, V vocabulary, W = 128 tokens of a block, G = ceil(V / W) blocks of a row.

    x_v = u_v + gain (c_v - u_v)  with guidance (gain = scale + 1), else c_v;  -inf at mask_id
    m_g = max of x over block g
    s_g = sum of exp((x - m_g) / T)                 e_g = sum of exp((x - m_g) / T) (x - m_g) / T

and s_g at T = 1 beside them where `raw_prob` needs it. The blocks of a row do not depend on each
other, so nothing is carried from one to the next: a program takes a tile of blocks, and how many
programs share a row changes no bit. One warp per program: sums over a block are shuffles.

Moves: one read of the rows (of both with guidance); 2 to 4 numbers of 4 bytes per block written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._tl import logits_tile, place_offset


@triton.jit
def guided_tile(
    x_ptr,
    y_ptr,
    u_ptr,
    uy_ptr,
    offset,  # [R] int64
    offset_u,
    gain,  # [R] fp32
    wanted,
    cols,  # [W]
    V,
    mask_id,
    eps,
    eps_u,
    KIND: tl.constexpr,
    KIND_U: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """x of the head of this file, [R, W]."""
    x = logits_tile(x_ptr, y_ptr, offset, wanted, cols, V, mask_id, eps, KIND, TAIL, MASKED)
    if KIND_U >= 0:
        u = logits_tile(u_ptr, uy_ptr, offset_u, wanted, cols, V, -1, eps_u, KIND_U, TAIL, False)
        x = tl.where(x == float("-inf"), x, u + gain[:, None] * (x - u))
    return x


@triton.jit
def block_sums(
    x,  # [R, BLOCK_G * WIDTH]
    scale,  # [R], log2(e) / T
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTROPY: tl.constexpr,
    RAW: tl.constexpr,
):
    """m, s, e / log(2) and s at T = 1 of the blocks of a tile, [R, BLOCK_G] each."""
    x = tl.reshape(x, (BLOCK_R, BLOCK_G, WIDTH))
    peak = tl.max(x, axis=2)
    # A block without any class: -inf minus 0, and not minus -inf, which is NaN.
    gap = x - tl.where(peak == float("-inf"), 0.0, peak)[:, :, None]
    log_weight = gap * scale[:, None, None]
    weight = tl.exp2(log_weight)
    total = tl.sum(weight, axis=2)
    weighted, raw = total, total
    if ENTROPY:  # 0 · (-inf) is to be 0
        weighted = tl.sum(weight * tl.maximum(log_weight, -1.0e5), axis=2)
    if RAW:
        raw = tl.sum(tl.exp2(gap * 1.4426950408889634), axis=2)
    return peak, total, weighted, raw


@triton.jit
def rows_at(
    slot,  # [R] int32
    first,
    rows,
    heat_ptr,
    gain_ptr,
    C,
    D,
    heat,
    gain,
    stride_i,
    stride_b,
    stride_c,
    stride_d,
    stride_ui,
    stride_ub,
    stride_uc,
    stride_ud,
    ALIGN: tl.constexpr,
    ALIGN_U: tl.constexpr,
    HAS_HEAT: tl.constexpr,
    HAS_GAIN: tl.constexpr,
):
    """Of the rows in these slots: number, whether to work on it, both offsets, T, whether it is at
    temperature 0 (then T is 1), and gain; [R] each."""
    row = first + slot  # rows fit in 32 bits, and 32-bit division is far cheaper
    wanted = slot < rows
    i = slot.to(tl.int64)
    rest = row // D
    b, c, d = (rest // C).to(tl.int64), (rest % C).to(tl.int64), (row % D).to(tl.int64)
    row = row.to(tl.int64)
    offset = place_offset(i, b, c, d, stride_i, stride_b, stride_c, stride_d, ALIGN)
    offset_u = place_offset(i, b, c, d, stride_ui, stride_ub, stride_uc, stride_ud, ALIGN_U)
    if HAS_HEAT:
        temperature = tl.load(heat_ptr + row, mask=wanted, other=1.0)
    else:
        temperature = tl.zeros_like(row).to(tl.float32) + heat
    cold = temperature == 0.0
    # Off 0 far enough for its inverse to be finite.
    temperature = tl.where(cold, 1.0, tl.maximum(temperature, 1.0e-30))
    if HAS_GAIN:
        strength = tl.load(gain_ptr + row, mask=wanted, other=1.0)
    else:
        strength = tl.zeros_like(row).to(tl.float32) + gain
    return row, wanted, offset, offset_u, temperature, cold, strength


@triton.jit
def _block_sums_kernel(
    x_ptr,  # logits of the operand, or mu; in
    y_ptr,  # log_scale of a logistic operand; in
    u_ptr,  # the same of the unconditional logits, with KIND_U >= 0; in
    uy_ptr,
    heat_ptr,  # [all rows] fp32, in, with HAS_HEAT
    gain_ptr,  # [all rows] fp32, in, with HAS_GAIN
    parts_ptr,  # [2 + ENTROPY + RAW, R, G] fp32, out
    first,  # number of the first row
    rows,  # R
    tiles,  # programs per row
    C,
    D,
    V,
    G,
    plane,  # R · G
    mask_id,
    eps,
    eps_u,
    heat,
    gain,
    stride_i,
    stride_b,
    stride_c,
    stride_d,
    stride_ui,
    stride_ub,
    stride_uc,
    stride_ud,
    KIND: tl.constexpr,
    KIND_U: tl.constexpr,
    ALIGN: tl.constexpr,
    ALIGN_U: tl.constexpr,
    HAS_HEAT: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    ENTROPY: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDTH: tl.constexpr,
):
    pid = tl.program_id(0)
    slot = pid // tiles + tl.arange(0, 1)
    tile = pid % tiles
    _, wanted, offset, offset_u, temperature, _, strength = rows_at(
        slot, first, rows, heat_ptr, gain_ptr, C, D, heat, gain, stride_i, stride_b, stride_c,
        stride_d, stride_ui, stride_ub, stride_uc, stride_ud, ALIGN, ALIGN_U, HAS_HEAT, HAS_GAIN,
    )  # fmt: skip
    scale = 1.4426950408889634 / temperature

    columns: tl.constexpr = BLOCK_G * WIDTH
    begin = tile * columns
    cols = begin + tl.arange(0, columns)
    # Most tiles lie within the row and do not hold the excluded column: no comparison there.
    if (begin + columns <= V) & ((mask_id < begin) | (mask_id >= begin + columns)):
        x = guided_tile(
            x_ptr, y_ptr, u_ptr, uy_ptr, offset, offset_u, strength, wanted, cols, V, mask_id, eps,
            eps_u, KIND, KIND_U, False, False,
        )  # fmt: skip
    else:
        x = guided_tile(
            x_ptr, y_ptr, u_ptr, uy_ptr, offset, offset_u, strength, wanted, cols, V, mask_id, eps,
            eps_u, KIND, KIND_U, True, True,
        )  # fmt: skip
    peak, total, weighted, raw = block_sums(x, scale, 1, BLOCK_G, WIDTH, ENTROPY, RAW)
    g = tile * BLOCK_G + tl.arange(0, BLOCK_G)[None, :]
    inside = wanted[:, None] & (g < G)
    part = parts_ptr + slot[:, None].to(tl.int64) * G + g
    tl.store(part, peak, mask=inside)
    tl.store(part + plane, total, mask=inside)
    if ENTROPY:
        tl.store(part + 2 * plane, weighted, mask=inside)
    if RAW:
        tl.store(part + (2 + ENTROPY) * plane, raw, mask=inside)
