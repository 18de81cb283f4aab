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
from .arguments import MaskDrawOptions, Model, Unpack, check_flags, sampler
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

    Args:
        plan: (B, D) int64 on the CPU, in [0, steps); -1 for positions without a step.
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


def _steps(run: Run, times: Tensor, active_only: bool) -> Iterator[Step]:
    last, shape = len(times) - 1, (run.batch, run.positions)
    plan = plan_unmask_steps(times, shape, seed=run.seed, first_sequence=run.first_sequence)
    plan[(~run.masked()).cpu()] = -1
    rows, sequences = rows_by_step(plan, last + 1, run.device)
    for step, time in enumerate(times.tolist()):
        some = sequences[step] if active_only else None
        yield Step(step, time, rows[step], some, greedy=step == last)
        if run.project_fn is not None and step < last and _replan(run, times, plan, step):
            rows, sequences = rows_by_step(plan, last + 1, run.device)


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
    steps: int,
    t_min: float = 1e-5,
    project_fn: Callable[[Tensor], Tensor] | None = None,
    active_only: bool = True,
    **options: Unpack[MaskDrawOptions],
) -> Tensor:
    """Draw token rows from a masked diffusion model by ancestral sampling.

    Times are linspace(1, t_min, steps + 1). Step k calls `model` at time t_k and unmasks the
    positions whose turn it is; positions left after the last step take the argmax at t_min. The
    mask token is never drawn and a token, once there, stays.

    Args: those of all samplers, see `di4c_fast.samplers`, and

        steps: the final argmax is one more.
        project_fn: tokens that it masks again unmask later at the rate of the loop; tokens that
            it fills stay.

    The hooks hear of every step, whether or not the model ran. Host syncs: before the loop one or
    two to read the prompt; inside none, but with `project_fn` one per step, to see what it changed.
    """
    check_flags(active_only=active_only)
    times = time_grid(steps, t_min)
    run = Run(model, shape, options, calls=steps + 1, mask_id=mask_id, project_fn=project_fn)
    return run.loop(_steps(run, times, active_only))
