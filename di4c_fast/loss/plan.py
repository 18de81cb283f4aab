"""How the sweeps are cut into chunks, and for how many slots what is kept between them.

From shapes alone, so that the op can tell the sizes of what it returns. What a chunk takes is the
logits of heads that have to be computed and the temporaries of the passes; an eighth of its room
is for logits of later chunks, so that a head of few rows is not multiplied for every chunk. What is
kept, under a byte budget that a chunk is part of: rows of q (and of q_T for the component term),
which stand for one or several heads; then the student's computed logits, which stand for a product.
The active positions come first, so what is kept is most likely needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..heads import Head
from ..passes.base import Visit, padded
from .problem import Problem

MINIMUM_ROWS = 64  # of a computed head: smaller matrix products run far below their peak
BUDGET = 88 << 20  # of all that is kept and of a chunk
# Where logits are computed and cannot all be kept; a product costs more than memory on a GPU.
COMPUTED_BUDGET = {"cpu": 44 << 20, "cuda": 768 << 20}
# Of the student's logits in memory: with a gradient in place the peak stays below a tenth of them.
KEPT_SHARE = 0.09


@dataclasses.dataclass(frozen=True)
class Plan:
    chunk: int  # slots
    kept: int  # slots whose rows of q, and of q_T, are kept
    kept_logits: int  # slots whose computed logits of the student are kept
    computes: bool  # logits of some head
    ahead: int  # bytes of a head's logits that may be computed before their chunk


def make_plan(problem: Problem, passes: Any, needs_grad: bool) -> Plan:
    batch, components, positions, vocabulary = problem.sizes
    total, row = batch * positions, padded(vocabulary)
    heads = [h for h in (problem.student, problem.teacher, problem.consistency) if h is not None]
    device = problem.student.device
    computed = [head for head in heads if head.operand(passes) is None]
    per_slot = sum(_components(head) * row * head.prepared_dtype.itemsize for head in computed)
    itemsize = problem.dtype.itemsize
    budget = min([head.budget_bytes for head in heads if head.budget_bytes], default=None)
    work = per_slot + passes.temporary_bytes(sum(map(_components, heads)), row * itemsize)
    chunk, ahead = total, 0
    if work:
        room = budget // 2 if budget else passes.chunk_bytes(device)
        ahead = room // 8 if computed else 0
        chunk = (room - ahead) // work
        if computed:
            chunk = max(chunk, -(-MINIMUM_ROWS // max(map(_components, computed))))
        chunk = max(1, min(chunk, total))
    if not needs_grad:
        return Plan(chunk, 0, 0, bool(computed), ahead)
    kept = kept_logits = size = 0
    rows = problem.marginal + problem.component
    if problem.student in computed:
        size = components * row * problem.student.prepared_dtype.itemsize
    everything = total * (rows * row * itemsize + size) + chunk * (per_slot - size) + ahead
    if computed and everything > (budget or BUDGET):
        budget = budget or COMPUTED_BUDGET.get(device.type, BUDGET)
        budget = max(0, budget - chunk * per_slot - ahead)
    elif budget is None:
        logits = problem.student.shape.numel() * problem.student.dtype.itemsize
        budget = max(BUDGET, 0 if computed else int(KEPT_SHARE * logits))
    if rows:
        kept = min(total, budget // (rows * row * itemsize))
        budget -= kept * rows * row * itemsize
        if kept < total and not work:  # the other slots share what is left for rows of one chunk
            chunk = max(1, min(kept // 2, total))
            kept = max(0, kept - chunk)
        kept = kept if kept == total else kept // chunk * chunk
    if size:
        kept_logits = min(total, budget // size)
        kept_logits = kept_logits if kept_logits == total else kept_logits // chunk * chunk
    return Plan(chunk, kept, kept_logits, bool(computed), ahead)


def _components(head: Head) -> int:
    return head.shape[1] if len(head.shape) == 4 else 1


def visits(
    plan: Plan, positions: int, stop: int, rows: Tensor | None, count: Tensor | None
) -> Iterator[Visit]:
    """The chunks of a sweep over slots 0 .. stop - 1."""
    for first in range(0, stop, max(plan.chunk, 1)):
        yield Visit(first, min(plan.chunk, stop - first), positions, rows, count)


def order_positions(active: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of `active` (B, D) bool with the active ones first, and how many those are.

    Both stay on the device: (B·D,) int64 and () int64. The order within each group is kept.
    """
    flat = active.reshape(-1)
    return torch.argsort((~flat).to(torch.uint8), stable=True), flat.sum()
