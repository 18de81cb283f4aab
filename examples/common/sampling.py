"""Samples of teacher and student at each step count, kept in the run directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .rundir import RunDirectory

CHUNK = 250
MODELS = ("teacher", "student")

ScoreType = TypeVar("ScoreType", covariant=True)
# (model, shape, steps=, latent_dim=, seed=, first_sequence=) to tokens of that shape (B, D), the
# sequences numbered from `first_sequence`.
Draw = Callable[..., Tensor]


class Sizes(Protocol):
    """What to sample: `samples` of D = `positions` at each of the step counts, λ of L."""

    @property
    def samples(self) -> int: ...
    @property
    def steps(self) -> tuple[int, ...]: ...
    @property
    def positions(self) -> int: ...
    @property
    def latent_dim(self) -> int: ...


class Scorer(Protocol[ScoreType]):
    """Judges samples (S, D)."""

    def score(self, samples: np.ndarray) -> ScoreType: ...


@dataclasses.dataclass(frozen=True)
class Samples:
    """tokens: (S, D) int64. seconds: wall time for all of them."""

    tokens: Tensor
    seconds: float

    @property
    def milliseconds(self) -> float:
        """Per sample."""
        return self.seconds / len(self.tokens) * 1e3


def draw_samples(
    sizes: Sizes, model: nn.Module, latent_dim: int, steps: int, seed: int, draw: Draw
) -> Samples:
    """`sizes.samples` sequences in chunks; the chunks do not change what is drawn."""
    chunks: list[Tensor] = []
    started = time.perf_counter()
    for first in range(0, sizes.samples, CHUNK):
        shape = (min(CHUNK, sizes.samples - first), sizes.positions)
        options = {"steps": steps, "latent_dim": latent_dim, "seed": seed}
        chunks.append(draw(model, shape, **options, first_sequence=first))
    return Samples(torch.cat(chunks), time.perf_counter() - started)


def sample_all(
    sizes: Sizes,
    models: Mapping[str, nn.Module],
    run: RunDirectory,
    seed: int,
    unit: str,
    draw: Draw,
) -> dict[str, dict[int, Samples]]:
    """Samples by model name and step count; what the run directory holds is not drawn again."""
    result: dict[str, dict[int, Samples]] = {name: {} for name in models}
    total = len(models) * len(sizes.steps) * sizes.samples
    with tqdm(total=total, desc="samples", unit=unit, dynamic_ncols=True) as bar:
        for name, model in models.items():
            latent_dim = sizes.latent_dim if name == "student" else 0
            for steps in sizes.steps:
                file = f"seed-{seed}/{name}-{steps}-steps"
                stored = run.load(file)
                if stored is None:
                    bar.set_postfix_str(f"{name}, {steps} steps")
                    drawn = draw_samples(sizes, model, latent_dim, steps, seed, draw)
                    small = torch.uint8 if int(drawn.tokens.max()) < 256 else torch.int32
                    tokens = {"tokens": drawn.tokens.to(small)}
                    run.save(file, tokens, {"seconds": drawn.seconds})
                else:
                    drawn = Samples(stored[0]["tokens"].long(), stored[1]["seconds"])
                result[name][steps] = drawn
                bar.update(sizes.samples)
    return result


def sample_seeds(
    sizes: Sizes,
    seeds: Sequence[int],
    run: RunDirectory,
    judge: Scorer[ScoreType],
    models_of: Callable[[int], Mapping[str, nn.Module]],
    draw: Draw,
    unit: str = "img",
) -> tuple[dict[int, dict[str, dict[int, ScoreType]]], dict[int, dict[str, dict[int, Samples]]]]:
    """Scores and samples by seed, model name and step count; `models_of` trains those of a seed."""
    scores, samples = {}, {}
    for seed in seeds:
        samples[seed] = sample_all(sizes, models_of(seed), run, seed, unit, draw)
        scores[seed] = {
            name: {steps: judge.score(np.asarray(one.tokens)) for steps, one in by_steps.items()}
            for name, by_steps in samples[seed].items()
        }
    return scores, samples
