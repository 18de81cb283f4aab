"""Ancestral sampling of uniform-state diffusion (Duo, UDLM): every token may change at every step.

With α_t the share of the signal at time t, α_ts = α_t/α_s for s < t, and p = softmax of the
denoiser's logits at a position that holds x, the posterior of the token at s is a mixture of
three parts, in units of α_t·V·p[x] + 1 − α_t:

    α_t·V·p[x] + α_ts − α_t      it stays x
    α_s − α_t                    it is drawn from p
    (1 − α_ts)·(1 − α_s)         it is drawn uniformly

One pass over a row gives logsumexp, and so p[x], and a draw from p; one uniform number decides
between the three, another is the uniform token. The V posterior probabilities never exist.

Source: the posterior of Duo (arXiv 2506.10892) and of UDLM (arXiv 2412.10193).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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
)
from ..draw.api import sample
from ..heads import Head, HeadLike, LinearHead, TensorHead
from ..models.call import Context, call_model, check_callable, check_context, evaluation_mode
from ._shared import (
    check_hooks,
    check_sizes,
    device_of,
    fill_prompt,
    latents_of,
    seed_of,
)

__all__ = ["cosine_signal", "log_linear_signal", "sample_uniform_state"]

# Step numbers of the generator for the choice between the parts; λ takes those from 0 on.
_DECIDE, _PRIOR = 2**30, 2**32 - 1
_GATHER_BYTES = 64 << 20  # of rows of the output weights at a time
_LAST_STEPS = ("ancestral", "greedy", "none")

Signal = Callable[[float], float]


def log_linear_signal(eps: float = 1e-3) -> Signal:
    """α(t) = 1 − (1 − eps)·t.

    >>> round(log_linear_signal()(0.5), 4)
    0.5005
    """
    _check_eps(eps)
    return lambda t: 1.0 - (1.0 - eps) * t


def cosine_signal(eps: float = 1e-3) -> Signal:
    """α(t) = 1 − cos(π/2 · (1 − (1 − eps)·t)).

    >>> round(cosine_signal()(0.5), 4)
    0.2934
    """
    _check_eps(eps)
    return lambda t: 1.0 - math.cos(math.pi / 2 * (1.0 - (1.0 - eps) * t))


def _check_eps(eps: Any) -> None:
    check_number(eps, "eps")
    if not 0.0 < eps < 1.0:
        raise ValueError(f"eps must be in (0, 1), got {eps}")


@torch.no_grad()
def sample_uniform_state(
    model: Callable[..., HeadLike],
    shape: tuple[int, int],
    *,
    vocab_size: int,
    steps: int,
    signal: str | Signal = "log_linear",
    condition: str = "t",
    last_step: str = "ancestral",
    latent_dim: int = 0,
    latent: Tensor | None = None,
    prompt: Tensor | None = None,
    start: Tensor | None = None,
    context: Context | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_sequence: int = 0,
    t_min: float = 1e-5,
    callback: Callable[[int, int, Tensor], None] | None = None,
    history: list[Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw token rows from a uniform-state diffusion model by its exact posterior.

    Equivalent PyTorch for one step, with a = alpha(t), b = alpha(s), x the tokens one-hot:

        p = model(tokens, t).softmax(-1)
        q = a*V*p*x + (a/b - a)*x + (b - a)*p + (1 - a/b)*(1 - b)/V
        torch.multinomial(q, 1)

    without the tensors p and q, and without noise for every token. Times are
    linspace(1, t_min, steps + 1); the start is uniform over the vocabulary.

    Args:
        model: callable (tokens (R, D) int64, t (R,) float32, **context) to logits (R, D, V) or a
            head, with a third argument latent (R, L) if `latent_dim` > 0. In eval mode during the
            call if it is an `nn.Module`.
        shape: (B, D).
        vocab_size: V.
        steps: S >= 1.
        signal: "log_linear" or "cosine" (eps 1e-3), or a function α of a time in (0, 1], in
            [0, 1] and decreasing.
        condition: what the model is given as its second argument: "t", "sigma" for −log α(t) (as
            Duo's), or "alpha".
        last_step: after the S steps, at t_min: "ancestral" (the posterior at α_s = 1), "greedy"
            (the denoiser's argmax everywhere), or "none".
        latent_dim: L of a mixture student; 0 for a model without λ.
        latent: λ to use: (B, L) for every step, or (S + 1, B, L), the last for the last step.
            None draws a fresh one per step and sequence.
        prompt: (B, P) or (P,) int64, the first P tokens of the rows, which never change.
        start: (B, D) int64, tokens to start from in place of uniform ones.
        context: tensors (B, ...) by keyword for the model.
        seed: int in [0, 2^63). None: taken from `generator`, or from the default generator.
        generator: source of the seed where `seed` is None.
        first_sequence: number of the first sequence. Randomness is a function of (seed, number
            of the sequence, step, position), so the same sequences come out however they are
            batched (up to the model's own rounding).
        t_min: last time.
        callback: called as callback(step, total, tokens) after each step, the last included.
        history: a list to which the tokens at the start and after every step are appended.
        device: where to sample; None for the device of the prompt or start, else that of the
            module's parameters, else the CPU.

    Returns:
        (B, D) int64.

    Rows of the prompt never go through the head. Host syncs: before the loop one to read a
    prompt (and one to read a seed from a GPU generator); inside the loop none.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a model that
            returns the wrong shape as soon as it does.
    """
    batch, positions = check_sizes(
        shape,
        vocab_size=(vocab_size, 2),
        steps=(steps, 1),
        latent_dim=(latent_dim, 0),
        first_sequence=(first_sequence, 0),
    )
    check_callable(model, "model")
    check_choice(condition, "condition", ("t", "sigma", "alpha"))
    check_choice(last_step, "last_step", _LAST_STEPS)
    check_number(t_min, "t_min")
    if not 0.0 < t_min < 1.0:
        raise ValueError(f"t_min must be in (0, 1), got {t_min}")
    times = torch.linspace(1.0, t_min, steps + 1, dtype=torch.float64).tolist()
    alphas = _alphas(signal, times, condition)
    check_hooks(callback, history)
    place = device_of(device, prompt if prompt is not None else start, model)
    tokens = torch.empty((batch, positions), dtype=torch.int64, device=place)
    device = tokens.device
    context = check_context(context, batch, device)
    seed = seed_of(seed, generator)
    keys = torch.arange(batch * positions, device=device) + first_sequence * positions
    if start is None:
        u = rng.uniform(seed, _PRIOR, keys, 1, dtype=torch.float64)
        tokens = (u * vocab_size).long().view(batch, positions)
    else:
        _check_start(start, tokens, vocab_size)
        tokens.copy_(start)
    known = 0
    if prompt is not None:
        fill_prompt(tokens, prompt, vocab_size)
        known = prompt.shape[-1]
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
    free = torch.arange(batch * positions, device=device).view(batch, positions)[:, known:]
    free = free.flatten()
    keys = keys[free]
    if history is not None:
        history.append(tokens)
    total = steps + (last_step != "none")

    with evaluation_mode(model):
        for step in range(total):
            greedy = step == steps and last_step == "greedy"
            lam = latent if latent is None or latent.ndim == 2 else latent[step]
            moment = {"t": times[step], "alpha": alphas[step]}.get(condition)
            if moment is None:
                moment = -math.log(alphas[step])
            if free.numel():
                t = torch.full((batch,), moment, dtype=torch.float32, device=device)
                head = call_model(model, "model", tokens, t, lam, context, vocab_size).take(free)
                draw = sample(
                    head,
                    temperature=0.0 if greedy else 1.0,
                    seed=seed,
                    step=step,
                    row_keys=keys,
                    want=() if greedy else ("logsumexp",),
                )
                new = draw.token
                if not greedy:
                    assert draw.logsumexp is not None
                    present = tokens.flatten()[free]
                    p_present = (logits_at(head, present) - draw.logsumexp).double().exp()
                    following = 1.0 if step == steps else alphas[step + 1]
                    u = rng.uniform(seed, _DECIDE + step, keys, 2, dtype=torch.float64)
                    new = _mix(
                        present, p_present, draw.token, u, alphas[step], following, vocab_size
                    )
                # Not in place: the model may have kept the tensor it was given.
                tokens = tokens.flatten().index_copy(0, free, new).view(batch, positions)
            if history is not None:
                history.append(tokens)
            if callback is not None:
                callback(step + 1, total, tokens)
    return tokens


