"""What a system is to the example: models, process, times, recipe of the distillation, sampler."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor, nn

from di4c_fast.processes import Process
from di4c_fast.training import DistillConfig

from ...common.model import start_from
from ..config import Config
from ..data import Digits
from ..metrics import ClassJudge, Judge

# Below one masked pixel in 64 most examples of masked diffusion carry no loss at all.
SMALLEST_TIME = 1.0 / 64


class System(abc.ABC):
    """One of the paper's systems on the digits.

    Shapes: B examples, D = 64 pixels, V classes, L latent dimensions.

    Attributes:
        process: the noise.
        columns: how many of the V classes the teacher's cross-entropy is taken over.
    """

    process: Process
    columns: int

    def __init__(self, config: Config):
        self.config = config

    @abc.abstractmethod
    def model(self, latent_dim: int) -> nn.Module:
        """A model with λ, or with 0 one without, at its random start."""

    def teacher(self) -> nn.Module:
        """A model without λ."""
        return self.model(0)

    def student(self, teacher: nn.Module) -> nn.Module:
        """A model with λ that has its teacher's weights."""
        return start_from(teacher, self.model(self.config.latent_dim))

    def times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Training times (B,) of the teacher, one in each of B equal parts."""
        return self.process.sample_times(batch, stratified=True, generator=generator)

    @abc.abstractmethod
    def student_times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Training times (B,) of the student."""

    @abc.abstractmethod
    def recipe(self) -> DistillConfig:
        """The distillation."""

    @abc.abstractmethod
    def draw(self, model: nn.Module, shape: tuple[int, int], **options: Any) -> Tensor:
        """Samples (B, D).

        options: steps, latent_dim, seed and first_sequence, the number of the first sample.
        """

    def judge(self, digits: Digits) -> Judge | ClassJudge:
        """Scores the samples."""
        return Judge(digits)

    def counted(self, xt: Tensor) -> Tensor:
        """(B, D) bool, which positions the teacher's cross-entropy is taken over."""
        return torch.ones_like(xt, dtype=torch.bool)

    def context(self, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What both models are given besides tokens and times, in training."""
        return {}

    def _recipe(self, **changes: Any) -> DistillConfig:
        """The distillation as the options say, with the system's own changes."""
        values: dict[str, Any] = {
            "components": self.config.components,
            "draws": self.config.draws,
            "teacher_step": self.config.teacher_step,
            "data_weight": self.config.data_weight,
            "teacher_weight": self.config.teacher_weight,
            "latent_dim": self.config.latent_dim,
        }
        return DistillConfig(**{**values, **changes})
