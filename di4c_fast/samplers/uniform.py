"""Ancestral sampling of uniform-state diffusion (Duo, UDLM): every token may change at every step.

The posterior of a token is a mixture of three parts: it stays, it is drawn from the denoiser's
distribution p, or it is drawn uniformly. One pass over a row gives logsumexp, and so p of the
present token, and a draw from p; one uniform number decides between the three, another is the
uniform token. The V posterior probabilities never exist.

Source: the posterior of Duo (arXiv 2506.10892) and of UDLM (arXiv 2412.10193).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice
from .arguments import DrawOptions, Model, Unpack, check_counts, sampler
from .loop import START, Answer, Run, Step, single_logits
from .schedules import Signal, at_times, cosine_signal, log_linear_signal, moments, time_grid

__all__ = ["cosine_signal", "log_linear_signal", "sample_uniform_state"]

SIGNALS = {"log_linear": log_linear_signal, "cosine": cosine_signal}
LAST_STEPS = ("ancestral", "greedy", "none")


@sampler(DrawOptions)
def sample_uniform_state(
    model: Model,
    shape: tuple[int, int],
    *,
    vocab_size: int,
    steps: int,
    signal: str | Signal = "log_linear",
    condition: str = "t",
    t_min: float = 1e-5,
    last_step: str = "ancestral",
    prompt: Tensor | None = None,
    start: Tensor | None = None,
    **options: Unpack[DrawOptions],
) -> Tensor:
    """Draw token rows from a uniform-state diffusion model by its exact posterior.

    Equivalent PyTorch for one step, with a = alpha(t), b = alpha(s), x the tokens one-hot:

        p = model(tokens, t).softmax(-1)
        q = a*V*p*x + (a/b - a)*x + (b - a)*p + (1 - a/b)*(1 - b)/V
        torch.multinomial(q, 1)

    Times are linspace(1, t_min, steps + 1); the start is uniform over the vocabulary.

    Args: those of all samplers, see `di4c_fast.samplers`, and

        vocab_size: V.
        signal: "log_linear" or "cosine" (eps 1e-3), or a function α of a time in (0, 1], in
            [0, 1] and decreasing.
        condition: what the model is given as its second argument: "t", "sigma" for −log α(t) (as
            Duo's), or "alpha".
        last_step: after the S steps, at t_min: "ancestral" (the posterior at α_s = 1), "greedy"
            (the denoiser's argmax everywhere), or "none".
        prompt: (B, P) or (P,) int64, all known.
        start: (B, D) int64, tokens to start from in place of uniform ones.
        temperature, top_k, top_p: of p above, that of the present token included.

    Rows of the prompt never go through the head. The hooks hear of every step. Host syncs: before
    the loop one to read a prompt; inside none.
    """
    check_choice(last_step, "last_step", LAST_STEPS)
    times = time_grid(steps, t_min).tolist()
    alphas = at_times(signal, "signal", SIGNALS, times, falling=False, top=1.0)
    asked = moments(condition, times, alphas)
    calls = steps + (last_step != "none")
    run = uniform_run(model, shape, options, vocab_size, calls, prompt, start)
    return run.loop(mixing(run, prompt, asked, alphas, [1.0] * steps, last_step == "greedy"))


def uniform_run(
    model: Model,
    shape: tuple[int, int],
    options: Mapping[str, object],
    vocab_size: Any,
    calls: int,
    prompt: Tensor | None,
    start: Tensor | None = None,
) -> Run:
    """A run that starts at uniform tokens, drawn from the seed, or at `start`."""
    check_counts([("vocab_size", vocab_size, 2)])

    def anything(run: Run) -> Tensor:
        u = rng.uniform(run.seed, START, run.keys, 1, dtype=torch.float64)
        return (u * vocab_size).long().view_as(run.tokens)

    given = {**options, "vocab_size": vocab_size, "prompt": prompt}
    return Run(model, shape, given, calls=calls, start=anything if start is None else start)


def shares(p: Tensor, alpha: float, following: float, kappa: float, vocab_size: int) -> Tensor:
    """(3, R): to take a uniform token, one from p, or to stay; p (R,) is that of the present token.

    By the share `kappa` the posterior, and by the rest a token x0 of the posterior at the signal 1,
    with noise again up to `following`.
    """
    ratio, present = alpha / following, alpha * vocab_size * p
    total = present + (1.0 - alpha)
    uniform = (1.0 - following) * (kappa * (1.0 - ratio) + (1.0 - kappa) * total)
    from_p = kappa * (following - alpha) + (1.0 - kappa) * following * (1.0 - alpha)
    stay = kappa * (present + (ratio - alpha)) + (1.0 - kappa) * following * present
    return torch.stack([uniform, torch.full_like(p, from_p), stay]) / total


def mixing(
    run: Run,
    prompt: Tensor | None,
    asked: Sequence[float],
    alphas: Sequence[float],
    kappas: Sequence[float],
    greedy: bool,
) -> Iterator[Step]:
    """Steps through the signals `alphas` by `shares`, and a last one to 1, or to the argmax.

    The model is given the moments `asked`. The prompt never changes.
    """
    vocab_size, known = run.vocab_size, 0 if prompt is None else prompt.shape[-1]
    assert vocab_size is not None
    signals, weights = (*alphas, 1.0), (*kappas, 1.0)
    filters = {name: run.draws[name] for name in ("temperature", "top_k", "top_p")}
    place = torch.arange(run.batch * run.positions, device=run.device).view_as(run.tokens)
    free = place[:, known:].flatten()

    def fill(step: Step, answer: Answer) -> Tensor:
        draw, present = answer.draw, run.tokens.flatten()[free]
        if run.draws["temperature"] == 0.0:
            p = torch.eq(draw.token, present).double()
        else:
            assert draw.logsumexp is not None
            p = (single_logits(answer.head, present, **filters) - draw.logsumexp).double().exp()
        i, u = step.number, run.uniform(step, 2)
        bounds = shares(p, signals[i], signals[i + 1], weights[i], vocab_size).cumsum(0)
        # Staying comes last, so that rounding at the top end of u never makes up a token.
        other = torch.where(u[:, 0] < bounds[0], (u[:, 1] * vocab_size).long(), draw.token)
        return run.put(step, torch.where(u[:, 0] < bounds[1], other, present))

    for i, moment in enumerate(asked[: run.calls]):
        if i == len(kappas) and greedy:
            yield Step(i, moment, free, greedy=True)
        else:
            yield Step(i, moment, free, fill=fill, want=("logsumexp",))
