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
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice
from ..heads import HeadLike
from ..models.call import Context, check_callable
from .arguments import check_counts, check_fraction
from .loop import START, Answer, Rule, Run, Visit, single_logits

__all__ = ["cosine_signal", "log_linear_signal", "sample_uniform_state"]

_LAST_STEPS = ("ancestral", "greedy", "none")

Signal = Callable[[float], float]


def log_linear_signal(eps: float = 1e-3) -> Signal:
    """α(t) = 1 − (1 − eps)·t.

    >>> round(log_linear_signal()(0.5), 4)
    0.5005
    """
    check_fraction(eps, "eps")
    return lambda t: 1.0 - (1.0 - eps) * t


def cosine_signal(eps: float = 1e-3) -> Signal:
    """α(t) = 1 − cos(π/2 · (1 − (1 − eps)·t)).

    >>> round(cosine_signal()(0.5), 4)
    0.2934
    """
    check_fraction(eps, "eps")
    return lambda t: 1.0 - math.cos(math.pi / 2 * (1.0 - (1.0 - eps) * t))


class _UniformState(Rule):
    def __init__(self, moments: list[float], alphas: list[float], last_step: str, known: int):
        self.moments, self.alphas, self.last_step, self.known = moments, alphas, last_step, known

    def visits(self, run: Run) -> Iterator[Visit]:
        place = torch.arange(run.batch * run.positions, device=run.device).view_as(run.tokens)
        free = place[:, self.known :].flatten()
        steps = len(self.alphas) - 1
        for step in range(steps + (self.last_step != "none")):
            greedy = step == steps and self.last_step == "greedy"
            want = () if greedy else ("logsumexp",)
            yield Visit(step, self.moments[step], free, greedy=greedy, want=want)

    def fill(self, run: Run, visit: Visit, answer: Answer) -> Tensor:
        draw = answer.draw
        if visit.greedy:
            return run.put(visit, draw.token)
        assert draw.logsumexp is not None
        assert visit.rows is not None
        present = run.tokens.flatten()[visit.rows]
        p_present = (single_logits(answer.head, present) - draw.logsumexp).double().exp()
        alpha, following = (*self.alphas, 1.0)[visit.number : visit.number + 2]
        u = run.uniform(visit, 2)
        size = answer.head.shape[-1]
        return run.put(visit, _mix(present, p_present, draw.token, u, alpha, following, size))


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

    Args: those of all samplers, see `di4c_fast.samplers`, and

        vocab_size: V.
        steps: S >= 1; with the last step S + 1 of them for `latent`, `callback`, `history`.
        signal: "log_linear" or "cosine" (eps 1e-3), or a function α of a time in (0, 1], in
            [0, 1] and decreasing.
        condition: what the model is given as its second argument: "t", "sigma" for −log α(t) (as
            Duo's), or "alpha".
        last_step: after the S steps, at t_min: "ancestral" (the posterior at α_s = 1), "greedy"
            (the denoiser's argmax everywhere), or "none".
        prompt: (B, P) or (P,) int64, the first P tokens of the rows, which never change.
        start: (B, D) int64, tokens to start from in place of uniform ones.
        t_min: last time.

    Rows of the prompt never go through the head. The hooks hear of every step. Host syncs: before
    the loop one to read a prompt; inside none.
    """
    check_counts([("steps", steps, 1), ("vocab_size", vocab_size, 2)])
    check_choice(condition, "condition", ("t", "sigma", "alpha"))
    check_choice(last_step, "last_step", _LAST_STEPS)
    check_fraction(t_min, "t_min")
    times = torch.linspace(1.0, t_min, steps + 1, dtype=torch.float64).tolist()
    alphas = _alphas(signal, times, condition)
    run = Run(model, shape, device, prompt if prompt is not None else start)
    run.set_seed(seed, generator, first_sequence)
    run.set_vocabulary(vocab_size, {})
    if start is None:
        u = rng.uniform(run.seed, START, run.keys, 1, dtype=torch.float64)
        start = (u * vocab_size).long().view_as(run.tokens)
    run.set_start(start, "start", vocab_size, prompt, context)
    run.set_latents(latent, latent_dim, steps + 1, "S + 1")
    run.set_hooks(callback, history)
    moments = {"t": times, "alpha": alphas}.get(condition)
    if moments is None:
        moments = [-math.log(alpha) for alpha in alphas]
    rule = _UniformState(moments, alphas, last_step, 0 if prompt is None else prompt.shape[-1])
    return run.loop(rule, steps + (last_step != "none"))


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
