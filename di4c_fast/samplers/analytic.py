"""Analytic sampling of score-entropy models (SEDD) with an absorbing state.

A model of this kind returns the logarithms of the concrete scores s_v = p_t(v)/p_t(mask). With
a = exp(σ_t − σ_u) − 1 and S = Σ_v s_v, a masked position takes the token v in the step from t to
u with probability a·s_v, and stays masked with probability 1 − a·S; where a·S exceeds 1 it never
stays. Both follow from one pass over the row: logsumexp gives S, one draw from softmax(log s)
the token, and one uniform number decides. How probable it is to stay depends on the scores, so
positions cannot be chosen before the model has been asked, as `sample_masked` does.

Source: the analytic predictor and the denoiser of SEDD (arXiv 2310.16834).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice, check_number
from ..draw.api import sample
from ..heads import HeadLike
from ..models.call import (
    Context,
    call_model,
    check_callable,
    check_context,
    evaluation_mode,
    select_context,
)
from ._shared import (
    check_hooks,
    check_sizes,
    check_vocab_size,
    device_of,
    fill_prompt,
    latents_of,
    project,
    seed_of,
)

__all__ = ["geometric_noise", "log_linear_noise", "sample_analytic"]

# Step numbers of the generator for the decision to stay; λ takes those from 0 on.
_DECIDE = 2**30

Noise = Callable[[float], float]


def log_linear_noise(eps: float = 1e-3) -> Noise:
    """σ(t) = −log(1 − (1 − eps)·t), the total noise of SEDD's log-linear schedule.

    >>> round(log_linear_noise()(0.5), 4)
    0.6921
    """
    _check_fraction(eps, "eps")
    return lambda t: -math.log1p(-(1.0 - eps) * t)


def geometric_noise(sigma_min: float = 1e-3, sigma_max: float = 1.0) -> Noise:
    """σ(t) = sigma_min^(1 − t) · sigma_max^t, the total noise of SEDD's geometric schedule.

    >>> round(geometric_noise(0.01, 1.0)(0.5), 4)
    0.1
    """
    check_number(sigma_min, "sigma_min")
    check_number(sigma_max, "sigma_max")
    if not 0.0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {sigma_min} "
            f"and {sigma_max}"
        )
    return lambda t: sigma_min ** (1.0 - t) * sigma_max**t


def _check_fraction(value: Any, name: str) -> None:
    check_number(value, name)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be in (0, 1), got {value}")


@torch.no_grad()
def sample_analytic(
    model: Callable[..., HeadLike],
    shape: tuple[int, int],
    *,
    mask_id: int,
    steps: int,
    noise: str | Noise = "log_linear",
    condition: str = "t",
    vocab_size: int | None = None,
    latent_dim: int = 0,
    latent: Tensor | None = None,
    prompt: Tensor | None = None,
    project_fn: Callable[[Tensor], Tensor] | None = None,
    context: Context | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_sequence: int = 0,
    t_min: float = 1e-5,
    denoise: bool = True,
    callback: Callable[[int, int, Tensor], None] | None = None,
    history: list[Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw token rows from an absorbing score-entropy model, exactly by its analytic step.

    Equivalent PyTorch for one step from t to u at the masked positions, up to random numbers:

        score = model(tokens, t).exp(); score[..., mask_id] = 0
        move = expm1(sigma(t) - sigma(u)) * score
        stay = (1 - move.sum(-1)).clamp(min=0)
        multinomial(cat([move, stay]))

    Times are linspace(1, t_min, steps + 1); what is masked after the last step is drawn from the
    scores at t_min without the chance to stay. A token, once there, stays.

    Args:
        model: callable (tokens (R, D) int64, t (R,) float32, **context) to log-scores (R, D, V),
            a tensor or a head, with a third argument latent (R, L) if `latent_dim` > 0. The
            column of the mask is ignored: its score is 1 by definition. In eval mode during the
            call if it is an `nn.Module`.
        shape: (B, D).
        mask_id: the absorbing token; V − 1 in SEDD.
        steps: S >= 1.
        noise: "log_linear" (eps 1e-3), "geometric" (1e-3 to 1), or a function of a time in (0, 1]
            that gives the total noise σ, increasing.
        condition: what the model is given as its second argument, "t" or "sigma" (as SEDD's).
        vocab_size: V, to check the model and the prompt against; None accepts the model's.
        latent_dim: L of a mixture student; 0 for a model without λ.
        latent: λ to use: (B, L) for every step, or (S + 1, B, L), the last for the final step.
            None draws a fresh one per step and sequence.
        prompt: (B, P) or (P,) int64, the first P tokens of the rows, `mask_id` where a token is
            unknown. Known tokens stay.
        project_fn: called with the tokens (B, D) at the start and after every step; returns
            (B, D) int64. Tokens that it masks again are drawn again.
        context: tensors (B, ...) by keyword for the model.
        seed: int in [0, 2^63). None: taken from `generator`, or from the default generator.
        generator: source of the seed where `seed` is None.
        first_sequence: number of the first sequence. Randomness is a function of (seed, number
            of the sequence, step, position), so the same sequences come out however they are
            batched (up to the model's own rounding).
        t_min: last time.
        denoise: take the final step. False may leave masks.
        callback: called as callback(step, total, tokens) after each step, the final one included.
        history: a list to which the tokens at the start and after every step are appended.
        device: where to sample; None for the prompt's device, else that of the module's
            parameters, else the CPU.

    Returns:
        (B, D) int64.

    Only masked rows go through the head, and only sequences with a mask through the model. Host
    syncs: one per step, to learn which positions are still masked.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a model or
            project_fn that returns the wrong shape as soon as it does.
    """
    batch, positions = check_sizes(
        shape,
        steps=(steps, 1),
        mask_id=(mask_id, 0),
        latent_dim=(latent_dim, 0),
        first_sequence=(first_sequence, 0),
    )
    check_vocab_size(vocab_size, mask_id)
    check_callable(model, "model")
    check_choice(condition, "condition", ("t", "sigma"))
    _check_fraction(t_min, "t_min")
    times = torch.linspace(1.0, t_min, steps + 1, dtype=torch.float64).tolist()
    sigmas = _sigmas(noise, times)
    check_hooks(callback, history, project_fn)
    tokens = torch.full(
        (batch, positions), mask_id, dtype=torch.int64, device=device_of(device, prompt, model)
    )
    device = tokens.device
    context = check_context(context, batch, device)
    seed = seed_of(seed, generator)
    top_token = fill_prompt(tokens, prompt, vocab_size) if prompt is not None else 0
    latent = latents_of(
        latent,
        latent_dim,
        steps + 1,
        batch,
        seed=seed,
        first_sequence=first_sequence,
        device=device,
        letter="S + 1",
    )
    if project_fn is not None:
        tokens = project(project_fn, tokens)
    if history is not None:
        history.append(tokens)
    total = steps + int(denoise)
    first_key = first_sequence * positions

    with evaluation_mode(model):
        for step in range(total):
            masked = tokens == mask_id
            flat = masked.flatten().nonzero()[:, 0]
            if flat.numel():
                sequence = flat // positions
                called = masked.any(1)
                sequences = called.nonzero()[:, 0]
                row = called.cumsum(0)[sequence] - 1
                lam = latent if latent is None or latent.ndim == 2 else latent[step]
                moment = times[step] if condition == "t" else sigmas[step]
                t = torch.full((len(sequences),), moment, dtype=torch.float32, device=device)
                head = call_model(
                    model,
                    "model",
                    tokens[sequences],
                    t,
                    None if lam is None else lam[sequences],
                    select_context(context, sequences),
                    vocab_size,
                )
                _check_vocabulary(head.shape[-1], mask_id, top_token)
                keys = flat + first_key
                draw = sample(
                    head.take(row * positions + flat % positions),
                    mask_id=mask_id,
                    seed=seed,
                    step=step,
                    row_keys=keys,
                    want=("logsumexp",),
                )
                drawn = draw.token
                if step < steps:
                    assert draw.logsumexp is not None
                    log_move = math.log(math.expm1(sigmas[step] - sigmas[step + 1]))
                    u = rng.uniform(seed, _DECIDE + step, keys, 1, dtype=torch.float64)[:, 0]
                    moves = u.log() < draw.logsumexp.double() + log_move
                    drawn = torch.where(moves, drawn, mask_id)
                # Not in place: the model may have kept the tensor it was given.
                tokens = tokens.flatten().index_copy(0, flat, drawn).view(batch, positions)
            if project_fn is not None:
                tokens = project(project_fn, tokens)
            if history is not None:
                history.append(tokens)
            if callback is not None:
                callback(step + 1, total, tokens)
    return tokens


