"""What `distill_step` asks of a noise process, and what the processes of this package share.

Time t is in (0, 1]; 1 is pure noise for every process, so that schedules of weights read the
same everywhere. Shapes: B examples, K draws, M teacher components, D positions, V classes.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ..checks import (
    check_bool,
    check_floating,
    check_int,
    check_int64,
    check_rank,
    check_same_device,
    check_shape,
    check_tensor,
    check_values,
    check_within,
)
from ..heads import Head, HeadLike, as_head
from ..rng import check_generator, generator_uniform

Source: TypeAlias = torch.Generator | None


@runtime_checkable
class Process(Protocol):
    """A noise process q(x_t | x_0) and one reverse step of a teacher under it.

    Wrong arguments raise a TypeError or ValueError that names them; values of tensors (times,
    tokens) as in `di4c_fast.loss`: at once on the CPU, by a device-side assertion on a GPU.
    `generator` is the source of randomness everywhere, None for torch's default.
    """

    @property
    def loss_mask_id(self) -> int | None:
        """The mask token that the loss leaves out of every softmax; None if every class counts.

        If it is not None, the loss is given x_t and x_u and counts masked positions only.
        """
        return None

    @property
    def component_time(self) -> float | None:
        """Time in (0, 1] of the component term's own pass; None if it has none.

        None: examples with t < low_t get the component term instead of the consistency terms. A
        number: every step compares student and teacher at x ~ q(. | x_0) at that time, N
        draws per example with one λ each, and `low_t` is not used.
        """
        return None

    def sample_times(
        self,
        batch: int,
        *,
        low_t: float = 0.0,
        low_t_probability: float = 0.0,
        generator: Source = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Training times (B,), float32; below `low_t` with probability `low_t_probability`."""

    def corrupt(
        self, x0: Tensor, t: Tensor, *, valid: Tensor | None = None, generator: Source = None
    ) -> Tensor:
        """x_t ~ q(. | x_0), (B, D) int64.

        Args:
            x0: (B, D) int64, tokens without noise.
            t: (B,) floating point in (0, 1], one per example.
            valid: (B, D) bool; positions where it is False (padding, prompt) stay as they are
                and may hold anything.
        """

    def step_time(self, t: Tensor, step: float, *, generator: Source = None) -> Tensor:
        """The time u < t (B,) at which one teacher step of about `step` in (0, 1] from t ends.

        float32, or float64 for float64 t.
        """

    def teacher_step(
        self,
        xt: Tensor,
        t: Tensor,
        u: Tensor,
        teacher_head: HeadLike,
        draws: int,
        *,
        valid: Tensor | None = None,
        generator: Source = None,
    ) -> Tensor:
        """K draws of x_u | x_t, (B, K, D) int64 without a graph, all from one teacher pass.

        Draw k follows component k mod M of the teacher, the whole row one component.

        Args:
            xt: (B, D) int64.
            t, u: (B,) times, 0 <= u < t <= 1.
            teacher_head: (B, D, V) or (B, M, D, V) logits or a head, the denoiser at (x_t, t).
            draws: K >= 1.
            valid: (B, D) bool; positions where it is False keep their token, whatever it is.
        """


@dataclasses.dataclass(frozen=True)
class TeacherStep:
    """The checked arguments of `Process.teacher_step`."""

    xt: Tensor  # (B, D) int64
    t: Tensor  # (B,)
    u: Tensor  # (B,)
    head: Head  # (B, D, V) or (B, M, D, V)
    components: int  # M
    draws: int  # K
    valid: Tensor | None  # (B, D) bool
    generator: Source


