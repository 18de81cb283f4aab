"""Block sums: the first of the two kernels of a row draw, and what both share.

Shapes: R rows, C components, D positions, V vocabulary, W = SAMPLE_BLOCK tokens of a block,
G = ceil(V / W) blocks of a row. Row r is component r mod C of slot r div C.

    x_v = u_v + strength (c_v - u_v)  with guidance (strength = scale + 1), else c_v
    m_g = max of x over block g       without column mask_id
    s_g = sum of exp((x - m_g) / T)                 e_g = sum of exp((x - m_g) / T) (x - m_g) / T

and s_g at T = 1 beside them where `raw_prob` needs it. The blocks of a row do not depend on each
other, so nothing is carried from one to the next: a program takes a tile of blocks, and how many
programs share a row changes no bit. One warp per program: sums over a block are shuffles, and few
of them, since 8 threads share a block.

Moves: one read of the rows (of both with guidance); 2 to 4 numbers of 4 bytes per block written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .logistic import bins_logits
from .tiles import position_at, row_offset, split_position, widened


@triton.jit
def logits_of(
    x_ptr, scale_ptr, offset, wanted, cols, V, mask_id,
    BINS: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Logits in fp32 of rows at `offset` and columns, which broadcast; -inf at mask_id, beyond V
    and in rows not wanted."""
    keep = wanted
    if TAIL:
        keep = keep & (cols < V)
    if MASKED:
        keep = keep & (cols != mask_id)
    if BINS is None:
        x = widened(tl.load(x_ptr + offset + cols, mask=keep, other=float("-inf")))
    else:
        x = bins_logits(x_ptr, scale_ptr, offset, wanted, cols, V, BINS)
        x = tl.where(keep, x, float("-inf"))
    return x


@triton.jit
def guided(
    x_ptr,
    x_scale_ptr,
    u_ptr,
    u_scale_ptr,
    offset,  # [R, 1] int64
    offset_u,
    strength,  # [R, 1] fp32
    wanted,  # [R, 1]
    cols,  # broadcasts to [R, W]
    V,
    mask_id,
    X_BINS: tl.constexpr,
    U_BINS: tl.constexpr,
    GUIDED: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
):
    """x of the head of this file, [R, W]."""
    x = logits_of(x_ptr, x_scale_ptr, offset, wanted, cols, V, mask_id, X_BINS, TAIL, MASKED)
    if GUIDED:
        u = logits_of(u_ptr, u_scale_ptr, offset_u, wanted, cols, V, -1, U_BINS, TAIL, False)
        x = tl.where(x == float("-inf"), x, u + strength * (x - u))
    return x


