"""Row draws of `sample`: a token per row, and the statistics of the row, from one read of it.

Shapes: R rows, V vocabulary, W = 128 tokens of a block, G = ceil(V / W) blocks of a row,
T temperature (1 for rows at temperature 0).

    x_v = u_v + gain (c_v - u_v)  with guidance (gain = scale + 1), else c_v;  -inf at mask_id
    m_g = max of x over block g
    s_g = sum of exp((x - m_g) / T)                 e_g = sum of exp((x - m_g) / T) (x - m_g) / T
    m   = max_g m_g          f_g = exp((m_g - m) / T)         S_g = s_0 f_0 + ... + s_g f_g
    chosen block = the last g with random_g S_g < s_g f_g
    token        = argmax over the chosen block of (x_v - m) / T - log E_v,
                   E_v = -log(1 - random'_v)

    logsumexp = m / T + log S                 log_prob = (x_token - m) / T - log S
    entropy   = log S - (sum_g f_g (e_g + s_g (m_g - m) / T)) / S
    margin    = (1 - exp((second largest x - m) / T)) / S
    raw_prob  = exp(x_token - m) / (S at T = 1)

The random numbers are those of `rng`: key = seed, counter = (stream · 2^30 + index div 4, row key
mod 2^32, row key div 2^32, step), word index mod 4.

Rows of up to `sample_elements` / 2 columns are done in one kernel, several per program. For longer
ones `block_sums.py` leaves 2 to 4 numbers per block in scratch memory, from which this kernel puts
the row together; it reads the chosen block and that of the maximum again. A random number per
block is thus made once per row by as many lanes as there are blocks, not by every lane that
holds a part of the block.

Moves: one read of the rows; 4 (2 to 4) V / 128 bytes per row written and read; one or two blocks.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tl import (
    BLOCKS,
    LOGITS,
    TOKENS,
    log_exponential,
    logits_at,
    uniform,
    uniform_run,
)
from .block_sums import _block_sums_kernel, block_sums, guided_tile, rows_at
from .operands import Operand
from .tuning import launch_parameters, power_of_two

WIDTH = 128  # tokens per block: part of the definition of a draw
NO_GUIDANCE = -1  # the KIND of unconditional logits that are not there
FREE_FIELDS = ("log_prob", "logsumexp", "max_log_prob", "prob")  # rows 0 .. 3 of `values`
MAX_VOCABULARY = 2**19  # 4096 blocks of one row are held in registers at the end


@triton.jit
def _guided_block(
    x_ptr,
    y_ptr,
    u_ptr,
    uy_ptr,
    offset,
    offset_u,
    gain,
    wanted,
    block,  # [R]
    V,
    mask_id,
    eps,
    eps_u,
    KIND: tl.constexpr,
    KIND_U: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Token ids and x of one block of every row, [R, WIDTH] each."""
    v = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    keep = wanted[:, None] & (v < V)
    x = logits_at(x_ptr, y_ptr, offset[:, None], v, keep, V, mask_id, eps, KIND)
    if KIND_U >= 0:
        u = logits_at(u_ptr, uy_ptr, offset_u[:, None], v, keep, V, -1, eps_u, KIND_U)
        x = tl.where(x == float("-inf"), x, u + gain[:, None] * (x - u))
    return v, x


