"""Which rows a step of confidence sampling computes, and how many of them it fills.

Shapes: B sequences, D positions, S steps of a block, P prompt tokens. Everything that the host
can know in advance is worked out there once; the loop then runs without waiting for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from .masked import plan_unmask_steps


@dataclasses.dataclass
class State:
    """The tokens (B, D) as they are, which a plan may look at and end sequences in."""

    tokens: Tensor


@dataclasses.dataclass(frozen=True)
class Layout:
    """The blocks of a run. The first also holds the unknown tokens of the prompt."""

    mask_id: int
    prompt_length: int
    positions: int
    block_length: int
    steps: int | None  # of one block
    schedule: str
    t_min: float
    eos_id: int | None

    @property
    def blocks(self) -> int:
        return max(1, -(-(self.positions - self.prompt_length) // self.block_length))

    def bounds(self, block: int) -> tuple[int, int]:
        end = self.prompt_length + (block + 1) * self.block_length
        begin = end - self.block_length if block else 0
        return begin, min(end, self.positions)


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


def _counts(layout: Layout, initial: Tensor, active: Tensor, step: int) -> Tensor:
    assert layout.steps is not None
    if layout.schedule == "even":
        return torch.minimum(even_counts(initial, step, layout.steps), active)
    return ancestral_counts(active, step, layout.steps, layout.t_min)


def known_steps(state: State, layout: Layout) -> Iterator[Step]:
    """Steps whose number of rows follows from the number of masked positions at the start.

    One host sync at the start; with `eos_id` one more per block, to learn which sequences ended.
    """
    masked = (state.tokens == layout.mask_id).cpu()
    if layout.eos_id is None:
        steps = [s for block in range(layout.blocks) for s in _block_steps(masked, layout, block)]
        yield from _moved(steps, state.tokens.device)
        return
    for block in range(layout.blocks):
        ended = end_sequences(state, layout, layout.bounds(block)[0]) if block else None
        if ended is not None:
            masked[ended.cpu()] = False
        yield from _moved(_block_steps(masked, layout, block), state.tokens.device)


def _block_steps(masked: Tensor, layout: Layout, block: int) -> list[Step]:
    assert layout.steps is not None
    begin, end = layout.bounds(block)
    initial = active = masked[:, begin:end].sum(1)
    steps = []
    for index in range(layout.steps):
        counts = _counts(layout, initial, active, index)
        if bool(counts.any()):
            steps.append(
                Step(
                    number=block * layout.steps + index,
                    limit=end,
                    rows=int(active.sum()),
                    sequences=active.nonzero()[:, 0],
                    counts=counts,
                )
            )
        active = active - counts
    return steps


def planned_steps(
    state: State, layout: Layout, *, seed: int, first_sequence: int
) -> Iterator[Step]:
    """The random order of Dream's `origin`: each position's step is drawn in advance.

    A position unmasks at step k of its block with probability t_k − t_(k+1), what remains at the
    last step. Host syncs as for `known_steps`.
    """
    assert layout.steps is not None
    masked = (state.tokens == layout.mask_id).cpu()
    batch, positions = masked.shape
    times = torch.linspace(1.0, layout.t_min, layout.steps + 1, dtype=torch.float64)
    plan = plan_unmask_steps(times, (batch, positions), seed=seed, first_sequence=first_sequence)
    plan = plan.clamp(max=layout.steps - 1)
    pending: list[Step] = []
    for block in range(layout.blocks):
        begin, end = layout.bounds(block)
        if block and layout.eos_id is not None:
            masked[end_sequences(state, layout, begin).cpu()] = False
        for index in range(layout.steps):
            chosen = (plan == index) & masked
            chosen[:, :begin] = chosen[:, end:] = False
            flat = chosen.flatten().nonzero()[:, 0]
            if flat.numel():
                pending.append(
                    Step(
                        number=block * layout.steps + index,
                        limit=end,
                        rows=flat.numel(),
                        sequences=chosen.any(1).nonzero()[:, 0],
                        flat=flat,
                    )
                )
        if layout.eos_id is not None or block == layout.blocks - 1:
            yield from _moved(pending, state.tokens.device)
            pending = []


def counted_steps(state: State, layout: Layout) -> Iterator[Step]:
    """Steps of a model that may draw the mask: one host sync per step counts what is masked."""
    assert layout.steps is not None
    device = state.tokens.device
    for block in range(layout.blocks):
        begin, end = layout.bounds(block)
        if block and layout.eos_id is not None:
            end_sequences(state, layout, begin)
        initial = None
        for index in range(layout.steps):
            masked = state.tokens[:, :end] == layout.mask_id
            both = torch.stack([masked.sum(1), masked[:, begin:].sum(1)]).cpu()
            active = both[0]
            initial = both[1] if initial is None else initial
            counts = _counts(layout, initial, active, index)
            if bool(counts.any()):
                yield from _moved(
                    [
                        Step(
                            number=block * layout.steps + index,
                            limit=end,
                            rows=int(active.sum()),
                            sequences=active.nonzero()[:, 0],
                            counts=counts,
                        )
                    ],
                    device,
                )


def open_steps(state: State, layout: Layout) -> Iterator[Step]:
    """Steps until nothing is masked, each sequence in the block of its first masked position.

    A sequence that has finished its block goes on to the next without waiting for others, so
    what it becomes does not depend on them. One host sync per step counts the active rows. Each
    step fills a position of every active sequence, so D are enough; only a model that draws the
    mask comes to the end of them.
    """
    place = torch.arange(layout.positions, device=state.tokens.device)
    initial: Tensor | None = None
    for number in range(layout.positions):
        masked = state.tokens == layout.mask_id
        first = masked.int().argmax(1, keepdim=True)
        block = (first - layout.prompt_length).clamp(min=0) // layout.block_length
        begin = layout.prompt_length + block * layout.block_length
        if layout.eos_id is not None and number:
            ended = end_sequences(state, layout, begin)
            masked = masked & ~ended.unsqueeze(1)
        limit = begin + layout.block_length
        active = (masked & (place < limit)).sum(1)
        counts = None
        if layout.steps is not None:  # a cap on what the rule lets through
            initial = active if initial is None else initial
            reached = even_reached(initial, number, layout.steps)
            counts = (reached - (initial - active)).clamp(min=1)
        on_host = active.cpu()
        rows = int(on_host.sum())
        if not rows:
            return
        sequences = on_host.nonzero()[:, 0].to(state.tokens.device)
        yield Step(number, limit, rows, sequences, counts)


def end_sequences(state: State, layout: Layout, begin: int | Tensor) -> Tensor:
    """Fill up, with eos_id, the sequences that hold it among their own tokens before `begin`.

    Returns:
        (B,) bool, the sequences that have ended, on the device.
    """
    assert layout.eos_id is not None
    tokens = state.tokens
    place = torch.arange(layout.positions, device=tokens.device)
    own = (place >= layout.prompt_length) & (place < begin)
    ended = ((tokens == layout.eos_id) & own).any(1)
    rest = ended.unsqueeze(1) & (tokens == layout.mask_id)
    state.tokens = torch.where(rest, layout.eos_id, tokens)
    return ended


def _moved(steps: list[Step], device: torch.device) -> list[Step]:
    """The steps with all their tensors on the device, moved in one go."""
    if not steps:
        return []
    tensors = [
        t for step in steps for t in (step.sequences, step.counts, step.flat) if t is not None
    ]
    moved = iter(torch.cat(tensors).to(device).split([t.numel() for t in tensors]))
    return [
        dataclasses.replace(
            step,
            sequences=next(moved),
            counts=None if step.counts is None else next(moved),
            flat=None if step.flat is None else next(moved),
        )
        for step in steps
    ]