class CheckedProcess(Process, abc.ABC):
    """The arguments of a process, checked; a process adds `corrupt` and the methods at the end."""

    first_time = 0.0  # training times lie between it and 1,
    t_min: float  # and are at least this

    def sample_times(
        self,
        batch: int,
        *,
        low_t: float = 0.0,
        low_t_probability: float = 0.0,
        stratified: bool = False,
        generator: Source = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Training times (B,), float32 in (0, 1], uniform both below and above `low_t`.

        Args:
            batch: B, may be 0.
            low_t, low_t_probability: in [0, 1]; probability 0 with low_t 0 is uniform.
            stratified: one time from each of B equal parts of the law, in random order of the
                offset only; lowers the variance between batches, each time keeps its law.
            device: where the result goes.
        """
        check_int(batch, "batch", minimum=0)
        check_within(low_t, "low_t", "[0, 1]")
        check_within(low_t_probability, "low_t_probability", "[0, 1]")
        check_bool(stratified, "stratified")
        count = min(batch, 1) if stratified else batch
        v = generator_uniform((count,), generator=generator, device=device)
        if stratified:
            v = (torch.arange(batch, device=v.device, dtype=torch.float32) / max(batch, 1) + v) % 1
        # One uniform number gives both the branch and the place within it.
        p, first, cut = low_t_probability, self.first_time, max(self.first_time, low_t)
        below = first + (cut - first) * v / p if p > 0.0 else v
        above = cut + (1.0 - cut) * (v - p) / (1.0 - p) if p < 1.0 else v
        return self.quantised(torch.where(v < p, below, above)).clamp(max(first, self.t_min), 1.0)

    def step_time(self, t: Tensor, step: float, *, generator: Source = None) -> Tensor:
        check_within(step, "step", "(0, 1]")
        check_generator(generator)
        check_times(t, t.shape[0] if isinstance(t, Tensor) and t.ndim else -1, t)
        # In at least float32, which a small step from 1 needs.
        wide = t.to(torch.promote_types(t.dtype, torch.float32))
        u = self.earlier(wide, step, generator)
        # The number before t where rounding has brought u back to t.
        return torch.minimum(u, torch.nextafter(wide, torch.zeros_like(wide)))

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
        generator: Source = None,
    ) -> Tensor:
        check_rows(xt, "xt", t, valid, generator)
        check_tensor(u, "u")
        check_shape(u, "u", "B,", t.shape)
        check_same_device(u, "u", xt, "xt")
        check_values((u >= 0) & (u < t), "u must hold times with 0 <= u < t", u)
        check_int(draws, "draws", minimum=1)
        head = as_head(teacher_head, "teacher_head").detach()
        shape = tuple(head.shape)
        components = 1 if len(shape) == 3 else shape[1] if len(shape) == 4 else 0
        if components < 1 or (shape[0], shape[-2]) != tuple(xt.shape):
            raise ValueError(
                "teacher_head must have shape (B, D, V) or (B, M, D, V) with "
                f"(B, D) = {tuple(xt.shape)}, got {shape}"
            )
        self.check_classes(head.vocabulary)
        check_same_device(head, "teacher_head", xt, "xt")
        return self.stepped(TeacherStep(xt, t, u, head, components, draws, valid, generator))

    def quantised(self, t: Tensor) -> Tensor:
        """Training times on the grid of the process, if it has one."""
        return t

    def check_classes(self, classes: int) -> None:
        """Refuse a teacher of V = `classes`."""

    @abc.abstractmethod
    def earlier(self, t: Tensor, step: float, generator: Source) -> Tensor:
        """See `step_time`; what is not below t is moved there."""

    @abc.abstractmethod
    def stepped(self, step: TeacherStep) -> Tensor:
        """See `teacher_step`."""


def check_times(t: Any, batch: int, like: Tensor) -> None:
    """A time per example, floating point, in (0, 1], on the device of the tokens."""
    check_floating(t, "t")
    check_shape(t, "t", "B,", (batch,))
    check_same_device(t, "t", like, "the tokens")
    check_values((t > 0) & (t <= 1), "t must hold times in (0, 1]", t)


def check_rows(tokens: Any, name: str, t: Any, valid: Any, generator: Any) -> None:
    """Tokens (B, D), their times, and None or a bool for each of them."""
    check_int64(tokens, name)
    check_rank(tokens, name, exactly=2)
    check_times(t, len(tokens), tokens)
    check_generator(generator)
    if valid is not None:
        check_tensor(valid, "valid")
        if valid.dtype != torch.bool:
            raise TypeError(f"valid must have dtype torch.bool, got {valid.dtype}")
        check_shape(valid, "valid", "B, D", tokens.shape)
        check_same_device(valid, "valid", tokens, name)
