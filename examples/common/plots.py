"""What the pictures of the examples share: colours, and one measure over the step counts."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

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


def model_values(scores: dict[str, dict[int, Any]], field: str) -> dict[str, list[float]]:
    """One measure of one seed: by model, a value for each step count."""
    return {
        name: [getattr(score, field) for score in by_steps.values()]
        for name, by_steps in scores.items()
    }


def draw_curve(
    axis: Any,
    step_counts: Sequence[int],
    by_seed: list[dict[str, list[float]]],
    real: float,
    real_label: str,
) -> None:
    """Teacher and student over the step counts: mean and range of the seeds, and the real data."""
    steps = np.array(step_counts)
    for name in ("teacher", "student"):
        values = np.array([one[name] for one in by_seed])
        axis.plot(
            steps, values.mean(axis=0), color=COLOURS[name], marker=MARKERS[name], lw=2, label=name
        )
        if len(values) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(steps, low, high, color=COLOURS[name], alpha=0.2, lw=0)
    axis.axhline(real, color=GREY, ls="--", lw=1.2, label=real_label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def save_figure(figure: Any, path: pathlib.Path) -> None:
    """Write a PNG whole or not at all, and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    pyplot().close(figure)
    temporary.replace(path)
