"""Posterior sampling of discretised Gaussian diffusion: x_0 from the denoiser, x_s given both.

Each step draws x_0 from the denoiser at x_t (given λ for a mixture student) and x_s from
q(x_s | x_t, x_0) ∝ q(x_s | x_0) q(x_t | x_s), exactly, with matrices that are cached per pair of
times. That is the law of the step whatever its length: no tau-leaping, no corrector steps.

Source: the pixel experiment of Di4C (arXiv 2410.08709) on the models of tauLDR
(arXiv 2205.14987).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from .. import rng
from ..checks import check_choice, check_within, describe
from ..models.call import check_callable
from ..processes.gaussian import INITIAL_LAWS, GaussianProcess
from .arguments import DrawOptions, Model, Unpack, check_counts, sampler
from .loop import RULE, START, Answer, Run, Step

__all__ = ["sample_gaussian"]


@sampler(DrawOptions)
def sample_gaussian(
    model: Model,
    shape: tuple[int, int],
    *,
    process: GaussianProcess,
    steps: int,
    t_min: float | None = None,
    teacher: Model | None = None,
    teacher_steps: int = 0,
    last_latents: int = 1,
    last: Literal["argmax", "draw"] = "argmax",
    initial: Literal["target", "uniform"] | Tensor = "target",
    **options: Unpack[DrawOptions],
) -> Tensor:
    """Draw token rows from a discretised Gaussian diffusion model.

    Models are called at S times, linspace(1, t_min, S): S - 1 posterior steps from each time to
    the next, then the last call at t_min. One step calls the model at t = 1 alone.

    Args: those of all samplers, see `di4c_fast.samplers`, and

        process: its matrices, V and t_min.
        steps: the number of model calls.
        t_min: None for that of the process.
        teacher, teacher_steps: the last `teacher_steps` of the S calls go to `teacher`, called
            without λ (the paper's student-then-teacher sampling). Both models get `context`.
        last_latents: how many λ the student tries in the last call (as B·last_latents rows, those
            of a sequence adjacent); each sequence keeps the argmax of the λ with the highest
            joint probability. 1 for one argmax.
        last: "argmax" of the last call, or "draw" from it.
        initial: law of x at t = 1: the process's stationary law, "uniform", or tokens (B, D).
        temperature, top_k, top_p: of the draws of x_0.

    The hooks hear of every call. Host syncs: none in the loop.
    """
    latent_dim = options["latent_dim"]
    check_counts([("steps", steps, 1), ("teacher_steps", teacher_steps, 0)])
    check_counts([("latent_dim", latent_dim, 0), ("last_latents", last_latents, 1)])
    if not isinstance(process, GaussianProcess):
        raise TypeError(f"process must be a GaussianProcess, got {describe(process)}")
    check_choice(last, "last", ("argmax", "draw"))
    if teacher_steps > steps:
        raise ValueError(f"teacher_steps must be at most steps = {steps}, got {teacher_steps}")
    if teacher is not None:
        check_callable(teacher, "teacher")
    elif teacher_steps:
        raise ValueError(f"teacher_steps = {teacher_steps} needs a teacher, got None")
    for wrong, reason in (
        (latent_dim < 1, f"latent_dim >= 1, got {latent_dim}"),
        (options["latent"] is not None, "fresh λ, but latent was passed"),
        (teacher_steps > 0, f"the student in the last step, got teacher_steps = {teacher_steps}"),
        (last != "argmax", f"last = 'argmax', got {last!r}"),
    ):
        if wrong and last_latents > 1:
            raise ValueError(f"last_latents = {last_latents} needs {reason}")
    t_min = process.t_min if t_min is None else t_min
    check_within(t_min, "t_min", "(0, 1)")
    start: Any = initial
    if not isinstance(initial, Tensor):
        check_choice(initial, "initial", INITIAL_LAWS)
        start = lambda run: process.initial(run.seed, START, run.keys.view_as(run.tokens), initial)  # noqa: E731
    run = Run(
        model,
        shape,
        {**options, "vocab_size": process.num_classes},
        calls=steps,
        start=start,
        start_name="initial",
        other=teacher,
    )
    tries = None
    if last_latents > 1:
        tries = rng.uniform(run.seed, steps - 1, run.sequence_keys(), last_latents * latent_dim)
        size = {"n": last_latents, "l": latent_dim}
        tries = rearrange(tries, "b (n l) -> (b n) l", **size).to(run.device)
    times = torch.linspace(1.0, t_min, steps, dtype=torch.float64).tolist()
    if steps > 1:  # what the matrices are made of goes to the device here, not inside the loop
        process.transitions.between(0.0, times[1], device=run.device, dtype=torch.float32)

    def rule() -> Iterator[Step]:
        for i, time in enumerate(times):
            if i < steps - 1:
                yield Step(i, time, None, fill=posterior, teacher=i >= steps - teacher_steps)
            elif tries is not None:
                want = ("max_log_prob",)
                yield Step(i, time, None, fill=best, greedy=True, want=want, tries=tries)
            else:
                yield Step(i, time, None, greedy=last == "argmax", teacher=teacher_steps > 0)

    def posterior(step: Step, answer: Answer) -> Tensor:
        token, (t, s) = answer.draw.token, times[step.number : step.number + 2]
        numbers: dict[str, Any] = {"seed": run.seed, "step": RULE + step.number}
        keys = run.keys.view_as(token)
        return process.posterior_step(token, run.tokens, t, s, row_keys=keys, **numbers)

    def best(step: Step, answer: Answer) -> Tensor:
        """The argmax with the highest joint probability."""
        assert answer.draw.max_log_prob is not None
        joint = answer.draw.max_log_prob.sum(-1, dtype=torch.float64)
        size, each = {"b": run.batch, "n": last_latents}, torch.arange(run.batch, device=run.device)
        first = rearrange(joint, "(b n) -> b n", **size).argmax(1)
        return rearrange(answer.draw.token, "(b n) d -> b n d", **size)[each, first]

    return run.loop(rule())
