"""The latent variable λ of a mixture student: draws, embedding, conditioning modules.

Shapes: B examples, N components, R rows (R = B*N, the components of an example adjacent),
L latent dimensions, D positions.

Source: the student architectures of Di4C (arXiv 2410.08709): λ ~ U[0, 1], the sinusoidal
embedding of 1000 λ, a two-layer network, and one extra token that is dropped from the output
(masked language, VQ images) or an addition to the time embedding (pixels).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from ..checks import check_bool, check_floating, check_int, check_number, check_rank, check_shape
from ..rng import generator_uniform

__all__ = ["LatentEmbedding", "LatentShift", "LatentToken", "draw_latents", "sinusoid"]


def draw_latents(
    batch: int,
    components: int,
    dim: int = 1,
    *,
    stratified: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """λ ~ U[0, 1)^L, float32 (B, N, L), independent unless they are stratified.

    Flattened over the first two dimensions they are the rows of a student's batch.

    Args:
        stratified: one of an example's N lies in each of N equal parts of every dimension. Each is
            uniform still, and their average is closer to that over all λ: the marginal, which
            the loss compares with the teacher's, has less noise.

    >>> draw_latents(2, 3).shape
    torch.Size([2, 3, 1])
    """
    check_int(batch, "batch", minimum=0)
    check_int(components, "components", minimum=1)
    check_int(dim, "dim", minimum=1)
    check_bool(stratified, "stratified")
    size = (batch, components, dim)
    latent = generator_uniform(size, generator=generator, device=device)
    if stratified:
        order = generator_uniform(size, generator=generator, device=device)
        latent = (order.argsort(dim=1) + latent) / components
    return latent


def sinusoid(x: Tensor, features: int, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines of x at geometrically spaced frequencies from 1 to 1/max_period.

    Equivalent PyTorch, with half = features // 2:

        w = max_period ** -(torch.arange(half) / (half - 1))
        torch.cat([(x[..., None] * w).sin(), (x[..., None] * w).cos()], -1)

    Args:
        x: any shape, floating point; computed in fp32 at least.
        features: even, at least 4.

    Returns:
        (*x.shape, features), fp32 (fp64 for fp64 input).
    """
    check_floating(x, "x")
    _check_even(features, "features")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    half = features // 2
    exponents = torch.arange(half, device=x.device, dtype=x.dtype) / (half - 1)
    angles = x.unsqueeze(-1) * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class LatentEmbedding(nn.Module):
    """λ → one vector per latent dimension: sinusoid of scale·λ, then a two-layer network.

    Args:
        width: size of the vectors.
        dim: L, latent dimensions. With L > 1 the hidden layer has a bias per dimension, so that
            the order of the dimensions matters.
        frequencies: size of the sinusoidal embedding, even.
        scale: factor on λ before the sinusoid.
        zero_init: start the last layer at zero, so that the vectors are exactly 0 at first.
            Their gradient with respect to the last layer is not zero, so training leaves 0.

    Input (R, L) floating point, output (R, L, width) in the dtype of the parameters (of
    autocast where it is on). Differentiable with respect to the parameters.
    """

    def __init__(
        self,
        width: int,
        dim: int = 1,
        frequencies: int = 128,
        scale: float = 1000.0,
        *,
        zero_init: bool = False,
    ):
        super().__init__()
        check_int(width, "width", minimum=1)
        check_int(dim, "dim", minimum=1)
        _check_even(frequencies, "frequencies")
        check_number(scale, "scale")
        self.width, self.dim, self.frequencies, self.scale = width, dim, frequencies, float(scale)
        self.hidden = nn.Linear(frequencies, 4 * frequencies)
        self.offset = nn.Parameter(torch.randn(dim, 4 * frequencies)) if dim > 1 else None
        self.project = nn.Linear(4 * frequencies, width)
        if zero_init:
            nn.init.zeros_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    def forward(self, latent: Tensor) -> Tensor:
        check_floating(latent, "latent")
        check_shape(latent, "latent", "R, L", (*latent.shape[:1], self.dim))
        features = sinusoid(latent.float() * self.scale, self.frequencies)
        hidden = self.hidden(features.to(self.hidden.weight.dtype))
        if self.offset is not None:
            hidden = hidden + self.offset
        return self.project(F.gelu(hidden))

    def extra_repr(self) -> str:
        return f"width={self.width}, dim={self.dim}, scale={self.scale:g}"


