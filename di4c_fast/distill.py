"""One Di4C distillation step.

A step draws t and x_t, runs the teacher once without a graph (that pass gives the targets and
all draws of x_u), runs the student at x_u without a graph and in eval mode, then at x_t with a
graph, and calls `di4c_fast.loss`.

Source: Di4C (arXiv 2410.08709), the losses and training recipes of its three systems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from . import backends
from ._checks import (
    check_choice,
    check_floating,
    check_int64,
    check_number,
    check_rank,
    check_same_device,
    check_shape,
    describe,
)
from ._draws import check_generator
from ._models import (
    Context,
    call_model,
    check_callable,
    check_context,
    evaluation_mode,
    repeat_context,
    select_context,
    split_examples,
    unflatten_rows,
)
from .ema import EMA
from .heads import HeadLike
from .latent import draw_latents
from .loss import LossTerms, loss
from .processes import Process

__all__ = ["EMA", "DistillConfig", "DistillOutput", "data_weights", "distill_step"]

Schedule = Literal["sigmoid", "linear", "constant"]
SCHEDULES = ("sigmoid", "linear", "constant")


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
        component_weight: weight of the component term where t < low_t (the paper: 1; images
            1/0.05).
        low_t: below it the student's components are matched to the teacher directly and
            there are no consistency terms (the paper: 0.02; images 0.05).
        low_t_probability: share of training times below `low_t` (the paper: 0.3).
        control_variate: as in `di4c_fast.loss`.
        latent_dim: L, size of the student's λ (and of a Di4C teacher's).
        teacher_components: M. 1: the teacher is called as teacher(tokens, t). M > 1: a Di4C
            teacher ("di4c²"), called with M rows and fresh λ per example as a student is.
        backend: of the loss.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    components: int = 16
    draws: int | None = None
    teacher_step: float = 1 / 1024
    data_weight: float = 0.1
    data_schedule: Schedule = "sigmoid"
    teacher_weight: float = 1.0
    consistency_weight: float = 1.0
    component_weight: float = 1.0
    low_t: float = 0.02
    low_t_probability: float = 0.3
    control_variate: bool = True
    latent_dim: int = 1
    teacher_components: int = 1
    backend: Literal["auto", "triton", "torch", "reference"] = "auto"

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in _COUNTS}
        if self.draws is not None:
            counts["draws"] = self.draws
        for name, value in counts.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {describe(value)}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in _WEIGHTS:
            check_number(getattr(self, name), name, minimum=0.0)
        for name in ("teacher_step", "low_t", "low_t_probability"):
            value = getattr(self, name)
            check_number(value, name)
            if not 0.0 <= value <= 1.0 or (name == "teacher_step" and value == 0.0):
                bracket = "(" if name == "teacher_step" else "["
                raise ValueError(f"{name} must be in {bracket}0, 1], got {value}")
        check_choice(self.data_schedule, "data_schedule", SCHEDULES)
        check_choice(self.backend, "backend", backends.LOSS_BACKENDS)


_COUNTS = ("components", "latent_dim", "teacher_components")
_WEIGHTS = ("data_weight", "teacher_weight", "consistency_weight", "component_weight")


@dataclasses.dataclass(frozen=True)
class DistillOutput:
    """What a step computed, in the order of x0. Nothing but `loss` has a graph.

    Attributes:
        loss: scalar, mean over examples, in nats; differentiable.
        terms: the unweighted terms (B,), consistency terms 0 where no x_u pass was needed; None
            with `return_terms=False`.
        t, u: (B,) times.
        xt: (B, D) int64.
        xu: (B, K, D) int64; rows of examples without an x_u pass hold x_t. None if no
            example needed the pass.
        latent: (B, N, L), the student's λ at x_t.
        latent_u: (B, K, L), the student's λ at x_u.
        low: (B,) bool on the CPU, which examples took the low-t branch.
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


