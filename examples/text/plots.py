"""The picture of a run: measures over the step counts, likelihoods, and samples to read."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..common.plots import COLOURS, GREY, draw_curve, model_values, pyplot, save_figure
from ..common.sampling import MODELS, Samples
from .config import Config
from .data import Text
from .likelihood import OneStep
from .metrics import Score

Scores = dict[str, dict[int, Score]]

# Field, label, colour, marker and line style of the differences.
GAPS = (
    ("bits", "of samples (judge)", "#009E73", "D", "-"),
    ("reverse_bits", "of held-out text, reversed", "#CC79A7", "^", "--"),
)
SHOWN = 3
LINE = 66


def draw_picture(
    path: pathlib.Path,
    config: Config,
    text: Text,
    samples: dict[str, dict[int, Samples]],
    scores: list[Scores],
    likelihoods: list[dict[float, OneStep]],
    real: Score,
) -> None:
    """Write the picture as PNG.

    Args:
        samples: of one seed, by model and step count; some of a middle step count are shown.
        scores, likelihoods: by seed; with several the curves show the mean and the range.
        real: what held-out text scores.
    """
    plt = pyplot()
    figure = plt.figure(figsize=(12.8, 5.6), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.9, 1.0))
    curves, passages = parts
    axes = curves.subplots(1, 4)
    for axis, field, title in (
        (axes[0], "bits", "bits per character\n(n-gram judge of the real text)"),
        (axes[2], "self_bleu", "self-BLEU\n(more is less diverse)"),
    ):
        by_seed = [model_values(one, field) for one in scores]
        draw_curve(axis, config.steps, by_seed, getattr(real, field), "held-out text")
        axis.set_title(title, fontsize=10.5)
        axis.set_ylim(bottom=0.0)
        axis.set_xlabel("sampling steps")
    axes[0].legend(frameon=False, fontsize=9.5)
    _draw_gaps(axes[1], config.steps, scores)
    _draw_likelihoods(axes[3], likelihoods)
    if len(scores) > 1:
        curves.supxlabel(f"mean and range of {len(scores)} seeds", fontsize=10)

    steps = config.steps[len(config.steps) // 2]
    for axis, name in zip(passages.subplots(1, len(MODELS)), MODELS, strict=True):
        _show(axis, name, steps, [text.decode(row) for row in _first(samples[name][steps])])
    save_figure(figure, path)


def _draw_gaps(axis: Any, step_counts: Sequence[int], scores: list[Scores]) -> None:
    """Student minus teacher, in bits per character."""
    steps = np.array(step_counts)
    for field, label, colour, marker, style in GAPS:
        values = [model_values(one, field) for one in scores]
        gaps = np.array([np.subtract(one["student"], one["teacher"]) for one in values])
        axis.plot(
            steps, gaps.mean(axis=0), style, color=colour, marker=marker, ms=5, lw=2, label=label
        )
        if len(gaps) > 1:
            low, high = gaps.min(axis=0), gaps.max(axis=0)
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
    axis.axhline(0.0, color=GREY, ls="--", lw=1.2)
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.set_xlabel("sampling steps")
    title = "student - teacher, bits per char.\n(below 0 the student is better)"
    axis.set_title(title, fontsize=10.5)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    _tidy(axis)


def _draw_likelihoods(axis: Any, likelihoods: list[dict[float, OneStep]]) -> None:
    """What the student gains on held-out characters that are filled in at once."""
    shares = np.array(list(likelihoods[0]))
    for field, label, marker, style in (
        ("student", "student", "s", "-"),
        ("marginals", "its marginals alone", "o", ":"),
    ):
        gains = np.array(
            [
                [value.teacher - getattr(value, field) for value in one.values()]
                for one in likelihoods
            ]
        )
        axis.plot(
            shares, gains.mean(axis=0), style, color=COLOURS["student"], marker=marker, label=label
        )
        if len(gains) > 1:
            low, high = gains.min(axis=0), gains.max(axis=0)
            axis.fill_between(shares, low, high, color=COLOURS["student"], alpha=0.2, lw=0)
    axis.axhline(0.0, color=COLOURS["teacher"], ls="--", lw=1.2, label="teacher")
    axis.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axis.set_xlabel("characters hidden, filled in at once")
    axis.set_title("likelihood of held-out text\n(bits per char. above the teacher)", fontsize=10.5)
    axis.legend(frameon=False, fontsize=9)
    _tidy(axis)


def _tidy(axis: Any) -> None:
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _first(samples: Samples) -> list[list[int]]:
    rows: list[list[int]] = samples.tokens[:SHOWN].tolist()
    return rows


def _show(axis: Any, name: str, steps: int, texts: list[str]) -> None:
    axis.axis("off")
    title = f"{name}, {steps} step{'s' if steps > 1 else ''}"
    axis.set_title(title, loc="left", fontsize=11, color=COLOURS[name], fontweight="bold")
    lines = ["\n".join(textwrap.wrap(text, LINE, break_on_hyphens=False)) for text in texts]
    axis.text(
        0.0,
        0.98,
        "\n\n".join(lines),
        family="monospace",
        fontsize=8.5,
        color=GREY,
        va="top",
        parse_math=False,
        transform=axis.transAxes,
    )
