"""What the examples print and write: a table per seed, a verdict over the seeds, the results."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import di4c_fast

from .options import Recipe
from .sampling import MODELS, Samples

# Of one seed, by model and step count.
Scores = dict[str, dict[int, Any]]
Drawn = dict[str, dict[int, Samples]]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A field of a score: its heading, digits after the point in tables and in the results."""

    field: str
    heading: str
    digits: int
    kept: int


def table(
    seed: int, measures: Sequence[Measure], scores: Scores, samples: Drawn, real: Any, note: str
) -> str:
    """One seed: a line per step count, teacher against student, and what real data score."""
    heads = "".join(f"{measure.heading:>17}" for measure in measures)
    lines = [
        f"seed {seed}",
        f"        {heads}{'ms per sample':>17}",
        "   steps" + f"{'teacher':>9}{'student':>8}" * (len(measures) + 1),
    ]
    for steps in scores["teacher"]:
        line = f"{steps:>8}"
        for measure in measures:
            one, other = (getattr(scores[name][steps], measure.field) for name in MODELS)
            line += f"{one:>9.{measure.digits}f}{other:>8.{measure.digits}f}"
        one, other = (samples[name][steps].milliseconds for name in MODELS)
        lines.append(f"{line}{one:>9.2f}{other:>8.2f}")
    values = "".join(f"{getattr(real, m.field):>17.{m.digits}f}" for m in measures)
    return "\n".join([*lines, f"    real{values}   <- {note}"])


def verdict(
    title: str,
    measures: Sequence[Measure],
    scores: Sequence[Scores],
    compare: Callable[[float, float], float],
    form: Callable[[Measure], str],
) -> str:
    """Student against teacher at each step count: the range over the seeds.

    compare: of the values of student and teacher. form: how its result is printed.
    """
    lines = [title + (f" (range of {len(scores)} seeds)" if len(scores) > 1 else "")]
    for steps in scores[0]["teacher"]:
        cells = []
        for measure in measures:
            values = [
                compare(*(getattr(one[name][steps], measure.field) for name in reversed(MODELS)))
                for one in scores
            ]
            shown = [format(value, form(measure)) for value in (min(values), max(values))]
            cells.append(f"{measure.heading} {' to '.join(shown[: len(scores)])}")
        lines.append(f"{steps:>8} {', '.join(cells)}")
    return "\n".join(lines)


def rounded(measures: Sequence[Measure], score: Any) -> dict[str, float]:
    """The measures of a score as the results keep them: no more digits than it can carry."""
    return {m.field: round(getattr(score, m.field), m.kept) for m in measures}


def results(
    config: Recipe,
    threads: int,
    measures: Sequence[Measure],
    scores: Mapping[int, Scores],
    samples: Mapping[int, Drawn],
    **more: Any,
) -> dict[str, Any]:
    """Everything that was measured, by seed, and `more`."""
    return {
        "config": config.to_json(),
        "versions": {
            "di4c_fast": di4c_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": threads,
        **more,
        "seeds": {
            str(seed): {
                name: {
                    str(steps): {
                        **rounded(measures, score),
                        "milliseconds_per_sample": round(
                            samples[seed][name][steps].milliseconds, 3
                        ),
                    }
                    for steps, score in by_steps.items()
                }
                for name, by_steps in one.items()
            }
            for seed, one in scores.items()
        },
    }
