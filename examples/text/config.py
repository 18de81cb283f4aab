"""The options of the example: one frozen record that a run directory remembers."""

from __future__ import annotations

import dataclasses

from ..common.model import HEADS
from ..common.options import Recipe, option

PATCH = 2  # characters that share one place in the transformer


@dataclasses.dataclass(frozen=True)
class Config(Recipe):
    """What a run computes. Each field is an option of the command line.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    length: int = option(128, "D, characters of a sequence, an even number", 16, 1024)
    width: int = option(128, "width of the transformers, a multiple of 8", 8, 1024)
    layers: int = option(4, "layers of the transformers", 1, 24)
    teacher_iterations: int = option(1600, "training iterations of the teacher", 1)
    teacher_batch: int = option(32, "sequences in a batch of the teacher", 1)
    teacher_lr: float = option(2e-3, "peak learning rate of the teacher", 1e-8, 1.0)
    student_iterations: int = option(500, "distillation iterations", 1)
    student_batch: int = option(8, "sequences in a batch of the student", 1)
    student_lr: float = option(2e-3, "peak learning rate of the student", 1e-8, 1.0)
    components: int = option(8, "N, latent draws of the student per sequence", 1, 1024)
    draws: int = option(8, "K, consistency draws per sequence", 1, 1024)
    block: int = option(8, "characters that the student's loss takes together", 2, 1024)
    stretch: int = option(4, "characters that share one latent number", 2, 1024)
    latent_scale: float = option(20.0, "factor on the latent before its sinusoids", 1e-3, 1e5)
    teacher_step: float = option(0.1, "longest step of the teacher in time, of 1", 1e-4, 1.0)
    data_weight: float = option(1.0, "weight of the data correlation term", 0.0)
    teacher_weight: float = option(3.0, "weight of the distance to the teacher's marginals", 0.0)
    time_power: float = option(1.0, "student times are u^power, u uniform; <1 favours noise", 0.05)
    judge_order: int = option(6, "longest n-grams of the judge", 2, 8)
    samples: int = option(384, "samples per model and step count", 32)
    steps: tuple[int, ...] = option((1, 2, 4, 8, 16, 32), "step counts to sample with", 1, 4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = (("stretch", PATCH), ("block", self.stretch), ("length", self.block))
        for name, part in parts:
            if getattr(self, name) % part:
                raise ValueError(f"{name} must be a multiple of {part}, got {getattr(self, name)}")
        if self.width % (2 * HEADS):
            raise ValueError(f"width must be a multiple of {2 * HEADS}, got {self.width}")

    @property
    def latent_dim(self) -> int:
        """L: one number for each stretch."""
        return self.length // self.stretch

    @property
    def positions(self) -> int:
        return self.length
