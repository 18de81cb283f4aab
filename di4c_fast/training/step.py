"""One Di4C distillation step.

A step draws t and x_t, runs the teacher once without a graph (that pass gives the targets and
all draws of x_u), runs the student at x_t with a graph, then at x_u without one and in eval mode,
and calls `di4c_fast.loss`. Processes with a time of their own for the component term
(`Process.component_time`) add one teacher pass and one student pass at that time.

Source: Di4C (arXiv 2410.08709), the losses and training recipes of its three systems.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import (
    check_floating,
    check_int64,
    check_number,
    check_rank,
    check_same_device,
    check_shape,
    describe,
    without_autocast,
)
from ..heads import HeadLike
from ..loss.api import LossTerms, loss
from ..models.call import (
    Context,
    check_callable,
    check_context,
    evaluation_mode,
    select_context,
    split_examples,
)
from ..models.latent import draw_latents
from ..processes import Process
from ..rng import check_generator
from .component import call_components, component_step
from .config import SCHEDULES, DistillConfig, Schedule, data_weights
from .ema import EMA

__all__ = [
    "EMA",
    "SCHEDULES",
    "DistillConfig",
    "DistillOutput",
    "Schedule",
    "data_weights",
    "distill_step",
]


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
    latent_min: Tensor | None = None,
    t: Tensor | None = None,
    valid: Tensor | None = None,
    context: Context | None = None,
    return_terms: bool = True,
    backward: Callable[[Tensor], None] | None = None,
) -> DistillOutput:
    """The distillation loss of one batch, ready for `output.loss.backward()`.

    Per step: one teacher pass of B rows (B·M for a Di4C teacher), one student pass of B·N rows
    with a graph, one student pass of K rows for each example with t >= low_t. Examples with
    t < low_t get the component term instead of the consistency terms.

    If `process.component_time` is a number, no example takes the low-t branch. Instead one
    teacher pass of B·N rows and one student pass of B·N rows with a graph follow, at
    x_min ~ q(. | x0) drawn anew for every row, one λ per row, and the loss gains
    component_weight · mean over n of Σ_d KL(q_T[d] ‖ p[n,d]) at x_min[n]. A Di4C teacher has one
    λ per row there: q_T enters the gradient linearly, so that its expectation is that of
    the teacher's whole mixture.

    Args:
        student: callable (tokens (R, D) int64, t (R,), latent (R, L), **context) to logits
            (R, D, V) or a head; rows of an example are adjacent.
        teacher: callable (tokens (R, D), t (R,), **context) to the same; with
            `teacher_components` > 1 called as a student.
        x0: (B, D) int64 data.
        process: gives x_t, u and x_u.
        config: the recipe; None for the defaults.
        generator: source of every draw made here. The same state, with the same arguments left
            for it to draw, gives the same step (dropout draws from the default generator).
        latent, latent_u: (B, N, L) and (B, K, L), λ of the student at x_t and at x_u; None
            draws U[0, 1). The loss is differentiable with respect to `latent` if it asks for it.
        latent_teacher: (B, M, L), λ of a Di4C teacher at x_t.
        latent_min: (B, N, L), λ of the student at x_min, for processes with a component pass.
        t: (B,) times in (0, 1]; None draws them. Times may differ within the batch.
        valid: (B, D) bool; False (padding, prompt) keeps its token in x_t and x_u, carries no
            loss, and may hold mask tokens.
        context: tensors (B, ...) by keyword, repeated along the rows and given to both models
            (class labels, attention masks).
        return_terms: False leaves the unweighted terms out; terms of weight 0 then cost nothing.
            A component pass of weight 0 is left out in any case, its term then being 0.
        backward: called with every part of the loss, a scalar with a graph, as soon as it
            exists: lambda part: part.backward(). With a component pass there are two parts,
            and only one graph is alive at a time; the returned loss then has none. Autocast is
            off during the call.

    The teacher and the x_u pass run without a graph, and in eval mode where the callable is an
    `nn.Module`; the pass at x_t runs in the mode that the student is in. Which examples need
    the x_u pass is decided on the host: one sync if `t` or `generator` lives on a GPU, none
    otherwise, besides those of `process.teacher_step`.

    Returns:
        `DistillOutput`. An empty batch calls no model and draws nothing: its loss is 0 with a
        gradient of 0 for every parameter of a student that is an `nn.Module`.

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
    if backward is not None:
        check_callable(backward, "backward")
    component_time = process.component_time
    if component_time is not None:
        check_number(component_time, "process.component_time")
        if not 0.0 < component_time <= 1.0:
            raise ValueError(f"process.component_time must be in (0, 1], got {component_time}")
    batch = x0.shape[0]
    draws = config.components if config.draws is None else config.draws
    given = {
        "latent": (latent, config.components),
        "latent_u": (latent_u, draws),
        "latent_teacher": (latent_teacher, config.teacher_components),
        "latent_min": (latent_min, config.components),
    }
    for name, (value, rows) in given.items():
        if value is not None:
            _check_latent(value, name, (batch, rows, config.latent_dim), x0)
    if latent_teacher is not None and config.teacher_components == 1:
        raise ValueError("latent_teacher needs config.teacher_components > 1, got 1")
    if latent_min is not None and component_time is None:
        raise ValueError(
            f"latent_min needs a process with a component_time, got {describe(process)}"
        )
    context = check_context(context, batch, x0.device)

    t_host = _times_on_host(t, process, config, batch, generator)
    if t is None:
        t = t_host.to(x0.device, non_blocking=True)
    else:
        check_same_device(t, "t", x0, "x0")
    if batch == 0:
        return _empty_step(student, x0, t, latent, config, draws, return_terms, backward)
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

    low = t_host < config.low_t if component_time is None else torch.zeros_like(t_host).bool()
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
    if backward is not None:
        value = _run_backward(backward, value)
    if permuted:
        inverse = torch.argsort(order)
        terms = None if terms is None else LossTerms(*(term[inverse] for term in terms))
        xu = None if xu is None else xu[inverse]
    output = DistillOutput(
        value, terms, t.detach(), u.detach(), xt, xu, latent.detach(), latent_u.detach(), low
    )
    if component_time is None:
        return output
    if config.component_weight == 0.0:
        if terms is not None:
            terms = terms._replace(component=torch.zeros_like(terms.component))
        return dataclasses.replace(output, terms=terms)
    latent_min = latents(latent_min, config.components)
    part, component, t_min, x_min = component_step(
        student, teacher, x0, latent_min, valid, context, component_time, process, config, generator
    )
    if backward is not None:
        part = _run_backward(backward, part)
    return dataclasses.replace(
        output,
        loss=value + part,
        terms=None if terms is None else terms._replace(component=component),
        t_min=t_min,
        x_min=x_min,
        latent_min=latent_min.detach(),
    )


