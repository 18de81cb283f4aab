"""Analytic sampling of score-entropy models (SEDD) with an absorbing state.

A model of this kind returns the logarithms of the concrete scores s_v = p_t(v)/p_t(mask), and one
pass over a row gives a step: logsumexp gives their sum, one draw from softmax(log s) the token, and
one uniform number decides whether the position moves. How probable that is depends on the scores,
so positions cannot be chosen before the model has been asked, as `sample_masked` does.

Source: the analytic predictor and the denoiser of SEDD (arXiv 2310.16834).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..checks import check_choice
from .arguments import MaskOptions, Model, Unpack, check_flags, sampler
from .loop import Answer, Run, Step
from .schedules import Noise, at_times, geometric_noise, log_linear_noise, time_grid

__all__ = ["geometric_noise", "log_linear_noise", "sample_analytic"]

_NOISES: dict[str, Callable[..., Noise]] = {
    "log_linear": log_linear_noise,
    "geometric": geometric_noise,
}


@sampler(MaskOptions)
def sample_analytic(
    model: Model,
    shape: tuple[int, int],
    *,
    mask_id: int,
    steps: int,
    noise: str | Noise = "log_linear",
    condition: str = "t",
    t_min: float = 1e-5,
    denoise: bool = True,
    project_fn: Callable[[Tensor], Tensor] | None = None,
    **options: Unpack[MaskOptions],
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
        noise: "log_linear" (eps 1e-3), "geometric" (1e-3 to 1), or a function of a time in (0, 1]
            that gives the total noise σ, increasing.
        condition: what the model is given as its second argument, "t" or "sigma" (as SEDD's).
        denoise: take the last step. False may leave masks.
        project_fn: tokens that it masks again are drawn again.

    Only masked rows go through the head, and only sequences with a mask through the model. The
    hooks hear of every step. Host syncs: one per step, to learn which positions are still masked.
    """
    check_choice(condition, "condition", ("t", "sigma"))
    check_flags(denoise=denoise)
    times = time_grid(steps, t_min).tolist()
    sigmas = at_times(noise, "noise", _NOISES, times, falling=True)
    calls = steps + denoise
    run = Run(model, shape, options, calls=calls, mask_id=mask_id, project_fn=project_fn)
    moments = (times if condition == "t" else sigmas)[:calls]

    def rule() -> Iterator[Step]:
        for i, moment in enumerate(moments):
            masked = run.masked()
            rows, some = masked.flatten().nonzero()[:, 0], masked.any(1).nonzero()[:, 0]
            yield Step(i, moment, rows, some, fill, want=("logsumexp",))

    def fill(step: Step, answer: Answer) -> Tensor:
        drawn, total, here = answer.draw.token, answer.draw.logsumexp, step.number
        assert total is not None
        if here < steps:
            log_move = math.log(math.expm1(sigmas[here] - sigmas[here + 1]))
            moves = run.uniform(step, 1)[:, 0].log() < total.double() + log_move
            drawn = torch.where(moves, drawn, mask_id)
        return run.put(step, drawn)

    return run.loop(rule())
