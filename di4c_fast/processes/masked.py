"""Masked (absorbing) diffusion with the log-linear schedule.

At time t every token is the mask token with probability t, independently. Going back from t to
u < t, a masked position is unmasked with probability (t - u) / t, and its token then comes from
the denoiser's distribution at t.

Source: MDLM (arXiv 2406.07524) and the masked language experiment of Di4C (arXiv 2410.08709).
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from einops import repeat
from torch import Tensor

from ..checks import check_int, check_values, check_within
from ..draw.api import sample
from ..rng import draw_seed, generator_uniform
from .base import CheckedProcess, Source, TeacherStep, check_rows

__all__ = ["MaskedProcess", "MaskingProcess"]

# Rows are drawn in pieces of as many logits as the teacher has, or this many (64 MiB in fp32).
_SMALL_PIECE = 2**24


class MaskingProcess(CheckedProcess):
    """A process whose noise is a mask token."""

    mask_id: int
    exclude_mask: bool = True  # never draw it, so that the teacher needs a column for it

    @abc.abstractmethod
    def share(self, t: Tensor) -> Tensor:
        """The share of masked positions at the times t (B,)."""

    def corrupt(
        self, x0: Tensor, t: Tensor, *, valid: Tensor | None = None, generator: Source = None
    ) -> Tensor:
        check_rows(x0, "x0", t, valid, generator)
        where = torch.ones_like(x0, dtype=torch.bool) if valid is None else valid
        check_values((x0 >= 0) | ~where, "x0 must hold ids of at least 0", x0)
        check_values((x0 != self.mask_id) | ~where, f"x0 must not hold mask_id = {self.mask_id}")
        u = generator_uniform(x0.shape, generator=generator, device=x0.device)
        return x0.masked_fill((u < self.share(t).unsqueeze(-1)) & where, self.mask_id)

    def check_classes(self, classes: int) -> None:
        if self.exclude_mask and self.mask_id >= classes:
            raise ValueError(
                f"mask_id must be in [0, V) = [0, {classes}) of teacher_head, got {self.mask_id}"
            )

    def waiting(self, step: TeacherStep) -> Tensor:
        """(B, D) bool, the positions that may be revealed."""
        masked = step.xt == self.mask_id
        return masked if step.valid is None else masked & step.valid


@dataclasses.dataclass(frozen=True)
class MaskedProcess(MaskingProcess):
    """Masked diffusion: the process of masked language models.

    Args:
        mask_id: id of the mask token, one of the V classes.
        t_min: smallest training time; the published samplers end at 1e-5.
        levels: quantise training times once, upwards, to multiples of 1/levels; None for
            continuous times. The paper's code uses 1024, and then masks with probability
            t + (1 - t)/1024; here masks follow the t that models and weights are given.
    """

    mask_id: int
    _: dataclasses.KW_ONLY
    t_min: float = 1e-5
    levels: int | None = None

    def __post_init__(self) -> None:
        check_int(self.mask_id, "mask_id", minimum=0)
        check_within(self.t_min, "t_min", "(0, 1)")
        if self.levels is not None:
            check_int(self.levels, "levels", minimum=1)

    @property
    def loss_mask_id(self) -> int:
        """`mask_id`: the loss counts masked positions only and never predicts the mask."""
        return self.mask_id

    def quantised(self, t: Tensor) -> Tensor:
        return t if self.levels is None else (torch.floor(t * self.levels) + 1.0) / self.levels

    def share(self, t: Tensor) -> Tensor:
        return t

    def earlier(self, t: Tensor, step: float, generator: Source) -> Tensor:
        """u = t - min(step, t / 2), so that a step never leaves (0, 1]; not random."""
        return t - torch.clamp(t / 2, max=step)

    def stepped(self, step: TeacherStep) -> Tensor:
        """K ancestral draws.

        Which positions unmask is drawn first, with probability (t - u) / t each; logits are
        computed only for those (`Head.take`). Needs one host sync on a GPU: the number of
        positions that unmask.
        """
        xt, (batch, positions), components = step.xt, step.xt.shape, step.components
        size = (batch, step.draws, positions)
        chance = generator_uniform(size, generator=step.generator, device=xt.device)
        unmask = chance < ((step.t - step.u) / step.t).view(batch, 1, 1)
        unmask = unmask & self.waiting(step).unsqueeze(1)
        xu = repeat(xt, "b d -> b k d", k=step.draws).contiguous()
        where = unmask.flatten().nonzero().squeeze(-1)
        b, k, d = torch.unravel_index(where, size)
        rows = (b * components + k % components) * positions + d
        # K draws of a long step could ask for K times the rows that the teacher returned.
        limit = max(batch * components * positions, _SMALL_PIECE // step.head.vocabulary, 1)
        seed = draw_seed(step.generator, xt.device)
        for some, at in zip(rows.split(limit), where.split(limit), strict=True):
            if some.numel():
                head = step.head.take(some)
                draw = sample(head, mask_id=self.mask_id, seed=seed, row_keys=at, want=())
                xu.view(-1)[at] = draw.token
        return xu
