"""Which rows a step of confidence sampling computes, and how many of them it fills.

Shapes: B sequences, D positions, S steps of a block, P prompt tokens. Everything that the host
can know in advance is worked out there once; the loop then runs without waiting for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from .caches import Window
from .loop import Run, moved
from .masked import plan_unmask_steps
from .schedules import time_grid


@dataclasses.dataclass(frozen=True)
class Fill:
    """Which masked positions a step computes, and how many of them it fills."""

    number: int  # of the step, from 0 on
    opening: int | None  # that of its block's first step; None: sequences are in several blocks
    begin: int
    limit: int | Tensor  # masked positions in [begin, limit) are active; a number or (B, 1)
    size: int  # how many there are in all sequences
    sequences: Tensor  # int64, those of the call
    counts: Tensor | None = None  # (B,) int64, how many to fill; None: all, or as a rule decides
    window: Window | None = None


# A fill, and on the host: (B,) nonzero for the sequences of its call, (B,) counts.
OnHost: TypeAlias = tuple[Fill, Tensor, Tensor | None]


class Blocks:
    """The blocks of a run. Without a window the first also holds the unknown tokens of the prompt.

    Args:
        block_length: None for a single block.
        steps: of all blocks together; None where a rule decides.
        capped: the steps cap a threshold.
        schedule, t_min, eos_id, window, lead: see `sample_confidence`.
    """

    def __init__(
        self,
        run: Run,
        prompt: Tensor | None,
        block_length: int | None,
        steps: int | None,
        schedule: str,
        t_min: float,
        eos_id: int | None,
        capped: bool,
        window: str,
        lead: bool,
    ):
        self.run, self.schedule, self.t_min, self.eos_id = run, schedule, t_min, eos_id
        self.window, self.lead = window, lead
        self.prompt_length = 0 if prompt is None else prompt.shape[-1]
        own = run.positions - self.prompt_length
        self.block_length = block_length or max(own, 1)
        self.blocks = max(1, -(-own // self.block_length))
        self.steps = 0 if steps is None else steps // self.blocks  # of one block
        self.turns: Tensor | None = None  # (B, D) int64, the step of each position, of `origin`
        if self.block_length > run.positions:
            raise ValueError(
                f"block_length must be at most D = {run.positions}, got {block_length}"
            )
        if steps is not None and capped and self.blocks > 1:
            raise ValueError(
                f"steps caps a threshold in a single block only, got {self.blocks} blocks"
            )
        if steps is not None and steps % self.blocks:
            raise ValueError(
                f"steps must be a multiple of the number of blocks, {self.blocks}, got {steps}"
            )
        if lead and self.steps == 1 and own > 1:
            raise ValueError(f"steps must be at least 2 per block with lead=True, got {steps}")
        if window != "all" and bool(run.masked()[:, : self.prompt_length].any()):
            raise ValueError(f"prompt must have no unknown tokens with window={window!r}")

    def bounds(self, block: int) -> tuple[int, int]:
        """Where the masked positions of a block are, [begin, end)."""
        end = self.prompt_length + (block + 1) * self.block_length
        begin = end - self.block_length if block or self.window != "all" else 0
        return begin, min(end, self.run.positions)

    def window_of(self, block: int, first: bool) -> Window | None:
        """What the model is told; first: at the block's first call."""
        kind, (begin, end), length = self.window, self.bounds(block), self.run.positions
        if kind == "all":
            return None
        if kind == "causal":
            return Window(kind, begin, end, begin, end, begin == 0, length)
        start, stop = begin, length if kind == "suffix" else end
        if self.run.shift and not self.lead:  # the row before holds the logits of the first
            start = max(begin - 1, 0)
        if first:
            start, stop = 0, length
        return Window(kind, begin, end, start, stop, first, length)

    def counts(self, initial: Tensor, active: Tensor, step: int) -> Tensor:
        """How many of the active positions a step fills, with `initial` of them at the start."""
        if self.schedule == "even":
            before, after = (self.even(initial, step + i) for i in (0, 1))
            return torch.minimum(after - before, active)
        if step == self.steps - 1:
            return active
        # In fp32 as Dream does it: the result is cut off to an integer.
        times = torch.linspace(1.0, self.t_min, self.steps + 1, dtype=torch.float32)
        return (active.float() * (1 - times[step + 1] / times[step])).long()

    def even(self, total: Tensor, done: int) -> Tensor:
        """What `done` steps fill of total / S each, the remainder one by one at first (LLaDA)."""
        done = min(done, self.steps)
        return total // self.steps * done + (total % self.steps).clamp(max=done)

    def _capped(self, initial: Tensor, active: Tensor, step: int) -> Tensor:
        """How many more a step may fill until as many are filled as `even` would have."""
        return self.even(initial, step + 1) - (initial - active)

    def _block_of(self, position: Tensor) -> Tensor:
        return (position - self.prompt_length).clamp(min=0) // self.block_length

    # The fills of a run, by what is known of them

    def known(self, *, origin: bool = False) -> Iterator[Fill]:
        """Their number of rows follows from what is masked at the start.

        With `origin` the order is Dream's random one, each position's step drawn in advance: it
        unmasks at step k of its block with probability t_k − t_(k+1), what remains at the last.
        One host sync at the start; with `eos_id` one more per block, to learn which sequences
        ended.
        """
        masked, fills = self.run.masked().cpu(), list[OnHost]()
        turns = self._draw_turns() if origin else torch.empty(0)
        for block in range(self.blocks):
            begin, end = self.bounds(block)
            if block and self.eos_id is not None:
                masked[self._end_sequences(begin).cpu()] = False
            initial = left = masked[:, begin:end].sum(1)
            opening, first = block * self.steps, True
            for index in range(self.steps):
                limit, active = end, left
                if origin:
                    counts = active = (masked & (turns == opening + index)).sum(1)
                elif self.lead and not index:
                    limit, active = begin + 1, masked[:, begin].long()
                    counts = active
                else:
                    counts = self.counts(initial, left, index)
                # What a cache holds of a block grows fewer, never more.
                asked = active if self.window == "all" else left
                left = left - counts
                if bool(active.any()):
                    window = self.window_of(block, first)
                    fill = self._fill(opening + index, opening, limit, int(active.sum()), window)
                    fills.append((fill, asked, counts))
                    first = False
            if self.eos_id is not None or block == self.blocks - 1:
                yield from self._moved(fills)
                fills = []

    def _draw_turns(self) -> Tensor:
        run, times = self.run, time_grid(self.steps, self.t_min)
        shape = (run.batch, run.positions)
        plan = plan_unmask_steps(times, shape, seed=run.seed, first_sequence=run.first_sequence)
        block = self._block_of(torch.arange(run.positions))
        turns = plan.clamp(max=self.steps - 1) + self.steps * block
        self.turns = turns.to(run.device)
        return turns

    def counted(self, *, open_ended: bool = False) -> Iterator[Fill]:
        """Of a model that may draw the mask, or open-ended with a window: all sequences are in the
        same block. One host sync per step counts what is masked."""
        for block in range(self.blocks):
            begin, end = self.bounds(block)
            if block and self.eos_id is not None:
                self._end_sequences(begin)
            # Open-ended, a block may take a step for each position; its numbers must not depend on
            # how many other sequences take.
            opening = block * (self.block_length if open_ended else self.steps)
            initial = None
            for index in range(end - begin if open_ended else self.steps):
                masked = self.run.masked()[:, :end]
                inside = masked[:, begin:]
                parts = (masked if self.window == "all" else inside, inside, inside[:, :1])
                asked, inside, leading = torch.stack([part.sum(1) for part in parts]).cpu()
                if not bool(asked.any()):
                    break
                initial = inside if initial is None else initial
                limit, active, counts = end, asked, None
                if self.lead and not index:
                    limit, active, counts = begin + 1, leading, leading
                elif not open_ended:
                    counts = self.counts(initial, active, index)
                elif self.steps:
                    counts = self._capped(initial, active, index)
                window = self.window_of(block, not index)
                fill = self._fill(opening + index, opening, limit, int(active.sum()), window)
                yield from self._moved([(fill, asked, counts)])

    def open(self) -> Iterator[Fill]:
        """Until nothing is masked, each sequence in the block of its first masked position.

        A sequence that has finished its block goes on to the next without waiting for others, so
        what it becomes does not depend on them. One host sync per step counts the active rows.
        Each step fills a position of every active sequence, so D are enough; only a model that
        draws the mask comes to the end of them.
        """
        place = torch.arange(self.run.positions, device=self.run.device)
        initial: Tensor | None = None
        for number in range(self.run.positions):
            masked = self.run.masked()
            first = masked.int().argmax(1, keepdim=True)
            begin = self.prompt_length + self._block_of(first) * self.block_length
            if self.eos_id is not None and number:
                masked = masked & ~self._end_sequences(begin).unsqueeze(1)
            limit = begin + self.block_length
            active = (masked & (place < limit)).sum(1)
            counts = None
            if self.steps:  # a cap on what the rule lets through, at least 1 while any are masked
                initial = active if initial is None else initial
                counts = self._capped(initial, active, number)
            on_host = active.cpu()
            rows = int(on_host.sum())
            if not rows:
                return
            sequences = on_host.nonzero()[:, 0].to(self.run.device)
            yield Fill(number, None, 0, limit, rows, sequences, counts)

    def _end_sequences(self, begin: int | Tensor) -> Tensor:
        """Fill up, with eos_id, the sequences that hold it among their own tokens before `begin`.

        Returns:
            (B,) bool, the sequences that have ended, on the device.
        """
        run, end = self.run, self.eos_id
        assert end is not None
        place = torch.arange(run.positions, device=run.device)
        own = (place >= self.prompt_length) & (place < begin)
        ended = ((run.tokens == end) & own).any(1)
        run.tokens = torch.where(ended.unsqueeze(1) & run.masked(), end, run.tokens)
        return ended

    def _fill(
        self, number: int, opening: int, limit: int, size: int, window: Window | None
    ) -> Fill:
        """One whose tensors are still on the host."""
        begin = 0 if window is None else window.begin
        return Fill(number, opening, begin, limit, size, torch.empty(0), None, window)

    def _moved(self, fills: list[OnHost]) -> Iterator[Fill]:
        """Them with all their tensors on the device, moved in one go."""
        tensors = [asked.nonzero()[:, 0] for _, asked, _ in fills]
        tensors += [counts for _, _, counts in fills if counts is not None]
        each = moved(tensors, self.run.device)
        sequences, rest = each[: len(fills)], iter(each[len(fills) :])
        for (fill, _, counts), some in zip(fills, sequences, strict=True):
            counts = None if counts is None else next(rest)
            yield dataclasses.replace(fill, sequences=some, counts=counts)
