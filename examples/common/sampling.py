"""Samples of teacher and student at each step count, kept in the run directory."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from di4c_fast.samplers import sample_masked

from .rundir import RunDirectory

CHUNK = 250
MODELS = ("teacher", "student")

ScoreType = TypeVar("ScoreType", covariant=True)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What to sample: S sequences of D positions at each step count, λ of L for the student."""

    samples: int
    steps: tuple[int, ...]
    latent_dim: int
    positions: int
    mask_id: int


class Scorer(Protocol[ScoreType]):
    """Judges samples (S, D)."""

    def score(self, samples: np.ndarray) -> ScoreType: ...


class Draw(Protocol):
    """Draws sequences of a shape (B, D) from a model, those numbered from `first_sequence`."""

    def __call__(
        self,
        model: nn.Module,
        shape: tuple[int, int],
        *,
        steps: int,
        latent_dim: int,
        seed: int,
        first_sequence: int,
    ) -> Tensor: ...


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
    sizes: Sizes,
    model: nn.Module,
    latent_dim: int,
    steps: int,
    seed: int,
    draw: Draw | None = None,
) -> Samples:
    """`sizes.samples` sequences in chunks; the chunks do not change what is drawn.

    draw: the sampler; None for that of masked diffusion.
    """
    sampler: Draw = draw or functools.partial(sample_masked, mask_id=sizes.mask_id)
    chunks: list[Tensor] = []
    started = time.perf_counter()
    for first in range(0, sizes.samples, CHUNK):
        chunks.append(
            sampler(
                model,
                (min(CHUNK, sizes.samples - first), sizes.positions),
                steps=steps,
                latent_dim=latent_dim,
                seed=seed,
                first_sequence=first,
            )
        )
    return Samples(torch.cat(chunks), time.perf_counter() - started)


def sample_all(
    sizes: Sizes,
    models: Mapping[str, nn.Module],
    run: RunDirectory,
    seed: int,
    unit: str = "img",
    draw: Draw | None = None,
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
                    tokens = drawn.tokens.to(torch.uint8 if sizes.mask_id <= 256 else torch.int32)
                    run.save(file, {"tokens": tokens}, {"seconds": drawn.seconds})
                else:
                    drawn = Samples(stored[0]["tokens"].long(), stored[1]["seconds"])
                result[name][steps] = drawn
                bar.update(sizes.samples)
    return result


def score_all(
    judge: Scorer[ScoreType], samples: dict[str, dict[int, Samples]]
) -> dict[str, dict[int, ScoreType]]:
    """Scores by model name and step count."""
    return {
        name: {steps: judge.score(np.asarray(drawn.tokens)) for steps, drawn in by_steps.items()}
        for name, by_steps in samples.items()
    }
