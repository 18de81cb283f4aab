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

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..checks import check_choice, check_number
from ..heads import HeadLike
from ..models.call import Context, check_callable
from .arguments import check_counts, check_fraction
from .loop import Answer, Rule, Run, Visit, check_flags

__all__ = ["geometric_noise", "log_linear_noise", "sample_analytic"]

Noise = Callable[[float], float]


def log_linear_noise(eps: float = 1e-3) -> Noise:
    """σ(t) = −log(1 − (1 − eps)·t), the total noise of SEDD's log-linear schedule.

    >>> round(log_linear_noise()(0.5), 4)
    0.6921
    """
    check_fraction(eps, "eps")
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


class _Analytic(Rule):
    def __init__(self, moments: list[float], sigmas: list[float], total: int, mask_id: int):
        self.moments, self.sigmas, self.total = moments, sigmas, total
        self.options = {"mask_id": mask_id}

    def visits(self, run: Run) -> Iterator[Visit]:
        for step in range(self.total):
            masked = run.masked()
            rows, sequences = masked.flatten().nonzero()[:, 0], masked.any(1).nonzero()[:, 0]
            yield Visit(step, self.moments[step], rows, sequences, want=("logsumexp",))

    def fill(self, run: Run, visit: Visit, answer: Answer) -> Tensor:
        drawn, total = answer.draw.token, answer.draw.logsumexp
        assert total is not None
        following = self.sigmas[visit.number + 1 :][:1]
        if following:
            log_move = math.log(math.expm1(self.sigmas[visit.number] - following[0]))
            moves = run.uniform(visit, 1)[:, 0].log() < total.double() + log_move
            drawn = torch.where(moves, drawn, self.options["mask_id"])
        return run.put(visit, drawn)


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

    Args: those of all samplers, see `di4c_fast.samplers`, and

        model: gives log-scores; the column of the mask is ignored: its score is 1 by definition.
        mask_id: the absorbing token; V − 1 in SEDD.
        steps: S >= 1; with the last step S + 1 of them for `latent`, `callback`, `history`.
        noise: "log_linear" (eps 1e-3), "geometric" (1e-3 to 1), or a function of a time in (0, 1]
            that gives the total noise σ, increasing.
        condition: what the model is given as its second argument, "t" or "sigma" (as SEDD's).
        project_fn: called with the tokens (B, D) at the start and after every step; returns
            (B, D) int64. Tokens that it masks again are drawn again.
        t_min: last time.
        denoise: take the last step. False may leave masks.

    Only masked rows go through the head, and only sequences with a mask through the model. The
    hooks hear of every step. Host syncs: one per step, to learn which positions are still masked.
    """
    check_counts([("steps", steps, 1), ("mask_id", mask_id, 0)])
    check_choice(condition, "condition", ("t", "sigma"))
    check_fraction(t_min, "t_min")
    check_flags(denoise=denoise)
    times = torch.linspace(1.0, t_min, steps + 1, dtype=torch.float64).tolist()
    sigmas = _sigmas(noise, times)
    run = Run(model, shape, device, prompt)
    run.set_seed(seed, generator, first_sequence)
    run.set_vocabulary(vocab_size, {"mask_id": mask_id})
    run.set_tokens(mask_id, prompt, context)
    run.set_latents(latent, latent_dim, steps + 1, "S + 1")
    run.set_hooks(callback, history, project_fn)
    total = steps + denoise
    rule = _Analytic(times if condition == "t" else sigmas, sigmas, total, mask_id)
    return run.loop(rule, total)


def _sigmas(noise: str | Noise, times: list[float]) -> list[float]:
    """The total noise at every time, checked to decrease."""
    if isinstance(noise, str):
        check_choice(noise, "noise", ("log_linear", "geometric"))
        noise = log_linear_noise() if noise == "log_linear" else geometric_noise()
    check_callable(noise, "noise")
    sigmas = [float(noise(t)) for t in times]
    pairs = itertools.pairwise(zip(times, sigmas, strict=True))
    for (t, sigma), (u, following) in pairs:
        if not (math.isfinite(sigma) and sigma > following >= 0.0):
            raise ValueError(
                "noise must be finite, not negative and increasing in t, "
                f"got {sigma} at t = {t:g} and {following} at t = {u:g}"
            )
    return sigmas
