"""The options of the example: one frozen record that a run directory remembers."""

from __future__ import annotations

import dataclasses

from di4c_fast.training import finetune

from ..common.options import Recipe, option
from .data import CONTEXT, FOURTH, LONGEST


@dataclasses.dataclass(frozen=True)
class Config(Recipe):
    """What a run computes. Each field is an option of the command line.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    loops: int = option(256, "loops that the teacher completes for training", 8)
    student_iterations: int = option(150, "distillation iterations", 1)
    student_batch: int = option(6, "loops in a batch of the student", 1)
    student_lr: float = option(3e-4, "peak learning rate of the student", 1e-8, 1.0)
    latent_lr: float = option(2e-3, "the same of the embedding of the latent", 1e-8, 1.0)
    components: int = option(8, "N, latent draws of the student per loop", 1, 1024)
    draws: int = option(2, "K, consistency draws per loop", 1, 1024)
    layer: int = option(6, "the latent joins after so many layers, which are frozen", 1, 7)
    latent_dim: int = option(1, "L, size of the student's latent", 1, 64)
    latent_scale: float = option(20.0, "factor on the latent before its sinusoids", 1e-3, 1e5)
    teacher_step: float = option(0.1, "longest step of the teacher in time, of 1", 1e-4, 1.0)
    data_weight: float = option(2.0, "weight of the data correlation term", 0.0)
    teacher_weight: float = option(3.0, "weight of the distance to the teacher's marginals", 0.0)
    time_power: float = option(0.85, "student times are u^power, u uniform; <1 favours noise", 0.05)
    samples: int = option(128, "loops drawn per model and step count", 16)
    judged: int = option(64, "of them, how many the teacher's chain rule judges", 8)
    steps: tuple[int, ...] = option((1, 2, 4, 8, 16), "step counts to sample with", 1, 4096)

    @property
    def positions(self) -> int:
        """D: a start token, what stands before the loop, the loop, what follows, an end token."""
        return 1 + CONTEXT + LONGEST + len(FOURTH[0]) + 1

    def recipe(self, seed: int) -> finetune.Recipe:
        """The part that the library trains by; the student draws from a seed of its own."""
        return finetune.Recipe(
            steps=self.student_iterations,
            batch=self.student_batch,
            lr=self.student_lr,
            seed=seed + 1,
            **{
                name: getattr(self, name)
                for name in (
                    "latent_lr",
                    "components",
                    "draws",
                    "layer",
                    "latent_dim",
                    "latent_scale",
                    "teacher_step",
                    "data_weight",
                    "teacher_weight",
                    "time_power",
                )
            },
        )
