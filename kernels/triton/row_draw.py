"""Row draws: a token per row, and the statistics of the row, from one read of it.

Shapes: R rows, V vocabulary, W = SAMPLE_BLOCK tokens of a block, G = ceil(V / W) blocks of a row,
T temperature (1 for rows at temperature 0). x, m_g, s_g and e_g are those of `block_sums`.

    m   = max_g m_g          f_g = exp((m_g - m) / T)         S_g = s_0 f_0 + ... + s_g f_g
    chosen block = the last g with random_g S_g < s_g f_g
    token        = argmax over the chosen block of (x_v - m) / T - log E_v,
                   E_v = -log(1 - random'_v)

    shift = m / T            total = S               log_weight = (x_token - m) / T
    entropy  = log S - (sum_g f_g (e_g + s_g (m_g - m) / T)) / S
    margin   = (1 - exp((second largest x - m) / T)) / S
    raw_prob = exp(x_token - m) / (S at T = 1)

That is the law of `di4c_fast.draw.law`, with the random numbers of `rng`. Rows of up to
`elements` / 2 columns are done in one kernel, several per program. For longer ones `block_sums.py`
leaves 2 to 4 numbers per block in scratch memory, from which this kernel puts the row together; it
reads the chosen block and that of the maximum again. A random number per block is thus made once
per row by as many lanes as there are blocks, not by every lane that holds a part of the block.

Moves: one read of the rows; 4 (2 to 4) V / W bytes per row written and read; one or two blocks.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .block_sums import block_sums_kernel, guided, rows_at, sums_of_blocks
from .logistic import bins_flag, pointers_of
from .random import BLOCKS, TOKENS, log_exponential, uniform_run
from .tiles import align_of, visit_arguments, visit_flags
from .tuning import launch_parameters, power_of_two, tunable

WHOLE_LANES = 16  # columns of a block that neighbours share where a row is one tile
MAX_VOCABULARY = 2**19  # 4096 blocks of one row are held in registers at the end


@tunable("row_draw")
@dataclasses.dataclass(frozen=True)
class RowDraw:
    elements: int = 2048  # of a tile; rows of at most half as many are whole
    warps: int = 1  # so that sums over a block need no barrier
    # Of a block, read at once by neighbours: a sector of memory. 10.8 instructions per logit; with
    # 64 bytes 12.2, with a whole block 15.
    run_bytes: int = 32
    whole_elements: int = 512  # per warp where a row is one tile; half of it with guidance
    rows: int = 16  # most rows of one program there
    blocks: int = 512  # blocks per warp where rows are put together
    joined_rows: int = 2  # most rows of one program there
    scratch_bytes: int = 64 * 2**20  # numbers per block between the two kernels

    powers_of_two = (
        "elements", "warps", "run_bytes", "whole_elements", "rows", "blocks", "joined_rows"
    )  # fmt: skip


@triton.jit
def _store_targets(
    token, shift, total, where, visited, wanted, alive, C, D, mask_id, given_ptr, xu_ptr,
    tokens_ptr, shift_ptr, total_ptr, TARGETS: tl.constexpr, XU: tl.constexpr,
):  # fmt: skip
    """The last C target rows of a loss, with the given ones before them, and the sums of rows."""
    place, b, c, d = where
    token = tl.where(alive & wanted, token, 0).to(tl.int64)
    if XU:
        shown = tl.load(xu_ptr + (b * C + c) * D + d, mask=visited, other=mask_id)
        token = tl.where(shown == mask_id, token, shown)
    given = TARGETS - C
    row = tokens_ptr + b * TARGETS * D + d
    tl.store(row + (given + c) * D, token, mask=visited)
    for j in range(given):
        once = visited & (c == 0)
        tl.store(row + j * D, tl.load(given_ptr + (b * given + j) * D + d, mask=once), mask=once)
    tl.store(shift_ptr + place * C + c, shift, mask=wanted)
    tl.store(total_ptr + place * C + c, total, mask=wanted)


@triton.jit(do_not_specialize=["begin_row", "part", "rows", "first", "plane"])
def _row_draw_kernel(
    x_ptr,  # logits, or mu of bins, in
    x_scale_ptr,  # log_scale of bins, in
    u_ptr,  # the same of unconditional logits, in, with GUIDED
    u_scale_ptr,
    rows_ptr,  # [A] int64, in, with HAS_ROWS
    count_ptr,  # [] int64, in, with HAS_COUNT
    temperature_ptr,  # [R] fp32, in, with HAS_TEMPERATURE
    guidance_ptr,  # [R] fp32, in, with HAS_GUIDANCE
    parts_ptr,  # [2 + ENTROPY + RAW, part, G] fp32, in, unless WHOLE
    keys_ptr,  # [R] int64, in, unless TARGETS
    seed_ptr,  # [] int64, in
    step_ptr,  # [] int64, in, unless TARGETS
    token_ptr,  # [R] int64, out, or [B, J, D] with TARGETS
    argmax_ptr,  # [R] int64, out, with ARGMAX
    values_ptr,  # [3 + ENTROPY + MARGIN + RAW_PROB, R] fp32, out, unless TARGETS
    given_ptr,  # [B, J - C, D] int64, in, with TARGETS, and so what follows
    xu_ptr,  # [B, C, D] int64, in, with XU
    shift_ptr,  # [A, C] fp32, out
    total_ptr,  # [A, C] fp32, out
    begin_row,  # first row of this launch
    part,  # its rows
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
    WHOLE: tl.constexpr,  # the blocks of a row are one tile, summed here
    GREEDY: tl.constexpr,  # every row takes its argmax
    ARGMAX: tl.constexpr,
    ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr,
    RAW: tl.constexpr,  # sums at T = 1 stand beside those at T
    RAW_PROB: tl.constexpr,
    TARGETS: tl.constexpr,  # J: rows become the last target rows of a loss; 0: none
    XU: tl.constexpr,  # tokens that are shown take the place of draws
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,  # at least G
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    local = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = begin_row + local
    wanted, offset, offset_u, t, cold, strength, where = rows_at(
        row, rows, rows_ptr, count_ptr, temperature_ptr, guidance_ptr, first, C, D,
        temperature, guidance, x_i, x_b, x_c, x_d, u_i, u_b, u_c, u_d, X_ALIGN, U_ALIGN,
        HAS_ROWS, HAS_COUNT, HAS_TEMPERATURE, HAS_GUIDANCE,
    )  # fmt: skip
    visited = (local < part) & (row < rows)
    wanted = wanted & visited
    row = row.to(tl.int64)
    scale = 1.4426950408889634 / t
    there = wanted[:, None]

    g = tl.arange(0, BLOCK_G)[None, :]
    if WHOLE:
        peak, total, weighted, raw = sums_of_blocks(
            x_ptr, x_scale_ptr, u_ptr, u_scale_ptr, offset, offset_u, strength, wanted, scale,
            tl.arange(0, BLOCK_G), V, mask_id, X_BINS, U_BINS, GUIDED, ENTROPY, RAW, WIDTH, LANES,
            True,
        )  # fmt: skip
    else:
        inside = there & (g < G)
        place = parts_ptr + local[:, None].to(tl.int64) * G + g
        peak = tl.load(place, mask=inside, other=float("-inf"))
        total = tl.load(place + plane, mask=inside, other=0.0)
        weighted, raw = total, total
        if ENTROPY:
            weighted = tl.load(place + 2 * plane, mask=inside, other=0.0)
        if RAW:
            raw = tl.load(place + (2 + ENTROPY) * plane, mask=inside, other=0.0)
    offset, offset_u, strength = offset[:, None], offset_u[:, None], strength[:, None]

    top = tl.max(peak, axis=1)  # [R]
    shift = tl.where(top == float("-inf"), 0.0, top)
    gap = peak - shift[:, None]
    share = tl.exp2(gap * scale[:, None])
    mass = total * share  # [R, BLOCK_G]
    sum_mass = tl.sum(mass, axis=1)
    alive = sum_mass > 0.0  # false for NaN too

    token = tl.full([BLOCK_R], 0, tl.int32)
    picked = shift  # x at the token
    if ARGMAX or MARGIN or GREEDY or HAS_TEMPERATURE:
        best_block = tl.min(tl.where(peak == top[:, None], g, BLOCK_G - 1), axis=1)
        v = best_block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        x = guided(
            x_ptr, x_scale_ptr, u_ptr, u_scale_ptr, offset, offset_u, strength, there, v, V,
            mask_id, X_BINS, U_BINS, GUIDED, True, True,
        )  # fmt: skip
        best = tl.min(tl.where(x == tl.max(x, axis=1)[:, None], v, 2147483647), axis=1)
        token = best
        if ARGMAX:
            tl.store(argmax_ptr + row, tl.where(alive, best, -1).to(tl.int64), mask=wanted)
        if MARGIN:
            within = tl.max(tl.where(v == best[:, None], float("-inf"), x), axis=1)
            outside = tl.max(tl.where(g == best_block[:, None], float("-inf"), peak), axis=1)
            margin = (1.0 - tl.exp((tl.maximum(within, outside) - shift) / t)) / sum_mass

    if not GREEDY:
        seed = tl.load(seed_ptr)
        if TARGETS:
            _, b, c, d = where
            key, step = (b * C + c) * D + d, tl.full([], 0, tl.int64)
        else:
            key, step = tl.load(keys_ptr + row, mask=wanted, other=0), tl.load(step_ptr)
        number = uniform_run(seed, step, key, tl.zeros_like(local), BLOCKS, BLOCK_G)
        hit = number * tl.cumsum(mass, axis=1) < mass
        chosen = tl.max(tl.where(hit, g, 0), axis=1)
        v = chosen[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        x = guided(
            x_ptr, x_scale_ptr, u_ptr, u_scale_ptr, offset, offset_u, strength, there, v, V,
            mask_id, X_BINS, U_BINS, GUIDED, True, True,
        )  # fmt: skip
        number = uniform_run(seed, step, key, chosen * WIDTH, TOKENS, WIDTH)
        race = (x - shift[:, None]) / t[:, None] - log_exponential(number)
        drawn = tl.min(tl.where(race == tl.max(race, axis=1)[:, None], v, 2147483647), axis=1)
        at_drawn = tl.max(tl.where(v == drawn[:, None], x, float("-inf")), axis=1)
        if HAS_TEMPERATURE:
            drawn = tl.where(cold, token, drawn)
            at_drawn = tl.where(cold, shift, at_drawn)
        token, picked = drawn, at_drawn

    if TARGETS:
        _store_targets(
            token, shift, sum_mass, where, visited, wanted, alive, C, D, mask_id, given_ptr, xu_ptr,
            token_ptr, shift_ptr, total_ptr, TARGETS, XU,
        )  # fmt: skip
    else:
        tl.store(token_ptr + row, tl.where(alive, token, -1).to(tl.int64), mask=wanted)
        value = values_ptr + row
        tl.store(value, shift / t, mask=wanted)
        value += rows
        tl.store(value, sum_mass, mask=wanted)
        value += rows
        tl.store(value, (picked - shift) / t, mask=wanted)
        if ENTROPY:
            value += rows
            log_share = tl.maximum(gap * scale[:, None], -1.0e5)
            moment = tl.sum(share * (weighted + total * log_share), axis=1) * 0.6931471805599453
            log_sum = tl.log(tl.where(alive, sum_mass, 1.0))
            tl.store(value, log_sum - moment / sum_mass, mask=wanted)
        if MARGIN:
            value += rows
            tl.store(value, margin, mask=wanted)
        if RAW_PROB:
            value += rows
            sum_raw = sum_mass
            if RAW:
                sum_raw = tl.sum(raw * tl.exp2(gap * 1.4426950408889634), axis=1)
            tl.store(value, tl.exp(picked - shift) / sum_raw, mask=wanted)


class Targets(NamedTuple):
    """Where the draws of a loss go: one from every component of u."""

    tokens: Tensor  # (B, J, D) int64, filled with `given` and, behind it, the draws
    given: Tensor  # (B, J - C, D) int64
    xu: Tensor | None  # (B, C, D) int64: what it shows takes the place of a draw
    shift: Tensor  # (A, C) fp32, and so `total`: the row sums of u
    total: Tensor


def rows_and_warps(
    tuned: RowDraw, whole: bool, block_g: int, width: int, guided: bool
) -> tuple[int, int]:
    """Rows and warps of one program."""
    if whole:
        per_warp = max(1, tuned.whole_elements // (1 + guided))
        rows = max(1, min(per_warp // (block_g * width), tuned.rows))
        return rows, max(1, min(8, block_g * width // per_warp))
    rows = max(1, min(tuned.blocks // block_g, tuned.joined_rows))
    return rows, max(1, min(8, block_g // tuned.blocks))


def row_draw(
    x, y, visit, keys: Tensor | None, options, width: int, targets: Targets | None = None
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """Token, argmax (None unless wanted) and values by name, (R,) each; see `passes.base.Drawn`.

    x and y are operands of logits and of unconditional logits (None: no guidance), `options` a
    `passes.base.DrawOptions` whose seed and step are on the device; width is SAMPLE_BLOCK. With
    `targets` rows are keyed by their numbers in u, and everything goes there.
    """
    rows, vocabulary, device = visit.slots * x.components, x.vocabulary, x.logits.device
    assert vocabulary <= MAX_VOCABULARY
    wanted, temperature, guidance = options.wanted, options.temperature, options.guidance
    raw_prob = "raw_prob" in wanted
    raw = raw_prob and options.tempered
    names = ["shift", "total", "log_weight"]
    names += [name for name in ("entropy", "margin", "raw_prob") if name in wanted]
    kept = rows if targets is None else 1
    values = torch.empty(len(names), kept, dtype=torch.float32, device=device)
    token = torch.empty(kept, dtype=torch.int64, device=device)
    argmax = torch.empty_like(token) if "argmax" in wanted else None
    found = token, argmax, dict(zip(names, values, strict=True))
    if rows == 0:
        return found
    tuned = launch_parameters("row_draw", device)
    other = x if y is None else y
    blocks = triton.cdiv(vocabulary, width)
    elements = max(width, tuned.elements)
    block_g = power_of_two(blocks)
    whole = block_g * width <= max(width, elements // 2)
    pointers = [
        *pointers_of(x),
        *pointers_of(other),
        *visit_arguments(visit, values)[:2],
        *(value if isinstance(value, Tensor) else values for value in (temperature, guidance)),
    ]
    sizes = [rows, visit.first, x.components, visit.positions, vocabulary, blocks]
    rest = [
        -1 if options.mask_id is None else options.mask_id,
        *(0.0 if isinstance(value, Tensor) else float(value) for value in (temperature, guidance)),
        *x.strides,
        *other.strides,
    ]
    bins = {"X_BINS": bins_flag(x), "U_BINS": bins_flag(other)}
    flags = {
        "X_ALIGN": align_of(x),
        "U_ALIGN": align_of(other),
        **visit_flags(visit),
        "HAS_TEMPERATURE": isinstance(temperature, Tensor),
        "HAS_GUIDANCE": isinstance(guidance, Tensor),
        "GUIDED": y is not None,
        "ENTROPY": "entropy" in wanted,
        "RAW": raw,
        "WIDTH": width,
    }
    xu, tokens, places, goals = None, token, [values] * 2, 0
    if targets is not None:
        tokens, _, xu, *places = targets
        goals = tokens.shape[1]
    numbers = 2 + flags["ENTROPY"] + raw
    chunk = rows if whole else max(1, tuned.scratch_bytes // (4 * numbers * blocks))
    tile_blocks = elements // width
    tiles = triton.cdiv(blocks, tile_blocks)
    lanes = WHOLE_LANES if whole else tuned.run_bytes // x.logits.element_size()
    flags["LANES"] = min(width, lanes)
    block_r, warps = rows_and_warps(tuned, whole, block_g, width, y is not None)
    for begin in range(0, rows, chunk):
        part = min(chunk, rows - begin)
        parts = values
        common = [*sizes, part * blocks, *rest]
        if not whole:
            parts = torch.empty(numbers, part, blocks, dtype=torch.float32, device=device)
            block_sums_kernel[(part * tiles,)](
                *pointers,
                parts,
                begin,
                tiles,
                *common,
                **bins,
                **flags,
                BLOCK_G=tile_blocks,
                num_warps=tuned.warps,
            )
        _row_draw_kernel[(triton.cdiv(part, block_r),)](
            *pointers,
            parts,
            token if keys is None else keys,
            options.seed,
            token if targets is not None else options.step,
            tokens,
            token if argmax is None else argmax,
            values,
            token if targets is None else targets.given,
            token if xu is None else xu,
            *places,
            begin,
            part,
            *common,
            **bins,
            **flags,
            WHOLE=whole,
            GREEDY=options.greedy,
            ARGMAX=argmax is not None,
            MARGIN="margin" in wanted,
            RAW_PROB=raw_prob,
            TARGETS=goals,
            XU=xu is not None,
            BLOCK_R=block_r,
            BLOCK_G=block_g,
            num_warps=warps,
        )
    return found
