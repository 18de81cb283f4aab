"""The recipe of a distillation step: weights, their schedules over time, sizes; its result."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from .. import backends
from ..checks import check_choice, check_int, check_number, check_within
from ..loss.api import LossTerms

__all__ = ["SCHEDULES", "DistillConfig", "DistillOutput", "Schedule", "data_weights"]

Schedule = Literal["sigmoid", "linear", "constant"]
SCHEDULES = ("sigmoid", "linear", "constant")
WEIGHTS = ("data_weight", "teacher_weight", "consistency_weight", "component_weight")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """The recipe of a step; the defaults are those of the paper's masked language experiment.

    Args:
        components: N, latent draws of the student per example (the paper: 16; images 32).
        draws: K, draws of x_u per example; None for N, as in the paper.
        teacher_step: length of the teacher's step; the step from t is min(teacher_step, t/2)
            for masked diffusion (the paper: 1/1024).
        data_weight: weight of the data correlation before its schedule (the paper: 0.1).
        data_schedule: factor of `data_weight` over time, see `data_weights`.
        teacher_weight: weight of KL(q_T || marginal) (the paper: 1).
        consistency_weight: weight of both consistency terms where t >= low_t (the paper: 1).
        component_weight: weight of the component term where t < low_t, or of the component
            pass of processes that have one (the paper: 1; VQ images 1/0.05; pixels 1).
        component_spread: times of that pass are `process.component_time`, plus with
            probability 1/2 a uniform number in [0, component_spread) (the paper's pixels: 0.01).
        low_t: below it the student's components are matched to the teacher directly and
            there are no consistency terms (the paper: 0.02; images 0.05). Not used for
            processes with a component pass.
        low_t_probability: share of training times below `low_t` (the paper: 0.3). Not used
            where `low_t` is not, nor with `low_t` = 0, which switches the branch off.
        control_variate: as in `di4c_fast.loss`.
        latent_dim: L, size of the student's λ (and of a Di4C teacher's).
        teacher_components: M. 1: the teacher is called as teacher(tokens, t). M > 1: a Di4C
            teacher ("di4c²"), called with M rows and fresh λ per example as a student is.
        backend: of the loss.
    """

    components: int = 16
    draws: int | None = None
    teacher_step: float = 1 / 1024
    data_weight: float = 0.1
    data_schedule: Schedule = "sigmoid"
    teacher_weight: float = 1.0
    consistency_weight: float = 1.0
    component_weight: float = 1.0
    component_spread: float = 0.0
    low_t: float = 0.02
    low_t_probability: float = 0.3
    control_variate: bool = True
    latent_dim: int = 1
    teacher_components: int = 1
    backend: Literal["auto", "triton", "cpu", "torch", "reference"] = "auto"

    def __post_init__(self) -> None:
        for name in ("components", "draws", "latent_dim", "teacher_components"):
            if name != "draws" or self.draws is not None:
                check_int(getattr(self, name), name, minimum=1)
        for name in WEIGHTS:
            check_number(getattr(self, name), name, minimum=0.0)
        check_within(self.teacher_step, "teacher_step", "(0, 1]")
        for name in ("component_spread", "low_t", "low_t_probability"):
            check_within(getattr(self, name), name, "[0, 1]")
        check_choice(self.data_schedule, "data_schedule", SCHEDULES)
        check_choice(self.backend, "backend", backends.names())


def data_weights(t: Tensor, schedule: Schedule, weight: float = 1.0) -> Tensor:
    """Weight of the data correlation at time t, where t = 1 is pure noise.

    "sigmoid": weight·σ(20(t - 1/2)); "linear": weight·t; "constant": weight.

    Args:
        t: any shape, floating point.

    Returns:
        The shape and dtype of `t`.

    >>> data_weights(torch.tensor([0.5, 1.0]), "linear", 0.1)
    tensor([0.0500, 0.1000])
    """
    check_choice(schedule, "schedule", SCHEDULES)
    if schedule == "sigmoid":
        return weight * torch.sigmoid(20.0 * (t - 0.5))
    if schedule == "linear":
        return weight * t
    return torch.full_like(t, weight)


@dataclasses.dataclass(frozen=True)
class DistillOutput:
    """What a step computed, in the order of x0. Nothing but `loss` has a graph.

    Attributes:
        loss: scalar, mean over examples, in nats; differentiable, unless `backward` was given.
        terms: the unweighted terms (B,), consistency terms 0 where no x_u pass was needed, the
            component term that of the pass at x_min where there is one; None with
            `return_terms=False`.
        t, u: (B,) times.
        xt: (B, D) int64.
        xu: (B, K, D) int64; rows of examples without an x_u pass hold x_t. None if no
            example needed the pass.
        latent: (B, N, L), the student's λ at x_t.
        latent_u: (B, K, L), the student's λ at x_u.
        low: (B,) bool on the CPU, which examples took the low-t branch.
        t_min: (B, N) times of the component pass; None, as the two below, if there was none.
        x_min: (B, N, D) int64, its tokens.
        latent_min: (B, N, L), the student's λ there.
    """

    loss: Tensor
    terms: LossTerms | None
    t: Tensor
    u: Tensor
    xt: Tensor
    xu: Tensor | None
    latent: Tensor
    latent_u: Tensor
    low: Tensor
    t_min: Tensor | None = None
    x_min: Tensor | None = None
    latent_min: Tensor | None = None
