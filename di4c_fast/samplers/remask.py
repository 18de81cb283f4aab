"""Masked diffusion whose tokens are masked again on the way, so that they can be corrected.

A step from t to s masks a filled position again with probability σ, and fills a masked one with
probability (α_s − (1 − σ)·α_t) / (1 − α_t), α = 1 − t, so that the share of masks at a time is that
of ordinary sampling. Neither looks at a logit: both are drawn first, and only the rows that are
filled go through the head. σ = 0 is `sample_masked`.

Source: ReMDM (arXiv 2503.00307), its cap, rescale, loop and conf.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import rng
from ..checks import check_choice, check_within
from .arguments import MaskDrawOptions, Model, Unpack, check_flags, sampler
from .loop import RULE, Answer, Run, Step
from .schedules import time_grid

__all__ = ["fill_chance", "remasking", "sample_remasked"]

RULES = ("cap", "rescale", "loop", "conf")


def fill_chance(alpha: float, following: float, sigma: float) -> float:
    """Of a masked position to be filled from α to the next α, if filled ones are masked by σ."""
    return (following - (1.0 - sigma) * alpha) / (1.0 - alpha) if alpha < 1.0 else 1.0


def remasking(
    run: Run,
    moments: Sequence[float],
    chances: Sequence[tuple[float, float]],
    active_only: bool,
    greedy: int = -1,
    by_confidence: bool = False,
) -> Iterator[Step]:
    """Steps that fill a masked position and mask a filled one with the `chances` of each step.

    Args:
        moments: what the model is given at each step.
        greedy: the number of the step that takes the argmax.
        by_confidence: the second of the chances is the most, and a sequence's positions share it
            by softmax(−p), p the probability of each token when it was drawn.
    """
    masked, keys = run.masked().cpu(), run.sequence_keys()
    free, doubt = masked.clone(), torch.full(masked.shape, -torch.inf, dtype=torch.float64)

    def note(step: Step, answer: Answer) -> Tensor:
        assert answer.draw.prob is not None
        assert step.rows is not None
        doubt.view(-1)[step.rows.cpu()] = -answer.draw.prob.double().cpu()
        return run.put(step, answer.draw.token)

    then, want = (note, ("prob",)) if by_confidence else (None, ())
    for i, (moment, (fill, again)) in enumerate(zip(moments, chances, strict=True)):
        share = doubt.softmax(1).nan_to_num() if by_confidence else 1.0
        u = rng.uniform(run.seed, RULE + i, keys, run.positions, dtype=torch.float64)
        filled, remasked = masked & (u < fill), ~masked & free & (u < again * share)
        masked = (masked & ~filled) | remasked
        rows = filled.flatten().nonzero()[:, 0].to(run.device)
        some = filled.any(1).nonzero()[:, 0].to(run.device) if active_only else None
        mask = remasked.to(run.device) if again else None
        doubt.masked_fill_(remasked, -torch.inf)
        yield Step(i, moment, rows, some, then, i == greedy, mask, want)


@sampler(MaskDrawOptions)
def sample_remasked(
    model: Model,
    shape: tuple[int, int],
    *,
    mask_id: int,
    steps: int,
    rule: str = "cap",
    eta: float = 0.008,
    t_on: float = 0.55,
    t_off: float = 0.05,
    alpha_on: float = 0.9,
    t_min: float = 1e-5,
    active_only: bool = True,
    **options: Unpack[MaskDrawOptions],
) -> Tensor:
    """Draw token rows from a masked diffusion model by ancestral sampling that remasks.

    Times are linspace(1, t_min, steps + 1); positions that are masked after the last step take
    the argmax at t_min. With σ_max = min(1, (1 − α_s) / α_t), the rules are

        "cap": σ = min(eta, σ_max) (published: eta 0.008);
        "rescale": σ = eta·σ_max (published: eta 0.015);
        "loop": until t_on as `sample_masked`, at a rate that leaves the share 1 − alpha_on masked
            there; from there to t_off σ = eta at this share; then as `sample_masked` again, from
            this share to none (published: eta 0.02);
        "conf": σ = σ_max·softmax(−p) over the filled positions of a sequence, p the probability
            of each one's token when it was drawn, and masked positions are filled as without
            remasking.

    Args: those of all samplers, see `di4c_fast.samplers`, and

        steps: the final argmax is one more.
        rule, eta: see above; eta in [0, 1], for "loop" at most (1 − alpha_on) / alpha_on; "conf"
            has none.
        t_on, t_off, alpha_on: of "loop", 0 <= t_off < t_on < 1, 0 < alpha_on < 1.
        top_p: keeps the token that crosses it, which ReMDM's code leaves out.

    Known tokens of the prompt are never masked. The hooks hear of every step, whether or not the
    model ran. Host syncs: before the loop one or two to read the prompt; inside none, but with
    "conf" one per step that calls the model.
    """
    check_flags(active_only=active_only)
    check_choice(rule, "rule", RULES)
    check_within(t_on, "t_on", "(0, 1)")
    check_within(t_off, "t_off", f"[0, {float(t_on)})")
    check_within(alpha_on, "alpha_on", "(0, 1)")
    most = min(1.0, (1.0 - alpha_on) / alpha_on) if rule == "loop" else 1.0
    check_within(eta, "eta", f"[0, {most:g}]")
    times = time_grid(steps, t_min).tolist()

    def chances(t: float, s: float) -> tuple[float, float]:
        """Of a masked position to be filled, and of a filled one to be masked."""
        if rule != "loop":
            most = min(1.0, s / (1.0 - t)) if t < 1.0 else 1.0
            if rule == "conf":
                return fill_chance(1.0 - t, 1.0 - s, 0.0), most
            sigma = min(eta, most) if rule == "cap" else eta * most
            return fill_chance(1.0 - t, 1.0 - s, sigma), sigma
        if t <= t_off:
            return (t - s) / t, 0.0
        if t <= t_on:
            return fill_chance(alpha_on, alpha_on, eta), eta
        here, after = (max(0.0, 1.0 - (1.0 - v) * alpha_on / (1.0 - t_on)) for v in (t, s))
        return (1.0 - after / here if here else 1.0), 0.0

    run = Run(model, shape, options, calls=steps + 1, mask_id=mask_id)
    each = [*map(chances, times, times[1:]), (1.0, 0.0)]
    return run.loop(remasking(run, times, each, active_only, steps, rule == "conf"))
