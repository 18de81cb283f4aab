"""The picture of a run: real digits, samples of both models, the two distances over steps."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange
from torch import Tensor

from ..common.plots import COLOURS, GREY, draw_curve, pyplot, save_figure, step_words
from ..common.report import Drawn, Scores
from ..common.sampling import MODELS
from .config import SIDE, Config, MaskGITConfig
from .metrics import Score

GRID = 6


def mosaic(tokens: Tensor, levels: int) -> np.ndarray:
    """The first 36 digits as one image, dark ink on white, a blank line between them."""
    count = GRID * GRID
    ink = np.zeros((count, SIDE, SIDE))
    some = tokens[:count].numpy().reshape(-1, SIDE, SIDE) / (levels - 1)
    ink[: len(some)] = some
    cells = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    return 1.0 - rearrange(cells, "(r c) h w -> (r h) (c w)", r=GRID)


def draw_picture(
    path: pathlib.Path,
    config: Config,
    real: Tensor,
    samples: Drawn,
    scores: Sequence[Scores],
    floor: Score,
) -> None:
    """Write the picture as PNG.

    Args:
        real: (A, 64) tokens to show.
        samples: of one seed, by model and step count; they fill the grids.
        scores: by seed; with several the curves show the mean and the range.
        floor: what real digits score.
    """
    plt = pyplot()
    columns = len(config.steps)
    figure = plt.figure(figsize=(2.05 * (columns + 1), 7.6), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.55, 1.0))
    grids, curves = parts
    axes = grids.subplots(2, columns + 1, squeeze=False)
    for row, name in enumerate(MODELS):
        for column, steps in enumerate(config.steps):
            axis = axes[row, column + 1]
            _show(axis, mosaic(samples[name][steps].tokens, config.levels), COLOURS[name])
            if row == 0:
                axis.set_title(step_words(steps), fontsize=11)
            if column == 0:
                axis.set_ylabel(name, fontsize=12, color=COLOURS[name], fontweight="bold")
    _show(axes[0, 0], mosaic(real, config.levels), GREY)
    axes[0, 0].set_title("real digits", fontsize=11)
    axes[1, 0].axis("off")
    axes[1, 0].text(
        0.0,
        0.95,
        "Teacher: one product\nof independent pixels\nper step.\n\n"
        "Student: a mixture of\nproducts, distilled by\ndi4c_fast.loss.",
        va="top",
        fontsize=9.5,
        color=GREY,
        transform=axes[1, 0].transAxes,
    )

    left, right = curves.subplots(1, 2)
    label = "real digits (noise floor)"
    draw_curve(left, scores, "frechet", floor, label)
    left.set_yscale("log")
    left.set_ylabel("Fréchet distance (classifier features)")
    draw_curve(right, scores, "pair_tv", floor, label)
    right.set_ylim(bottom=0.0)
    right.set_ylabel("distance of pixel-pair joints (TV)")
    place = "center" if isinstance(config, MaskGITConfig) else "upper right"
    left.legend(frameon=False, loc=place, fontsize=9.5)
    seeds = f", mean and range of {len(scores)} seeds" if len(scores) > 1 else ""
    within = "distances within classes; " if isinstance(config, MaskGITConfig) else ""
    curves.supxlabel(f"sampling steps ({within}lower is better{seeds})", fontsize=10)
    save_figure(figure, path)


def _show(axis: Any, image: np.ndarray, colour: str) -> None:
    axis.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(1.5)