@triton.jit
def sums_of_blocks(
    x_ptr,
    x_scale_ptr,
    u_ptr,
    u_scale_ptr,
    offset,  # [R] int64, and so what follows
    offset_u,
    strength,
    wanted,
    scale,  # log2(e) / T
    g,  # [G]
    V,
    mask_id,
    X_BINS: tl.constexpr,
    U_BINS: tl.constexpr,
    GUIDED: tl.constexpr,
    ENTROPY: tl.constexpr,
    RAW: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    TAIL: tl.constexpr,  # the tile may end beyond V, or hold mask_id
):
    """m, s, e / log(2) and s at T = 1 of blocks g of rows, [R, G] each.

    Neighbouring threads share LANES columns of a block, and each has WIDTH / LANES more: they sum
    by few shuffles.
    """
    run = tl.arange(0, WIDTH // LANES)[:, None, None, None] * LANES
    cols = g[None, None, :, None] * WIDTH + run + tl.arange(0, LANES)[None, None, None, :]
    x = guided(
        x_ptr, x_scale_ptr, u_ptr, u_scale_ptr, offset[None, :, None, None],
        offset_u[None, :, None, None], strength[None, :, None, None], wanted[None, :, None, None],
        cols, V, mask_id, X_BINS, U_BINS, GUIDED, TAIL, TAIL,
    )  # fmt: skip  # [WIDTH / LANES, R, G, LANES]
    peak = tl.max(tl.max(x, axis=0), axis=2)
    # A block without any class: -inf minus 0, and not minus -inf, which is NaN.
    gap = x - tl.where(peak == float("-inf"), 0.0, peak)[None, :, :, None]
    log_weight = gap * scale[None, :, None, None]
    weight = tl.exp2(log_weight)
    total = tl.sum(tl.sum(weight, axis=0), axis=2)
    weighted, raw = total, total
    if ENTROPY:  # 0 · (-inf) is to be 0
        weighted = tl.sum(tl.sum(weight * tl.maximum(log_weight, -1.0e5), axis=0), axis=2)
    if RAW:
        raw = tl.sum(tl.sum(tl.exp2(gap * 1.4426950408889634), axis=0), axis=2)
    return peak, total, weighted, raw


@triton.jit
def rows_at(
    row,  # [R] int32
    rows,  # rows of this draw
    rows_ptr,
    count_ptr,
    temperature_ptr,
    guidance_ptr,
    first,
    C,
    D,
    temperature,
    guidance,
    x_i,
    x_b,
    x_c,
    x_d,
    u_i,
    u_b,
    u_c,
    u_d,
    X_ALIGN: tl.constexpr,
    U_ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_GUIDANCE: tl.constexpr,
):
    """Of these rows: whether to work on them, both offsets, T, whether it is at temperature 0
    (then T is 1), strength, and place, example, component and position; [R] each."""
    # Rows fit in 32 bits, and 32-bit division is far cheaper.
    slot, c = (row // C).to(tl.int64), (row % C).to(tl.int64)
    place, position, wanted = position_at(
        slot, row < rows, rows_ptr, count_ptr, first, HAS_ROWS, HAS_COUNT
    )
    b, d = split_position(position, D)
    offset = row_offset(slot, b, c, d, x_i, x_b, x_c, x_d, X_ALIGN)
    offset_u = row_offset(slot, b, c, d, u_i, u_b, u_c, u_d, U_ALIGN)
    if HAS_TEMPERATURE:
        t = tl.load(temperature_ptr + row, mask=wanted, other=1.0)
    else:
        t = tl.zeros_like(row).to(tl.float32) + temperature
    cold = t == 0.0
    # Off 0 far enough for its inverse to be finite.
    t = tl.where(cold, 1.0, tl.maximum(t, 1.0e-30))
    if HAS_GUIDANCE:
        strength = tl.load(guidance_ptr + row, mask=wanted, other=0.0) + 1.0
    else:
        strength = tl.zeros_like(row).to(tl.float32) + guidance + 1.0
    return wanted, offset, offset_u, t, cold, strength, (place, b, c, d)


@triton.jit(do_not_specialize=["begin_row", "rows", "first", "plane"])
def _block_sums_kernel(
    x_ptr,  # logits, or mu of bins, in
    x_scale_ptr,  # log_scale of bins, in
    u_ptr,  # the same of unconditional logits, in, with GUIDED
    u_scale_ptr,
    rows_ptr,  # [A] int64, in, with HAS_ROWS
    count_ptr,  # [] int64, in, with HAS_COUNT
    temperature_ptr,  # [R] fp32, in, with HAS_TEMPERATURE
    guidance_ptr,  # [R] fp32, in, with HAS_GUIDANCE
    parts_ptr,  # [2 + ENTROPY + RAW, part, G] fp32, out
    begin_row,  # first row of this launch
    tiles,  # programs per row
    rows,  # R
    first,
    C,
    D,
    V,
    G,
    plane,  # numbers between two kinds of parts
    mask_id,
    temperature,
    guidance,
    x_i,
    x_b,
    x_c,
    x_d,
    u_i,
    u_b,
    u_c,
    u_d,
    X_BINS: tl.constexpr,
    U_BINS: tl.constexpr,
    X_ALIGN: tl.constexpr,
    U_ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_GUIDANCE: tl.constexpr,
    GUIDED: tl.constexpr,
    ENTROPY: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    pid = tl.program_id(0)
    local = pid // tiles + tl.arange(0, 1)
    tile = pid % tiles
    wanted, offset, offset_u, t, _, strength, _ = rows_at(
        begin_row + local, rows, rows_ptr, count_ptr, temperature_ptr, guidance_ptr, first, C, D,
        temperature, guidance, x_i, x_b, x_c, x_d, u_i, u_b, u_c, u_d, X_ALIGN, U_ALIGN,
        HAS_ROWS, HAS_COUNT, HAS_TEMPERATURE, HAS_GUIDANCE,
    )  # fmt: skip
    scale = 1.4426950408889634 / t
    columns: tl.constexpr = BLOCK_G * WIDTH
    begin = tile * columns
    g = tile * BLOCK_G + tl.arange(0, BLOCK_G)
    place = parts_ptr + local[:, None].to(tl.int64) * G + g[None, :]
    inside = wanted[:, None] & (g < G)[None, :]
    # Most tiles lie within the row and do not hold the excluded column: no comparison there.
    plain = (begin + columns <= V) & ((mask_id < begin) | (mask_id >= begin + columns))
    for PLAIN in tl.static_range(2):
        if plain == (PLAIN == 1):
            peak, total, weighted, raw = sums_of_blocks(
                x_ptr, x_scale_ptr, u_ptr, u_scale_ptr, offset, offset_u, strength, wanted, scale,
                g, V, mask_id, X_BINS, U_BINS, GUIDED, ENTROPY, RAW, WIDTH, LANES,
                PLAIN == 0,
            )  # fmt: skip
            tl.store(place, peak, mask=inside)
            tl.store(place + plane, total, mask=inside)
            if ENTROPY:
                tl.store(place + 2 * plane, weighted, mask=inside)
            if RAW:
                tl.store(place + (2 + ENTROPY) * plane, raw, mask=inside)


block_sums_kernel = _block_sums_kernel  # launched by `row_draw`, which puts the rows together