def _sigmas(noise: str | Noise, times: list[float]) -> list[float]:
    """The total noise at every time, checked to decrease."""
    if isinstance(noise, str):
        check_choice(noise, "noise", ("log_linear", "geometric"))
        noise = log_linear_noise() if noise == "log_linear" else geometric_noise()
    check_callable(noise, "noise")
    sigmas = [float(noise(t)) for t in times]
    for (t, sigma), (u, following) in zip(
        zip(times, sigmas, strict=True), zip(times[1:], sigmas[1:], strict=True), strict=False
    ):
        if not (math.isfinite(sigma) and sigma > following >= 0.0):
            raise ValueError(
                "noise must be finite, not negative and increasing in t, "
                f"got {sigma} at t = {t:g} and {following} at t = {u:g}"
            )
    return sigmas


def _check_vocabulary(vocabulary: int, mask_id: int, top_token: int) -> None:
    """What could not be checked before the model had said how many classes there are."""
    if vocabulary < 2:
        raise ValueError(f"model must return at least 2 classes with a mask_id, got {vocabulary}")
    if mask_id >= vocabulary:
        raise ValueError(f"mask_id must be in [0, V) = [0, {vocabulary}) of model, got {mask_id}")
    if top_token >= vocabulary:
        raise ValueError(
            f"prompt must hold token ids in [0, V) = [0, {vocabulary}) of model, got {top_token}"
        )