def distill_step(
    student: Callable[..., HeadLike],
    teacher: Callable[..., HeadLike],
    x0: Tensor,
    *,
    process: Process,
    config: DistillConfig | None = None,
    generator: torch.Generator | None = None,
    latent: Tensor | None = None,
    latent_u: Tensor | None = None,
    latent_teacher: Tensor | None = None,
    t: Tensor | None = None,
    valid: Tensor | None = None,
    context: Context | None = None,
    return_terms: bool = True,
) -> DistillOutput:
    """The distillation loss of one batch, ready for `output.loss.backward()`.

    Per step: one teacher pass of B rows (B·M for a Di4C teacher), one student pass of K rows
    for each example with t >= low_t, one student pass of B·N rows with a graph. Examples
    with t < low_t get the component term instead of the consistency terms.

    Args:
        student: callable (tokens (R, D) int64, t (R,), latent (R, L), **context) to logits
            (R, D, V) or a head; rows of an example are adjacent.
        teacher: callable (tokens (R, D), t (R,), **context) to the same; with
            `teacher_components` > 1 called as a student.
        x0: (B, D) int64 data.
        process: gives x_t, u and x_u.
        config: the recipe; None for the defaults.
        generator: source of every draw made here: t, x_t, λ, x_u, x^k, in that order. The
            same state gives the same step (dropout draws from the default generator).
        latent, latent_u: (B, N, L) and (B, K, L), λ of the student at x_t and at x_u; None
            draws U[0, 1). The loss is differentiable with respect to `latent` if it asks for it.
        latent_teacher: (B, M, L), λ of a Di4C teacher.
        t: (B,) times in (0, 1]; None draws them. Times may differ within the batch.
        valid: (B, D) bool; False (padding, prompt) keeps its token in x_t and x_u, carries no
            loss, and may hold mask tokens.
        context: tensors (B, ...) by keyword, repeated along the rows and given to both models
            (class labels, attention masks).
        return_terms: False leaves the unweighted terms out; terms of weight 0 then cost nothing.

    The teacher and the x_u pass run without a graph, and in eval mode where the callable is an
    `nn.Module`; the pass at x_t runs in the mode that the student is in. Which examples need
    the x_u pass is decided on the host: one sync if `t` or `generator` lives on a GPU, none
    otherwise, besides those of `process.teacher_step`.

    Returns:
        `DistillOutput`.

    Raises:
        TypeError, ValueError: before any work for arguments, and as soon as a model returns
            something of the wrong shape.
    """
    config = DistillConfig() if config is None else config
    check_callable(student, "student")
    check_callable(teacher, "teacher")
    check_int64(x0, "x0")
    check_rank(x0, "x0", exactly=2)
    check_generator(generator)
    if not isinstance(process, Process):
        raise TypeError(f"process must be a Process such as MaskedProcess, got {describe(process)}")
    if not isinstance(config, DistillConfig):
        raise TypeError(f"config must be a DistillConfig or None, got {describe(config)}")
    batch = x0.shape[0]
    draws = config.components if config.draws is None else config.draws
    given = {
        "latent": (latent, config.components),
        "latent_u": (latent_u, draws),
        "latent_teacher": (latent_teacher, config.teacher_components),
    }
    for name, (value, rows) in given.items():
        if value is not None:
            _check_latent(value, name, (batch, rows, config.latent_dim), x0)
    if latent_teacher is not None and config.teacher_components == 1:
        raise ValueError("latent_teacher needs config.teacher_components > 1, got 1")
    context = check_context(context, batch, x0.device)
    if batch == 0:
        raise ValueError(f"x0 must hold at least one example, got shape {tuple(x0.shape)}")

    t_host = _times_on_host(t, process, config, batch, generator)
    if t is None:
        t = t_host.to(x0.device, non_blocking=True)
    else:
        check_same_device(t, "t", x0, "x0")
    xt = process.corrupt(x0, t, valid=valid, generator=generator)
    u = process.step_time(t, config.teacher_step, generator=generator)

    def latents(given: Tensor | None, rows: int) -> Tensor:
        if given is not None:
            return given
        return draw_latents(batch, rows, config.latent_dim, generator=generator, device=x0.device)

    latent = latents(latent, config.components)
    latent_u = latents(latent_u, draws)
    if config.teacher_components > 1:
        latent_teacher = latents(latent_teacher, config.teacher_components)

    low = t_host < config.low_t
    # Examples that need the x_u pass first, so that both kinds are contiguous slices.
    order = torch.argsort(low.int(), stable=True)
    high = batch - int(low.sum())
    permuted = 0 < high < batch and not bool((order[1:] > order[:-1]).all())
    examples = _Examples(x0, t, u, xt, latent, latent_u, latent_teacher, valid, context)
    if permuted:
        order = order.to(x0.device, non_blocking=True)
        examples = examples.select(order)
    value, terms, xu = _sorted_step(
        student, teacher, examples, high, draws, process, config, generator, return_terms
    )
    if permuted:
        inverse = torch.argsort(order)
        terms = None if terms is None else LossTerms(*(term[inverse] for term in terms))
        xu = None if xu is None else xu[inverse]
    return DistillOutput(
        value, terms, t.detach(), u.detach(), xt, xu, latent.detach(), latent_u.detach(), low
    )


