"""Posterior sampling of discretised Gaussian diffusion: x_0 from the denoiser, x_s given both.

Each step draws x_0 from the denoiser at x_t (given λ for a mixture student) and x_s from
q(x_s | x_t, x_0) ∝ q(x_s | x_0) q(x_t | x_s), exactly, with matrices that are cached per pair of
times. That is the law of the step whatever its length: no tau-leaping, no corrector steps. The
last call gives the sample: the argmax, the best argmax of several λ, or a draw.

Source: the pixel experiment of Di4C (arXiv 2410.08709) on the models of tauLDR
(arXiv 2205.14987).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .. import rng
from ..checks import (
    check_choice,
    check_int64,
    check_number,
    check_same_device,
    check_shape,
    check_token_range,
    describe,
)
from ..draw.api import sample
from ..heads import HeadLike
from ..models.call import Context, call_model, check_callable, check_context, evaluation_mode
from ..models.call import repeat_context as repeat
from ..processes.gaussian import INITIAL_LAWS, GaussianProcess
from ._shared import (
    PLAN,
    check_filters,
    check_hooks,
    check_sizes,
    device_of,
    latents_of,
    seed_of,
)

__all__ = ["sample_gaussian"]

# Step numbers of the counter-based generator: λ and x_0 of step i have i, the start has PLAN.
_POSTERIOR = 2**30


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

    Args:
        model: callable (tokens (R, D) int64, t (R,) float32, **context) to logits (R, D, V) or
            a head, with a third argument latent (R, L) if `latent_dim` > 0. In eval mode during
            the call if it is an `nn.Module`.
        shape: (B, D).
        process: its matrices, V and t_min.
        steps: S >= 1, the number of model calls.
        teacher, teacher_steps: the last `teacher_steps` of the S calls go to `teacher`, called
            without λ (the paper's student-then-teacher sampling).
        latent_dim: L of a mixture student; 0 for a model without λ.
        latent: λ to use: (B, L) for every step, or (S, B, L). None draws a fresh one per step
            and sequence.
        last_latents: how many λ the student tries in the last call (as B·last_latents rows, those
            of a sequence adjacent); each sequence keeps the argmax of the λ with the highest
            joint probability. 1 for one argmax.
        last: "argmax" of the last call, or "draw" from it.
        initial: law of x at t = 1: the process's stationary law, "uniform", or tokens (B, D).
        context: tensors (B, ...) by keyword for both models.
        seed: int in [0, 2^63). None: taken from `generator`, or from the default generator.
        generator: source of the seed where `seed` is None.
        first_sequence: number of the first sequence. Randomness is a function of (seed, number
            of the sequence, step, position), so the same sequences come out however they are
            batched (up to the model's own rounding).
        t_min: time of the last call; None for that of the process.
        temperature, top_k, top_p: of the draws of x_0, as in `di4c_fast.sample`. Other values
            than the defaults are no longer the model's law.
        callback: called as callback(step, total, tokens) after each of the S calls, step from 1
            to total = S.
        history: a list to which the tokens at the start and after every call are appended,
            S + 1 tensors (B, D).
        device: where to sample; None for that of `initial`, else that of the module's
            parameters, else the CPU.

    Returns:
        (B, D) int64.

    Host syncs: none in the loop; one before it to read a seed from a GPU generator.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a model that
            returns the wrong shape as soon as it does.
    """
    batch, positions = check_sizes(
        shape,
        steps=(steps, 1),
        teacher_steps=(teacher_steps, 0),
        latent_dim=(latent_dim, 0),
        last_latents=(last_latents, 1),
        first_sequence=(first_sequence, 0),
    )
    if not isinstance(process, GaussianProcess):
        raise TypeError(f"process must be a GaussianProcess, got {describe(process)}")
    check_callable(model, "model")
    _check_teacher(teacher, teacher_steps, steps)
    check_choice(last, "last", ("argmax", "draw"))
    _check_last_latents(last_latents, last, latent, latent_dim, teacher_steps)
    t_min = process.t_min if t_min is None else t_min
    check_number(t_min, "t_min")
    if not 0.0 < t_min < 1.0:
        raise ValueError(f"t_min must be in (0, 1), got {t_min}")
    check_filters(temperature, top_k, top_p)
    check_hooks(callback, history)
    device = device_of(device, initial, model)
    context = check_context(context, batch, device)
    _check_initial(initial, (batch, positions), device, process.num_classes)
    seed = seed_of(seed, generator)
    latent = latents_of(
        latent,
        latent_dim,
        steps,
        batch,
        seed=seed,
        first_sequence=first_sequence,
        device=device,
    )
    many = None
    if last_latents > 1:
        numbers = torch.arange(batch) + first_sequence
        many = rng.uniform(seed, steps - 1, numbers, last_latents * latent_dim)
        many = many.reshape(batch * last_latents, latent_dim).to(device)
    keys = torch.arange(batch * positions, device=device) + first_sequence * positions
    keys = keys.view(batch, positions)
    tokens = initial if isinstance(initial, Tensor) else process.initial(seed, PLAN, keys, initial)
    if history is not None:
        history.append(tokens)
    draw: dict[str, Any] = {"seed": seed, "row_keys": keys, "want": ()}
    draw |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    times = torch.linspace(1.0, t_min, steps, dtype=torch.float64).tolist()
    if steps > 1:  # what the matrices are made of goes to the device here, not inside the loop
        process.transitions.between(0.0, times[1], device=device, dtype=torch.float32)

    def call(step: int) -> Any:
        t = torch.full((batch,), times[step], dtype=torch.float32, device=device)
        if step >= steps - teacher_steps:
            assert teacher is not None
            return call_model(teacher, "teacher", tokens, t, None, context, process.num_classes)
        lam = latent if latent is None or latent.ndim == 2 else latent[step]
        return call_model(model, "model", tokens, t, lam, context, process.num_classes)

    with evaluation_mode(model, teacher):
        for step in range(steps):
            if step < steps - 1:
                x0 = sample(call(step), step=step, **draw).token
                tokens = process.posterior_step(
                    x0,
                    tokens,
                    times[step],
                    times[step + 1],
                    seed=seed,
                    step=_POSTERIOR + step,
                    row_keys=keys,
                )
            elif many is not None:
                t = torch.full((many.shape[0],), times[step], dtype=torch.float32, device=device)
                rows = tokens.repeat_interleave(last_latents, dim=0)
                some = repeat(context, last_latents)
                head = call_model(model, "model", rows, t, many, some, process.num_classes)
                tokens = _best_argmax(head, batch, last_latents)
            elif last == "argmax":
                tokens = sample(call(step), temperature=0.0, want=()).token
            else:
                tokens = sample(call(step), step=step, **draw).token
            if history is not None:
                history.append(tokens)
            if callback is not None:
                callback(step + 1, steps, tokens)
    return tokens


