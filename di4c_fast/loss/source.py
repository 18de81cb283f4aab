"""The logits of heads, chunk by chunk, and the chunks of a sweep over them.

Shapes: B examples, C components, D positions, P slots of a chunk, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..heads import Head
from ..memory import empty
from ..passes.base import Operand, Places, Visit, padded
from .plan import Plan, visits
from .problem import Problem


class Source:
    """The operand of a head, chunk by chunk."""

    def __init__(self, head: Head, passes: Any):
        self.passes = passes
        detached = head.detach()
        self.head, self.whole = detached.prepared(), detached.operand(passes)
        self.components = head.shape[1] if len(head.shape) == 4 else 1
        self._buffer: Tensor | None = None

    def rows(self, visit: Visit) -> Tensor:
        """Row numbers (P, C) of the visited slots."""
        device = self.head.device
        number = self.head.shape[:-1].numel()
        if visit.rows is None and visit.slots * self.components == number:  # all, in few launches
            every = torch.arange(number, device=device).view(-1, self.components, visit.positions)
            return every.transpose(1, 2).reshape(visit.slots, self.components)
        b, d = visit.split(device)
        component = torch.arange(self.components, device=device)
        return (b[:, None] * self.components + component) * visit.positions + d[:, None]

    def new_chunk(self, slots: int) -> Tensor:
        """An uninitialised buffer (P, C, padded V)."""
        vocabulary = self.head.shape[-1]
        sizes = (slots, self.components, padded(vocabulary))
        return empty(sizes, dtype=self.head.chunk_dtype, device=self.head.device)

    def load(self, visit: Visit, out: Tensor | None = None) -> Operand:
        """The logits of a chunk, in memory or computed into `out` or a buffer of this object."""
        if self.whole is not None:
            return self.whole
        if out is None:
            if self._buffer is None or self._buffer.shape[0] < visit.slots:
                self._buffer = self.new_chunk(visit.slots)
            out = self._buffer[: visit.slots]
        out = out[..., : self.head.shape[-1]]
        self.head.load(self.rows(visit), out, self.passes)
        return Operand.of_chunk(out)


def source_of(head: Head | None, passes: Any) -> Source | None:
    return None if head is None else Source(head, passes)


def sweep_over(
    problem: Problem, plan: Plan, places: Places, *sources: Source | None
) -> tuple[Iterator[Visit], bool]:
    """The chunks of a sweep over some heads, and whether they visit every slot.

    Only the active slots are visited where the host knows how many there are.
    """
    positions, stop, count = problem.sizes[2], places.slots, places.count
    if places.number is not None:
        stop, count = places.number, None
    everything = stop == problem.sizes[0] * positions
    return visits(plan, positions, stop, places.rows, count), everything
