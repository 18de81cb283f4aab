"""ψ-samplers: predictor–corrector sampling of uniform-state and of masked diffusion.

A step from t to s is by the share κ the ancestral posterior, the predictor, and by 1 − κ a
corrector: a clean token of the posterior at α = 1, with noise again up to α_s. Of a uniform state
these are `uniform.shares`. With masks, a masked position is filled with probability
κ·(α_s − α_t)/(1 − α_t) + (1 − κ)·α_s and a filled one masked with (1 − κ)·(1 − α_s): this is
remasking with σ = (1 − κ)·(1 − α_s).

Source: Duo's second chapter (arXiv 2602.21185).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_within
from .arguments import MaskDrawOptions, Model, Unpack, check_flags, sampler
from .loop import Run
from .remask import fill_chance, remasking
from .schedules import Signal, at_times, moments, time_grid
from .uniform import LAST_STEPS, SIGNALS, mixing, uniform_run

__all__ = ["psi_kappas", "psi_times", "sample_psi"]

_INVERSES = {
    "log_linear": lambda alpha: 1.0 - alpha,
    "cosine": lambda alpha: 1.0 - 2.0 / math.pi * math.acos(1.0 - alpha),
}  # as in Duo: without the eps of the signals
_PROFILE = "linear-constant-linear-"
# σ by eta, α_t and α_s; the second is Duo's code, where ReMDM's rescale has min(1, …).
_CHANCES: dict[str, Callable[[float, float, float], float]] = {
    "max-capped-": lambda eta, a, b: min(eta, (1.0 - b) / a) if a else eta,
    "max-rescale-": lambda eta, a, b: eta * (min(eta, (1.0 - b) / a) if a else 1.0),
    "constant-remdm-": lambda eta, a, b: eta,
}
_MODES = ("pure-posterior", "pure-pc", "constant-<κ>", *(f"{name}<eta>" for name in _CHANCES))


def _number(text: str, name: str, known: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be {known}, with a number, got {text!r} there") from None


def _thirds(count: int, high_frac: float, middle_frac: float) -> tuple[int, int, int]:
    high = round(high_frac * count)
    middle = min(round(middle_frac * count), count - high)
    return high, middle, count - high - middle


def psi_times(
    steps: int, t_min: float, profile: str, signal: Any, high_frac: float, middle_frac: float
) -> list[float]:
    """The S + 1 times of a `time_profile`, see `sample_psi`."""
    times = time_grid(steps, t_min)
    if profile == "linear":
        return times.tolist()
    known = f"'linear' or '{_PROFILE}<time>' or '{_PROFILE}<alpha>-inv'"
    if not isinstance(profile, str) or not profile.startswith(_PROFILE):
        raise ValueError(f"time_profile must be {known}, got {profile!r}")
    value = _number(profile.removeprefix(_PROFILE).removesuffix("-inv"), "time_profile", known)
    check_within(value, "the number of time_profile", "(0, 1)")
    if profile.endswith("-inv"):
        if not isinstance(signal, str):
            raise ValueError("time_profile with '-inv' needs a signal by name, got a function")
        value = _INVERSES[signal](value)
    check_within(value, "the time of time_profile", f"[{t_min}, 1)")
    high, middle, low = _thirds(steps + 1, high_frac, middle_frac)
    parts = ((1.0, value, high), (value, value, middle), (value, t_min, low))
    return torch.cat([torch.linspace(*part, dtype=torch.float64) for part in parts]).tolist()


def psi_kappas(mode: str, name: str, alphas: list[float]) -> list[float]:
    """κ of each of the signals `alphas` of a part by its mode, see `sample_psi`."""
    if mode in ("pure-posterior", "pure-pc"):
        return [float(mode == "pure-posterior")] * len(alphas)
    known, kinds = "one of " + ", ".join(_MODES), (*_CHANCES, "constant-")
    kind = next((kind for kind in kinds if str(mode).startswith(kind)), None)
    if kind is None:
        raise ValueError(f"{name} must be {known}, got {mode!r}")
    value = _number(mode.removeprefix(kind), name, known)
    check_within(value, f"the number of {name}", "[0, 1]")
    if kind == "constant-":
        return [value] * len(alphas)
    kappas = [
        min(max(1.0 - _CHANCES[kind](value, a, b) / (1.0 - b), 0.0), 1.0) if b < 1.0 else 1.0
        for a, b in itertools.pairwise(alphas)
    ]
    return [*kappas, 1.0][: len(alphas)]


@sampler(MaskDrawOptions)
def sample_psi(
    model: Model,
    shape: tuple[int, int],
    *,
    steps: int,
    mask_id: int | None = None,
    signal: str | Signal = "log_linear",
    condition: str = "t",
    time_profile: str = "linear",
    high_mode: str = "pure-posterior",
    middle_mode: str = "pure-posterior",
    low_mode: str = "pure-posterior",
    high_frac: float = 0.2,
    middle_frac: float = 0.6,
    t_min: float = 1e-5,
    last_step: str = "ancestral",
    active_only: bool = True,
    **options: Unpack[MaskDrawOptions],
) -> Tensor:
    """Draw token rows from a uniform-state or masked diffusion model with correctors (Duo's ψ).

    Equivalent PyTorch for one step of a uniform state, with a = alpha(t), b = alpha(s), and
    `posterior(a, b)` the q of `sample_uniform_state`:

        corrector = b * posterior(a, 1) + (1 - b) / V
        torch.multinomial(kappa * posterior(a, b) + (1 - kappa) * corrector, 1)

    κ of each time is by the mode of its part, the first `high_frac` of the steps, the next
    `middle_frac`, or the rest:

    | mode | κ |
    |---|---|
    | pure-posterior, pure-pc, constant-<κ> | 1, 0, as given |
    | max-capped-<eta> | 1 − σ/(1 − α_s), σ = min(eta, (1 − α_s)/α_t) |
    | max-rescale-<eta> | the same with σ = eta·min(eta, (1 − α_s)/α_t), as in Duo's code |
    | constant-remdm-<eta> | the same with σ = eta |

    the last three cut to [0, 1], and 1 in the last step of a part.

    Args: those of all samplers, see `di4c_fast.samplers`, and

        mask_id: the absorbing token; None for a uniform state, which needs `vocab_size`.
        signal, condition: see `sample_uniform_state`.
        time_profile: "linear"; "linear-constant-linear-<time>", that falls in the high part to a
            time, stays there in the middle part and falls to t_min in the low part; with "-inv"
            at the end the number is the signal α there.
        high_mode, middle_mode, low_mode, high_frac, middle_frac: see above.
        last_step: after the S steps, at t_min: "ancestral" (the posterior at α_s = 1), "greedy"
            (the denoiser's argmax), or "none", which may leave masks.
        prompt: of a uniform state all known.

    The hooks hear of every step. Host syncs: before the loop one or two to read a prompt; inside
    none.
    """
    check_flags(active_only=active_only)
    check_choice(last_step, "last_step", LAST_STEPS)
    check_within(high_frac, "high_frac", "[0, 1]")
    check_within(middle_frac, "middle_frac", f"[0, {1.0 - high_frac:g}]")
    if isinstance(signal, str):
        check_choice(signal, "signal", tuple(SIGNALS))
    times = psi_times(steps, t_min, time_profile, signal, high_frac, middle_frac)
    alphas = at_times(signal, "signal", SIGNALS, times, falling=False, top=1.0)
    asked = moments(condition, times, alphas)
    high, middle, _ = _thirds(steps + 1, high_frac, middle_frac)
    kappas = psi_kappas(high_mode, "high_mode", alphas[:high])
    kappas += psi_kappas(middle_mode, "middle_mode", alphas[high : high + middle])
    kappas += psi_kappas(low_mode, "low_mode", alphas[high + middle :])
    kappas, greedy, calls = kappas[:steps], last_step == "greedy", steps + (last_step != "none")
    if mask_id is None:
        run = uniform_run(model, shape, options, options["vocab_size"], calls, options["prompt"])
        return run.loop(mixing(run, options["prompt"], asked, alphas, kappas, greedy))
    run = Run(model, shape, options, calls=calls, mask_id=mask_id)
    sigmas = [(1.0 - kappa) * (1.0 - b) for kappa, b in zip(kappas, alphas[1:], strict=True)]
    fills = map(fill_chance, alphas, alphas[1:], sigmas)
    chances = [*zip(fills, sigmas, strict=True), (1.0, 0.0)][:calls]
    return run.loop(remasking(run, asked[:calls], chances, active_only, steps if greedy else -1))