def _best_argmax(head: HeadLike, batch: int, count: int) -> Tensor:
    """Of `count` rows of each sequence, the argmax with the highest joint probability."""
    drawn = sample(head, temperature=0.0, want=("max_log_prob",))
    assert drawn.max_log_prob is not None
    joint = drawn.max_log_prob.sum(-1, dtype=torch.float64).view(batch, count)
    best = joint.argmax(1) + torch.arange(batch, device=joint.device) * count
    return drawn.token[best]


def _check_teacher(teacher: Any, teacher_steps: int, steps: int) -> None:
    if teacher is not None:
        check_callable(teacher, "teacher")
    if teacher_steps > steps:
        raise ValueError(f"teacher_steps must be at most steps = {steps}, got {teacher_steps}")
    if teacher_steps and teacher is None:
        raise ValueError(f"teacher_steps = {teacher_steps} needs a teacher, got None")


def _check_last_latents(
    last_latents: int, last: str, latent: Any, latent_dim: int, teacher_steps: int
) -> None:
    if last_latents == 1:
        return
    for wrong, reason in (
        (latent_dim < 1, f"latent_dim >= 1, got {latent_dim}"),
        (latent is not None, "fresh λ, but latent was passed"),
        (teacher_steps > 0, f"the student in the last step, got teacher_steps = {teacher_steps}"),
        (last != "argmax", f"last = 'argmax', got {last!r}"),
    ):
        if wrong:
            raise ValueError(f"last_latents = {last_latents} needs {reason}")


def _check_initial(
    initial: Any, sizes: tuple[int, int], device: torch.device, classes: int
) -> None:
    if not isinstance(initial, Tensor):
        check_choice(initial, "initial", INITIAL_LAWS)
        return
    check_int64(initial, "initial")
    check_shape(initial, "initial", "B, D", sizes)
    check_same_device(initial, "initial", torch.empty(0, device=device), "the samples")
    check_token_range(initial, "initial", classes)
