"""What the example prints and writes: tables and the results file."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import torch

import di4c_fast

from ..common.sampling import MODELS, Samples
from .config import Config
from .metrics import ClassJudge, Judge, Score
from .speed import Comparison

Scores = dict[str, dict[int, Score]]


def table(seed: int, scores: Scores, samples: dict[str, dict[int, Samples]], floor: Score) -> str:
    """One seed: a line per step count, teacher against student; smaller is better."""
    pairs = "".join(f"{'teacher':>10} {'student':>8}" for _ in range(3))
    lines = [
        f"seed {seed}",
        f"         {'Fréchet distance':>19}{'pixel-pair TV':>19}{'ms per sample':>19}",
        f"   steps {pairs}",
    ]
    for steps in scores["teacher"]:
        one = [scores[name][steps] for name in MODELS]
        times = [samples[name][steps].milliseconds for name in MODELS]
        lines.append(
            f"{steps:>8} {one[0].frechet:>10.2f} {one[1].frechet:>8.2f}"
            f"{one[0].pair_tv:>10.4f} {one[1].pair_tv:>8.4f}"
            f"{times[0]:>10.2f} {times[1]:>8.2f}"
        )
    lines.append(
        f"{'real':>8} {floor.frechet:>19.2f}{floor.pair_tv:>19.4f}   <- noise floor: as many real "
        "digits, drawn again"
    )
    return "\n".join(lines)


def verdict(scores: list[Scores]) -> str:
    """Where the student is ahead on both measures, over all seeds."""
    lines = []
    for steps in scores[0]["teacher"]:
        cells = []
        for field, label in (("frechet", "Fréchet"), ("pair_tv", "pixel-pair TV")):
            ratios = [
                getattr(one["student"][steps], field) / getattr(one["teacher"][steps], field)
                for one in scores
            ]
            spread = f"{min(ratios):.2f}"
            if len(ratios) > 1:
                spread += f" to {max(ratios):.2f}"
            cells.append(f"{label} {spread}")
        lines.append(f"{steps:>8} {', '.join(cells)}")
    seeds = f", range of {len(scores)} seeds" if len(scores) > 1 else ""
    return "\n".join([f"student / teacher (below 1: the student is better{seeds})", *lines])


def speed_table(comparisons: list[Comparison]) -> str:
    """The loss, forward and backward: streaming backend against the dense reference."""
    lines = [
        "di4c_fast.loss, forward and backward: backend torch against the dense reference",
        f"{'(B, N, D, V)':>20} {'ms':>10} {'ref. ms':>10} {'ratio':>7} {'MiB':>9} {'ref. MiB':>9} "
        f"{'ratio':>7}",
    ]
    for one in comparisons:
        seconds = [one.seconds[backend] for backend in ("torch", "reference")]
        peaks = [one.peak_bytes[backend] for backend in ("torch", "reference")]
        cells = [f"{seconds[0] * 1e3:>10.1f} {seconds[1] * 1e3:>10.1f}"]
        cells.append(f"{seconds[1] / seconds[0]:>7.1f}")
        if peaks[0] is None or peaks[1] is None:
            cells.append("(peak memory cannot be read on this system)")
        else:
            cells.append(f"{peaks[0] / 2**20:>9.1f} {peaks[1] / 2**20:>9.1f}")
            cells.append(f"{peaks[1] / max(peaks[0], 1):>7.1f}")
        lines.append(f"{one.sizes!s:>20} {' '.join(cells)}")
    return "\n".join(lines)


def results(
    config: Config,
    seeds: list[int],
    threads: int,
    judge: Judge | ClassJudge,
    floor: Score,
    scores: list[Scores],
    samples: list[dict[str, dict[int, Samples]]],
    comparisons: list[Comparison] | None,
) -> dict[str, Any]:
    """Everything that was measured, rounded to what it can carry."""
    return {
        "config": config.to_json(),
        "versions": {
            "di4c_fast": di4c_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": threads,
        "classifier_accuracy": round(judge.features.accuracy, 4),
        **({"distances": "within classes"} if isinstance(judge, ClassJudge) else {}),
        "noise_floor": _score(floor),
        "seeds": {
            str(seed): {
                name: {
                    str(steps): {
                        **_score(score),
                        "milliseconds_per_sample": round(drawn[name][steps].milliseconds, 3),
                    }
                    for steps, score in one[name].items()
                }
                for name in MODELS
            }
            for seed, one, drawn in zip(seeds, scores, samples, strict=True)
        },
        "loss": None if comparisons is None else [_comparison(one) for one in comparisons],
    }


def _score(score: Score) -> dict[str, float]:
    return {"frechet": round(score.frechet, 3), "pair_tv": round(score.pair_tv, 5)}


def _comparison(one: Comparison) -> dict[str, Any]:
    fields = dataclasses.asdict(one)
    fields["seconds"] = {name: round(value, 5) for name, value in one.seconds.items()}
    fields["relative_difference"] = float(f"{one.relative_difference:.1e}")
    return fields
