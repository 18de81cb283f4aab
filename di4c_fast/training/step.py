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
from ..heads import Head, HeadLike
from ..loss.api import LossTerms, loss
from ..models.call import (
    Context,
    call_model,
    check_callable,
    check_context,
    evaluation_mode,
    repeat_context,
    select_context,
)
from ..models.latent import draw_latents
from ..processes import Process
from ..rng import check_generator, generator_uniform
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
    step = _Step(student, teacher, process, config, generator, return_terms, backward)
    given = {
        "latent": latent,
        "latent_u": latent_u,
        "latent_teacher": latent_teacher,
        "latent_min": latent_min,
    }
    step.check(x0, given)
    context = check_context(context, len(x0), x0.device)
    t_host = step.times_on_host(t, len(x0))
    if t is None:
        t = t_host.to(x0.device, non_blocking=True)
    else:
        check_same_device(t, "t", x0, "x0")
    if not len(x0):
        return step.empty(x0, t, latent)
    xt = process.corrupt(x0, t, valid=valid, generator=generator)
    u = process.step_time(t, config.teacher_step, generator=generator)
    latent = step.latents("latent", latent, x0)
    latent_u = step.latents("latent_u", latent_u, x0)
    if config.teacher_components > 1:
        latent_teacher = step.latents("latent_teacher", latent_teacher, x0)

    component_time = process.component_time
    low = t_host < config.low_t if component_time is None else torch.zeros_like(t_host).bool()
    # Examples that need the x_u pass first, so that both kinds are contiguous slices.
    order = torch.argsort(low.int(), stable=True)
    high = len(x0) - int(low.sum())
    permuted = 0 < high < len(x0) and not bool((order[1:] > order[:-1]).all())
    examples = _Examples(x0, t, u, xt, latent, latent_u, latent_teacher, valid, context)
    if permuted:
        order = order.to(x0.device, non_blocking=True)
        examples = examples.select(order)
    value, terms, xu = step.run(examples, high)
    value = step.hand_over(value)
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
    latent_min = step.latents("latent_min", latent_min, x0)
    part, component, t_min, x_min = step.component(x0, latent_min, valid, context, component_time)
    return dataclasses.replace(
        output,
        loss=value + step.hand_over(part),
        terms=None if terms is None else terms._replace(component=component),
        t_min=t_min,
        x_min=x_min,
        latent_min=latent_min.detach(),
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


@dataclasses.dataclass(frozen=True)
class _Step:
    """What all parts of a step share.

    Shapes: B examples, N components, D positions, V classes, L latent dimensions.
    """

    student: Callable[..., HeadLike]
    teacher: Callable[..., HeadLike]
    process: Process
    config: DistillConfig
    generator: torch.Generator | None
    return_terms: bool
    backward: Callable[[Tensor], None] | None

    def check(self, x0: Tensor, given: dict[str, Tensor | None]) -> None:
        check_callable(self.student, "student")
        check_callable(self.teacher, "teacher")
        check_int64(x0, "x0")
        check_rank(x0, "x0", exactly=2)
        check_generator(self.generator)
        process, config = self.process, self.config
        if not isinstance(process, Process):
            raise TypeError(
                f"process must be a Process such as MaskedProcess, got {describe(process)}"
            )
        if not isinstance(config, DistillConfig):
            raise TypeError(f"config must be a DistillConfig or None, got {describe(config)}")
        if self.backward is not None:
            check_callable(self.backward, "backward")
        time = process.component_time
        if time is not None:
            check_number(time, "process.component_time")
            if not 0.0 < time <= 1.0:
                raise ValueError(f"process.component_time must be in (0, 1], got {time}")
        for name, value in given.items():
            if value is not None:
                letter, rows = self.rows(name)
                check_floating(value, name)
                sizes = (len(x0), rows, config.latent_dim)
                check_shape(value, name, f"B, {letter}, L", sizes)
                check_same_device(value, name, x0, "x0")
        if given["latent_teacher"] is not None and config.teacher_components == 1:
            raise ValueError("latent_teacher needs config.teacher_components > 1, got 1")
        if given["latent_min"] is not None and time is None:
            raise ValueError(
                f"latent_min needs a process with a component_time, got {describe(process)}"
            )

    def rows(self, name: str) -> tuple[str, int]:
        """The letter and the number of an example's latents of that name."""
        config = self.config
        if name == "latent_u":
            return "K", config.components if config.draws is None else config.draws
        if name == "latent_teacher":
            return "M", config.teacher_components
        return "N", config.components

    def latents(self, name: str, given: Tensor | None, x0: Tensor) -> Tensor:
        if given is not None:
            return given
        return self.new_latents(len(x0), self.rows(name)[1], x0.device)

    def new_latents(self, batch: int, rows: int, device: torch.device) -> Tensor:
        size = self.config.latent_dim
        return draw_latents(batch, rows, size, generator=self.generator, device=device)

    def times_on_host(self, t: Tensor | None, batch: int) -> Tensor:
        """The times (B,) on the CPU, checked."""
        if t is None:
            # Without a low branch no share of the times is set aside for it.
            low = self.process.component_time is None and self.config.low_t > 0.0
            return self.process.sample_times(
                batch,
                low_t=self.config.low_t if low else 0.0,
                low_t_probability=self.config.low_t_probability if low else 0.0,
                generator=self.generator,
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

    def hand_over(self, part: Tensor) -> Tensor:
        """A part's value, its graph given to the caller's `backward` if there is one."""
        if self.backward is None:
            return part
        # Casts that autocast made in one pass belong to the graph that is about to be freed.
        torch.clear_autocast_cache()
        with without_autocast(part.device):
            self.backward(part)
        return part.detach()

    def empty(self, x0: Tensor, t: Tensor, latent: Tensor | None) -> DistillOutput:
        """A step without examples: loss 0, which every weight of the student has a part in."""
        sources: list[Tensor] = []
        if isinstance(self.student, nn.Module):
            sources = [p for p in self.student.parameters() if p.requires_grad]
        if latent is not None and latent.requires_grad:
            sources.append(latent)
        value = torch.zeros((), device=x0.device, requires_grad=not sources)
        for source in sources:  # sums of nothing: weights that are not finite leave no NaN
            value = value + source.flatten()[:0].sum().to(value)
        none = torch.zeros(0, device=x0.device)
        latents = (self.latents(name, None, x0) for name in ("latent", "latent_u"))
        return DistillOutput(
            self.hand_over(value),
            LossTerms(*[none] * len(LossTerms._fields)) if self.return_terms else None,
            t.detach(),
            t.detach().clone(),
            x0.clone(),
            None,
            *latents,
            torch.zeros(0, dtype=torch.bool),
        )

    def call(
        self,
        name: str,
        tokens: Tensor,
        t: Tensor,
        latent: Tensor | None,
        context: Context,
        vocab_size: int | None = None,
    ) -> Head:
        """One call for all components of all examples; a head (B, N, D, V), or (B, D, V).

        Args:
            name: "student" or "teacher".
            tokens: (B, D), the same for each component, or (B, N, D).
            latent: (B, N, L), or None for a model without λ.
        """
        model = getattr(self, name)
        if latent is None:
            return call_model(model, name, tokens, t, None, context, vocab_size)
        batch, rows = latent.shape[:2]
        if tokens.ndim == 2:
            tokens = tokens.unsqueeze(1).expand(-1, rows, -1)
        tokens, t = tokens.flatten(0, 1), t.repeat_interleave(rows)
        latent, context = latent.flatten(0, 1), repeat_context(context, rows)
        head = call_model(model, name, tokens, t, latent, context, vocab_size)
        return head.unflatten(batch, rows)

    def targets(self, tokens: Tensor, t: Tensor, latent: Tensor | None, context: Context) -> Head:
        with torch.no_grad(), evaluation_mode(self.student, self.teacher):
            head = self.call("teacher", tokens, t, latent, context)
        # Some versions of PyTorch reuse the casts that autocast made without a graph.
        torch.clear_autocast_cache()
        return head

    def loss(
        self, student: Head, teacher: Head, x0: Tensor, xt: Tensor, valid: Any, **options: Any
    ) -> Any:
        mask = self.process.loss_mask_id
        return loss(
            student,
            teacher,
            x0,
            xt=None if mask is None else xt,
            mask_id=mask,
            valid=valid,
            control_variate=self.config.control_variate,
            generator=self.generator,
            backend=self.config.backend,
            **options,
        )

    def run(self, examples: _Examples, high: int) -> tuple[Tensor, LossTerms | None, Tensor | None]:
        """The three model passes and the loss, the first `high` examples with consistency terms."""
        batch, config, process = len(examples.x0), self.config, self.process
        xu, consistency = None, None
        targets = self.targets(examples.xt, examples.t, examples.latent_teacher, examples.context)
        vocab_size = targets.shape[-1]
        # Before the draws: a student of fewer classes must not be called with tokens it lacks.
        prediction = self.call(
            "student", examples.xt, examples.t, examples.latent, examples.context, vocab_size
        )
        draws = self.rows("latent_u")[1]
        if high:
            front = examples.select(slice(high))
            with torch.no_grad(), evaluation_mode(self.student):
                xu = process.teacher_step(
                    front.xt,
                    front.t,
                    front.u,
                    targets if high == batch else targets.split(high)[0],
                    draws,
                    valid=front.valid,
                    generator=self.generator,
                )
                consistency = self.call(
                    "student", xu, front.u, front.latent_u, front.context, vocab_size
                )

        def part_loss(
            part: _Examples, student: Head, teacher: Head, low: bool
        ) -> tuple[Tensor, LossTerms | None]:
            # The mean over the batch sits in the weights, so that nothing is scaled afterwards.
            share = 1.0 / batch
            result = self.loss(
                student,
                teacher,
                part.x0,
                part.xt,
                part.valid,
                consistency=None if low else consistency,
                xu=None if low or process.loss_mask_id is None else xu,
                data_weight=data_weights(part.t, config.data_schedule, config.data_weight * share),
                teacher_weight=config.teacher_weight * share,
                consistency_weight=0.0 if low else config.consistency_weight * share,
                component_weight=config.component_weight * share if low else 0.0,
                reduction="sum",
                return_terms=self.return_terms,
            )
            return result if self.return_terms else (result, None)

        if high in (0, batch):
            return *part_loss(examples, prediction, targets, low=high == 0), xu
        (value, terms), (low_value, low_terms) = (
            part_loss(examples.select(cut), student, teacher, low)
            for cut, student, teacher, low in zip(
                (slice(high), slice(high, None)),
                prediction.split(high),
                targets.split(high),
                (False, True),
                strict=True,
            )
        )
        if terms is not None and low_terms is not None:
            terms = LossTerms(*map(torch.cat, zip(terms, low_terms, strict=True)))
        assert xu is not None
        rest = examples.xt[high:].unsqueeze(1).expand(-1, draws, -1)
        return value + low_value, terms, torch.cat([xu, rest])

    def component(
        self, x0: Tensor, latent: Tensor, valid: Tensor | None, context: Context, time: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The component term from calls of its own: weighted mean, term (B,), t_min, x_min."""
        batch, rows = latent.shape[:2]
        count, weight, spread = (
            batch * rows,
            self.config.component_weight,
            self.config.component_spread,
        )
        t = torch.full((count,), time, dtype=torch.float32, device=x0.device)
        if spread:
            later = generator_uniform((2, count), generator=self.generator, device=x0.device)
            t = (t + (later[0] < 0.5) * later[1] * spread).clamp(max=1.0)
        x0, context = x0.repeat_interleave(rows, dim=0), repeat_context(context, rows)
        valid = None if valid is None else valid.repeat_interleave(rows, dim=0)
        xt = self.process.corrupt(x0, t, valid=valid, generator=self.generator)
        one = self.config.teacher_components == 1
        targets = self.targets(
            xt, t, None if one else self.new_latents(count, 1, x0.device), context
        )
        prediction = self.call(
            "student", xt, t, latent.flatten(0, 1).unsqueeze(1), context, targets.shape[-1]
        )
        weighted = self.loss(
            prediction,
            targets,
            x0,
            xt,
            valid,
            data_weight=0.0,
            teacher_weight=0.0,
            consistency_weight=0.0,
            component_weight=weight / count,
            reduction="none",
        )
        term = weighted.detach().view(batch, rows).sum(1) * (batch / weight)
        return weighted.sum(), term, t.view(batch, rows), xt.view(batch, rows, -1)