def _mix(
    present: Tensor,
    p_present: Tensor,
    drawn: Tensor,
    u: Tensor,
    alpha_t: float,
    alpha_s: float,
    vocabulary: int,
) -> Tensor:
    """One of: the present token, a draw from p, a uniform token; u (R, 2) float64 decides."""
    ratio = alpha_t / alpha_s
    stay = alpha_t * vocabulary * p_present + (ratio - alpha_t)
    from_p = alpha_s - alpha_t
    uniform = (1.0 - ratio) * (1.0 - alpha_s)
    at = u[:, 0] * (stay + from_p + uniform)
    anything = (u[:, 1] * vocabulary).long()
    # Staying comes last, so that rounding at the top end of u never makes up a token.
    return torch.where(at < uniform, anything, torch.where(at < uniform + from_p, drawn, present))


def logits_at(head: Head, tokens: Tensor) -> Tensor:
    """The logit of one token per row, (R,) in fp32 (fp64 for fp64 heads), without other logits.

    Args:
        head: (R, V).
        tokens: (R,) int64.
    """
    dtype = torch.promote_types(head.dtype, torch.float32)
    if isinstance(head, TensorHead):
        return head.logits().gather(1, tokens.unsqueeze(1))[:, 0].to(dtype)
    if isinstance(head, LinearHead):
        width = head.hidden.shape[-1]
        weight, bytes_per_row = head.weight, width * dtype.itemsize
    else:
        bytes_per_row = head.shape[-1] * dtype.itemsize
    size = max(1, _GATHER_BYTES // bytes_per_row)
    parts = []
    for rows in torch.arange(len(tokens), device=tokens.device).split(size):
        part, ids = head.take(rows), tokens[rows]
        if isinstance(part, LinearHead):
            chosen = weight[ids].to(part.hidden.dtype).to(dtype)
            value = (part.hidden.to(dtype) * chosen).sum(-1)
            if part.bias is not None and part.bias.ndim == 2:
                at = part.positions(torch.arange(len(ids), device=ids.device))
                value = value + part.bias[at, ids].to(dtype)
            elif part.bias is not None:
                value = value + part.bias[ids].to(dtype)
        else:
            value = part.logits().gather(1, ids.unsqueeze(1))[:, 0].to(dtype)
        parts.append(value)
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=tokens.device)


def _alphas(signal: str | Signal, times: list[float], condition: str) -> list[float]:
    """α at every time, checked to be in [0, 1] and to grow towards the data."""
    if isinstance(signal, str):
        check_choice(signal, "signal", ("log_linear", "cosine"))
        signal = log_linear_signal() if signal == "log_linear" else cosine_signal()
    check_callable(signal, "signal")
    alphas = [float(signal(t)) for t in times]
    for k in range(len(times) - 1):
        if not 0.0 <= alphas[k] < alphas[k + 1] <= 1.0:
            raise ValueError(
                "signal must be in [0, 1] and decreasing in t, "
                f"got {alphas[k]} at t = {times[k]:g} and {alphas[k + 1]} at t = {times[k + 1]:g}"
            )
    if condition == "sigma" and alphas[0] == 0.0:
        raise ValueError('signal must be positive at t = 1 with condition="sigma", got 0.0')
    return alphas


def _check_start(start: Any, tokens: Tensor, vocabulary: int) -> None:
    check_int64(start, "start")
    check_shape(start, "start", "B,D", tokens.shape)
    check_same_device(start, "start", tokens, "the samples")
    check_token_range(start, "start", vocabulary)
