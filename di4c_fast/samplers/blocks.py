"""Which rows a step of confidence sampling computes, and how many of them it fills.

Shapes: B sequences, D positions, S steps of a block, P prompt tokens. Everything that the host
can know in advance is worked out there once; the loop then runs without waiting for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .loop import Run, moved
from .masked import plan_unmask_steps, rows_by_step


@dataclasses.dataclass
class Layout:
    """The blocks of a run. The first also holds the unknown tokens of the prompt."""

    prompt_length: int
    positions: int
    block_length: int  # 0: one block
    steps: int | None  # of one block; as passed, of all
    schedule: str
    t_min: float
    eos_id: int | None
    capped: bool  # the steps cap a threshold

    def __post_init__(self) -> None:
        self.block_length = self.block_length or max(self.positions - self.prompt_length, 1)
        if self.steps is None:
            return
        if self.capped and self.blocks > 1:
            raise ValueError(
                f"steps caps a threshold in a single block only, got {self.blocks} blocks"
            )
        if self.steps % self.blocks:
            raise ValueError(
                f"steps must be a multiple of the number of blocks, {self.blocks}, got {self.steps}"
            )
        self.steps //= self.blocks

    @property
    def blocks(self) -> int:
        return max(1, -(-(self.positions - self.prompt_length) // self.block_length))

    def bounds(self, block: int) -> tuple[int, int]:
        end = self.prompt_length + (block + 1) * self.block_length
        begin = end - self.block_length if block else 0
        return begin, min(end, self.positions)

    def counts(self, initial: Tensor, active: Tensor, step: int) -> Tensor:
        """How many of the active positions a step fills, with `initial` of them at the start."""
        assert self.steps is not None
        if self.schedule == "even":
            return torch.minimum(even_counts(initial, step, self.steps), active)
        return ancestral_counts(active, step, self.steps, self.t_min)


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of the model."""

    number: int  # from 0 on: which λ, which random numbers
    limit: int | Tensor  # masked positions below it are active; a number or (B, 1)
    rows: int  # how many there are in all sequences
    sequences: Tensor  # int64, those with any
    counts: Tensor | None = None  # (B,) int64, how many to fill; None: all, or as a rule decides
    flat: Tensor | None = None  # int64, the rows b*D + d, where they are known in advance


def even_counts(total: Tensor, step: int, steps: int) -> Tensor:
    """total / steps per step, the remainder one by one over the first steps (LLaDA)."""
    return total // steps + (step < total % steps).long()


def even_reached(total: Tensor, step: int, steps: int) -> Tensor:
    """The sum of `even_counts` up to and with `step`."""
    done = min(step + 1, steps)
    return total // steps * done + (total % steps).clamp(max=done)


def ancestral_counts(active: Tensor, step: int, steps: int, t_min: float) -> Tensor:
    """int(active · (1 − s/t)) on the times linspace(1, t_min, steps + 1), at last all (Dream)."""
    if step == steps - 1:
        return active
    # In fp32 as the repository does it: the result is cut off to an integer.
    times = torch.linspace(1.0, t_min, steps + 1, dtype=torch.float32)
    share = 1 - times[step + 1] / times[step]
    return (active.float() * share).long()


def known_steps(run: Run, layout: Layout) -> Iterator[Step]:
    """Steps whose number of rows follows from the number of masked positions at the start."""
    assert layout.steps is not None
    per_block = layout.steps

    def of_block(masked: Tensor, block: int) -> Iterator[Step]:
        begin, end = layout.bounds(block)
        initial = active = masked[:, begin:end].sum(1)
        for index in range(per_block):
            counts = layout.counts(initial, active, index)
            if bool(counts.any()):
                yield _counted(block * per_block + index, end, active, counts)
            active = active - counts

    return _block_by_block(run, layout, of_block)


def planned_steps(run: Run, layout: Layout) -> Iterator[Step]:
    """The random order of Dream's `origin`: each position's step is drawn in advance.

    A position unmasks at step k of its block with probability t_k − t_(k+1), what remains at the
    last step.
    """
    assert layout.steps is not None
    per_block = layout.steps
    times = torch.linspace(1.0, layout.t_min, per_block + 1, dtype=torch.float64)
    shape = (run.batch, run.positions)
    plan = plan_unmask_steps(times, shape, seed=run.seed, first_sequence=run.first_sequence)
    plan = plan.clamp(max=per_block - 1)

    def of_block(masked: Tensor, block: int) -> Iterator[Step]:
        begin, end = layout.bounds(block)
        place = torch.arange(layout.positions)
        chosen = torch.where(masked & (place >= begin) & (place < end), plan, -1)
        flat, sequences = rows_by_step(chosen, per_block, plan.device)
        for index, rows in enumerate(flat):
            if rows.numel():
                number = block * per_block + index
                yield Step(number, end, rows.numel(), sequences[index], flat=rows)

    return _block_by_block(run, layout, of_block)


