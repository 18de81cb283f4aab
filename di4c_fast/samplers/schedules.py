"""Times of steps, and what a model that knows them by other names is given: noise σ, signal α."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..checks import check_choice, check_int, check_within, describe
from ..models.call import check_callable

Noise = Callable[[float], float]
Signal = Callable[[float], float]


def log_linear_noise(eps: float = 1e-3) -> Noise:
    """σ(t) = −log(1 − (1 − eps)·t), the total noise of SEDD's log-linear schedule.

    >>> round(log_linear_noise()(0.5), 4)
    0.6921
    """
    check_within(eps, "eps", "(0, 1)")
    return lambda t: -math.log1p(-(1.0 - eps) * t)


def geometric_noise(sigma_min: float = 1e-3, sigma_max: float = 1.0) -> Noise:
    """σ(t) = sigma_min^(1 − t) · sigma_max^t, the total noise of SEDD's geometric schedule.

    >>> round(geometric_noise(0.01, 1.0)(0.5), 4)
    0.1
    """
    check_within(sigma_max, "sigma_max", "(0, inf)")
    check_within(sigma_min, "sigma_min", f"(0, {float(sigma_max)})")
    return lambda t: sigma_min ** (1.0 - t) * sigma_max**t


def log_linear_signal(eps: float = 1e-3) -> Signal:
    """α(t) = 1 − (1 − eps)·t.

    >>> round(log_linear_signal()(0.5), 4)
    0.5005
    """
    check_within(eps, "eps", "(0, 1)")
    return lambda t: 1.0 - (1.0 - eps) * t


def cosine_signal(eps: float = 1e-3) -> Signal:
    """α(t) = 1 − cos(π/2 · (1 − (1 − eps)·t)).

    >>> round(cosine_signal()(0.5), 4)
    0.2934
    """
    check_within(eps, "eps", "(0, 1)")
    return lambda t: 1.0 - math.cos(math.pi / 2 * (1.0 - (1.0 - eps) * t))


def time_grid(steps: int | None, t_min: float) -> torch.Tensor:
    """linspace(1, t_min, steps + 1) in fp64, the arguments checked."""
    steps = check_int(steps, "steps", minimum=1)
    check_within(t_min, "t_min", "(0, 1)")
    return torch.linspace(1.0, t_min, steps + 1, dtype=torch.float64)


def at_times(
    schedule: Any,
    name: str,
    known: Mapping[str, Any],
    times: list[float],
    *,
    falling: bool,
    top: float = math.inf,
) -> list[float]:
    """The values of a schedule at falling times, checked to be in [0, top] and to fall or rise.

    At a time that is that before, the value is, too.
    """
    if isinstance(schedule, str):
        check_choice(schedule, name, tuple(known))
        schedule = known[schedule]()
    check_callable(schedule, name)
    values = []
    for t in times:
        value = schedule(t)
        try:
            values.append(float(value))
        except (TypeError, ValueError):
            raise TypeError(f"{name} must return a number, got {describe(value)}") from None
    for i, (here, following) in enumerate(itertools.pairwise(values)):
        low, high = (following, here) if falling else (here, following)
        steady = low == high and times[i] == times[i + 1]
        if not (0.0 <= low <= high <= top and math.isfinite(high) and (low < high or steady)):
            range_ = "finite, not negative" if top == math.inf else f"in [0, {top:g}]"
            raise ValueError(
                f"{name} must be {range_} and {'in' if falling else 'de'}creasing in t, "
                f"got {here} at t = {times[i]:g} and {following} at t = {times[i + 1]:g}"
            )
    return values


def moments(condition: Any, times: list[float], alphas: list[float]) -> list[float]:
    """What a model with this `condition` is given at the times, whose signals are `alphas`."""
    check_choice(condition, "condition", ("t", "sigma", "alpha"))
    if condition == "sigma" and alphas[0] == 0.0:
        raise ValueError('signal must be positive at t = 1 with condition="sigma", got 0.0')
    sigmas = [-math.log(alpha) for alpha in alphas if alpha]
    return {"t": times, "alpha": alphas, "sigma": sigmas}[condition]
