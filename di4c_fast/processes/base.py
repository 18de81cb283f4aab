"""What `distill_step` asks of a noise process, and the checks that processes share.

Time t is in (0, 1]; 1 is pure noise for every process, so that schedules of weights read the
same everywhere.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..checks import (
    check_floating,
    check_int64,
    check_rank,
    check_same_device,
    check_shape,
    check_tensor,
    check_values,
    describe,
)
from ..heads import HeadLike


@runtime_checkable
class Process(Protocol):
    """A noise process q(x_t | x_0) and one reverse step of a teacher under it.

    Shapes: B examples, K draws, M teacher components, D positions, V classes.
    """

    @property
    def loss_mask_id(self) -> int | None:
        """The mask token that the loss leaves out of every softmax; None if every class counts.

        If it is not None, the loss is given x_t and x_u and counts masked positions only.
        """

    @property
    def component_time(self) -> float | None:
        """Time in (0, 1] of the component term's own pass; None if it has none.

        None: examples with t < low_t get the component term instead of the consistency terms. A
        number: every step compares student and teacher at x ~ q(. | x_0) at that time, N
        draws per example with one λ each, and `low_t` is not used.
        """

    def sample_times(
        self,
        batch: int,
        *,
        low_t: float = 0.0,
        low_t_probability: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Training times (B,), float32; below `low_t` with probability `low_t_probability`."""

    def corrupt(
        self,
        x0: Tensor,
        t: Tensor,
        *,
        valid: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x_t ~ q(. | x_0), (B, D); positions outside `valid` (B, D) stay as they are."""

    def step_time(
        self, t: Tensor, step: float, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The time u < t (B,) at which one teacher step of about `step` from t ends."""

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
        """K draws of x_u | x_t, (B, K, D), all from one teacher pass (B, D, V) or (B, M, D, V).

        Positions outside `valid` (B, D) keep their token, whatever it is.
        """


def check_times(t: Any, name: str, batch: int, like: Tensor) -> None:
    """A time per example, floating point, in (0, 1], on the device of the tokens."""
    check_floating(t, name)
    check_shape(t, name, "B,", (batch,))
    check_same_device(t, name, like, "the tokens")
    check_values((t > 0) & (t <= 1), f"{name} must hold times in (0, 1]", t)


def widened(t: Tensor) -> Tensor:
    """Times in at least float32, which a small step from 1 needs."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def before(u: Tensor, t: Tensor) -> Tensor:
    """u, or the number before t where rounding has brought u back to t."""
    return torch.minimum(u, torch.nextafter(t, torch.zeros_like(t)))


def check_valid(valid: Any, tokens: Tensor, name: str) -> None:
    """A bool for each of the tokens (B, D), on their device."""
    check_tensor(valid, "valid")
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must have dtype torch.bool, got {valid.dtype}")
    check_shape(valid, "valid", "B, D", tokens.shape)
    check_same_device(valid, "valid", tokens, name)


def check_teacher_step(
    xt: Any, t: Any, u: Any, draws: Any, valid: Tensor | None
) -> tuple[int, int]:
    """The arguments that every `teacher_step` shares; (B, D)."""
    check_int64(xt, "xt")
    check_rank(xt, "xt", exactly=2)
    batch, positions = xt.shape
    check_times(t, "t", batch, xt)
    check_tensor(u, "u")
    check_shape(u, "u", "B,", (batch,))
    check_same_device(u, "u", xt, "xt")
    check_values((u >= 0) & (u < t), "u must hold times with 0 <= u < t", u)
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"draws must be an int, got {describe(draws)}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if valid is not None:
        check_valid(valid, xt, "xt")
    return batch, positions