class _Conditioning(nn.Module):
    def __init__(self, width: int, dim: int, **options: Any):
        super().__init__()
        self.embedding = LatentEmbedding(width, dim, **options)

    @property
    def dim(self) -> int:
        """L, the latent dimensions."""
        return self.embedding.dim

    def _vectors(self, x: Tensor, latent: Tensor, shapes: dict[int, str]) -> Tensor:
        """(R, L, C) for an `x` whose shape is one of those, by rank."""
        check_floating(x, "x")
        width = self.embedding.width
        if x.ndim not in shapes or x.shape[-1] != width:
            known = " or ".join(shapes.values())
            raise ValueError(f"x must have shape {known} with C = {width}, got {tuple(x.shape)}")
        check_latent(latent, len(x), self.dim)
        return self.embedding(latent)


class LatentToken(_Conditioning):
    """λ as L extra tokens of a transformer's input, dropped from its output.

    Usage inside a model:

        h = self.latent(self.embed(tokens), lam)     # (R, D, C) -> (R, D + L, C)
        for block in self.blocks: h = block(h)
        logits = self.head(self.latent.strip(h))     # (R, D, C) again

    Position information (embeddings added before, rotary angles by index) is that of the D
    tokens when the extra tokens stand last, the default. With `zero_init` λ has no influence at
    first, but attention has L more keys to spread over: the student starts near its teacher, not
    at it, unless attention masks them, which also keeps them from learning. `LatentShift` starts
    exactly at the teacher and learns.

    Args:
        width: C, size of the embeddings.
        dim: L, latent dimensions, one token each.
        first: put the extra tokens before the others instead of after them.
        options: frequencies, scale, zero_init, as in `LatentEmbedding`.
    """

    def __init__(self, width: int, dim: int = 1, *, first: bool = False, **options: Any):
        super().__init__(width, dim, **options)
        self.first = bool(first)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """(R, D, C) embeddings and (R, L) latents to (R, D + L, C), in the dtype of `x`."""
        tokens = self._vectors(x, latent, {3: "(R, D, C)"}).to(x.dtype)
        return torch.cat([tokens, x] if self.first else [x, tokens], dim=1)

    def strip(self, x: Tensor) -> Tensor:
        """Drop the extra tokens: (R, D + L, ...) to (R, D, ...), a view."""
        check_rank(x, "x", minimum=2)
        length = x.shape[1] - self.dim
        if length < 0:
            raise ValueError(
                f"x must have at least L = {self.dim} positions to drop, got {tuple(x.shape)}"
            )
        return x.narrow(1, self.dim if self.first else 0, length)


class LatentShift(_Conditioning):
    """λ added to what a model computes already: embeddings of tokens or of the time.

    `x + sum_l embedding(λ)_l`, the same for every position. Made with `zero_init` (the default)
    it adds exactly 0 at first: a student that is a copy of its teacher plus this module returns
    the teacher's logits exactly, for every λ, until the first optimiser step, also where only a
    part is shifted, such as the time embedding (R, C) or that of a class or start token.

    Args:
        width: C, last size of `x`.
        dim: L, latent dimensions.
        zero_init, options: frequencies, scale, as in `LatentEmbedding`.
    """

    def __init__(self, width: int, dim: int = 1, *, zero_init: bool = True, **options: Any):
        super().__init__(width, dim, zero_init=zero_init, **options)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """(R, D, C) or (R, C) and (R, L) latents to the shape and dtype of `x`."""
        vectors = self._vectors(x, latent, {3: "(R, D, C)", 2: "(R, C)"})
        shift = reduce(vectors, "r l c -> r 1 c" if x.ndim == 3 else "r l c -> r c", "sum")
        return x + shift.to(x.dtype)


def check_latent(latent: Any, rows: int, dim: int) -> None:
    """λ (R, L) of the rows."""
    check_floating(latent, "latent")
    check_shape(latent, "latent", "R, L", (rows, dim))


def _check_even(value: int, name: str) -> None:
    if check_int(value, name, minimum=4) % 2:
        raise ValueError(f"{name} must be even, got {value}")
