"""Samples of teacher and student at each step count, kept in the run directory."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from di4c_fast.samplers import sample_masked

from .config import POSITIONS, Config
from .metrics import Judge, Score
from .model import DigitsDenoiser
from .rundir import RunDirectory

CHUNK = 250


@dataclasses.dataclass(frozen=True)
class Samples:
    """tokens: (S, 64) int64. seconds: wall time for all of them."""

    tokens: Tensor
    seconds: float


def draw_samples(
    config: Config, model: DigitsDenoiser, latent_dim: int, steps: int, seed: int
) -> Samples:
    """`config.samples` sequences in chunks; the chunks do not change what is drawn."""
    chunks: list[Tensor] = []
    started = time.perf_counter()
    for first in range(0, config.samples, CHUNK):
        chunks.append(
            sample_masked(
                model,
                (min(CHUNK, config.samples - first), POSITIONS),
                mask_id=config.mask_id,
                steps=steps,
                latent_dim=latent_dim,
                seed=seed,
                first_sequence=first,
            )
        )
    return Samples(torch.cat(chunks), time.perf_counter() - started)


def sample_all(
    config: Config,
    models: dict[str, DigitsDenoiser],
    run: RunDirectory,
    seed: int,
) -> dict[str, dict[int, Samples]]:
    """Samples by model name and step count; what the run directory holds is not drawn again."""
    result: dict[str, dict[int, Samples]] = {name: {} for name in models}
    total = len(models) * len(config.steps) * config.samples
    with tqdm(total=total, desc="samples", unit="img", dynamic_ncols=True) as bar:
        for name, model in models.items():
            latent_dim = config.latent_dim if name == "student" else 0
            for steps in config.steps:
                file = f"seed-{seed}/{name}-{steps}-steps"
                stored = run.load(file)
                if stored is None:
                    bar.set_postfix_str(f"{name}, {steps} steps")
                    drawn = draw_samples(config, model, latent_dim, steps, seed)
                    tokens = drawn.tokens.to(torch.uint8)
                    run.save(file, {"tokens": tokens}, {"seconds": drawn.seconds})
                else:
                    drawn = Samples(stored[0]["tokens"].long(), stored[1]["seconds"])
                result[name][steps] = drawn
                bar.update(config.samples)
    return result


def score_all(judge: Judge, samples: dict[str, dict[int, Samples]]) -> dict[str, dict[int, Score]]:
    """Scores by model name and step count."""
    return {
        name: {steps: judge.score(np.asarray(drawn.tokens)) for steps, drawn in by_steps.items()}
        for name, by_steps in samples.items()
    }
