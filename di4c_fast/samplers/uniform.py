"""Ancestral sampling of uniform-state diffusion (Duo, UDLM): every token may change at every step.

The posterior of a token is a mixture of three parts: it stays, it is drawn from the denoiser's
distribution p, or it is drawn uniformly. One pass over a row gives logsumexp, and so p of the
present token, and a draw from p; one uniform number decides between the three, another is the
uniform token. The V posterior probabilities never exist.

Source: the posterior of Duo (arXiv 2506.10892) and of UDLM (arXiv 2412.10193).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice
from .arguments import Model, Options, Unpack, check_counts, sampler
from .loop import START, Answer, Run, Step, single_logits
from .schedules import Signal, at_times, cosine_signal, log_linear_signal, time_grid

__all__ = ["cosine_signal", "log_linear_signal", "sample_uniform_state"]

_SIGNALS = {"log_linear": log_linear_signal, "cosine": cosine_signal}


@sampler(Options)
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
    **options: Unpack[Options],
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

    Rows of the prompt never go through the head. The hooks hear of every step. Host syncs: before
    the loop one to read a prompt; inside none.
    """
    check_counts([("vocab_size", vocab_size, 2)])
    check_choice(condition, "condition", ("t", "sigma", "alpha"))
    check_choice(last_step, "last_step", ("ancestral", "greedy", "none"))
    times = time_grid(steps, t_min).tolist()
    alphas = at_times(signal, "signal", _SIGNALS, times, falling=False, top=1.0)
    if condition == "sigma" and alphas[0] == 0.0:
        raise ValueError('signal must be positive at t = 1 with condition="sigma", got 0.0')
    sigmas = [-math.log(alpha) for alpha in alphas if alpha]
    moments = {"t": times, "alpha": alphas, "sigma": sigmas}[condition]

    def anything(run: Run) -> Tensor:
        u = rng.uniform(run.seed, START, run.keys, 1, dtype=torch.float64)
        return (u * vocab_size).long().view_as(run.tokens)

    run = Run(
        model,
        shape,
        {**options, "vocab_size": vocab_size, "prompt": prompt},
        calls=steps + (last_step != "none"),
        start=anything if start is None else start,
    )
    known = 0 if prompt is None else prompt.shape[-1]
    place = torch.arange(run.batch * run.positions, device=run.device).view_as(run.tokens)
    free = place[:, known:].flatten()

    def rule() -> Iterator[Step]:
        for i, moment in enumerate(moments[: run.calls]):
            if i == steps and last_step == "greedy":
                yield Step(i, moment, free, greedy=True)
            else:
                yield Step(i, moment, free, fill=fill, want=("logsumexp",))

    def fill(step: Step, answer: Answer) -> Tensor:
        draw, present = answer.draw, run.tokens.flatten()[free]
        assert draw.logsumexp is not None
        p_present = (single_logits(answer.head, present) - draw.logsumexp).double().exp()
        alpha, following = (*alphas, 1.0)[step.number : step.number + 2]
        ratio, u = alpha / following, run.uniform(step, 2)
        stay = alpha * vocab_size * p_present + (ratio - alpha)
        from_p, uniform = following - alpha, (1.0 - ratio) * (1.0 - following)
        at = u[:, 0] * (stay + from_p + uniform)
        # Staying comes last, so that rounding at the top end of u never makes up a token.
        other = torch.where(at < uniform, (u[:, 1] * vocab_size).long(), draw.token)
        return run.put(step, torch.where(at < uniform + from_p, other, present))

    return run.loop(rule())
