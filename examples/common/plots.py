"""What the pictures of the examples share: colours, and curves with the range of the seeds."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from di4c_fast.training.checkpoint import replacing

from .report import Scores
from .sampling import MODELS

# Okabe and Ito's colours, apart for every common colour blindness; markers differ as well.
COLOURS = {"teacher": "#0072B2", "student": "#D55E00"}
MARKERS = {"teacher": "o", "student": "s"}
GREY = "#555555"


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def over_steps(scores: Sequence[Scores], name: str, field: str) -> np.ndarray:
    """(seeds, step counts): one measure of one model."""
    return np.array([[getattr(s, field) for s in one[name].values()] for one in scores])


def draw_range(
    axis: Any, x: Sequence[float], by_seed: np.ndarray, colour: str, **options: Any
) -> None:
    """A line through the means over the seeds, and the range of the seeds around it."""
    axis.plot(x, by_seed.mean(axis=0), color=colour, **options)
    if len(by_seed) > 1:
        low, high = by_seed.min(axis=0), by_seed.max(axis=0)
        axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)


def draw_curve(axis: Any, scores: Sequence[Scores], field: str, real: Any, real_label: str) -> None:
    """Teacher and student over the step counts: mean and range of the seeds, and the real data."""
    steps = list(scores[0]["teacher"])
    for name in MODELS:
        values = over_steps(scores, name, field)
        draw_range(axis, steps, values, COLOURS[name], marker=MARKERS[name], lw=2, label=name)
    axis.axhline(getattr(real, field), color=GREY, ls="--", lw=1.2, label=real_label)
    step_axis(axis, steps)


def step_axis(axis: Any, steps: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, [str(step) for step in steps])
    tidy(axis)


def tidy(axis: Any) -> None:
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def step_words(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"


def save_figure(figure: Any, path: pathlib.Path) -> None:
    """Write a PNG whole or not at all, and close the figure."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot().close(figure)