@dataclasses.dataclass(frozen=True)
class _Examples:
    """The per-example tensors of a step, so that they are permuted and cut together."""

    x0: Tensor
    t: Tensor
    u: Tensor
    xt: Tensor
    latent: Tensor
    latent_u: Tensor
    latent_teacher: Tensor | None
    valid: Tensor | None
    context: Context

    def select(self, index: Tensor | slice) -> _Examples:
        changes: dict[str, Any] = {"context": select_context(self.context, index)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = value[index]
        return dataclasses.replace(self, **changes)


def _sorted_step(
    student: Callable[..., HeadLike],
    teacher: Callable[..., HeadLike],
    examples: _Examples,
    high: int,
    draws: int,
    process: Process,
    config: DistillConfig,
    generator: torch.Generator | None,
    return_terms: bool,
) -> tuple[Tensor, LossTerms | None, Tensor | None]:
    """The three model passes and the loss, the first `high` examples with consistency terms."""
    batch = examples.x0.shape[0]
    xu, consistency = None, None
    with torch.no_grad(), evaluation_mode(student, teacher):
        targets = _component_pass(
            teacher, "teacher", examples.xt, examples.t, examples.latent_teacher, examples.context
        )
        vocab_size = targets.shape[-1]
        if high:
            front = examples.select(slice(high))
            front_targets = targets if high == batch else split_examples(targets, high)[0]
            xu = process.teacher_step(
                front.xt, front.t, front.u, front_targets, draws, generator=generator
            )
            if front.valid is not None:
                xu = torch.where(front.valid.unsqueeze(1), xu, front.xt.unsqueeze(1))
            consistency = _component_pass(
                student, "student", xu, front.u, front.latent_u, front.context, vocab_size
            )
    # Some versions of PyTorch reuse the casts that autocast made without a graph.
    torch.clear_autocast_cache()
    prediction = _component_pass(
        student, "student", examples.xt, examples.t, examples.latent, examples.context, vocab_size
    )

    def part_loss(
        part: _Examples, student_head: HeadLike, teacher_head: HeadLike, low: bool
    ) -> tuple[Tensor, LossTerms | None]:
        masks = process.loss_mask_id is not None
        # The mean over the batch sits in the weights, so that nothing is scaled afterwards.
        share = 1.0 / batch
        arguments: dict[str, Any] = {
            "consistency": None if low else consistency,
            "xt": part.xt if masks else None,
            "xu": xu if masks and not low else None,
            "mask_id": process.loss_mask_id,
            "valid": part.valid,
            "data_weight": data_weights(part.t, config.data_schedule, config.data_weight * share),
            "teacher_weight": config.teacher_weight * share,
            "consistency_weight": 0.0 if low else config.consistency_weight * share,
            "component_weight": config.component_weight * share if low else 0.0,
            "control_variate": config.control_variate,
            "reduction": "sum",
            "generator": generator,
            "backend": config.backend,
        }
        if return_terms:
            return loss(student_head, teacher_head, part.x0, return_terms=True, **arguments)
        return loss(student_head, teacher_head, part.x0, **arguments), None

    if high in (0, batch):
        value, terms = part_loss(examples, prediction, targets, low=high == 0)
        return value, terms, xu
    students = split_examples(prediction, high)
    teachers = split_examples(targets, high)
    cuts = (slice(high), slice(high, None))
    (front_value, front_terms), (back_value, back_terms) = (
        part_loss(examples.select(cut), students[i], teachers[i], low=i == 1)
        for i, cut in enumerate(cuts)
    )
    terms = None
    if front_terms is not None and back_terms is not None:
        terms = LossTerms(*map(torch.cat, zip(front_terms, back_terms, strict=True)))
    assert xu is not None
    rest = examples.xt[high:].unsqueeze(1).expand(-1, draws, -1)
    return front_value + back_value, terms, torch.cat([xu, rest])


def _component_pass(
    model: Callable[..., HeadLike],
    name: str,
    tokens: Tensor,
    t: Tensor,
    latent: Tensor | None,
    context: Context,
    vocab_size: int | None = None,
) -> Any:
    """One call for all components of all examples; a head (B, N, D, V), or (B, D, V) without λ.

    tokens: (B, D), the same for each component, or (B, N, D).
    """
    if latent is None:
        return call_model(model, name, tokens, t, None, context, vocab_size)
    batch, rows = latent.shape[:2]
    if tokens.ndim == 2:
        tokens = tokens.unsqueeze(1).expand(-1, rows, -1)
    head = call_model(
        model,
        name,
        tokens.flatten(0, 1),
        t.repeat_interleave(rows),
        latent.flatten(0, 1),
        repeat_context(context, rows),
        vocab_size,
    )
    return unflatten_rows(head, batch, rows)


def _check_latent(value: Any, name: str, sizes: tuple[int, int, int], x0: Tensor) -> None:
    check_floating(value, name)
    letters = {"latent": "B, N, L", "latent_u": "B, K, L", "latent_teacher": "B, M, L"}[name]
    check_shape(value, name, letters, sizes)
    check_same_device(value, name, x0, "x0")


def _times_on_host(
    t: Tensor | None,
    process: Process,
    config: DistillConfig,
    batch: int,
    generator: torch.Generator | None,
) -> Tensor:
    """The times (B,) on the CPU, checked."""
    if t is None:
        return process.sample_times(
            batch,
            low_t=config.low_t,
            low_t_probability=config.low_t_probability,
            generator=generator,
            device="cpu",
        )
    check_floating(t, "t")
    check_shape(t, "t", "B,", (batch,))
    t_host = t.detach().cpu()
    wrong = ~((t_host > 0) & (t_host <= 1))
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(f"t must hold times in (0, 1], got {t_host[index].item()} at {index}")
    return t_host