@triton.jit
def _row_draw_kernel(
    x_ptr,  # as above; in
    y_ptr,
    u_ptr,
    uy_ptr,
    heat_ptr,
    gain_ptr,
    parts_ptr,  # [2 + ENTROPY + RAW, R, G] fp32, in, unless WHOLE
    keys_ptr,  # [all rows] int64, in
    seed_ptr,  # [] int64, in
    step_ptr,  # [] int64, in
    token_ptr,  # [all rows] int64, out
    argmax_ptr,  # [all rows] int64, out, with ARGMAX
    values_ptr,  # [4 + ENTROPY + MARGIN + RAW, all rows] fp32, out
    first,
    rows,
    all_rows,
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
    WHOLE: tl.constexpr,  # the blocks of a row are one tile, summed here
    GREEDY: tl.constexpr,  # every row takes its argmax
    ARGMAX: tl.constexpr,
    ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,  # at least G
    WIDTH: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row, wanted, offset, offset_u, temperature, cold, strength = rows_at(
        slot, first, rows, heat_ptr, gain_ptr, C, D, heat, gain, stride_i, stride_b, stride_c,
        stride_d, stride_ui, stride_ub, stride_uc, stride_ud, ALIGN, ALIGN_U, HAS_HEAT, HAS_GAIN,
    )  # fmt: skip
    scale = 1.4426950408889634 / temperature

    g = tl.arange(0, BLOCK_G)[None, :]
    if WHOLE:
        x = guided_tile(
            x_ptr, y_ptr, u_ptr, uy_ptr, offset, offset_u, strength, wanted,
            tl.arange(0, BLOCK_G * WIDTH), V, mask_id, eps, eps_u, KIND, KIND_U, True, True,
        )  # fmt: skip
        peak, total, weighted, raw = block_sums(x, scale, BLOCK_R, BLOCK_G, WIDTH, ENTROPY, RAW)
    else:
        inside = wanted[:, None] & (g < G)
        part = parts_ptr + slot[:, None].to(tl.int64) * G + g
        peak = tl.load(part, mask=inside, other=float("-inf"))
        total = tl.load(part + plane, mask=inside, other=0.0)
        weighted, raw = total, total
        if ENTROPY:
            weighted = tl.load(part + 2 * plane, mask=inside, other=0.0)
        if RAW:
            raw = tl.load(part + (2 + ENTROPY) * plane, mask=inside, other=0.0)

    top = tl.max(peak, axis=1)  # [R]
    shift = tl.where(top == float("-inf"), 0.0, top)
    gap = peak - shift[:, None]
    share = tl.exp2(gap * scale[:, None])
    mass = total * share  # [R, BLOCK_G]
    sum_mass = tl.sum(mass, axis=1)
    alive = sum_mass > 0.0  # false for NaN too
    log_sum = tl.log(tl.where(alive, sum_mass, 1.0))

    token = tl.full([BLOCK_R], 0, tl.int32)
    picked = shift  # x at the token
    if ARGMAX or MARGIN or GREEDY or HAS_HEAT:
        best_block = tl.min(tl.where(peak == top[:, None], g, BLOCK_G - 1), axis=1)
        v, x = _guided_block(
            x_ptr, y_ptr, u_ptr, uy_ptr, offset, offset_u, strength, wanted, best_block, V, mask_id,
            eps, eps_u, KIND, KIND_U, WIDTH,
        )  # fmt: skip
        # Compared with its own maximum: a logistic bin may round differently here.
        best = tl.min(tl.where(x == tl.max(x, axis=1)[:, None], v, 2147483647), axis=1)
        token = best
        if ARGMAX:
            tl.store(argmax_ptr + row, tl.where(alive, best, -1).to(tl.int64), mask=wanted)
        if MARGIN:
            within = tl.max(tl.where(v == best[:, None], float("-inf"), x), axis=1)
            outside = tl.max(tl.where(g == best_block[:, None], float("-inf"), peak), axis=1)
            # Not above 1 if a bin of the same block has been rounded down.
            log_ratio = tl.minimum((tl.maximum(within, outside) - shift) / temperature, 0.0)
            margin = (1.0 - tl.exp(log_ratio)) / sum_mass

    if not GREEDY:
        key = tl.load(keys_ptr + row, mask=wanted, other=0)
        seed, step = tl.load(seed_ptr), tl.load(step_ptr)
        number = uniform_run(seed, step, key, tl.zeros_like(slot), BLOCKS, BLOCK_G)
        hit = number * tl.cumsum(mass, axis=1) < mass
        chosen = tl.max(tl.where(hit, g, 0), axis=1)
        v, x = _guided_block(
            x_ptr, y_ptr, u_ptr, uy_ptr, offset, offset_u, strength, wanted, chosen, V, mask_id,
            eps, eps_u, KIND, KIND_U, WIDTH,
        )  # fmt: skip
        # One call per token, of which three words are not used: lanes that hold v make their own.
        number = uniform(seed, step, key[:, None], v, TOKENS)
        race = (x - shift[:, None]) / temperature[:, None] - log_exponential(number)
        drawn = tl.min(tl.where(race == tl.max(race, axis=1)[:, None], v, 2147483647), axis=1)
        at_drawn = tl.max(tl.where(v == drawn[:, None], x, float("-inf")), axis=1)
        if HAS_HEAT:
            drawn = tl.where(cold, token, drawn)
            at_drawn = tl.where(cold, shift, at_drawn)
        token, picked = drawn, at_drawn

    nothing = float("nan")
    tl.store(token_ptr + row, tl.where(alive, token, -1).to(tl.int64), mask=wanted)
    log_prob = (picked - shift) / temperature - log_sum
    value = values_ptr + row
    tl.store(value, tl.where(alive, log_prob, nothing), mask=wanted)
    value += all_rows
    tl.store(value, tl.where(alive, shift / temperature + log_sum, nothing), mask=wanted)
    value += all_rows
    tl.store(value, tl.where(alive, -log_sum, nothing), mask=wanted)
    value += all_rows
    prob = tl.exp((picked - shift) / temperature) / sum_mass
    tl.store(value, tl.where(alive, prob, nothing), mask=wanted)
    if ENTROPY:
        value += all_rows
        log_share = tl.maximum(gap * scale[:, None], -1.0e5)
        moment = tl.sum(share * (weighted + total * log_share), axis=1) * 0.6931471805599453
        tl.store(value, tl.where(alive, log_sum - moment / sum_mass, nothing), mask=wanted)
    if MARGIN:
        value += all_rows
        tl.store(value, tl.where(alive, margin, nothing), mask=wanted)
    if RAW:
        value += all_rows
        sum_raw = tl.sum(raw * tl.exp2(gap * 1.4426950408889634), axis=1)
        raw_prob = tl.exp(picked - shift) / sum_raw
        tl.store(value, tl.where(alive, raw_prob, nothing), mask=wanted)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a row draw is asked for beyond the free fields."""

    greedy: bool = False  # the temperature of all rows is 0: no random number is needed
    argmax: bool = False
    entropy: bool = False
    margin: bool = False
    raw: bool = False  # raw_prob; at temperature 1 it is prob

    @property
    def values(self) -> tuple[str, ...]:
        """The names of the rows of `values`."""
        extra = {"entropy": self.entropy, "margin": self.margin, "raw_prob": self.raw}
        return (*FREE_FIELDS, *(name for name, asked in extra.items() if asked))


@dataclasses.dataclass(frozen=True)
class Results:
    """Where the results go; `values` has a row for each name of `Wanted.values`."""

    token: Tensor  # [all rows] int64
    argmax: Tensor  # [all rows] int64; empty if not wanted
    values: Tensor  # [fields, all rows] fp32


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows a launch draws: `count` of them from number `first` on.

    Row (b·C + c)·D + d is the entry (b, c, d) of the operands. Slots count from 0.
    """

    first: int
    count: int
    sizes: tuple[int, int]  # C, D


def blocks_of(vocabulary: int) -> int:
    return triton.cdiv(vocabulary, WIDTH)


def scratch_bytes(vocabulary: int, wanted: Wanted) -> int:
    """Bytes of scratch memory per row, if the row does not fit into one tile."""
    return 4 * (2 + wanted.entropy + wanted.raw) * blocks_of(vocabulary)


def row_draw(
    conditional: Operand,
    unconditional: Operand | None,
    rows: Rows,
    mask_id: int | None,
    *,
    temperature: float | Tensor,
    gain: float | Tensor,
    row_keys: Tensor,
    seed: Tensor,
    step: Tensor,
    wanted: Wanted,
    results: Results,
) -> None:
    """Draw a token for each of `rows` and fill `results` there.

    A temperature of 0 is the argmax, lowest id first, with the statistics of temperature 1. A row
    with a NaN, +inf, or no class gets token -1, argmax -1 and NaN.

    Args:
        conditional, unconditional: logits (R,), addressed by (b, c, d), by slot or both.
        temperature, gain: a number, or (all rows,) fp32; gain is the scale of guidance + 1.
        row_keys: (all rows,) int64.
        seed, step: () int64, read on the device.
    """
    if rows.count == 0:
        return
    tuned = launch_parameters(conditional.x.device)
    vocabulary = conditional.vocabulary
    blocks = blocks_of(vocabulary)
    if vocabulary > MAX_VOCABULARY:
        raise ValueError(f"at most {MAX_VOCABULARY} columns can be drawn from, got {vocabulary}")
    operands = [conditional, conditional if unconditional is None else unconditional]
    bins = any(operand.kind != LOGITS for operand in operands)
    # Bins, and the other logits of guidance, take registers of their own.
    guided = unconditional is not None
    elements = max(WIDTH, tuned.sample_elements // (1 + bins))
    per_warp = max(1, tuned.sample_whole_elements // ((1 + bins) * (1 + guided)))
    block_g = power_of_two(blocks)
    whole = block_g * WIDTH <= max(WIDTH, elements // 2)
    parts = results.values
    pointers = [tensor for operand in operands for tensor in (operand.x, operand.y)]
    pointers += [
        value if isinstance(value, Tensor) else results.values for value in (temperature, gain)
    ]
    common = [
        *rows.sizes,
        vocabulary,
        blocks,
        rows.count * blocks,
        -1 if mask_id is None else mask_id,
        *(operand.eps for operand in operands),
        *(0.0 if isinstance(value, Tensor) else float(value) for value in (temperature, gain)),
        *(stride for operand in operands for stride in operand.strides),
    ]
    flags = {
        "KIND": conditional.kind,
        "KIND_U": NO_GUIDANCE if unconditional is None else unconditional.kind,
        "ALIGN": operands[0].align,
        "ALIGN_U": operands[1].align,
        "HAS_HEAT": isinstance(temperature, Tensor),
        "HAS_GAIN": isinstance(gain, Tensor),
        "ENTROPY": wanted.entropy,
        "RAW": wanted.raw,
        "WIDTH": WIDTH,
    }
    if whole:
        block_r = max(1, min(per_warp // (block_g * WIDTH), tuned.sample_rows))
        warps = max(1, min(8, block_g * WIDTH // per_warp))
    else:
        parts = torch.empty(
            2 + wanted.entropy + wanted.raw,
            rows.count,
            blocks,
            dtype=torch.float32,
            device=conditional.x.device,
        )
        tile_blocks = elements // WIDTH
        tiles = triton.cdiv(blocks, tile_blocks)
        _block_sums_kernel[(rows.count * tiles,)](
            *pointers,
            parts,
            rows.first,
            rows.count,
            tiles,
            *common,
            **flags,
            BLOCK_G=tile_blocks,
            num_warps=tuned.sample_warps,
        )
        block_r = max(1, min(tuned.sample_blocks // block_g, tuned.sample_joined_rows))
        warps = max(1, min(8, block_g // tuned.sample_blocks))
    _row_draw_kernel[(triton.cdiv(rows.count, block_r),)](
        *pointers,
        parts,
        row_keys,
        seed,
        step,
        results.token,
        results.argmax,
        results.values,
        rows.first,
        rows.count,
        results.values.shape[1],
        *common,
        **flags,
        WHOLE=whole,
        GREEDY=wanted.greedy,
        ARGMAX=wanted.argmax,
        MARGIN=wanted.margin,
        BLOCK_R=block_r,
        BLOCK_G=block_g,
        num_warps=warps,
    )
