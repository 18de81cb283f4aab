"""`draw` as plain tensor operations: any device, fp32 or fp64, no compiler.

Shapes: P slots, C components, R = P·C rows, V vocabulary, W = SAMPLE_BLOCK, G blocks of a row.

Of a sharded vocabulary (`shard`) the ranks exchange the largest logit, the sums of all blocks
(V/128 numbers per row), and the winners. A block that lies on two ranks is one block all the same.

The law is in `di4c_fast.draw.law`. Rows are drawn in groups, groups in chunks. A group holds the
random numbers; a chunk is what the operations over the vocabulary touch, small enough to stay
in the cache of a CPU.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..draw.filters import NEG_INF, guide, row_peak
from ..draw.law import (
    SAMPLE_BLOCK,
    block_sums,
    block_uniforms,
    blocks_of,
    choose_block,
    run_race,
    token_uniforms,
)
from ..groups import Shard
from .base import Drawn, DrawOptions, Operand, Visit

CHUNK_BYTES = 8 << 20  # on a CPU: fits the caches, and few enough chunks
GROUP_NUMBERS = 1 << 20  # random numbers held at a time
SHARD_NUMBERS = 1 << 24  # columns that ranks draw from together
_LOWEST = -1e5  # exp is 0 from here on in fp32 and fp64, so that 0·(-inf) becomes 0


def draw(
    x: Operand,
    y: Operand | None,
    visit: Visit,
    keys: Tensor,
    options: DrawOptions,
    shard: Shard | None = None,
) -> Drawn:
    """One draw for each row of the visited slots; y are unconditional logits of guidance.

    With `shard` the columns are those of one rank, and tokens those of the whole vocabulary.
    """
    logits = x.of_visit(visit)
    other = None if y is None else y.of_visit(visit)
    slots, components, vocabulary = logits.shape
    vocabulary = vocabulary if shard is None else shard.vocabulary
    size = max(1, GROUP_NUMBERS // (components * (blocks_of(vocabulary) + SAMPLE_BLOCK)))
    if shard is not None:  # what ranks do together has one size on all of them
        size = max(1, min(size, SHARD_NUMBERS // (components * shard.share)))
    groups = []
    for begin in range(0, slots, size) if slots else (0,):
        part = slice(begin, min(begin + size, slots))
        rows = slice(part.start * components, part.stop * components)
        given = None if other is None else other[part]
        groups.append(_draw_group(logits[part], given, keys[rows], options.of_rows(rows), shard))
    if len(groups) == 1:
        return groups[0]
    names = [field.name for field in dataclasses.fields(Drawn)]
    parts = {name: [getattr(group, name) for group in groups] for name in names}
    return Drawn(**{name: torch.cat(part) for name, part in parts.items() if part[0] is not None})


@dataclasses.dataclass
class _Group:
    """What the chunks of a group leave, (r,) each but for the weights."""

    shard: Shard | None
    first: int  # block of the first column
    blocks: int  # G, of the whole vocabulary
    uniforms: Tensor | None  # (r, G)
    cold: Tensor | None  # bool: rows at temperature 0, where temperatures differ
    chosen: Tensor  # block of the token
    argmax: Tensor
    shift: Tensor  # largest logit, before the temperature
    total: Tensor
    raw_total: Tensor  # total at temperature 1
    entropy: Tensor
    margin: Tensor
    weights: Tensor  # (r, W) of the chosen block: exp((x - shift) / T)


def _draw_group(
    logits: Tensor,
    other: Tensor | None,
    keys: Tensor,
    options: DrawOptions,
    shard: Shard | None,
) -> Drawn:
    """Draws of the rows of some slots: (p, C, V) each, keys (r,)."""
    slots, components, vocabulary = logits.shape
    whole = vocabulary if shard is None else shard.vocabulary
    start = 0 if shard is None else shard.start
    work = torch.promote_types(logits.dtype, torch.float32)
    temperature, cold = options.temperature, None
    if isinstance(temperature, Tensor):
        cold = temperature == 0.0
        temperature = torch.where(cold, 1.0, temperature)
    elif options.greedy:
        temperature = 1.0
    warm = dataclasses.replace(options, temperature=temperature)
    uniforms = None
    if not options.greedy and blocks_of(whole) > 1:
        uniforms = block_uniforms(options.seed, options.step, keys, whole, work)

    def number(*width: int, dtype: torch.dtype = work) -> Tensor:
        return torch.zeros(len(keys), *width, dtype=dtype, device=keys.device)

    group = _Group(
        shard,
        start // SAMPLE_BLOCK,
        blocks_of(whole),
        uniforms,
        cold,
        chosen=number(dtype=torch.int64),
        argmax=number(dtype=torch.int64),
        shift=number(),
        total=number(),
        raw_total=number(),
        entropy=number(),
        margin=number(),
        weights=number(SAMPLE_BLOCK),
    )
    size = slots
    if shard is None and logits.device.type == "cpu":
        size = max(1, min(slots, CHUNK_BYTES // (components * vocabulary * work.itemsize)))
    width = (blocks_of(start + vocabulary) - group.first) * SAMPLE_BLOCK
    scratch = torch.empty(size * components, width, dtype=work, device=keys.device)
    for begin in range(0, slots, size):
        part = slice(begin, min(begin + size, slots))
        rows = slice(part.start * components, part.stop * components)
        x = logits[part].reshape(-1, vocabulary)
        y = None if other is None else other[part].reshape(-1, vocabulary)
        _sum_chunk(group, rows, x, y, warm.of_rows(rows), options.greedy, scratch[: x.shape[0]])
    return _race(group, logits, other, keys, warm, options.greedy)


def _sum_chunk(
    group: _Group,
    rows: slice,
    x: Tensor,  # (r, V)
    y: Tensor | None,
    options: DrawOptions,
    greedy: bool,
    scratch: Tensor,  # (r, columns): the blocks that x has a part of
) -> None:
    """All operations over the vocabulary for the rows `rows` of a group."""
    wanted, vocabulary, temperature = options.wanted, x.shape[1], options.temperature
    shard, first = group.shard, group.first
    begin = 0 if shard is None else shard.start - first * SAMPLE_BLOCK
    if isinstance(temperature, Tensor):
        temperature = temperature.unsqueeze(-1)
    if y is not None:
        x = guide(x, y, options.guidance, scratch.dtype)

    # Logits minus the largest of their row; excluded columns and the padding are -inf.
    peak = row_peak(x, options.mask_id).to(scratch.dtype)
    if shard is not None:
        (peak,) = shard.maximum(peak)
    shift = peak.masked_fill_(peak == NEG_INF, 0.0)
    columns = scratch[:, begin : begin + vocabulary]
    if x.dtype == scratch.dtype:
        torch.sub(x, shift, out=columns)
    else:
        columns.copy_(x).sub_(shift)
    if options.mask_id is not None:
        columns[:, options.mask_id] = NEG_INF
    scratch[:, :begin] = NEG_INF
    scratch[:, begin + vocabulary :] = NEG_INF
    group.shift[rows] = shift[:, 0]
    if options.tempered:
        if "raw_prob" in wanted:
            raw_total = group.raw_total[rows] = block_sums(columns.exp()).sum(-1)
            if shard is not None:
                (group.raw_total[rows],) = shard.sum(raw_total)
        scratch.div_(temperature)

    # What needs the logits themselves.
    blocks = scratch.unflatten(1, (-1, SAMPLE_BLOCK))
    second = weighted_log = None
    if greedy or group.cold is not None or wanted & {"argmax", "margin"}:
        group.argmax[rows], second = _largest_two(blocks, first, shard)
    if "entropy" in wanted:
        weights = scratch.exp()
        weighted_log = block_sums(scratch.clamp_(min=_LOWEST).mul_(weights)).sum(-1)
        blocks = weights.unflatten(1, (-1, SAMPLE_BLOCK))
    else:
        scratch.exp_()

    # What needs their exponentials.
    sums = blocks.sum(-1)
    if shard is not None:
        every = sums.new_zeros(len(sums), group.blocks)
        every[:, first : first + sums.shape[1]] = sums
        none = sums.new_zeros(0) if weighted_log is None else weighted_log
        sums, none = shard.sum(every, none)
        weighted_log = weighted_log if weighted_log is None else none
    total = group.total[rows] = sums.sum(-1)
    chosen = group.chosen[rows]
    if greedy:
        chosen.copy_(group.argmax[rows] // SAMPLE_BLOCK)
    elif group.uniforms is not None:
        chosen.copy_(choose_block(sums, group.uniforms[rows]))
        if group.cold is not None:
            best = group.argmax[rows] // SAMPLE_BLOCK
            chosen.copy_(torch.where(group.cold[rows], best, chosen))
    place = chosen if shard is None else (chosen - first).clamp(0, blocks.shape[1] - 1)
    group.weights[rows] = blocks[torch.arange(len(place), device=place.device), place]
    if shard is not None:
        group.weights[rows] *= (place + first == chosen).unsqueeze(-1)
    if "margin" in wanted:
        assert second is not None
        group.margin[rows] = (1.0 - second.exp()) / total
    if weighted_log is not None:
        group.entropy[rows] = total.log() - weighted_log / total


def _race(
    group: _Group,
    logits: Tensor,
    other: Tensor | None,
    keys: Tensor,
    options: DrawOptions,
    greedy: bool,
) -> Drawn:
    """The race within the chosen blocks, and what follows from the token."""
    work, wanted, shard = group.total.dtype, options.wanted, group.shard
    token = group.argmax
    if not greedy:
        uniforms = token_uniforms(options.seed, options.step, keys, group.chosen, work)
        speed, winner = run_race(group.weights, uniforms)
        token = group.chosen * SAMPLE_BLOCK + winner
        if shard is not None:
            token = shard.argmax(speed, token)[1]
        if group.cold is not None:
            token = torch.where(group.cold, group.argmax, token)
    place = token if shard is None else (token - shard.start).clamp(0, logits.shape[2] - 1)
    place = place.view(*logits.shape[:2], 1)
    x = logits.gather(2, place).flatten(0, 1)
    if other is not None:
        x = guide(x, other.gather(2, place).flatten(0, 1), options.guidance, work)
    gap = x[:, 0].to(work) - group.shift
    if shard is not None:
        (gap,) = shard.sum(torch.where(shard.owns(token), gap, 0.0))
    raw_prob = None
    if "raw_prob" in wanted:
        raw_prob = gap.exp() / (group.raw_total if options.tempered else group.total)
    return Drawn(
        token.masked_fill(~(group.total > 0), -1),
        group.shift / options.temperature,
        group.total,
        gap / options.temperature,
        group.argmax if "argmax" in wanted else None,
        group.entropy if "entropy" in wanted else None,
        group.margin if "margin" in wanted else None,
        raw_prob,
    )


def _largest_two(blocks: Tensor, first: int, shard: Shard | None) -> tuple[Tensor, Tensor]:
    """The column of the largest value, the lowest of equals, and the second largest value."""
    tops = blocks.amax(-1)
    block = tops.argmax(-1, keepdim=True)
    values = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, SAMPLE_BLOCK)).squeeze(1)
    place = values.argmax(-1, keepdim=True)
    largest = values.amax(-1)
    within = values.scatter_(1, place, NEG_INF).amax(-1)
    outside = tops.scatter_(1, block, NEG_INF).amax(-1)
    second = torch.maximum(within, outside)
    column = ((block + first) * SAMPLE_BLOCK + place)[:, 0]
    if shard is not None:
        _, found = shard.argmax(largest, column)
        (second,) = shard.maximum(torch.where(column == found, second, largest))
        column = found
    return column, second
