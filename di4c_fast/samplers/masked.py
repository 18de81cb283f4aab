"""Ancestral sampling of masked diffusion, computing only what is used.

The naive loop asks the denoiser for every position at every step and then unmasks position d at
step k with probability (t_k - t_{k+1}) / t_k. That decision does not look at a logit, so
each position's step is drawn in advance: P(k) = t_k - t_{k+1} for times that start at 1, and
what remains, t_min, goes to the final argmax. Then the head computes only the rows that
unmask, a step that unmasks nothing calls no model, and a sequence that unmasks nothing at a
step is left out of the call. The law of the samples is that of the loop.

Source: the samplers of MDLM (arXiv 2406.07524) and of the masked language experiment of Di4C
(arXiv 2410.08709).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice, check_int, check_within
from .arguments import MaskDrawOptions, Model, Unpack, check_flags, check_size, sampler
from .caches import Window, check_latents, check_window
from .loop import START, Run, Step, moved
from .schedules import time_grid

__all__ = ["plan_unmask_steps", "rows_by_step", "sample_masked"]

_REPLAN = 2**31  # step numbers of the generator for positions that are masked again


def plan_unmask_steps(
    times: Tensor, shape: tuple[int, int], *, seed: int, first_sequence: int = 0
) -> Tensor:
    """The step at which each position unmasks, (B, D) int64 in [0, S], drawn on the CPU.

    Step k goes from times[k] to times[k + 1] of the times (S + 1,), decreasing from 1. It has the
    probability times[k] - times[k + 1], and S, the final argmax, has times[S]. The result is a
    function of (seed, number of the sequence, position) alone.
    """
    batch, positions = shape
    keys = torch.arange(batch) + first_sequence
    return _step_of(rng.uniform(seed, START, keys, positions, dtype=torch.float64), times)


def _step_of(u: Tensor, times: Tensor) -> Tensor:
    """k such that times[k + 1] <= u < times[k]: how many of times[1:] exceed u."""
    ascending = -times[1:].to(torch.float64)
    return torch.searchsorted(ascending.contiguous(), -u, right=False)


def rows_by_step(
    plan: Tensor, steps: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """For each step the rows b*D + d that have it, and their sequences, all on the device.

    The plan is (B, D) int64 on the CPU, in [0, steps), or -1 for positions without a step.
    """
    batch, positions = plan.shape
    step = plan.flatten()
    rows = torch.argsort(step, stable=True)[int((step < 0).sum()) :]
    step = step[rows]
    calls = torch.unique_consecutive(step * batch + rows // positions)
    by_step = [rows.split(torch.bincount(step, minlength=steps).tolist())]
    by_step.append((calls % batch).split(torch.bincount(calls // batch, minlength=steps).tolist()))
    both = moved([*by_step[0], *by_step[1]], device)
    return both[:steps], both[steps:]


def _first_hits(run: Run, length: int, t_min: float) -> tuple[Tensor, Tensor]:
    """The step of each position (B, D), one after another in its block of `length` steps, -1 where
    known; and the time of each step (B, S), that at which the position unmasks.

    The k-th hitting time of n masked positions is the k-th largest of n uniform numbers.
    """
    keys = torch.arange(run.batch) + run.first_sequence
    u = rng.uniform(run.seed, START, keys, run.positions, dtype=torch.float64)
    masked, place = run.masked().cpu(), torch.arange(run.positions)
    begins = place // length * length
    turn = torch.where(masked, begins // length - u, torch.inf).argsort(1).argsort(1)
    before = masked.long().cumsum(1) - masked.long()  # masked positions further left
    plan = torch.where(masked, begins + turn - before[:, begins], -1)
    b, d = masked.nonzero(as_tuple=True)
    times = torch.full((run.batch, run.calls), t_min, dtype=torch.float64)
    times[b, plan[b, d]] = u[b, d]
    return plan, times.to(run.device)


def _steps(
    run: Run, times: Tensor | float, active_only: bool, length: int, causal: bool, by_block: bool
) -> Iterator[Step]:
    """times: t_min for first hits; length: of a block; by_block: the λ of a block is that of its
    first step."""
    shape = (run.batch, run.positions)
    moments: list[float | Tensor]
    if not isinstance(times, Tensor):
        every, last = length, length
        plan, hits = _first_hits(run, length, times)
        moments = [*hits.unbind(1)]
    else:
        every, last = len(times), len(times) - 1
        moments = times.tolist() * (run.calls // every)
        plan = plan_unmask_steps(times, shape, seed=run.seed, first_sequence=run.first_sequence)
        plan += torch.arange(run.positions) // length * every
        plan[(~run.masked()).cpu()] = -1
    rows, sequences = rows_by_step(plan, run.calls, run.device)
    committed, before = 0, None
    for number in range(run.calls):
        block, step = divmod(number, every)
        begin, end = block * length, min((block + 1) * length, run.positions)
        lam = number - step if by_block else None
        window = Window("causal", begin, end, begin, end, begin == 0, run.positions)
        now = Step(
            number,
            moments[number],
            rows[number],
            sequences[number] if active_only else None,
            greedy=step == last,
            latent=lam,
            window=window if causal else None,
        )
        if causal and committed < begin and rows[number].numel():
            run.commit(before or now, committed, begin)
            committed = begin
        before = now
        yield now
        if run.project_fn is None or step == last:
            continue
        assert isinstance(times, Tensor)
        if _replan(run, times, plan, step):
            rows, sequences = rows_by_step(plan, run.calls, run.device)


def _replan(run: Run, times: Tensor, plan: Tensor, step: int) -> bool:
    """Bring the plan in line with what `project_fn` changed; True if it had to change.

    A position masked again after `step` is masked at time s = times[step + 1]; the loop would
    unmask it at step k > `step` with probability (times[k] - times[k + 1]) / s.
    """
    masked = run.masked().cpu()
    waiting = plan > step
    filled, again = waiting & ~masked, masked & ~waiting
    plan[~masked] = -1
    if bool(again.any()):
        number, keys = _REPLAN + step, run.sequence_keys()
        u = rng.uniform(run.seed, number, keys, run.positions, dtype=torch.float64)
        plan[again] = _step_of(u * times[step + 1], times)[again]
    return bool(filled.any()) or bool(again.any())


@sampler(MaskDrawOptions)
def sample_masked(
    model: Model,
    shape: tuple[int, int],
    *,
    mask_id: int,
    steps: int | None = None,
    first_hitting: bool = False,
    t_min: float = 1e-5,
    project_fn: Callable[[Tensor], Tensor] | None = None,
    active_only: bool = True,
    block_length: int | None = None,
    window: str = "all",
    latent_every: str = "step",
    **options: Unpack[MaskDrawOptions],
) -> Tensor:
    """Draw token rows from a masked diffusion model by ancestral sampling.

    Times are linspace(1, t_min, steps + 1). Step k calls `model` at time t_k and unmasks the
    positions whose turn it is; positions left after the last step take the argmax at t_min. The
    mask token is never drawn and a token, once there, stays.

    Args: those of all samplers, see `di4c_fast.samplers`, and

        steps: of each block; its final argmax is one more. λ, `callback` and `history` have
            steps + 1 of each block.
        first_hitting: in place of steps, the limit of many: a step unmasks one position of each
            sequence, at the time when the ancestral process does, with which the model is called.
            A block has as many steps as positions; sequences without one left are called, if at
            all, at t_min (arXiv 2409.02908).
        block_length: the blocks of so many positions, from position 0 on, are filled one after
            another, each from time 1 on (BD3LM, arXiv 2503.09573). None: a single block.
        window: "causal": the model is called on the block alone, and its `commit` stores what is
            before it, once, see `di4c_fast.samplers.caches`.
        latent_every: "block" keeps the λ of a block's first step to its end.
        project_fn: only with steps and a single block. Tokens that it masks again unmask later at
            the rate of the loop; tokens that it fills stay.

    The hooks hear of every step, whether or not the model ran. Host syncs: before the loop one or
    two to read the prompt; inside none, but with `project_fn` one per step, to see what it changed.
    """
    check_flags(active_only=active_only, first_hitting=first_hitting)
    check_choice(window, "window", ("all", "causal"))
    check_latents(window, latent_every, options)
    if first_hitting and steps is not None:
        raise ValueError(f"steps must be None with first_hitting, got {steps}")
    if first_hitting and project_fn is not None:
        raise ValueError("project_fn needs steps, got first_hitting")
    check_within(t_min, "t_min", "(0, 1)")
    times: Tensor | float = t_min if first_hitting else time_grid(steps, t_min)
    positions = check_size(shape)[1]
    length = positions
    if block_length is not None:
        length = check_int(block_length, "block_length", minimum=1)
        if length < positions and project_fn is not None:
            raise ValueError(f"project_fn needs a single block, got blocks of {length}")
    calls = -(-positions // length) * (len(times) if isinstance(times, Tensor) else length)
    run = Run(model, shape, options, calls=calls, mask_id=mask_id, project_fn=project_fn)
    check_window(model, window, block_length, 0, positions)
    causal, by_block = window == "causal", latent_every == "block"
    return run.loop(_steps(run, times, active_only, length, causal, by_block))
