"""Masked diffusion: pixels become the mask at random, and are revealed at random."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from di4c_fast.models.latent import LatentEmbedding
from di4c_fast.processes import MaskedProcess
from di4c_fast.samplers import sample_masked
from di4c_fast.training import DistillConfig

from ..config import Config
from ..model import DigitsDenoiser
from .base import SMALLEST_TIME, System

MANY = 4096  # numbers λ whose vectors are averaged


class MaskedSystem(System):
    """The paper's masked language experiment, with pixels for words."""

    process: MaskedProcess

    def __init__(self, config: Config):
        super().__init__(config)
        self.process = MaskedProcess(config.mask_id, t_min=SMALLEST_TIME)
        self.columns = config.levels

    def model(self, latent_dim: int) -> DigitsDenoiser:
        config = self.config
        return DigitsDenoiser(
            config.levels,
            config.width,
            config.layers,
            latent_dim,
            config.latent_scale,
            latent_fades=True,
        )

    def student(self, teacher: nn.Module) -> nn.Module:
        """The teacher, which stays as it is, with λ, whose vectors have mean 0 at first.

        Sixteen steps add up what each does to the marginals: trained as a whole, or begun with a
        mean that λ's random start does not make 0, the student loses there to its teacher.
        """
        student = super().student(teacher)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name.startswith("latent."))
        latent = cast(LatentEmbedding, student.latent)
        every = ((torch.arange(MANY) + 0.5) / MANY)[:, None].expand(-1, latent.dim)
        with torch.no_grad():
            latent.project.bias -= latent(every).sum(dim=1).mean(dim=0) / latent.dim
        return student

    def student_times(self, batch: int, generator: torch.Generator) -> Tensor:
        t = self.process.sample_times(batch, stratified=True, generator=generator)
        return t.pow(self.config.time_power).clamp(min=SMALLEST_TIME)

    def counted(self, xt: Tensor) -> Tensor:
        return xt == self.config.mask_id

    def recipe(self) -> DistillConfig:
        return self._recipe(data_schedule="constant", low_t=0.0, low_t_probability=0.0)

    def draw(self, model: nn.Module, shape: tuple[int, int], **options: Any) -> Tensor:
        return sample_masked(model, shape, mask_id=self.config.mask_id, **options)
