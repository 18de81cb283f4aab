"""Posterior sampling of discretised Gaussian diffusion: x_0 from the denoiser, x_s given both.

Each step draws x_0 from the denoiser at x_t (given λ for a mixture student) and x_s from
q(x_s | x_t, x_0) ∝ q(x_s | x_0) q(x_t | x_s), exactly, with matrices that are cached per pair of
times. That is the law of the step whatever its length: no tau-leaping, no corrector steps. The
last call gives the sample: the argmax, the best argmax of several λ, or a draw.

Source: the pixel experiment of Di4C (arXiv 2410.08709) on the models of tauLDR
(arXiv 2205.14987).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice, describe
from ..heads import HeadLike
from ..models.call import Context, check_callable
from ..processes.gaussian import INITIAL_LAWS, GaussianProcess
from .arguments import check_counts, check_filters, check_fraction
from .loop import RULE, START, Answer, Rule, Run, Visit

__all__ = ["sample_gaussian"]


class _Posterior(Rule):
    def __init__(
        self,
        process: GaussianProcess,
        times: list[float],
        teacher_steps: int,
        last: str,
        tries: Tensor | None,
        options: dict[str, Any],
    ):
        self.process, self.times, self.options = process, times, options
        self.teacher_steps, self.last, self.tries = teacher_steps, last, tries

    def visits(self, run: Run) -> Iterator[Visit]:
        steps = len(self.times)
        for step, time in enumerate(self.times):
            teacher, last = step >= steps - self.teacher_steps, step == steps - 1
            if last and self.tries is not None:
                want = ("max_log_prob",)
                yield Visit(step, time, None, greedy=True, tries=self.tries, want=want)
            else:
                greedy = last and self.last == "argmax"
                yield Visit(step, time, None, greedy=greedy, teacher=teacher)

    def fill(self, run: Run, visit: Visit, answer: Answer) -> Tensor:
        step, token = visit.number, answer.draw.token
        if visit.tries is not None:  # the argmax with the highest joint probability
            assert answer.draw.max_log_prob is not None
            joint = answer.draw.max_log_prob.sum(-1, dtype=torch.float64)
            count = len(visit.tries) // max(run.batch, 1)
            best = joint.view(run.batch, count).argmax(1)
            return token[best + torch.arange(run.batch, device=run.device) * count]
        if step == len(self.times) - 1:
            return token
        return self.process.posterior_step(
            token,
            run.tokens,
            self.times[step],
            self.times[step + 1],
            seed=run.seed,
            step=RULE + step,
            row_keys=run.keys.view_as(token),
        )


@torch.no_grad()
def sample_gaussian(
    model: Callable[..., HeadLike],
    shape: tuple[int, int],
    *,
    process: GaussianProcess,
    steps: int,
    teacher: Callable[..., HeadLike] | None = None,
    teacher_steps: int = 0,
    latent_dim: int = 0,
    latent: Tensor | None = None,
    last_latents: int = 1,
    last: Literal["argmax", "draw"] = "argmax",
    initial: Literal["target", "uniform"] | Tensor = "target",
    context: Context | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_sequence: int = 0,
    t_min: float | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    callback: Callable[[int, int, Tensor], None] | None = None,
    history: list[Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw token rows from a discretised Gaussian diffusion model.

    Models are called at S times, linspace(1, t_min, S): S - 1 posterior steps from each time to
    the next, then the last call at t_min. One step calls the model at t = 1 alone.

    Args: those of all samplers, see `di4c_fast.samplers`, and

        process: its matrices, V and t_min.
        steps: S >= 1, the number of model calls.
        teacher, teacher_steps: the last `teacher_steps` of the S calls go to `teacher`, called
            without λ (the paper's student-then-teacher sampling). Both models get `context`.
        last_latents: how many λ the student tries in the last call (as B·last_latents rows, those
            of a sequence adjacent); each sequence keeps the argmax of the λ with the highest
            joint probability. 1 for one argmax.
        last: "argmax" of the last call, or "draw" from it.
        initial: law of x at t = 1: the process's stationary law, "uniform", or tokens (B, D).
        t_min: time of the last call; None for that of the process.
        temperature, top_k, top_p: of the draws of x_0. Other values than the defaults are no
            longer the model's law.

    The hooks hear of every call. Host syncs: none in the loop.
    """
    check_counts([("steps", steps, 1), ("teacher_steps", teacher_steps, 0)])
    check_counts([("latent_dim", latent_dim, 0), ("last_latents", last_latents, 1)])
    if not isinstance(process, GaussianProcess):
        raise TypeError(f"process must be a GaussianProcess, got {describe(process)}")
    check_choice(last, "last", ("argmax", "draw"))
    _check_last_calls(teacher, teacher_steps, steps, last_latents, last, latent, latent_dim)
    t_min = process.t_min if t_min is None else t_min
    check_fraction(t_min, "t_min")
    options = check_filters(temperature, top_k, top_p)
    if not isinstance(initial, Tensor):
        check_choice(initial, "initial", INITIAL_LAWS)
    run = Run(model, shape, device, initial)
    run.other = teacher
    run.set_seed(seed, generator, first_sequence)
    run.set_vocabulary(process.num_classes, {})
    if not isinstance(initial, Tensor):
        initial = process.initial(run.seed, START, run.keys.view_as(run.tokens), initial)
    run.set_start(initial, "initial", process.num_classes, None, context)
    run.set_latents(latent, latent_dim, steps)
    run.set_hooks(callback, history)
    tries = None
    if last_latents > 1:
        tries = rng.uniform(run.seed, steps - 1, run.sequence_keys(), last_latents * latent_dim)
        tries = tries.reshape(run.batch * last_latents, latent_dim).to(run.device)
    times = torch.linspace(1.0, t_min, steps, dtype=torch.float64).tolist()
    if steps > 1:  # what the matrices are made of goes to the device here, not inside the loop
        process.transitions.between(0.0, times[1], device=run.device, dtype=torch.float32)
    return run.loop(_Posterior(process, times, teacher_steps, last, tries, options), steps)


def _check_last_calls(
    teacher: Any,
    teacher_steps: int,
    steps: int,
    last_latents: int,
    last: str,
    latent: Any,
    dim: int,
) -> None:
    if teacher is not None:
        check_callable(teacher, "teacher")
    if teacher_steps > steps:
        raise ValueError(f"teacher_steps must be at most steps = {steps}, got {teacher_steps}")
    if teacher_steps and teacher is None:
        raise ValueError(f"teacher_steps = {teacher_steps} needs a teacher, got None")
    for wrong, reason in (
        (dim < 1, f"latent_dim >= 1, got {dim}"),
        (latent is not None, "fresh λ, but latent was passed"),
        (teacher_steps > 0, f"the student in the last step, got teacher_steps = {teacher_steps}"),
        (last != "argmax", f"last = 'argmax', got {last!r}"),
    ):
        if wrong and last_latents > 1:
            raise ValueError(f"last_latents = {last_latents} needs {reason}")
