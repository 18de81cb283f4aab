"""The picture of a run: loops side by side, the measures over the steps, and the time."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.plots import (
    COLOURS,
    GREY,
    MARKERS,
    draw_curve,
    pyplot,
    save_figure,
    step_axis,
    step_words,
)
from ..common.report import Scores
from ..common.sampling import MODELS
from .metrics import Score

ONE = "teacher, one at a time"
# Residues by their chemistry, as colours of sequence logos are.
CHEMISTRY = {
    "DE": ("#C0392B", "acidic"),
    "KRH": ("#2166AC", "basic"),
    "STNQ": ("#1B7837", "polar"),
    "GP": ("#B8860B", "G and P"),
    "FWY": ("#7B3294", "aromatic"),
    "AVILM": ("#333333", "aliphatic"),
    "C": ("#E6007E", "cysteine"),
}
SHOWN, WIDTH = 13, 15


def draw_picture(
    path: pathlib.Path,
    loops: Mapping[tuple[str, int], list[str]],
    scores: Sequence[Scores],
    speeds: Mapping[str, Mapping[int, float]],
    floor: Score,
) -> None:
    """Write the picture as PNG.

    Args:
        loops: of one seed, by model and step count, of 0 steps those filled in one at a time.
        scores: by seed; with several the curves show the mean and the range.
        speeds: milliseconds per loop by model and step count.
        floor: what the loops filled in one at a time score.
    """
    plt = pyplot()
    figure = plt.figure(figsize=(12.8, 7.4), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.05, 1.0))
    few = min(steps for name, steps in loops if steps)
    for axis, (name, steps) in zip(
        parts[0].subplots(1, 3), (("teacher", few), ("student", few), ("teacher", 0)), strict=True
    ):
        title = f"{name}, {step_words(steps)}" if steps else ONE
        _show(axis, title, COLOURS[name] if steps else GREY, loops[name, steps])
    axes = parts[1].subplots(1, 4)
    for axis, field, title in (
        (
            axes[0],
            "nats",
            "unlikely loops: nats per residue\n(teacher's chain rule; less better)",
        ),
        (axes[1], "pairs", "wrong neighbours: distance of residue\npairs (TV; less is better)"),
        (axes[2], "lone", "loops with a single cysteine\n(no partner to bond with)"),
    ):
        draw_curve(axis, scores, field, floor, ONE)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("sampling steps")
    axes[0].legend(frameon=False, fontsize=9)
    axes[2].set_ylim(bottom=0.0)
    for name in MODELS:
        steps = list(speeds[name])
        values = list(speeds[name].values())
        axes[3].plot(steps, values, color=COLOURS[name], marker=MARKERS[name], lw=2, label=name)
    axes[3].set_title("processor time per loop, ms", fontsize=10)
    axes[3].set_xlabel("sampling steps")
    axes[3].set_ylim(bottom=0.0)
    step_axis(axes[3], list(speeds["teacher"]))
    if len(scores) > 1:
        parts[1].supxlabel(f"mean and range of {len(scores)} seeds", fontsize=10)
    save_figure(figure, path)


def _show(axis: Any, title: str, colour: str, loops: Sequence[str]) -> None:
    axis.axis("off")
    axis.set_title(title, loc="left", fontsize=11, color=colour, fontweight="bold")
    axis.set_xlim(-0.5, WIDTH + 4.5)
    axis.set_ylim(SHOWN + 0.4, -0.6)
    colours = {residue: c for group, (c, _) in CHEMISTRY.items() for residue in group}
    for row, loop in enumerate(loops[:SHOWN]):
        for column, residue in enumerate(loop):
            axis.text(
                column,
                row,
                residue,
                family="monospace",
                fontsize=11,
                fontweight="bold",
                color=colours[residue],
                ha="center",
                va="center",
            )
        if loop.count("C") == 1:
            axis.text(len(loop) + 0.2, row, "lone C", fontsize=8, color=colours["C"], va="center")
    for number, (colour, name) in enumerate(CHEMISTRY.values()):
        axis.text(number * 2.75 - 0.5, SHOWN + 0.2, name, fontsize=7.5, color=colour, va="center")
