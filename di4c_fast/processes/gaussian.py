"""Discretised Gaussian diffusion of ordered classes, such as the 256 levels of a pixel.

Each position moves between its V ordered classes on its own, at rates that grow over time and
whose stationary law is a wide Gaussian (see `transitions`). Going back from t to u, the posterior
q(x_u | x_t, x_0) ∝ q(x_u | x_0) q(x_t | x_u) is averaged over the denoiser's law of x_0.

Source: tauLDR (arXiv 2205.14987) and the pixel experiment of Di4C (arXiv 2410.08709).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..checks import (
    check_choice,
    check_int64,
    check_number,
    check_rank,
    check_same_device,
    check_shape,
    check_token_range,
    check_values,
    describe,
    without_autocast,
)
from ..heads import HeadLike, as_head
from ..rng import check_generator, generator_uniform
from .base import before, check_teacher_step, check_times, check_valid, widened
from .transitions import GaussianTransitions, draw_by_weights, draw_from_cdf, fine_uniform

__all__ = ["GaussianProcess"]

INITIAL_LAWS = ("target", "uniform")
# How many weights exist at a time: a piece stays in a CPU's cache, or fills a GPU.
_PIECE = {"cpu": 2**18, "other": 2**22}
# A piece reads whole transition matrices, so that it should not hold fewer positions.
_FEWEST_POSITIONS = 32
# Decides where no x_0 of any weight can lead to x_t: x_u then follows q(x_t | x_u) alone.
_FLOOR = 1e-30


@dataclasses.dataclass(frozen=True)
class GaussianProcess:
    """Discretised Gaussian diffusion; the defaults are those of the published CIFAR-10 models.

    Args:
        num_classes: V, ordered classes (256 for 8-bit pixels).
        rate_sigma: width of single moves, in classes; should shrink with V (6 for 256).
        target_sigma: width of the stationary law in classes ("Q_sigma"), at least V/12.
        time_base, time_exponential: time passed by t is time_base (time_exponential^t - 1).
        t_min: smallest time at which models are called: the end of the samplers' grid, and the
            time of the component term.
        min_step: shortest step of the teacher, see `step_time`.
        eps: added to q(x_t | x_0) before dividing by it; an x_0 that is less likely to have led to
            x_t does not count.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    num_classes: int
    _: dataclasses.KW_ONLY
    rate_sigma: float = 6.0
    target_sigma: float = 512.0
    time_base: float = 3.0
    time_exponential: float = 100.0
    t_min: float = 0.01
    min_step: float = 1e-3
    eps: float = 1e-9

    def __post_init__(self) -> None:
        for name in ("t_min", "min_step"):
            value = getattr(self, name)
            check_number(value, name)
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name} must be in (0, 1), got {value}")
        if self.t_min + self.min_step >= 1.0:
            raise ValueError(
                f"t_min + min_step must be below 1, got {self.t_min} + {self.min_step}"
            )
        check_number(self.eps, "eps")
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps must be in (0, 1), got {self.eps}")
        numbers = ("rate_sigma", "target_sigma", "time_base", "time_exponential")
        for name in numbers:
            check_number(getattr(self, name), name)
        if isinstance(self.num_classes, bool) or not isinstance(self.num_classes, int):
            raise TypeError(f"num_classes must be an int, got {describe(self.num_classes)}")
        self.transitions  # noqa: B018 - checks the numbers

    @property
    def transitions(self) -> GaussianTransitions:
        """Rate and transition matrices, shared by equal processes."""
        return GaussianTransitions.of(
            self.num_classes,
            self.rate_sigma,
            self.target_sigma,
            self.time_base,
            self.time_exponential,
        )

    @property
    def loss_mask_id(self) -> None:
        """None: every class and every position counts in the loss."""
        return None

    @property
    def component_time(self) -> float:
        """`t_min`: the component term has model calls of its own, at this time."""
        return self.t_min

    def sample_times(
        self,
        batch: int,
        *,
        low_t: float = 0.0,
        low_t_probability: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Training times, one per example, uniform on [t_min + min_step, 1].

        With probability `low_t_probability` uniform below `low_t`, else above it, as for other
        processes; not needed, since this process has a `component_time`.

        Args:
            batch: B, may be 0.
            low_t, low_t_probability: in [0, 1].
            generator: source of randomness; None for the default generator.
            device: where the result goes.

        Returns:
            (B,) float32 in [t_min + min_step, 1].
        """
        if isinstance(batch, bool) or not isinstance(batch, int):
            raise TypeError(f"batch must be an int, got {describe(batch)}")
        if batch < 0:
            raise ValueError(f"batch must not be negative, got {batch}")
        for name, value in (("low_t", low_t), ("low_t_probability", low_t_probability)):
            check_number(value, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        first = self.t_min + self.min_step
        cut = max(first, low_t)
        v = generator_uniform((batch,), generator=generator, device=device)
        # One uniform number gives both the branch and the place within it.
        p = low_t_probability
        below = first + (cut - first) * v / p if p > 0.0 else v
        above = cut + (1.0 - cut) * (v - p) / (1.0 - p) if p < 1.0 else v
        return torch.where(v < p, below, above).clamp(first, 1.0)

    def corrupt(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x_t ~ q(. | x_0), exactly.

        Args:
            x0: (B, D) int64 in [0, V); anything outside `valid`.
            t: (B,) floating point in (0, 1], one per example.
            valid: (B, D) bool; positions where it is False stay as they are.
            generator: source of randomness.

        Returns:
            (B, D) int64.

        Raises:
            TypeError, ValueError: wrong kinds, shapes, devices; values (times outside (0, 1] or
                NaN, tokens out of range) at once on the CPU, by a device-side assertion on a GPU.
        """
        check_int64(x0, "x0")
        check_rank(x0, "x0", exactly=2)
        check_times(t, "t", x0.shape[0], x0)
        check_generator(generator)
        tokens = x0
        if valid is not None:
            check_valid(valid, x0, "x0")
            tokens = x0.masked_fill(~valid, 0)
        check_token_range(tokens, "x0", self.num_classes)
        seed = rng.draw_seed(generator, x0.device)
        if x0.numel() == 0:
            return x0.clone()
        cdf = self.transitions.batched(0.0, t).cumsum(-1).flatten(0, 1)
        keys = torch.arange(x0.numel(), device=x0.device)
        u = fine_uniform(seed, 0, keys, 1).view(x0.shape)
        example = torch.arange(x0.shape[0], device=x0.device).unsqueeze(-1)
        xt = draw_from_cdf(cdf, example * self.num_classes + tokens, u)
        return xt if valid is None else torch.where(valid, xt, x0)

    def step_time(
        self, t: Tensor, step: float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """u = t - length with a log-uniform length between `min_step` and `step`.

        Lengths are cut off at t - t_min, so that u >= t_min. The published recipe is step = 1e-2
        with min_step = 1e-3.

        Args:
            t: (B,) in (t_min, 1].
            step: in (0, 1].

        Returns:
            (B,) float32 (float64 for float64 t).
        """
        check_number(step, "step")
        if not 0.0 < step <= 1.0:
            raise ValueError(f"step must be in (0, 1], got {step}")
        check_times(t, "t", t.shape[0] if isinstance(t, Tensor) and t.ndim else -1, t)
        check_values(t > self.t_min, f"t must be greater than t_min = {self.t_min}", t)
        shortest, longest = sorted((self.min_step, step))
        v = generator_uniform(t.shape, generator=generator, device=t.device, dtype=torch.float64)
        room = t.to(torch.float64) - self.t_min
        high = room.clamp(max=longest)
        low = high.clamp(max=shortest)
        u = t.to(torch.float64) - low * (high / low) ** v
        # Rounding may not bring u back to t, nor below t_min.
        wide = widened(t)
        return before(u.to(wide.dtype).clamp(min=self.t_min), wide)

    @torch.no_grad()
    def teacher_step(
        self,
        xt: Tensor,
        t: Tensor,
        u: Tensor,
        teacher_head: HeadLike,
        draws: int,
        *,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """K draws of x_u | x_t, the mean over x_0 of the posterior, from one teacher pass.

        Per position the weights Σ_x0 p(x_0) / (q(x_t | x_0) + eps) · q(x_u | x_0) · q(x_t | x_u)
        are computed once, for all draws, in pieces of positions; nothing of size K·D·V exists.
        Draw k follows component k mod M of the teacher, the whole row one component. Weights are
        products of float32 matrices (float64 for a float64 head): where the user lets those run
        in TF32, they are rounded to 1e-3 of their size.

        Args:
            xt: (B, D) int64 in [0, V).
            t, u: (B,) times, 0 <= u < t <= 1.
            teacher_head: (B, D, V) or (B, M, D, V) logits or a head, the denoiser at (x_t, t).
            draws: K >= 1.
            valid: (B, D) bool; positions where it is False keep their token, whatever it is.
            generator: source of randomness.

        Returns:
            (B, K, D) int64. No graph, no host sync.
        """
        batch, positions = check_teacher_step(xt, t, u, draws, valid)
        check_generator(generator)
        head = as_head(teacher_head, "teacher_head").detach()
        shape = tuple(head.shape)
        components = 1 if len(shape) == 3 else shape[1] if len(shape) == 4 else 0
        if components < 1 or (shape[0], *shape[-2:]) != (batch, positions, self.num_classes):
            raise ValueError(
                "teacher_head must have shape (B, D, V) or (B, M, D, V) with "
                f"(B, D, V) = {(batch, positions, self.num_classes)}, got {shape}"
            )
        check_same_device(head, "teacher_head", xt, "xt")
        given = xt
        if valid is not None:
            xt = xt.masked_fill(~valid, 0)
        check_token_range(xt, "xt", self.num_classes)
        seed = rng.draw_seed(generator, xt.device)
        if xt.numel() == 0:
            return xt.new_empty(batch, draws, positions)

        classes = self.num_classes
        dtype = torch.promote_types(head.dtype, torch.float32)
        to_u = self.transitions.batched(0.0, u).to(dtype)
        into_t = self.transitions.batched(0.0, t, columns=True).to(dtype).flatten(0, 1)
        from_u = self.transitions.batched(u, t, columns=True).to(dtype).flatten(0, 1)

        used = min(components, draws)
        turns = -(-draws // used)
        device, width = xt.device, batch * used * classes
        example = torch.arange(batch, device=device).unsqueeze(-1)
        component = torch.arange(used, device=device).view(1, used, 1)
        xu = torch.empty(batch, turns, used, positions, dtype=torch.int64, device=device)
        with without_autocast(device):
            for first, last in _pieces(positions, width, device, _FEWEST_POSITIONS):
                d = torch.arange(first, last, device=device)
                rows = (example.unsqueeze(-1) * components + component) * positions + d
                logits = head.take(rows).logits().to(dtype)  # (B, M, piece, V)
                at = example * classes + xt[:, first:last]
                weights = logits.softmax(-1) / (into_t[at] + self.eps).unsqueeze(1)
                weights = torch.bmm(weights.flatten(1, 2), to_u).view(logits.shape)
                weights = (weights + _FLOOR) * from_u[at].unsqueeze(1)
                _check_weights(weights, "teacher_head must hold numbers: row of logits with NaN")
                keys = (example * positions + d).flatten()
                v = fine_uniform(seed, 0, keys, turns * used)
                v = v.view(batch, last - first, turns, used).permute(0, 3, 1, 2)
                xu[..., first:last] = draw_by_weights(weights, v.contiguous()).permute(0, 3, 1, 2)
        xu = xu.flatten(1, 2)[:, :draws]
        return xu if valid is None else torch.where(valid.unsqueeze(1), xu, given.unsqueeze(1))

    @torch.no_grad()
    def posterior_step(
        self,
        x0: Tensor,
        xt: Tensor,
        t: float,
        s: float,
        *,
        seed: rng.Integer,
        step: rng.Integer = 0,
        row_keys: Tensor | None = None,
    ) -> Tensor:
        """x_s ~ q(x_s | x_t, x_0) ∝ q(x_s | x_0) q(x_t | x_s), exactly; one time for all rows.

        Args:
            x0, xt: int64 of one shape, in [0, V).
            t, s: numbers, 0 <= s < t <= 1; their matrices are cached.
            seed, step, row_keys: the draw is a function of (seed, step, row key); keys of the
                shape of x0, None for 0, 1, 2, ...

        Returns:
            int64 of the shape of x0. No host sync. Where x_0 cannot have led to x_t (probability
            below about 1e-14), x_s follows q(x_t | x_s).
        """
        for value, name in ((x0, "x0"), (xt, "xt")):
            check_int64(value, name)
            check_shape(value, name, "the shape of x0", x0.shape)
            check_same_device(value, name, x0, "x0")
            check_token_range(value, name, self.num_classes)
        check_time_pair(t, s)
        if row_keys is None:
            row_keys = torch.arange(x0.numel(), device=x0.device)
        else:
            check_int64(row_keys, "row_keys")
            check_shape(row_keys, "row_keys", "the shape of x0", x0.shape)
            check_same_device(row_keys, "row_keys", x0, "x0")
        options: dict[str, Any] = {"device": x0.device, "dtype": torch.float32}
        to_s = self.transitions.between(0.0, s, **options)
        from_s = self.transitions.between(s, t, columns=True, **options)
        v = fine_uniform(seed, step, row_keys.flatten(), 1)
        x0, xt, shape = x0.flatten(), xt.flatten(), x0.shape
        parts = [
            draw_by_weights((to_s[x0[i:j]] + _FLOOR).mul_(from_s[xt[i:j]]), v[i:j])
            for i, j in _pieces(x0.numel(), self.num_classes, x0.device)
        ]
        return torch.cat(parts).view(shape) if parts else x0.clone().view(shape)

    def initial(
        self, seed: rng.Integer, step: rng.Integer, row_keys: Tensor, law: str = "target"
    ) -> Tensor:
        """Tokens at t = 1 from the stationary law ("target") or with equal chances ("uniform").

        Returns:
            int64 of the shape of `row_keys`, a function of (seed, step, row key).
        """
        check_choice(law, "law", INITIAL_LAWS)
        target = self.transitions.target if law == "target" else torch.ones(self.num_classes)
        cdf = target.to(torch.float64).cumsum(0).unsqueeze(0).to(row_keys.device)
        v = fine_uniform(seed, step, row_keys.flatten(), 1).view(row_keys.shape)
        return draw_from_cdf(cdf, torch.zeros_like(row_keys), v)


def check_time_pair(t: Any, s: Any) -> None:
    check_number(t, "t")
    check_number(s, "s")
    if not 0.0 <= s < t <= 1.0:
        raise ValueError(f"times must be 0 <= s < t <= 1, got s = {s} and t = {t}")


def _pieces(count: int, width: int, device: torch.device, fewest: int = 1) -> list[tuple[int, int]]:
    size = max(fewest, _PIECE["cpu" if device.type == "cpu" else "other"] // max(width, 1))
    return [(i, min(i + size, count)) for i in range(0, count, size)]


def _check_weights(weights: Tensor, message: str) -> None:
    total = weights.sum(-1)
    check_values(total.isfinite() & (total > 0), message)
