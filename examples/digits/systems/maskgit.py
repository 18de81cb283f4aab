"""MaskGIT with class labels: the most confident pixels are revealed, and guidance sharpens them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from di4c_fast.processes import MaskGITProcess
from di4c_fast.samplers import sample_maskgit
from di4c_fast.training import DistillConfig

from ..config import MaskGITConfig
from ..data import Digits
from ..metrics import ClassJudge
from ..model import DigitsDenoiser
from .base import SMALLEST_TIME, System

CLASSES = 10
NO_LABEL = CLASSES


class MaskGITSystem(System):
    """The paper's VQ image experiment, with the grey levels of pixels for the codes of patches.

    As there, all positions and all classes count, in the teacher's cross-entropy too, so that
    what both models say of revealed pixels and of the mask token is learned and not left over.
    """

    process: MaskGITProcess
    config: MaskGITConfig

    def __init__(self, config: MaskGITConfig):
        super().__init__(config)
        # Not that of the sampler: tokens revealed by confidence are likelier than the teacher's
        # draws, so that consistency with them takes variety from the student's marginals.
        self.process = MaskGITProcess(
            config.mask_id, gumbel_temperature=config.step_gumbel_temperature, t_min=SMALLEST_TIME
        )
        self.columns = config.levels + 1

    def model(self, latent_dim: int) -> DigitsDenoiser:
        config = self.config
        return DigitsDenoiser(
            config.levels, config.width, config.layers, latent_dim, config.latent_scale, CLASSES
        )

    def student_times(self, batch: int, generator: torch.Generator) -> Tensor:
        low = self.config.low_t
        t = self.process.sample_times(
            batch, low_t=low, low_t_probability=low, stratified=True, generator=generator
        )
        above = ((t - low) / (1.0 - low)).clamp(min=0.0).pow(self.config.time_power)
        return torch.where(t < low, t, low + (1.0 - low) * above)

    def context(self, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The labels, a share of them hidden, for the unconditional half of guidance."""
        hidden = torch.rand(labels.shape, generator=generator) < self.config.label_dropout
        return {"label": labels.masked_fill(hidden, NO_LABEL)}

    def judge(self, digits: Digits) -> ClassJudge:
        """Scores within each class: the labels are given, not drawn."""
        return ClassJudge(digits)

    def recipe(self) -> DistillConfig:
        return self._recipe(
            data_schedule="sigmoid",
            component_weight=self.config.component_weight,
            low_t=self.config.low_t,
            low_t_probability=self.config.low_t,
        )

    def draw(self, model: nn.Module, shape: tuple[int, int], **options: Any) -> Tensor:
        """Samples with the labels 0, 1, ..., 9, 0, 1, ... in turn; classes are as frequent."""
        labels = (torch.arange(shape[0]) + options["first_sequence"]) % CLASSES
        return sample_maskgit(
            model,
            shape,
            mask_id=self.config.mask_id,
            vocab_size=self.config.levels + 1,
            context={"label": labels},
            guidance=self.config.guidance,
            unconditional={"label": torch.full_like(labels, NO_LABEL)},
            gumbel_temperature=self.config.gumbel_temperature,
            **options,
        )
