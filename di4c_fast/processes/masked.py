"""Masked (absorbing) diffusion with the log-linear schedule.

At time t every token is the mask token with probability t, independently. Going back from t to
u < t, a masked position is unmasked with probability (t - u) / t, and its token then comes from
the denoiser's distribution at t.

Source: MDLM (arXiv 2406.07524) and the masked language experiment of Di4C (arXiv 2410.08709).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..checks import (
    check_int64,
    check_number,
    check_rank,
    check_same_device,
    check_values,
    describe,
)
from ..draw.api import sample
from ..heads import HeadLike, as_head
from ..rng import draw_seed, generator_uniform
from .base import before, check_teacher_step, check_times, check_valid, widened

__all__ = ["MaskedProcess"]

# Rows are drawn in pieces of as many logits as the teacher has, or this many (64 MiB in fp32).
_SMALL_PIECE = 2**24


@dataclasses.dataclass(frozen=True)
class MaskedProcess:
    """Masked diffusion: the process of masked language models.

    Args:
        mask_id: id of the mask token, one of the V classes.
        t_min: smallest training time; the published samplers end at 1e-5.
        levels: quantise training times once, upwards, to multiples of 1/levels (the paper's
            code uses 1024); None for continuous times.

    Raises:
        TypeError, ValueError: `mask_id` negative or no int, `t_min` outside (0, 1), `levels` < 1.
    """

    mask_id: int
    _: dataclasses.KW_ONLY
    t_min: float = 1e-5
    levels: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.mask_id, bool) or not isinstance(self.mask_id, int):
            raise TypeError(f"mask_id must be an int, got {describe(self.mask_id)}")
        if self.mask_id < 0:
            raise ValueError(f"mask_id must not be negative, got {self.mask_id}")
        check_number(self.t_min, "t_min")
        if not 0.0 < self.t_min < 1.0:
            raise ValueError(f"t_min must be in (0, 1), got {self.t_min}")
        if self.levels is not None:
            if isinstance(self.levels, bool) or not isinstance(self.levels, int):
                raise TypeError(f"levels must be an int or None, got {describe(self.levels)}")
            if self.levels < 1:
                raise ValueError(f"levels must be at least 1, got {self.levels}")

    @property
    def loss_mask_id(self) -> int:
        """`mask_id`: the loss counts masked positions only and never predicts the mask."""
        return self.mask_id

    @property
    def component_time(self) -> None:
        """None: the component term is for examples with t < low_t."""
        return None

    def sample_times(
        self,
        batch: int,
        *,
        low_t: float = 0.0,
        low_t_probability: float = 0.0,
        stratified: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Training times, one per example.

        With probability `low_t_probability` uniform on (0, low_t), otherwise on (low_t, 1); then
        quantised upwards once if the process has `levels`.

        Args:
            batch: B, may be 0.
            low_t, low_t_probability: in [0, 1]; probability 0 with low_t 0 is uniform on (0, 1).
            stratified: one time from each of B equal parts of the law, in random order of the
                offset only; lowers the variance between batches, each time keeps its law.
            generator: source of randomness; None for the default generator.
            device: where the result goes.

        Returns:
            (B,) float32 in [t_min, 1].
        """
        if isinstance(batch, bool) or not isinstance(batch, int):
            raise TypeError(f"batch must be an int, got {describe(batch)}")
        if batch < 0:
            raise ValueError(f"batch must not be negative, got {batch}")
        for name, value in (("low_t", low_t), ("low_t_probability", low_t_probability)):
            check_number(value, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if stratified and batch:
            offset = generator_uniform((1,), generator=generator, device=device)
            part = torch.arange(batch, device=offset.device, dtype=torch.float32) / batch
            v = (part + offset) % 1.0
        else:
            v = generator_uniform((batch,), generator=generator, device=device)
        # One uniform number gives both the branch and the place within it.
        p = low_t_probability
        below = low_t * v / p if p > 0.0 else v
        above = low_t + (1.0 - low_t) * (v - p) / (1.0 - p) if p < 1.0 else v
        t = torch.where(v < p, below, above)
        if self.levels is not None:
            t = (torch.floor(t * self.levels) + 1.0) / self.levels
        return t.clamp(self.t_min, 1.0)

    def corrupt(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x_t ~ q(. | x_0): every token becomes the mask with probability t.

        Args:
            x0: (B, D) int64, without mask tokens.
            t: (B,) floating point in (0, 1], one per example.
            valid: (B, D) bool; positions where it is False (padding, prompt) are never masked.
            generator: source of randomness.

        Returns:
            (B, D) int64.

        Raises:
            TypeError, ValueError: wrong kinds, shapes, devices; values (times outside (0, 1] or
                NaN, mask tokens in x0) as in `di4c_fast.loss`: at once on the CPU, by a
                device-side assertion on a GPU.
        """
        self._check_tokens(x0, "x0")
        check_times(t, "t", x0.shape[0], x0)
        clean = x0 != self.mask_id
        if valid is not None:
            check_valid(valid, x0, "x0")
            clean = clean | ~valid
        check_values(clean, f"x0 must not hold mask_id = {self.mask_id}")
        masked = generator_uniform(x0.shape, generator=generator, device=x0.device) < t.unsqueeze(
            -1
        )
        if valid is not None:
            masked = masked & valid
        return x0.masked_fill(masked, self.mask_id)

    def step_time(
        self, t: Tensor, step: float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """u = t - min(step, t / 2), so that a step never leaves (0, 1].

        `generator` is not used: the step is not random.
        """
        check_number(step, "step")
        if not 0.0 < step <= 1.0:
            raise ValueError(f"step must be in (0, 1], got {step}")
        check_times(t, "t", t.shape[0] if isinstance(t, Tensor) and t.ndim else -1, t)
        wide = widened(t)
        return before(wide - torch.clamp(wide / 2, max=step), wide)

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
        """K ancestral draws of x_u | x_t from one teacher pass.

        Which positions unmask is drawn first, with probability (t - u) / t each; logits are
        computed only for those (`Head.take`). Draw k follows component k mod M of the teacher,
        the whole row one component. Needs one host sync on a GPU: the number of positions that
        unmask.

        Args:
            xt: (B, D) int64.
            t, u: (B,) times, 0 <= u < t <= 1.
            teacher_head: (B, D, V) or (B, M, D, V) logits or a head, the denoiser at (x_t, t).
            draws: K >= 1.
            valid: (B, D) bool; positions where it is False keep their token, masks too.
            generator: source of randomness.

        Returns:
            (B, K, D) int64; tokens of x_t stay, others are a class below V other than the mask
            or still the mask. No graph.
        """
        batch, positions = check_teacher_step(xt, t, u, draws, valid)
        head = as_head(teacher_head, "teacher_head").detach()
        shape = tuple(head.shape)
        components = 1 if len(shape) == 3 else shape[1] if len(shape) == 4 else 0
        if components < 1 or (shape[0], shape[-2]) != (batch, positions):
            raise ValueError(
                "teacher_head must have shape (B, D, V) or (B, M, D, V) with "
                f"(B, D) = {(batch, positions)}, got {shape}"
            )
        if self.mask_id >= shape[-1]:
            raise ValueError(
                f"mask_id must be in [0, V) = [0, {shape[-1]}) of teacher_head, got {self.mask_id}"
            )
        check_same_device(head, "teacher_head", xt, "xt")

        chance = ((t - u) / t).view(batch, 1, 1)
        unmask = (
            generator_uniform((batch, draws, positions), generator=generator, device=xt.device)
            < chance
        )
        waiting = xt == self.mask_id
        if valid is not None:
            waiting = waiting & valid
        unmask = unmask & waiting.unsqueeze(1)
        xu = xt.unsqueeze(1).repeat(1, draws, 1)
        where = unmask.flatten().nonzero().squeeze(-1)
        d = where % positions
        k = where // positions % draws
        b = where // (positions * draws)
        rows = (b * components + k % components) * positions + d
        # K draws of a long step could ask for K times the rows that the teacher returned.
        limit = max(batch * components * positions, _SMALL_PIECE // shape[-1], 1)
        seed = draw_seed(generator, xt.device)
        for some, at in zip(rows.split(limit), where.split(limit), strict=True):
            if some.numel():
                draw = sample(
                    head.take(some), mask_id=self.mask_id, seed=seed, row_keys=at, want=()
                )
                xu.view(-1)[at] = draw.token
        return xu

    def _check_tokens(self, tokens: Tensor, name: str) -> None:
        check_int64(tokens, name)
        check_rank(tokens, name, exactly=2)
