"""The options of the example: one frozen record that a run directory remembers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ..common.options import Recipe, option

POSITIONS = 64
SIDE = 8


@dataclasses.dataclass(frozen=True)
class Config(Recipe):
    """What a run of masked diffusion computes. Each field is an option of the command line.

    The recipes of the other systems add fields and change defaults.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    system: ClassVar[str] = "masked"

    levels: int = option(17, "grey levels of a pixel; 17 is the data as it is", 2, 17)
    width: int = option(96, "width of the transformers, a multiple of 4", 8, 1024)
    layers: int = option(3, "layers of the transformers", 1, 24)
    teacher_iterations: int = option(2600, "training iterations of the teacher", 1)
    teacher_batch: int = option(64, "examples in a batch of the teacher", 1)
    teacher_lr: float = option(2e-3, "peak learning rate of the teacher", 1e-8, 1.0)
    student_iterations: int = option(1200, "distillation iterations", 1)
    student_batch: int = option(8, "examples in a batch of the student", 1)
    student_lr: float = option(1e-3, "peak learning rate of the student", 1e-8, 1.0)
    components: int = option(16, "N, latent draws of the student per example", 1, 1024)
    draws: int = option(16, "K, consistency draws per example", 1, 1024)
    latent_dim: int = option(1, "L, size of the student's latent", 1, 64)
    latent_scale: float = option(1000.0, "factor on the latent before its sinusoids", 1e-3, 1e5)
    teacher_step: float = option(0.2, "longest step of the teacher in time, of 1", 1e-4, 1.0)
    data_weight: float = option(1.0, "weight of the data correlation term", 0.0)
    teacher_weight: float = option(5.0, "weight of the distance to the teacher's marginals", 0.0)
    time_power: float = option(0.5, "student times are u^power, u uniform; <1 favours noise", 0.05)
    samples: int = option(4000, "samples per model and step count", 32)
    steps: tuple[int, ...] = option((1, 2, 4, 8, 16), "step counts to sample with", 1, 4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 4:
            raise ValueError(f"width must be a multiple of 4 (the heads), got {self.width}")

    def to_json(self) -> dict[str, Any]:
        """Plain values; of the system's name only that of the others, as runs were first kept."""
        name = {} if self.system == Config.system else {"system": self.system}
        return {**name, **super().to_json()}

    @property
    def mask_id(self) -> int:
        """The mask token comes after the grey levels."""
        return self.levels

    @property
    def positions(self) -> int:
        return POSITIONS


@dataclasses.dataclass(frozen=True)
class MaskGITConfig(Config):
    """What a run of MaskGIT with class labels computes."""

    system: ClassVar[str] = "maskgit"

    teacher_iterations: int = option(2000, "training iterations of the teacher", 1)
    student_iterations: int = option(900, "distillation iterations", 1)
    student_batch: int = option(16, "examples in a batch of the student", 1)
    student_lr: float = option(5e-4, "peak learning rate of the student", 1e-8, 1.0)
    components: int = option(8, "N, latent draws of the student per example", 1, 1024)
    draws: int = option(8, "K, consistency draws per example", 1, 1024)
    teacher_weight: float = option(1.0, "weight of the distance to the teacher's marginals", 0.0)
    time_power: float = option(0.8, "student times above low-t are u^power of the range", 0.05)
    low_t: float = option(
        0.05, "times, and share of them, for the component term instead of consistency", 0.0, 0.5
    )
    component_weight: float = option(20.0, "weight of the component term", 0.0)
    label_dropout: float = option(0.1, "share of labels hidden in training, for guidance", 0.0, 1.0)
    guidance: float = option(0.25, "weight of the guidance at the last step", 0.0, 100.0)
    gumbel_temperature: float = option(4.5, "of the noise on the confidence", 0.0, 1000.0)
    step_gumbel_temperature: float = option(
        1000.0, "the same in the teacher's steps of distillation; large: a random order", 0.0, 1e6
    )
    samples: int = option(2000, "samples per model and step count, of all classes", 32)
    steps: tuple[int, ...] = option((1, 2, 4, 8, 16), "step counts to sample with", 1, POSITIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance and not self.label_dropout:
            raise ValueError(
                f"label_dropout must be above 0 for guidance = {self.guidance:g}, got 0: a model "
                "that has seen every label knows nothing of images without one"
            )


@dataclasses.dataclass(frozen=True)
class GaussianConfig(Config):
    """What a run of discretised Gaussian diffusion computes."""

    system: ClassVar[str] = "gaussian"

    teacher_iterations: int = option(2000, "training iterations of the teacher", 1)
    student_iterations: int = option(600, "distillation iterations", 1)
    teacher_weight: float = option(1.0, "weight of the distance to the teacher's marginals", 0.0)
    min_step: float = option(0.05, "shortest step of the teacher in time", 1e-4, 0.9)
    component_weight: float = option(1.0, "weight of the component term", 0.0)
    rate_sigma: float = option(0.5, "width of single moves, in levels", 0.05, 16.0)
    target_sigma: float = option(20.0, "width of the stationary law, in levels", 2.0, 1000.0)
    samples: int = option(2000, "samples per model and step count", 32)
    time_base: float = option(1.5, "the time passed by t is time-base (100^t - 1)", 0.01, 100.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_step > self.teacher_step:
            raise ValueError(
                f"min_step must be at most teacher_step = {self.teacher_step:g}, "
                f"got {self.min_step:g}"
            )
