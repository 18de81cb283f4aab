"""Transition matrices of the discretised Gaussian process, and exact draws from rows of weights.

Shapes: B examples, V classes in order, R rows, K draws.

The process moves between the V ordered classes with the rate r(t)·A. With the class numbers
i, j counted from 1 and the target p(i) ∝ exp(-(i - V/2)² / (2 target_sigma²)), A holds
exp(-(|i - j| - 1)² / rate_sigma²) for every move towards the target's middle (from the end that
is nearer to its edge), and for the move back that times p(i)/p(j), so that p is stationary:
p(i) A[i, j] = p(j) A[j, i]. The time that has passed between s and t is

    τ(s, t) = ∫ r = time_base (time_exponential^t - time_exponential^s),    Q(s → t) = exp(τ A),

row x_s, column x_t. Detailed balance makes diag(√p) A diag(1/√p) symmetric, so every Q is one
product of real eigenvectors in float64, accurate to about 1e-14 where the general
eigendecomposition of the sources in float32 is accurate to 1e-6.

Source: tauLDR (arXiv 2205.14987, appendix on the CIFAR-10 experiment) and the pixel experiment
of Di4C (arXiv 2410.08709).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..checks import check_int, check_within, without_autocast

__all__ = ["GaussianTransitions", "draw_by_weights", "draw_from_cdf", "fine_uniform"]

_CACHE_BYTES = 2**27  # of float64 matrices between two numbers
_NOISE = 1e-14  # entries below it, times the condition of the eigenvectors, are rounding errors
_WIDEST = 12.0  # V / target_sigma: beyond it the eigenvectors lose more than 4 digits


class GaussianTransitions:
    """Rate, target and transition matrices; matrices between two numbers are cached.

    Args:
        num_classes: V >= 2.
        rate_sigma, target_sigma, time_base, time_exponential: see `GaussianProcess`.

    Attributes:
        rate: (V, V) float64, A.
        target: (V,) float64, p.

    Use `GaussianTransitions.of(...)` to share the cache between equal processes.
    """

    def __init__(
        self,
        num_classes: int,
        rate_sigma: float = 6.0,
        target_sigma: float = 512.0,
        time_base: float = 3.0,
        time_exponential: float = 100.0,
    ):
        check_int(num_classes, "num_classes", minimum=2)
        check_within(rate_sigma, "rate_sigma", "(0, inf)")
        check_within(target_sigma, "target_sigma", f"[{num_classes / _WIDEST}, inf)")
        check_within(time_base, "time_base", "(0, inf)")
        check_within(time_exponential, "time_exponential", "(1, inf)")
        self.num_classes = num_classes
        self.time_base = float(time_base)
        self.time_exponential = float(time_exponential)

        number = torch.arange(1, num_classes + 1, dtype=torch.float64)
        log_target = -((number - num_classes / 2) ** 2) / (2.0 * target_sigma**2)
        self.target = log_target.softmax(0)
        row, column = number.unsqueeze(1), number.unsqueeze(0)
        size = torch.exp(-(((row - column).abs() - 1.0) ** 2) / rate_sigma**2)
        # The pair (i, j), i < j, is free from i to j where i is farther from the middle.
        upwards = row + column <= num_classes + 1
        inwards = torch.where(row < column, upwards, ~upwards)
        back = torch.exp(log_target.unsqueeze(0) - log_target.unsqueeze(1))
        rate = torch.where(inwards, size, size * back).fill_diagonal_(0.0)
        self.rate = rate - torch.diag(rate.sum(1))

        root = (log_target / 2).exp()
        symmetric = root.unsqueeze(1) * self.rate / root
        values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
        values[-1] = 0.0  # a rate matrix has this eigenvalue exactly, and no positive one
        parts = (values.clamp_max(0.0), vectors / root.unsqueeze(1), vectors.T * root)
        self._eigen: dict[torch.device, tuple[Tensor, ...]] = {torch.device("cpu"): parts}
        self._noise = _NOISE * float(root.max() / root.min())
        matrices = max(_CACHE_BYTES // (num_classes**2 * 8), 1)
        self._cached = functools.lru_cache(matrices)(self._between)

    @classmethod
    @functools.lru_cache(maxsize=16)
    def of(cls, *numbers: Any) -> GaussianTransitions:
        """The transitions of these numbers, in the order of the arguments, made once."""
        return cls(*numbers)

    def elapsed(self, s: Tensor, t: Tensor) -> Tensor:
        """τ(s, t), float64 of the broadcast shape; accurate for close s and t."""
        s, t = s.to(torch.float64), t.to(torch.float64)
        base = math.log(self.time_exponential)
        return self.time_base * torch.exp(s * base) * torch.expm1((t - s) * base)

    @torch.no_grad()
    def batched(self, s: Tensor | float, t: Tensor, *, columns: bool = False) -> Tensor:
        """Q(s → t) of every example in one batched product, on the device of `t`.

        Args:
            s: (B,) or a number, 0 <= s <= t.
            t: (B,) floating point.
            columns: transpose, so that row x_t of the result is column x_t of Q.

        Returns:
            (B, V, V) float64, contiguous; entries not negative, rows of Q sum to 1. No graph, no
            host sync.
        """
        t = t.to(torch.float64)
        start = s if isinstance(s, Tensor) else torch.full_like(t, s)
        values, left, right = self._eigen_on(t.device)
        decay = torch.exp(self.elapsed(start, t).unsqueeze(-1) * values).unsqueeze(-2)
        with without_autocast(t.device):
            first, second = (right.T, left.T) if columns else (left, right)
            matrix = (first * decay) @ second
        matrix = torch.where(matrix < self._noise, 0.0, matrix)
        return matrix / matrix.sum(-2 if columns else -1, keepdim=True)

    def between(
        self,
        s: float,
        t: float,
        *,
        columns: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Q(s → t), (V, V), from the cache where these exact numbers have been asked for.

        The cache keeps the matrices used last, 64 MiB of them in float32. Do not write into the
        result.
        """
        return self._cached(float(s), float(t), columns, torch.device(device), dtype)

    def _between(
        self, s: float, t: float, columns: bool, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        # A tensor made in inference mode could not be used outside of it later. Filled in by a
        # kernel: a copy from the host could wait for the device.
        with torch.inference_mode(False):
            work = device if device.type in ("cpu", "cuda") else torch.device("cpu")
            time = torch.full((1,), t, dtype=torch.float64, device=work)
            return self.batched(s, time, columns=columns)[0].to(dtype).to(device)

    def _eigen_on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._eigen:
            with torch.inference_mode(False):
                parts = self._eigen[torch.device("cpu")]
                self._eigen[device] = tuple(part.to(device) for part in parts)
        return self._eigen[device]


def fine_uniform(seed: rng.Integer, step: rng.Integer, row_keys: Tensor, count: int) -> Tensor:
    """Uniform numbers (k + ½)·2⁻⁵² in (0, 1) from two words each; see `rng.uniform`.

    Returns:
        (R, count) float64, column c a function of (seed, step, row key, c) alone.
    """
    first, second, third, fourth = rng.random_words(seed, step, row_keys, 2 * count)
    high = torch.stack([first, third], -1)
    low = torch.stack([second, fourth], -1)
    numbers = ((high << 20) | (low >> 12)).to(torch.float64).add_(0.5).mul_(2.0**-52)
    return numbers.flatten(1)[:, :count]


def draw_by_weights(weights: Tensor, uniforms: Tensor) -> Tensor:
    """K classes from each row of weights by inversion of its distribution function.

    Equivalent PyTorch, up to the random numbers: `torch.multinomial(weights, K, True)`, exact to
    2⁻⁵² of the row's sum, which need not be 1.

    Args:
        weights: (..., V), not negative, with a positive and finite sum.
        uniforms: (..., K) float64 in (0, 1).

    Returns:
        (..., K) int64; a class of weight 0 is never drawn.
    """
    cdf = weights.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, uniforms * cdf[..., -1:], right=True)


def draw_from_cdf(cdf: Tensor, rows: Tensor, uniforms: Tensor) -> Tensor:
    """One class for each of many rows of a small table, without copying its rows.

    Args:
        cdf: (G, V) float64, cumulative sums of weights.
        rows: any shape, int64 in [0, G).
        uniforms: the same shape, float64 in (0, 1).

    Returns:
        int64 of that shape: the first class whose cumulative sum exceeds u times the row's sum.
    """
    classes = cdf.shape[-1]
    table = cdf.flatten()
    start = rows * classes
    level = uniforms * table[start + (classes - 1)]
    low, high = torch.zeros_like(rows), torch.full_like(rows, classes - 1)
    for _ in range((classes - 1).bit_length()):
        middle = (low + high) // 2
        beyond = table[start + middle] > level
        high = torch.where(beyond, middle, high)
        low = torch.where(beyond, low, middle + 1).minimum(high)
    return high
