"""Masked diffusion: pixels become the mask at random, and are revealed at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from di4c_fast.processes import MaskedProcess
from di4c_fast.samplers import sample_masked
from di4c_fast.training import DistillConfig

from ..config import Config
from ..model import DigitsDenoiser
from .base import SMALLEST_TIME, System


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
            config.levels, config.width, config.layers, latent_dim, config.latent_scale
        )

    def student_times(self, batch: int, generator: torch.Generator) -> Tensor:
        t = self.process.sample_times(batch, stratified=True, generator=generator)
        return t.pow(self.config.time_power).clamp(min=SMALLEST_TIME)

    def counted(self, xt: Tensor) -> Tensor:
        return xt == self.config.mask_id

    def recipe(self) -> DistillConfig:
        return self._recipe(data_schedule="constant", low_t=0.0, low_t_probability=0.0)

    def draw(self, model: nn.Module, shape: tuple[int, int], **options: Any) -> Tensor:
        return sample_masked(model, shape, mask_id=self.config.mask_id, **options)