def _run_backward(backward: Callable[[Tensor], None], part: Tensor) -> Tensor:
    """The part's value, its graph handed to the caller's function."""
    # Casts that autocast made in one pass belong to the graph that is about to be freed.
    torch.clear_autocast_cache()
    with without_autocast(part.device):
        backward(part)
    return part.detach()


def _empty_step(
    student: Callable[..., HeadLike],
    x0: Tensor,
    t: Tensor,
    latent: Tensor | None,
    config: DistillConfig,
    draws: int,
    return_terms: bool,
    backward: Callable[[Tensor], None] | None,
) -> DistillOutput:
    """A step without examples: loss 0, which every weight of the student has a part in."""
    sources: list[Tensor] = []
    if isinstance(student, nn.Module):
        sources = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if latent is not None and latent.requires_grad:
        sources.append(latent)
    value = torch.zeros((), device=x0.device, requires_grad=not sources)
    for source in sources:  # sums of nothing: weights that are not finite leave no NaN
        value = value + source.flatten()[:0].sum().to(value)
    if backward is not None:
        value = _run_backward(backward, value)

    def empty(*sizes: int) -> Tensor:
        return torch.zeros((0, *sizes), device=x0.device)

    return DistillOutput(
        value,
        LossTerms(*(empty() for _ in LossTerms._fields)) if return_terms else None,
        t.detach(),
        t.detach().clone(),
        x0.clone(),
        None,
        empty(config.components, config.latent_dim),
        empty(draws, config.latent_dim),
        torch.zeros(0, dtype=torch.bool),
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
        targets = call_components(
            teacher, "teacher", examples.xt, examples.t, examples.latent_teacher, examples.context
        )
    vocab_size = targets.shape[-1]
    # Some versions of PyTorch reuse the casts that autocast made without a graph.
    torch.clear_autocast_cache()
    # Before the draws: a student of fewer classes must not be called with tokens it lacks.
    prediction = call_components(
        student, "student", examples.xt, examples.t, examples.latent, examples.context, vocab_size
    )
    if high:
        front = examples.select(slice(high))
        with torch.no_grad(), evaluation_mode(student, teacher):
            front_targets = targets if high == batch else split_examples(targets, high)[0]
            xu = process.teacher_step(
                front.xt,
                front.t,
                front.u,
                front_targets,
                draws,
                valid=front.valid,
                generator=generator,
            )
            consistency = call_components(
                student, "student", xu, front.u, front.latent_u, front.context, vocab_size
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


def _check_latent(value: Any, name: str, sizes: tuple[int, int, int], x0: Tensor) -> None:
    check_floating(value, name)
    count = {"latent_u": "K", "latent_teacher": "M"}.get(name, "N")
    letters = f"B, {count}, L"
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
        # Without a low branch no share of the times is set aside for it.
        low = process.component_time is None and config.low_t > 0.0
        return process.sample_times(
            batch,
            low_t=config.low_t if low else 0.0,
            low_t_probability=config.low_t_probability if low else 0.0,
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
