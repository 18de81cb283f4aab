"""What ranks exchange for a loss over a sharded vocabulary, between the sweeps of the driver.

Shapes: B examples, N components, J target rows, K draws, D positions, A slots, P slots of a chunk.

Every rank has its columns of all logits, and global token ids. One sweep finds the sums of its part
of every row, and the log-probabilities of targets among its columns. With the sums of whole rows
(all-reduce of the largest, then of the totals) the pass over distributions is local: mass and
divergences are sums over columns, added up once at the end, and so is dL/dhidden after `backward`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..groups import Shard, agree_but_for_positions, of_first_rank, places_among
from ..passes import torch_draw
from ..passes.base import Chunk, DrawOptions, Operand, Places, RowSums, Statistics, Visit
from .plan import Plan, visits
from .problem import Problem
from .source import Source, sweep_over

Keys = Callable[[Tensor], Tensor]

NEG_INF = float("-inf")
DRAWN_BYTES = 64 << 20  # of the consistency logits that ranks draw from together


def agreed(problem: Problem) -> tuple[Problem, Keys]:
    """The problem that all ranks evaluate, with one seed, and the keys of rows among all positions.

    Ranks that share the positions number them one after the other.
    """
    shard, group, device = problem.student.shard, problem.position_group, problem.tokens.device
    facts, positions, seed = problem.facts(), problem.sizes[2], problem.seed
    if shard is not None:
        tensors = (problem.tokens, problem.xu, problem.active, problem.ends)
        shard.agree(facts | {"positions": positions}, device, *tensors)
        seed = None if seed is None else of_first_rank(seed, shard.group)
    if group is None:
        return dataclasses.replace(problem, seed=seed), lambda rows: rows
    agree_but_for_positions(group, facts, device)
    seed = None if seed is None else of_first_rank(seed, group)
    before, total = places_among(positions, group, device)
    return dataclasses.replace(
        problem, seed=seed
    ), lambda rows: rows // positions * total + before + rows % positions


def draw_targets(
    problem: Problem,
    passes: Any,
    u: Operand,
    visit: Visit,
    rows: Tensor,
    statistics: Statistics,
    keys: Tensor,
) -> None:
    """Draw x^k of a chunk, one token from every component of the consistency logits."""
    sums, tokens, xu = statistics.consistency, statistics.tokens, problem.xu
    shard = problem.student.shard
    assert problem.seed is not None
    assert sums is not None
    if shard is None:
        options = DrawOptions(mask_id=problem.mask_id, seed=problem.seed)
        drawn = passes.draw(u, None, visit, keys.flatten(), options)
    else:
        options = DrawOptions(shard.column(problem.mask_id), problem.seed)
        drawn = torch_draw.draw(u, None, visit, keys.flatten(), options, shard)
    sums.shift[visit.part] = drawn.shift.view(rows.shape)
    sums.total[visit.part] = drawn.total.view(rows.shape)
    token = drawn.token.view(rows.shape).clamp_min(0)
    own = tokens[:, tokens.shape[1] - u.components :]
    if xu is None and visit.rows is None and visit.slots == own[:, 0].numel():
        own.copy_(token.view(-1, visit.positions, u.components).transpose(1, 2))
        return
    b, d = visit.split(token.device)
    if visit.count is not None:
        slots = torch.arange(visit.first, visit.first + visit.slots, device=token.device)
        token = torch.where((slots < visit.count).unsqueeze(-1), token, 0)
    if xu is not None:
        shown = xu[b, :, d]
        token = torch.where(shown.ne(problem.mask_id or 0), shown, token)
    own[b, :, d] = token


def local_statistics(shard: Shard, statistics: Statistics) -> Statistics:
    """The same for passes over this rank's columns."""
    tokens = shard.local(statistics.tokens)
    return dataclasses.replace(statistics, tokens=tokens, sums_known=True, all_known=True)


def find_sums(
    shard: Shard,
    problem: Problem,
    passes: Any,
    plan: Plan,
    places: Places,
    sources: Sequence[Source | None],
    statistics: Statistics,
    keys: Keys,
) -> None:
    """Draw the targets that are to be drawn; then the sums of whole rows, and `log_prob` of the
    owned targets."""
    student, teacher, consistency = sources
    assert student is not None
    pairs = [(student, statistics.student), (teacher, statistics.teacher)]
    if problem.seed is None:
        pairs.append((consistency, statistics.consistency))
    elif consistency is not None:
        # The ranks draw together, so their chunks are the same.
        row = consistency.components * shard.share * problem.dtype.itemsize
        together = dataclasses.replace(plan, chunk=max(1, DRAWN_BYTES // row))
        for visit in visits(together, problem.sizes[2], places.slots, places.rows, places.count):
            u = consistency.load(visit)
            rows = consistency.rows(visit)
            draw_targets(problem, passes, u, visit, rows, statistics, keys(rows))
    every = [(source, sums) for source, sums in pairs if source is not None and sums is not None]
    local = dataclasses.replace(statistics, tokens=shard.local(statistics.tokens))
    log_prob = statistics.log_prob
    for source, sums in every:
        if source is not student:  # there are no targets in the rows of others
            none = log_prob.new_zeros(log_prob.shape[0], 0, source.components)
            local = dataclasses.replace(local, tokens=local.tokens[:, :0], log_prob=none)
        local = dataclasses.replace(local, student=sums, sums_known=False)
        sweep, _ = sweep_over(problem, plan, places, source)
        for visit in sweep:
            chunk = Chunk(source.load(visit), None, None, visit, problem.mixture(), local)
            passes.forward(chunk)
    whole = statistics.student
    part = RowSums(whole.shift.clone(), whole.total.clone())
    _exchange_sums(shard, [sums for _, sums in every])
    moved = (part.shift - whole.shift) + (_log(part.total) - _log(whole.total))
    log_prob += moved.unsqueeze(1)


def _log(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1.0, total).log()


def _exchange_sums(shard: Shard, every: Sequence[RowSums]) -> None:
    """Sums of the columns of this rank become those of whole rows."""
    # A row without a class has shift 0, which is no logit.
    own = [torch.where(sums.total == 0, NEG_INF, sums.shift) for sums in every]
    largest = shard.maximum(*own)
    scaled = [
        torch.where(sums.total == 0, 0.0, sums.total * (shift - peak).exp())
        for sums, shift, peak in zip(every, own, largest, strict=True)
    ]
    for sums, peak, total in zip(every, largest, shard.sum(*scaled), strict=True):
        sums.shift.copy_(torch.where(peak == NEG_INF, 0.0, peak))
        sums.total.copy_(total)


def exchange_statistics(shard: Shard, statistics: Statistics, places: Places) -> None:
    """Log-probabilities of targets from their owners, sums over columns from all ranks."""
    part = slice(0, places.slots)
    b, d = Visit(0, places.slots, places.sizes[1], places.rows).split(statistics.mass.device)
    log_prob = statistics.log_prob[part]
    log_prob.masked_fill_(~shard.owns(statistics.tokens[b, :, d]).unsqueeze(-1), 0.0)
    names = ("mass", "teacher_kl", "consistency_kl", "divergence")
    every = [log_prob, *(getattr(statistics, name) for name in names)]
    for mine, total in zip(every, shard.sum(*every), strict=True):
        mine.copy_(total)
