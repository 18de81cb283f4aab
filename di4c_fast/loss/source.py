"""The logits of heads, chunk by chunk, and the chunks of a sweep over them.

Shapes: B examples, C components, D positions, P slots of a chunk, V classes.
"""

from __future__ import annotations

import dataclasses
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

    def __init__(self, head: Head, passes: Any, plan: Plan, places: Places):
        self.passes, self.ahead = passes, plan.ahead
        self.stop = places.slots if places.number is None else places.number
        detached = head.detach()
        self.head, self.whole = detached.prepared(), detached.operand(passes)
        self.components = head.shape[1] if len(head.shape) == 4 else 1
        self._buffer: Tensor | None = None
        self._computed = range(0)  # slots in the buffer
        self._kept = 0  # how many of the kept slots are computed

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

    def load(self, visit: Visit, kept: Tensor | None = None) -> Operand:
        """The logits of a chunk, in memory or computed, into `kept` (slots, C, padded V) where it
        has the chunk's slots.

        A product reads the whole weight, so that one of few rows takes later chunks along: all
        that are kept, if it takes no memory beside them, otherwise what `Plan.ahead` has room for.
        """
        if self.whole is not None:
            return self.whole
        end = visit.first + visit.slots
        row = self.components * padded(self.head.shape[-1]) * self.head.chunk_dtype.itemsize
        stop = max(end, min(self.stop, visit.first + self.ahead // row))
        if kept is not None and end <= kept.shape[0]:
            if end > self._kept:
                stop = self.stop if self.head.loads_in_place else stop
                self._kept = min(stop, kept.shape[0])
                self._compute(visit, self._kept, kept[visit.first : self._kept])
            return self._operand(kept[visit.part])
        if visit.first not in self._computed or end > self._computed.stop:
            self._computed = range(visit.first, stop)
            if self._buffer is None or self._buffer.shape[0] < len(self._computed):
                self._buffer = self.new_chunk(len(self._computed))
            self._compute(visit, self._computed.stop, self._buffer[: len(self._computed)])
        assert self._buffer is not None
        begin = visit.first - self._computed.start
        return self._operand(self._buffer[begin : begin + visit.slots])

    def _operand(self, logits: Tensor) -> Operand:
        return Operand.of_chunk(logits[..., : self.head.shape[-1]])

    def _compute(self, visit: Visit, stop: int, out: Tensor) -> None:
        rows = self.rows(dataclasses.replace(visit, slots=stop - visit.first))
        self.head.load(rows, out[..., : self.head.shape[-1]], self.passes)


def source_of(head: Head | None, passes: Any, plan: Plan, places: Places) -> Source | None:
    return None if head is None else Source(head, passes, plan, places)


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
