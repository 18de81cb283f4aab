"""The picture of a run: measures over the step counts, likelihoods, and samples to read."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..common.plots import (
    COLOURS,
    GREY,
    draw_curve,
    draw_range,
    over_steps,
    pyplot,
    save_figure,
    step_axis,
    step_words,
    tidy,
)
from ..common.report import Drawn, Scores
from ..common.sampling import MODELS
from .data import Text
from .likelihood import Likelihoods
from .metrics import Score

# Field, label, colour, marker and line style of the differences.
GAPS = (
    ("bits", "of samples (judge)", "#009E73", "D", "-"),
    ("reverse_bits", "of held-out text, reversed", "#CC79A7", "^", "--"),
)
SHOWN = 3
LINE = 66


def draw_picture(
    path: pathlib.Path,
    text: Text,
    samples: Drawn,
    scores: Sequence[Scores],
    likelihoods: Sequence[Likelihoods],
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
        draw_curve(axis, scores, field, real, "held-out text")
        axis.set_title(title, fontsize=10.5)
        axis.set_ylim(bottom=0.0)
        axis.set_xlabel("sampling steps")
    axes[0].legend(frameon=False, fontsize=9.5)
    _draw_gaps(axes[1], scores)
    _draw_likelihoods(axes[3], likelihoods)
    if len(scores) > 1:
        curves.supxlabel(f"mean and range of {len(scores)} seeds", fontsize=10)

    counts = list(samples["teacher"])
    steps = counts[len(counts) // 2]
    for axis, name in zip(passages.subplots(1, len(MODELS)), MODELS, strict=True):
        rows = samples[name][steps].tokens[:SHOWN].tolist()
        _show(axis, name, steps, [text.decode(row) for row in rows])
    save_figure(figure, path)


def _draw_gaps(axis: Any, scores: Sequence[Scores]) -> None:
    """Student minus teacher, in bits per character."""
    steps = list(scores[0]["teacher"])
    for field, label, colour, marker, style in GAPS:
        gaps = over_steps(scores, "student", field) - over_steps(scores, "teacher", field)
        draw_range(axis, steps, gaps, colour, ls=style, marker=marker, ms=5, lw=2, label=label)
    axis.axhline(0.0, color=GREY, ls="--", lw=1.2)
    axis.set_xlabel("sampling steps")
    title = "student - teacher, bits per char.\n(below 0 the student is better)"
    axis.set_title(title, fontsize=10.5)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    step_axis(axis, steps)


def _draw_likelihoods(axis: Any, likelihoods: Sequence[Likelihoods]) -> None:
    """What the student gains on held-out characters that are filled in at once."""
    shares = list(likelihoods[0])
    for field, label, marker, style in (
        ("student", "student", "s", "-"),
        ("marginals", "its marginals alone", "o", ":"),
    ):
        gains = [[v.teacher - getattr(v, field) for v in one.values()] for one in likelihoods]
        options = {"ls": style, "marker": marker, "label": label}
        draw_range(axis, shares, np.array(gains), COLOURS["student"], **options)
    axis.axhline(0.0, color=COLOURS["teacher"], ls="--", lw=1.2, label="teacher")
    axis.set_xticks(shares, [f"{share:.0%}" for share in shares])
    axis.set_xlabel("characters hidden, filled in at once")
    axis.set_title("likelihood of held-out text\n(bits per char. above the teacher)", fontsize=10.5)
    axis.legend(frameon=False, fontsize=9)
    tidy(axis)


def _show(axis: Any, name: str, steps: int, texts: list[str]) -> None:
    axis.axis("off")
    axis.set_title(
        f"{name}, {step_words(steps)}",
        loc="left",
        fontsize=11,
        color=COLOURS[name],
        fontweight="bold",
    )
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
