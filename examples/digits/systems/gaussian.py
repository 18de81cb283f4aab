"""Discretised Gaussian diffusion: every pixel wanders over the grey levels, in time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from di4c_fast.heads import LogisticHead
from di4c_fast.models.latent import LatentShift, sinusoid
from di4c_fast.processes import GaussianProcess
from di4c_fast.samplers import sample_gaussian
from di4c_fast.training import DistillConfig

from ..config import GaussianConfig
from ..model import PATCH_PIXELS, PATCHES, Block, patch_order, start_from
from .base import System

TIME_FREQUENCIES = 128
TIME_SCALE = 1000.0
# Of the paper's pixel experiment: times of the component term lie a little above the last one.
COMPONENT_SPREAD = 0.01


class GaussianDenoiser(nn.Module):
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
        super().__init__()
        self.levels, self.width = levels, width
        self.tokens = nn.Embedding(PATCH_PIXELS * levels, width)
        self.places = nn.Parameter(torch.randn(PATCHES, width))
        self.time = nn.Linear(TIME_FREQUENCIES, 4 * width)
        self.condition = nn.Linear(4 * width, PATCHES * width)
        self.gate = nn.Linear(4 * width, 1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, PATCH_PIXELS * 2)
        # Not zero at first: equal components would have the gradient of one.
        self.latent = (
            LatentShift(4 * width, latent_dim, scale=latent_scale, zero_init=False)
            if latent_dim
            else None
        )
        nn.init.normal_(self.tokens.weight, std=1.0 / math.sqrt(PATCH_PIXELS))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        order = patch_order()
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", order.argsort(), persistent=False)
        offsets = torch.arange(PATCH_PIXELS) * levels
        self.register_buffer("offsets", offsets, persistent=False)

    order: Tensor
    inverse: Tensor
    offsets: Tensor

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> LogisticHead:
        """tokens (R, 64) int64, t (R,), latent (R, L) to a head (R, 64, V)."""
        if (latent is None) != (self.latent is None):
            takes = "needs latents" if latent is None else "takes no latents"
            raise ValueError(f"this model {takes}")
        time = self.time(sinusoid(t.float() * TIME_SCALE, TIME_FREQUENCIES))
        if self.latent is not None and latent is not None:
            time = self.latent(time, latent)
        time = F.gelu(time)
        patches = tokens[:, self.order].unflatten(-1, (PATCHES, PATCH_PIXELS))
        x = self.tokens(patches + self.offsets).sum(dim=2) + self.places
        x = x + self.condition(time).unflatten(-1, (PATCHES, self.width))
        for block in self.blocks:
            x = block(x)
        numbers = self.head(self.norm(x)).unflatten(-1, (PATCH_PIXELS, 2))
        location, log_scale = numbers.flatten(1, 2)[:, self.inverse].unbind(-1)
        noisy = tokens * (2.0 / (self.levels - 1)) - 1.0
        mu = torch.tanh(location + self.gate(time) * noisy)
        return LogisticHead(mu, log_scale, self.levels)


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

    def teacher(self) -> GaussianDenoiser:
        return GaussianDenoiser(self.config.levels, self.config.width, self.config.layers)

    def student(self, teacher: nn.Module) -> GaussianDenoiser:
        config = self.config
        student = GaussianDenoiser(
            config.levels, config.width, config.layers, config.latent_dim, config.latent_scale
        )
        start_from(teacher, student)
        return student

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

    def draw(
        self,
        model: nn.Module,
        shape: tuple[int, int],
        *,
        steps: int,
        latent_dim: int,
        seed: int,
        first_sequence: int,
    ) -> Tensor:
        return sample_gaussian(
            model,
            shape,
            process=self.process,
            steps=steps,
            latent_dim=latent_dim,
            seed=seed,
            first_sequence=first_sequence,
        )
