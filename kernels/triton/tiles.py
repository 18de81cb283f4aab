"""What the kernels of the loss share: places of slots, tiles of logits, the marginal of a tile.

Shapes: B examples, C components, D positions, V classes, A slots, W columns of a tile. A *slot*
counts the positions that a launch visits, from 0; its *place* is its number among all A slots, by
which statistics are stored; its *position* is b·D + d (see `passes.base.Visit`). Kernels do not
specialise on counts: those change from step to step, and each would be compiled for anew.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .logistic import bins_of_rows, bins_tile
from .random import LOG2_E
from .tuning import power_of_two

MAX_ALIGN_BYTES = 16  # the widest load of one thread
COMPONENT_TILE = 32  # the largest number of components in one tile; the kernels loop beyond
LOWEST = tl.constexpr(-3.0e38)  # below every logit, and finite: differences of it are no NaN


@triton.jit
def position_at(
    slot, inside, rows_ptr, count_ptr, first, HAS_ROWS: tl.constexpr, HAS_COUNT: tl.constexpr
):
    """Place and position of a slot (scalar or vector, int64), and whether it is to be worked on."""
    place = first + slot
    position = place
    active = inside
    if HAS_ROWS:
        position = tl.load(rows_ptr + place, mask=inside, other=0)
    if HAS_COUNT:
        active = inside & (place < tl.load(count_ptr))
    return place, position, active


@triton.jit
def widened(x):
    """Logits in fp32. Of a pair of bf16 in one register, a shift and a mask take both; Triton's
    conversion takes three instructions."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def split_position(position, D):
    """Example and position in it, int64, of b·D + d. Divides in int32, which is far cheaper."""
    small = position.to(tl.int32)
    return (small // D).to(tl.int64), (small % D).to(tl.int64)


@triton.jit
def row_offset(slot, b, c, d, stride_i, stride_b, stride_c, stride_d, ALIGN: tl.constexpr):
    """Element offset of a row. ALIGN divides every stride, and is how wide loads shall be.

    The hint at the end also hides a larger alignment, which would give wider loads than
    `load_align` asks for: 170 instead of 117 registers in mixture forward.
    """
    offset = (
        slot * (stride_i // ALIGN)
        + b * (stride_b // ALIGN)
        + d * (stride_d // ALIGN)
        + c * (stride_c // ALIGN)
    )
    return tl.multiple_of(offset * ALIGN, ALIGN)


@triton.jit
def load_sums(shift_ptr, total_ptr, entry, wanted):
    """Shift and log2(total) of rows; both are 0 for rows without a class, whose logits are -inf."""
    shift = tl.load(shift_ptr + entry, mask=wanted, other=0.0)
    total = tl.load(total_ptr + entry, mask=wanted, other=0.0)
    return shift, tl.log2(tl.where(total == 0.0, 1.0, total))


@triton.jit
def load_log2_weights(log_weights_ptr, entry, wanted):
    """Component log-weights to base 2; -inf where not wanted."""
    return tl.load(log_weights_ptr + entry, mask=wanted, other=float("-inf")) * LOG2_E


@triton.jit
def softmax_rows(
    x_ptr, scale_ptr, offset, shift_ptr, total_ptr, entry, wanted, V, BINS: tl.constexpr
):  # fmt: skip
    """What `softmax_tile` takes of rows [C]; rows not wanted have probability 0."""
    shift, log2_total = load_sums(shift_ptr, total_ptr, entry, wanted)
    if BINS is None:
        what = (offset[:, None], wanted[:, None])
    else:  # shift is 0 but for rows all of whose bins are far below mu: one number is enough
        what = bins_of_rows(x_ptr, scale_ptr, offset[:, None], wanted[:, None], V)
        log2_total = tl.where(wanted, shift * LOG2_E + log2_total, float("inf"))
    return what, shift[:, None], log2_total[:, None]


@triton.jit
def softmax_tile(
    x_ptr, rows, begin, W: tl.constexpr, V, mask_id, TAIL: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """Softmax of rows [C, W] from column `begin` on: factor, log2 and the edges of bins. It is
    factor 2^log2, and the factor of logits is 1; 0 at the excluded column, beyond V, and in rows
    not wanted."""
    what, shift, log2_total = rows
    cols = (begin + tl.arange(0, W))[None, :]
    if BINS is None:
        offset, keep = what
        if TAIL:
            keep = keep & (cols < V)
        tile = tl.load(x_ptr + offset + cols, mask=keep, other=float("-inf"))
        # The difference comes first: it carries no rounding of large logits.
        log2 = (widened(tile) - shift) * LOG2_E - log2_total
        factor, edges = 1.0, shift
    else:
        edges, factor, exponent = bins_tile(what, cols, V, BINS)
        log2 = exponent - log2_total
        if TAIL:
            log2 = tl.where(cols < V, log2, float("-inf"))
    if (mask_id >= begin) & (mask_id < begin + W):  # few tiles hold it: no comparison elsewhere
        log2 = tl.where(cols == mask_id, float("-inf"), log2)
    return factor, log2, edges


@triton.jit
def row_tile(row_ptr, cols, V, TAIL: tl.constexpr):
    """Columns of a stored distribution, [W] fp32."""
    if not TAIL:
        return tl.load(row_ptr + cols)
    return tl.load(row_ptr + cols, mask=cols < V, other=0.0)


@triton.jit
def responsibility_tile(factor, log2_prob, log2_weights):
    """exp(a_n + l_nv - peak_v) [N, W], their sums over n [W], peak [W] to base 2, of a tile that
    holds all components. Where no component has the class the sum is 0."""
    weighted = log2_prob + log2_weights[:, None]
    peak = tl.max(weighted, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    part = factor * tl.exp2(weighted - peak[None, :])
    return part, tl.sum(part, axis=0), peak


@triton.jit
def add_components(peak, total, factor, weighted):
    """Take a tile [N, W] of a_n + l_nv, to base 2, into the running maximum and sum [W] over
    components."""
    top = tl.maximum(peak, tl.max(weighted, axis=0))
    part = factor * tl.exp2(weighted - top[None, :])
    return top, total * tl.exp2(peak - top) + tl.sum(part, axis=0)


# On the host --------------------------------------------------------------------------------------


def align_of(operand: Any) -> int:
    """The largest power of two of elements that divides every stride, up to 16 bytes."""
    align = MAX_ALIGN_BYTES // operand.logits.element_size()
    # Without a base address that is aligned itself, wide loads are impossible.
    if operand.logits.data_ptr() % MAX_ALIGN_BYTES:
        return 1
    while align > 1 and any(stride % align for stride in operand.strides):
        align //= 2
    return align


def load_align(operand: Any, block_components: int) -> int:
    """Elements of one load in a tile of several components.

    A thread that owns few columns of all components reduces over them without its neighbours, and
    keeps few values per column; so wide loads are for tiles of few components. 4 bytes per
    thread fill a cache line per warp, and are the least that an asynchronous copy takes.
    """
    least = max(1, 4 // operand.logits.element_size())
    return min(align_of(operand), max(least, 16 // block_components))


def visit_arguments(visit: Any, like: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """rows, count, first, slots as every kernel takes them; `like` stands for what is not there."""
    rows = like if visit.rows is None else visit.rows
    count = like if visit.count is None else visit.count
    return rows, count, visit.first, visit.slots


def visit_flags(visit: Any) -> dict[str, bool]:
    return {"HAS_ROWS": visit.rows is not None, "HAS_COUNT": visit.count is not None}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile sizes of the mixture kernels for one problem."""

    one_tile: bool
    block_n: int
    block_v: int
    split: int
    splits: int
    warps: int


def mixture_tiles(operand: Any, tuned: Any) -> Tiles:
    """All components in a tile up to COMPONENT_TILE; beyond, one block of columns per split.

    A tile has `tuned.elements` of 2 bytes, or half as many of 4: as many bytes on their way. One of
    bins is smaller, and one warp's: every thread forms what it needs of a row, and holds it.
    """
    components, vocabulary = operand.components, operand.vocabulary
    one_tile = components <= COMPONENT_TILE
    block_n = power_of_two(min(components, COMPONENT_TILE))
    elements, warps = tuned.elements * 2 // operand.logits.element_size(), tuned.warps
    if operand.bins is not None:
        elements, warps = max(tuned.bins_elements, 16 * block_n), 1
    block_v = max(1, min(power_of_two(vocabulary), elements // block_n))
    split = max(tuned.split_columns, block_v) if one_tile else block_v
    splits = triton.cdiv(vocabulary, split)
    if one_tile:  # even splits
        split = triton.cdiv(triton.cdiv(vocabulary, splits), block_v) * block_v
        splits = triton.cdiv(vocabulary, split)
    # A warp should have at least 128 elements: small tiles of single components need few. Columns
    # of more than 16 components do not fit the registers of as few threads, except in two runs over
    # many components (with 4 or 8 warps those spilled 8 bytes on sm_80).
    most = power_of_two(max(1, block_n * block_v // 128))
    warps = min(warps * (max(1, block_n // 16) if one_tile else 1), most)
    return Tiles(one_tile, block_n, block_v, split, splits, warps)


def block_columns(vocabulary: int, elements: int) -> int:
    """Columns of a tile: `elements`, but fewer where the last tile would waste a quarter.

    >>> [block_columns(vocabulary, 2048) for vocabulary in (50258, 1025, 130)]
    [2048, 256, 256]
    """
    block = min(power_of_two(vocabulary), elements)
    while block > 256 and triton.cdiv(vocabulary, block) * block > 1.25 * vocabulary:
        block //= 2
    return block
