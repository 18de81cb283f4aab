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
from einops import rearrange
from torch import Tensor

from .. import rng
from ..checks import (
    check_choice,
    check_int,
    check_int64,
    check_number,
    check_same_device,
    check_shape,
    check_token_range,
    check_values,
    check_whole,
    check_within,
    without_autocast,
)
from .base import CheckedProcess, Source, TeacherStep, check_rows
from .transitions import GaussianTransitions, draw_by_weights, draw_from_cdf, fine_uniform

__all__ = ["GaussianProcess"]

INITIAL_LAWS = ("target", "uniform")
# How many weights exist at a time: a piece stays in a CPU's cache, or fills a GPU.
_PIECE = {"cpu": 2**18, "other": 2**22}
# A piece reads whole transition matrices, so that it should not hold fewer positions.
_FEWEST_POSITIONS = 32
# Decides where no x_0 of any weight can lead to x_t: x_u then follows q(x_t | x_u) alone.
FLOOR = 1e-30


@dataclasses.dataclass(frozen=True)
class GaussianProcess(CheckedProcess):
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
        check_within(self.t_min, "t_min", "(0, 1)")
        check_within(self.min_step, "min_step", f"(0, {1.0 - self.t_min})")
        check_within(self.eps, "eps", "(0, 1)")
        for name in ("rate_sigma", "target_sigma", "time_base", "time_exponential"):
            check_number(getattr(self, name), name)
        check_int(self.num_classes, "num_classes")
        self.transitions  # noqa: B018 - checks the numbers

    @property
    def transitions(self) -> GaussianTransitions:
        """Rate and transition matrices, shared by equal processes."""
        numbers = (self.num_classes, self.rate_sigma, self.target_sigma)
        return GaussianTransitions.of(*numbers, self.time_base, self.time_exponential)

    @property
    def component_time(self) -> float:
        """`t_min`: the component term has model calls of its own, at this time."""
        return self.t_min

    @property
    def first_time(self) -> float:  # type: ignore[override]
        """Training times are uniform on [t_min + min_step, 1]."""
        return self.t_min + self.min_step

    def check_classes(self, classes: int) -> None:
        if classes != self.num_classes:
            wanted = f"V = num_classes = {self.num_classes}"
            raise ValueError(f"teacher_head must have {wanted}, got V = {classes}")

    def corrupt(
        self, x0: Tensor, t: Tensor, *, valid: Tensor | None = None, generator: Source = None
    ) -> Tensor:
        """x_t ~ q(. | x_0), exactly; x0 in [0, V)."""
        check_rows(x0, "x0", t, valid, generator)
        tokens = x0 if valid is None else x0.masked_fill(~valid, 0)
        check_token_range(tokens, "x0", self.num_classes)
        seed = rng.draw_seed(generator, x0.device)
        cdf = rearrange(self.transitions.batched(0.0, t).cumsum(-1), "b v w -> (b v) w")
        keys = torch.arange(x0.numel(), device=x0.device)
        u = fine_uniform(seed, 0, keys, 1).view(x0.shape)
        example = torch.arange(x0.shape[0], device=x0.device).unsqueeze(-1)
        xt = draw_from_cdf(cdf, example * self.num_classes + tokens, u)
        return xt if valid is None else torch.where(valid, xt, x0)

    def earlier(self, t: Tensor, step: float, generator: Source) -> Tensor:
        """u = t - length with a log-uniform length between `min_step` and `step`.

        Lengths are cut off at t - t_min, so that u >= t_min; t must be greater than t_min. The
        published recipe is step = 1e-2 with min_step = 1e-3.
        """
        check_values(t > self.t_min, f"t must be greater than t_min = {self.t_min}", t)
        shortest, longest = sorted((self.min_step, step))
        v = rng.generator_uniform(
            t.shape, generator=generator, device=t.device, dtype=torch.float64
        )
        high = (t.double() - self.t_min).clamp(max=longest)
        low = high.clamp(max=shortest)
        u = t.double() - low * (high / low) ** v
        return u.to(t.dtype).clamp(min=self.t_min)

    def stepped(self, step: TeacherStep) -> Tensor:
        """The mean over x_0 of the posterior; xt in [0, V).

        Per position the weights Σ_x0 p(x_0) / (q(x_t | x_0) + eps) · q(x_u | x_0) · q(x_t | x_u)
        are computed once, for all draws, in pieces of positions; nothing of size K·D·V exists.
        Weights are products of float32 matrices (float64 for a float64 head): where the user lets
        those run in TF32, they are rounded to 1e-3 of their size. No host sync.
        """
        check_whole(step.head, "GaussianProcess")
        head, components, draws, valid = step.head, step.components, step.draws, step.valid
        xt = step.xt if valid is None else step.xt.masked_fill(~valid, 0)
        batch, positions = xt.shape
        check_token_range(xt, "xt", self.num_classes)
        seed = rng.draw_seed(step.generator, xt.device)
        if xt.numel() == 0:
            return xt.new_empty(batch, draws, positions)

        classes = self.num_classes
        dtype = torch.promote_types(head.dtype, torch.float32)
        to_u = self.transitions.batched(0.0, step.u).to(dtype)
        into_t, from_u = (
            self.transitions.batched(s, step.t, columns=True).to(dtype).flatten(0, 1)
            for s in (0.0, step.u)
        )
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
                weights = (weights + FLOOR) * from_u[at].unsqueeze(1)
                total = weights.sum(-1)
                message = "teacher_head must hold numbers: row of logits with NaN"
                check_values(total.isfinite() & (total > 0), message)
                v = fine_uniform(seed, 0, (example * positions + d).flatten(), turns * used)
                v = rearrange(v, "(b d) (k m) -> b m d k", b=batch, m=used).contiguous()
                xu[..., first:last] = rearrange(draw_by_weights(weights, v), "b m d k -> b k m d")
        xu = rearrange(xu, "b k m d -> b (k m) d")[:, :draws]
        return xu if valid is None else torch.where(valid.unsqueeze(1), xu, step.xt.unsqueeze(1))

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
        check_int64(x0, "x0")
        if row_keys is None:
            row_keys = torch.arange(x0.numel(), device=x0.device).view_as(x0)
        for value, name in ((xt, "xt"), (row_keys, "row_keys")):
            check_int64(value, name)
            check_shape(value, name, "the shape of x0", x0.shape)
            check_same_device(value, name, x0, "x0")
        check_token_range(x0, "x0", self.num_classes)
        check_token_range(xt, "xt", self.num_classes)
        check_within(t, "t", "(0, 1]")
        check_within(s, "s", f"[0, {float(t)})")
        options: dict[str, Any] = {"device": x0.device, "dtype": torch.float32}
        to_s = self.transitions.between(0.0, s, **options)
        from_s = self.transitions.between(s, t, columns=True, **options)
        v = fine_uniform(seed, step, row_keys.flatten(), 1)
        x0, xt, shape = x0.flatten(), xt.flatten(), x0.shape
        parts = [
            draw_by_weights((to_s[x0[i:j]] + FLOOR).mul_(from_s[xt[i:j]]), v[i:j])
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
        v = fine_uniform(seed, step, row_keys.flatten(), 1)[:, 0]
        return draw_by_weights(target.to(row_keys.device), v).view(row_keys.shape)


def _pieces(count: int, width: int, device: torch.device, fewest: int = 1) -> list[tuple[int, int]]:
    size = max(fewest, _PIECE["cpu" if device.type == "cpu" else "other"] // max(width, 1))
    return [(i, min(i + size, count)) for i in range(0, count, size)]