def _block_by_block(
    run: Run, layout: Layout, of_block: Callable[[Tensor, int], Iterator[Step]]
) -> Iterator[Step]:
    """The steps of all blocks, made on the host of what is masked (B, D) at the start.

    One host sync at the start; with `eos_id` one more per block, to learn which sequences ended.
    """
    masked, steps = run.masked().cpu(), list[Step]()
    for block in range(layout.blocks):
        if block and layout.eos_id is not None:
            masked[_end_sequences(run, layout, layout.bounds(block)[0]).cpu()] = False
        steps += of_block(masked, block)
        if layout.eos_id is not None or block == layout.blocks - 1:
            yield from _moved(steps, run.device)
            steps = []


def counted_steps(run: Run, layout: Layout) -> Iterator[Step]:
    """Steps of a model that may draw the mask: one host sync per step counts what is masked."""
    assert layout.steps is not None
    for block in range(layout.blocks):
        begin, end = layout.bounds(block)
        if block and layout.eos_id is not None:
            _end_sequences(run, layout, begin)
        initial = None
        for index in range(layout.steps):
            masked = run.masked()[:, :end]
            active, inside = torch.stack([masked.sum(1), masked[:, begin:].sum(1)]).cpu()
            initial = inside if initial is None else initial
            counts = layout.counts(initial, active, index)
            if bool(counts.any()):
                step = _counted(block * layout.steps + index, end, active, counts)
                yield from _moved([step], run.device)


def open_steps(run: Run, layout: Layout) -> Iterator[Step]:
    """Steps until nothing is masked, each sequence in the block of its first masked position.

    A sequence that has finished its block goes on to the next without waiting for others, so
    what it becomes does not depend on them. One host sync per step counts the active rows. Each
    step fills a position of every active sequence, so D are enough; only a model that draws the
    mask comes to the end of them.
    """
    place = torch.arange(layout.positions, device=run.device)
    initial: Tensor | None = None
    for number in range(layout.positions):
        masked = run.masked()
        first = masked.int().argmax(1, keepdim=True)
        block = (first - layout.prompt_length).clamp(min=0) // layout.block_length
        begin = layout.prompt_length + block * layout.block_length
        if layout.eos_id is not None and number:
            masked = masked & ~_end_sequences(run, layout, begin).unsqueeze(1)
        limit = begin + layout.block_length
        active = (masked & (place < limit)).sum(1)
        counts = None
        if layout.steps is not None:  # a cap on what the rule lets through
            initial = active if initial is None else initial
            reached = even_reached(initial, number, layout.steps)
            counts = reached - (initial - active)  # at least 1 while any are masked
        on_host = active.cpu()
        rows = int(on_host.sum())
        if not rows:
            return
        yield Step(number, limit, rows, on_host.nonzero()[:, 0].to(run.device), counts)


def _end_sequences(run: Run, layout: Layout, begin: int | Tensor) -> Tensor:
    """Fill up, with eos_id, the sequences that hold it among their own tokens before `begin`.

    Returns:
        (B,) bool, the sequences that have ended, on the device.
    """
    assert layout.eos_id is not None
    place = torch.arange(layout.positions, device=run.device)
    own = (place >= layout.prompt_length) & (place < begin)
    ended = ((run.tokens == layout.eos_id) & own).any(1)
    rest = ended.unsqueeze(1) & run.masked()
    run.tokens = torch.where(rest, layout.eos_id, run.tokens)
    return ended


def _counted(number: int, end: int, active: Tensor, counts: Tensor) -> Step:
    return Step(number, end, int(active.sum()), active.nonzero()[:, 0], counts)


def _moved(steps: list[Step], device: torch.device) -> list[Step]:
    """The steps with all their tensors on the device, moved in one go."""
    values = [(s.sequences, s.counts if s.flat is None else s.flat) for s in steps]
    each = iter(moved([t for pair in values for t in pair if t is not None], device))
    return [
        dataclasses.replace(
            step,
            sequences=next(each),
            counts=None if step.counts is None else next(each),
            flat=None if step.flat is None else next(each),
        )
        for step in steps
    ]
