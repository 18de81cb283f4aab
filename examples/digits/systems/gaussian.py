"""Discretised Gaussian diffusion: every pixel wanders over the grey levels, in time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from di4c_fast.heads import LogisticHead
from di4c_fast.models.latent import LatentShift, sinusoid
from di4c_fast.processes import GaussianProcess
from di4c_fast.samplers import sample_gaussian
from di4c_fast.training import DistillConfig

from ...common.model import check_given
from ..config import GaussianConfig
from ..model import PATCHES, DigitsBase
from .base import System

TIME_FREQUENCIES = 128
TIME_SCALE = 1000.0
# Of the paper's pixel experiment: times of the component term lie a little above the last one.
COMPONENT_SPREAD = 0.01


class GaussianDenoiser(DigitsBase):
    """A transformer over 2x2 patches with a logistic law per pixel: two numbers, not V.

    Time enters as one vector per patch, made from an embedding to which the student adds λ. The
    location is that of tauLDR, tanh of the output plus the noisy pixel, with a gate on the
    pixel that depends on time (and λ), since at t = 1 it says nothing.

    Args:
        levels: V, grey levels.
        width, layers: of the transformer.
        latent_dim: L; 0 for a model without λ.
        latent_scale: factor on λ before its sinusoids.
    """

    def __init__(
        self,
        levels: int,
        width: int,
        layers: int,
        latent_dim: int = 0,
        latent_scale: float = 1000.0,
    ):
        super().__init__(levels, width)
        self.time = nn.Linear(TIME_FREQUENCIES, 4 * width)
        self.condition = nn.Linear(4 * width, PATCHES * width)
        self.gate = nn.Linear(4 * width, 1)
        self.make_body(layers, outputs=2)
        # Not zero at first: equal components would have the gradient of one.
        self.latent = (
            LatentShift(4 * width, latent_dim, scale=latent_scale, zero_init=False)
            if latent_dim
            else None
        )
        self.start()

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> LogisticHead:
        """tokens (R, 64) int64, t (R,), latent (R, L) to a head (R, 64, V)."""
        check_given(latent, self.latent, "latents")
        waves = sinusoid(t.float() * TIME_SCALE, TIME_FREQUENCIES)
        time = self.time(waves.to(self.time.weight.dtype))
        if self.latent is not None and latent is not None:
            time = self.latent(time, latent)
        time = F.gelu(time)
        shift = rearrange(self.condition(time), "r (t c) -> r t c", t=PATCHES)
        location, log_scale = self.run_pixels(self.embed_pixels(tokens) + shift).unbind(-1)
        noisy = tokens * (2.0 / (self.vocabulary - 1)) - 1.0
        mu = torch.tanh(location + self.gate(time) * noisy)
        return LogisticHead(mu, log_scale, self.vocabulary)


class GaussianSystem(System):
    """The paper's pixel experiment, on 8x8 pixels."""

    process: GaussianProcess
    config: GaussianConfig

    def __init__(self, config: GaussianConfig):
        super().__init__(config)
        self.process = GaussianProcess(
            config.levels,
            rate_sigma=config.rate_sigma,
            target_sigma=config.target_sigma,
            time_base=config.time_base,
            min_step=config.min_step,
        )
        self.columns = config.levels

    def model(self, latent_dim: int) -> GaussianDenoiser:
        config = self.config
        return GaussianDenoiser(
            config.levels, config.width, config.layers, latent_dim, config.latent_scale
        )

    def times(self, batch: int, generator: torch.Generator) -> Tensor:
        """Uniform from t_min, where the samplers end, to 1, one in each of B equal parts."""
        part = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        return self.process.t_min + (1.0 - self.process.t_min) * part

    def student_times(self, batch: int, generator: torch.Generator) -> Tensor:
        first = self.process.t_min + self.process.min_step
        part = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        return first + (1.0 - first) * part.pow(self.config.time_power)

    def recipe(self) -> DistillConfig:
        return self._recipe(
            data_schedule="sigmoid",
            component_weight=self.config.component_weight,
            component_spread=COMPONENT_SPREAD,
        )

    def draw(self, model: nn.Module, shape: tuple[int, int], **options: Any) -> Tensor:
        return sample_gaussian(model, shape, process=self.process, **options)
