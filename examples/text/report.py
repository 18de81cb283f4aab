"""What the example prints and writes: tables, sample texts and the results file."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import torch

import di4c_fast

from ..common.sampling import MODELS, Samples
from .config import Config
from .data import Text
from .likelihood import OneStep
from .metrics import Score

Scores = dict[str, dict[int, Score]]
Likelihoods = dict[float, OneStep]

# Field, heading, digits after the point.
MEASURES = (
    ("bits", "bits per char.", 3),
    ("reverse_bits", "reverse bits", 3),
    ("self_bleu", "self-BLEU", 1),
    ("repeats", "repeats", 4),
)
SHOWN = 3


def table(
    seed: int, scores: Scores, samples: dict[str, dict[int, Samples]], real: Score, windows: int
) -> str:
    """One seed: a line per step count, teacher against student."""
    heads = "".join(f"{heading:>17}" for _, heading, _ in MEASURES)
    lines = [
        f"seed {seed}",
        f"        {heads}{'ms per sample':>17}",
        "   steps" + f"{'teacher':>9}{'student':>8}" * (len(MEASURES) + 1),
    ]
    for steps in scores["teacher"]:
        cells = [
            (getattr(scores[name][steps], field), digits)
            for field, _, digits in MEASURES
            for name in MODELS
        ]
        cells += [(samples[name][steps].milliseconds, 1) for name in MODELS]
        lines.append(
            f"{steps:>8}"
            + "".join(
                f"{value:>{9 if i % 2 == 0 else 8}.{digits}f}"
                for i, (value, digits) in enumerate(cells)
            )
        )
    values = "".join(f"{getattr(real, field):>17.{digits}f}" for field, _, digits in MEASURES)
    lines.append(f"    real{values}   <- {windows} windows of held-out text")
    return "\n".join(lines)


def verdict(scores: list[Scores]) -> str:
    """Student minus teacher, over all seeds."""
    lines = []
    for steps in scores[0]["teacher"]:
        cells = []
        for field, heading, digits in MEASURES:
            gaps = [
                getattr(one["student"][steps], field) - getattr(one["teacher"][steps], field)
                for one in scores
            ]
            spread = f"{min(gaps):+.{digits}f}"
            if len(gaps) > 1:
                spread += f" to {max(gaps):+.{digits}f}"
            cells.append(f"{heading} {spread}")
        lines.append(f"{steps:>8} {', '.join(cells)}")
    seeds = f", range of {len(scores)} seeds" if len(scores) > 1 else ""
    return "\n".join([f"student - teacher (bits: below 0 the student is better{seeds})", *lines])


def one_step_table(likelihoods: list[Likelihoods]) -> str:
    """Mean over the seeds: what teacher and student give to characters filled in at once."""
    lines = [
        "bits per hidden character of held-out text, all filled in at once",
        f"  hidden{'teacher':>10}{'student':>9}   its marginals alone",
    ]
    for share in likelihoods[0]:
        means = [
            sum(getattr(one[share], name) for one in likelihoods) / len(likelihoods)
            for name in ("teacher", "student", "marginals")
        ]
        lines.append(f"{share:>8.0%}{means[0]:>10.3f}{means[1]:>9.3f}{means[2]:>22.3f}")
    return "\n".join(lines)


def sample_texts(text: Text, seed: int, samples: dict[str, dict[int, Samples]]) -> str:
    """The first samples of each model and step count, to read."""
    lines = [f"seed {seed}; teacher and student start from the same random numbers"]
    for steps in samples["teacher"]:
        for name in MODELS:
            lines.append(f"\n{name}, {steps} step{'s' if steps > 1 else ''}")
            for row in samples[name][steps].tokens[:SHOWN].tolist():
                lines.append(f"  |{text.decode(row)}|")
    return "\n".join(lines) + "\n"


def results(
    config: Config,
    text: Text,
    seeds: list[int],
    threads: int,
    real: Score,
    windows: int,
    scores: list[Scores],
    samples: list[dict[str, dict[int, Samples]]],
    likelihoods: list[Likelihoods],
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
        "text": {
            "fingerprint": text.fingerprint,
            "characters": len(text.alphabet),
            "train": sum(map(len, text.train)),
            "held_out": sum(map(len, text.held_out)),
            "held_out_topics": list(text.names),
        },
        "real": {**_rounded(real), "windows": windows},
        "seeds": {
            str(seed): {
                name: {
                    str(steps): {
                        **_rounded(score),
                        "milliseconds_per_sample": round(drawn[name][steps].milliseconds, 3),
                    }
                    for steps, score in one[name].items()
                }
                for name in MODELS
            }
            | {"one_step": {str(share): _rounded(value) for share, value in likelihood.items()}}
            for seed, one, drawn, likelihood in zip(
                seeds, scores, samples, likelihoods, strict=True
            )
        },
    }


def _rounded(values: Score | OneStep) -> dict[str, float]:
    return {name: round(value, 4) for name, value in dataclasses.asdict(values).items()}
