"""One Di4C distillation step.

A step draws t and x_t, runs the teacher (whose pass gives the targets and all draws of x_u), the
student at x_t and at x_u, and calls `di4c_fast.loss`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ..checks import (
    check_floating,
    check_int,
    check_int64,
    check_kind,
    check_rank,
    check_same_device,
    check_shape,
    check_values,
    check_within,
    without_autocast,
)
from ..groups import agree_but_for_positions, group_name, shared_errors
from ..heads import Head, HeadLike
from ..loss.api import LossTerms, loss
from ..models.call import (
    Context,
    call_model,
    check_callable,
    check_context,
    evaluation_mode,
    repeat_context,
)
from ..processes.base import Process, check_times
from ..rng import generator_uniform
from . import parallel
from .config import WEIGHTS, DistillConfig, DistillOutput, data_weights
from .draws import Source, by_example, check_source, examples_of, of_positions, targets
from .examples import Examples
from .pieces import call_in_pieces

__all__ = ["distill_step", "outside_autocast"]

Heads = tuple[Head, Head]  # of the student and of the teacher
_SHAPES = {
    "latent": "B, N, L",
    "latent_u": "B, K, L",
    "latent_teacher": "B, M, L",
    "latent_min": "B, N, L",
    "u": "B,",
    "xt": "B, D",
    "xu": "B, K, D",
    "consistency_x": "B, K, D",
    "t_min": "B, N",
    "x_min": "B, N, D",
}


def distill_step(
    student: Callable[..., HeadLike],
    teacher: Callable[..., HeadLike],
    x0: Tensor,
    *,
    process: Process,
    config: DistillConfig | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latent: Tensor | None = None,
    latent_u: Tensor | None = None,
    latent_teacher: Tensor | None = None,
    latent_min: Tensor | None = None,
    t: Tensor | None = None,
    u: Tensor | None = None,
    xt: Tensor | None = None,
    xu: Tensor | None = None,
    consistency_x: Tensor | None = None,
    t_min: Tensor | None = None,
    x_min: Tensor | None = None,
    valid: Tensor | None = None,
    context: Context | None = None,
    return_terms: bool = True,
    backward: Callable[[Tensor], None] | None = None,
    components_at_once: int | None = None,
    position_group: Any = None,
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
            for it to draw, gives the same step (dropout draws from the default generator). A
            sequence holds one generator for each example, whose draws then depend on nothing else
            in the batch; they are made example by example.
        latent, latent_u: (B, N, L) and (B, K, L), λ of the student at x_t and at x_u; None
            draws U[0, 1). The loss is differentiable with respect to `latent` if it asks for it.
        latent_teacher: (B, M, L), λ of a Di4C teacher at x_t.
        latent_min: (B, N, L), λ of the student at x_min, for processes with a component pass.
        t: (B,) times in (0, 1]; None draws them. Times may differ within the batch.
        u: (B,) times in [0, t); None for those of `process.step_time`.
        xt, xu: (B, D) and (B, K, D) int64, the noisy tokens at t and the teacher's draws at u;
            None draws them. Rows of xu of examples with t < low_t are not used.
        consistency_x: (B, K, D) int64, draws from the student at x_u, as for `di4c_fast.loss`.
        t_min, x_min: (B, N) in (0, 1] and (B, N, D) int64, times and tokens of the component pass,
            for processes that have one; None draws them. The `DistillOutput` of a step, given back
            by these names, repeats it but for `consistency_x`.
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
        components_at_once: n < N: no model is called on more than B·n rows, and the backward pass
            keeps the activations of so many. The gradient is that of all N at once, with the
            joint weights of all: only the tensors behind the heads (logits, or the hidden states
            of a `LinearHead`) are kept for all N, and every piece of rows runs once more, with
            the same dropout. For models whose rows do not depend on each other. None for N.
            With `backward`, and without torch.distributed, all pieces but one are called without
            a graph first, and build theirs within `Tensor.backward`; `torch.autograd.grad`
            raises. Exceptions: a student whose weights have hooks, or are computed before the
            step from others that require a gradient.
        position_group: process group whose ranks have other positions of the same examples, as for
            `di4c_fast.loss`: x0 (B, D of this rank), models that are called with them and see the
            others by exchanges of their own. `generator` has the same state on every rank; times
            and latents are then the same, and each rank draws tokens of its own. Gradients are
            those of this rank's positions, to be summed over the ranks.

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
    given = {"latent": latent, "latent_u": latent_u, "latent_teacher": latent_teacher}
    given |= {"latent_min": latent_min, "u": u, "xt": xt, "xu": xu, "consistency_x": consistency_x}
    given |= {"t_min": t_min, "x_min": x_min}
    with shared_errors(x0, position_group):
        step = _Step(
            student, teacher, x0, process, config, generator, given, return_terms, backward,
            components_at_once, position_group,
        )  # fmt: skip
        context = check_context(context, len(x0), x0.device)
        t, low = step.times(t)
    some, own_pass = len(x0) > 0, process.component_time is not None
    source, local = step.source, of_positions(step.source, position_group)
    if xt is None:
        xt = step.corrupt(local, x0, t, valid) if some else x0
    if u is None:
        u = step.step_time(source, t) if some else t
    else:
        check_values((u >= 0) & (u < t), "u must hold times with 0 <= u < t", u)
    latent, latent_u = step.latent("latent"), step.latent("latent_u")
    latent_teacher = step.latent("latent_teacher") if config.teacher_components > 1 else None
    if position_group is not None:
        facts = len(x0), config, type(process).__name__, components_at_once
        agree_but_for_positions(
            position_group.group_name, facts, x0.device, t, u, latent, latent_u, latent_teacher
        )
    at_u = u, latent_u, source, local, xu, consistency_x
    examples = Examples(x0, t, xt, latent, latent_teacher, valid, context, *at_u)
    value, terms, xu = step.run(examples, low) if some else step.empty(latent)
    if own_pass and terms is not None:  # not that of x_t
        terms = terms._replace(component=torch.zeros_like(terms.component))
    detached = t.detach(), u.detach(), xt, xu, latent.detach(), latent_u.detach()
    value = step.hand_over(value)  # and free of its graph before the next one is made
    output = DistillOutput(value, terms, *detached, low)
    if own_pass and some and config.component_weight:
        output = step.component(output, examples)
    return output


@contextlib.contextmanager
def outside_autocast(part: Tensor) -> Iterator[None]:
    """Where a part of the loss goes backward."""
    # Casts that autocast made in one pass belong to the graph that is about to be freed.
    torch.clear_autocast_cache()
    with without_autocast(part.device):
        yield


@dataclasses.dataclass(frozen=True)
class _Step:
    """What all parts of a step share.

    Shapes: B examples, N components, D positions, V classes, L latent dimensions.
    """

    student: Callable[..., HeadLike]
    teacher: Callable[..., HeadLike]
    x0: Tensor
    process: Process
    config: DistillConfig
    generator: Any
    given: dict[str, Tensor | None]  # what would be drawn here otherwise
    return_terms: bool
    backward: Callable[[Tensor], None] | None
    components_at_once: int | None
    position_group: Any

    def __post_init__(self) -> None:
        check_callable(self.student, "student")
        check_callable(self.teacher, "teacher")
        check_int64(self.x0, "x0")
        check_rank(self.x0, "x0", exactly=2)
        check_source(self.generator, len(self.x0))
        check_kind(self.process, Process, "process")
        check_kind(self.config, DistillConfig, "config")
        if self.backward is not None:
            check_callable(self.backward, "backward")
        if self.components_at_once is not None:
            check_int(self.components_at_once, "components_at_once", minimum=1)
        if self.position_group is not None:
            group_name(self.position_group, "position_group")
            if getattr(self.process, "couples_positions", False):
                kind = type(self.process).__name__
                raise ValueError(
                    f"position_group needs a process of separate positions, got {kind}"
                )
        time = self.process.component_time
        if time is not None:
            check_within(time, "process.component_time", "(0, 1]")
        for name, value in self.given.items():
            if value is None:
                continue
            (check_int64 if _SHAPES[name].endswith("D") else check_floating)(value, name)
            check_shape(value, name, _SHAPES[name], self.shape(name))
            check_same_device(value, name, self.x0, "x0")
            if name == "latent_teacher" and self.config.teacher_components == 1:
                raise ValueError("latent_teacher needs config.teacher_components > 1, got 1")
            if name.endswith("_min") and time is None:
                kind = type(self.process).__name__
                raise ValueError(f"{name} needs a process with a component_time, got {kind}")

    @property
    def source(self) -> Source:
        return check_source(self.generator, len(self.x0))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what is drawn under that name."""
        config, (batch, positions) = self.config, self.x0.shape
        rows = {"N": config.components, "K": config.draws or config.components}
        rows |= {"M": config.teacher_components, "L": config.latent_dim}
        sizes = {"B": batch, "D": positions, **rows}
        return tuple(sizes[letter] for letter in _SHAPES[name].replace(",", "").split())

    def latent(self, name: str) -> Tensor:
        """Latents as they were given, or drawn."""
        given = self.given[name]
        return self.draw(self.source, *self.shape(name)) if given is None else given

    def draw(self, source: Source, count: int, *shape: int, dim: int = 0) -> Tensor:
        """Uniform numbers of `shape` with the `count` examples as dimension `dim`."""

        def own(generator: torch.Generator | None, examples: slice) -> Tensor:
            size = len(range(count)[examples])
            sizes = (*shape[:dim], size, *shape[dim:])
            return generator_uniform(sizes, generator=generator, device=self.x0.device)

        return by_example(source, own, dim)

    def step_time(self, source: Source, t: Tensor) -> Tensor:
        def own(generator: torch.Generator | None, i: slice) -> Tensor:
            return self.process.step_time(t[i], self.config.teacher_step, generator=generator)

        return by_example(source, own)

    def corrupt(self, source: Source, x0: Tensor, t: Tensor, valid: Tensor | None) -> Tensor:
        def own(generator: torch.Generator | None, i: slice) -> Tensor:
            where = None if valid is None else valid[i]
            return self.process.corrupt(x0[i], t[i], valid=where, generator=generator)

        return by_example(source, own)

    def teacher_step(self, at: Examples, teacher: Head, draws: int) -> Tensor:
        heads = examples_of(teacher, at.local)

        def own(generator: torch.Generator | None, i: slice) -> Tensor:
            given: Any = {"valid": None if at.valid is None else at.valid[i]}
            given["generator"] = generator
            head = heads[i.start or 0]
            return self.process.teacher_step(at.xt[i], at.t[i], at.u[i], head, draws, **given)

        return by_example(at.local, own)

    def times(self, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """The times (B,), and on the CPU which of them are low."""
        config, x0 = self.config, self.x0
        # A component pass of its own leaves no times that are low.
        low_t = config.low_t if self.process.component_time is None else 0.0
        if t is None:
            host = by_example(
                self.source,
                lambda own, i: self.process.sample_times(
                    len(x0[i]),
                    low_t=low_t,
                    low_t_probability=config.low_t_probability if low_t else 0.0,
                    generator=own,
                    device="cpu",
                ),
            )
            return host.to(x0.device, non_blocking=True), host < low_t
        check_kind(t, Tensor, "t")
        check_same_device(t, "t", x0, "x0")
        host = t.detach().cpu()
        check_times(host, len(x0), host)  # on the host: a wrong time is an error at once
        return t, host < low_t

    def hand_over(self, part: Tensor) -> Tensor:
        """A part's value, its graph given to the caller's `backward` if there is one."""
        if self.backward is None:
            return part
        with outside_autocast(part):
            self.backward(part)
        return part.detach()

    def empty(self, latent: Tensor) -> tuple[Tensor, LossTerms | None, None]:
        """The loss of no examples: 0, which every weight of the student has a part in."""
        weights = self.student.parameters() if isinstance(self.student, nn.Module) else ()
        value = torch.zeros((), device=latent.device, requires_grad=True)
        for source in (latent, *weights):
            if source.requires_grad:  # sums of nothing: weights that are not finite leave no NaN
                value = value + source.flatten()[:0].sum().to(value)
        none = value.new_zeros(0)
        terms = LossTerms(*[none] * len(LossTerms._fields)) if self.return_terms else None
        return value, terms, None

    def call(self, name: str, at: Examples, classes: int | None = None) -> Head:
        """The head of "student" or "teacher" at x_t: (B, N, D, V), or (B, D, V) without λ.

        `at.xt` is (B, D), the same for each component, or (B, N, D).
        """
        tokens, t, context, latent = at.xt, at.t, at.context, at.latent
        if latent is not None:
            rows = latent.shape[1]
            if tokens.ndim == 2:
                tokens = repeat(tokens, "b d -> b n d", n=rows)
            tokens, latent = (rearrange(each, "b n d -> (b n) d") for each in (tokens, latent))
            t, context = repeat(t, "b -> (b n)", n=rows), repeat_context(context, rows)

        def run(tokens: Tensor, t: Tensor, latent: Tensor | None, *values: Tensor) -> Head:
            own = dict(zip(context, values, strict=True))
            return call_model(getattr(self, name), name, tokens, t, latent, own, classes)

        # As many calls for some of the examples as for all.
        examples = min(len(at.t), len(self.x0))
        limit = self.components_at_once and examples * self.components_at_once
        nested = self.backward is not None and not parallel.is_distributed()
        head = call_in_pieces(run, (tokens, t, latent, *context.values()), limit, nested=nested)
        return head if latent is None else head.unflatten(len(at.t), rows)

    def predict(self, at: Examples) -> Heads:
        """The student's head at x_t, with a graph, and the teacher's, without one."""
        with torch.no_grad(), evaluation_mode(self.student, self.teacher):
            targets = self.call("teacher", at._replace(latent=at.latent_teacher))
        # Some versions of PyTorch reuse the casts that autocast made without a graph.
        torch.clear_autocast_cache()
        return self.call("student", at, targets.vocabulary), targets

    def loss(self, at: Examples, heads: Heads, share: float, *terms: str, **options: Any) -> Any:
        """`di4c_fast.loss` with these weights of the recipe, times `share`, the others 0.

        The mean over the batch sits in the weights, so that nothing is scaled afterwards.
        """
        config, mask = self.config, self.process.loss_mask_id
        for name in WEIGHTS:
            options[name] = getattr(config, name) * share if name in terms else 0.0
        if "data_weight" in terms:
            # The share is exact, whatever part of a larger batch this is.
            weights = data_weights(at.t, config.data_schedule, config.data_weight)
            options["data_weight"] = weights.double() * share
        if mask is None:
            options.pop("xu", None)
        else:
            options |= {"mask_id": mask, "xt": at.xt}
        return loss(
            *heads,
            at.x0,
            valid=at.valid,
            control_variate=config.control_variate,
            generator=None if isinstance(at.source, tuple) else at.source,
            position_group=self.position_group,
            backend=config.backend,
            **options,
        )

    def run(self, at: Examples, low: Tensor) -> tuple[Tensor, LossTerms | None, Tensor | None]:
        """The three model passes and the loss; the examples that are low get no x_u pass."""
        # The student before the draws: with fewer classes it cannot be called with all tokens.
        high = len(low) - int(low.sum())
        if high in (0, len(low)):
            heads = self.predict(at)
            if not high and parallel.has_shards(self.student):
                # The pass of one example in place of that at x_u, which other ranks may make.
                one = at.select(slice(1))
                with torch.no_grad(), evaluation_mode(self.student):
                    self.call("student", one._replace(latent=one.latent_u))
            value, terms, xu = self.part(at, heads, low=not high)
            return value, terms, xu if high else None
        # Those with an x_u pass first, so that both kinds are contiguous slices.
        order = torch.argsort(low.int(), stable=True)
        inverse = torch.argsort(order).to(at.x0.device, non_blocking=True)
        at = at.select(order)
        (student, low_student), (teacher, low_teacher) = (h.split(high) for h in self.predict(at))
        front, rest = at.select(slice(high)), at.select(slice(high, None))
        value, terms, xu = self.part(front, (student, teacher), low=False)
        low_value, low_terms, low_xu = self.part(rest, (low_student, low_teacher), low=True)
        if self.return_terms:
            pairs = zip(terms, low_terms, strict=True)
            terms = LossTerms(*(torch.cat(pair)[inverse] for pair in pairs))
        return value + low_value, terms, torch.cat([xu, low_xu])[inverse]

    def part(self, at: Examples, heads: Heads, *, low: bool) -> tuple[Tensor, Any, Tensor]:
        """The loss of examples that are all low or all not, their terms, and x_u."""
        (student, teacher), draws = heads, at.latent_u.shape[1]
        options: dict[str, Any] = {"reduction": "sum", "return_terms": self.return_terms}
        if low:
            xu = repeat(at.xt, "b d -> b k d", k=draws)
        else:
            with torch.no_grad(), evaluation_mode(self.student):
                xu = self.teacher_step(at, teacher, draws) if at.xu is None else at.xu
                there = at._replace(xt=xu, t=at.u, latent=at.latent_u)
                head = self.call("student", there, student.vocabulary)
            options |= {"xu": xu, "consistency": head, "consistency_x": at.consistency_x}
            if isinstance(at.local, tuple) and at.consistency_x is None:
                given = self.process.loss_mask_id, at.valid, self.config.backend
                options["consistency_x"] = targets(head, xu, at.local, *given)
        terms = "data_weight", "teacher_weight", "component_weight" if low else "consistency_weight"
        result = self.loss(at, heads, 1.0 / len(self.x0), *terms, **options)
        return (*(result if self.return_terms else (result, None)), xu)

    def component(self, output: DistillOutput, at: Examples) -> DistillOutput:
        """What there is, with the component term from calls of its own."""
        config, process, latent = self.config, self.process, self.latent("latent_min")
        batch, rows, dim = latent.shape
        t, xt, count = self.given["t_min"], self.given["x_min"], batch * rows
        at = at._replace(xu=None, consistency_x=None)
        at = at.select(torch.arange(batch).repeat_interleave(rows))
        if t is None:
            t = latent.new_full((count,), process.component_time or 0.0, dtype=torch.float32)
            if config.component_spread:
                later = self.draw(at.source, count, 2, dim=1)
                t = (t + (later[0] < 0.5) * later[1] * config.component_spread).clamp(max=1.0)
        t = t.flatten()
        if xt is None:
            xt = self.corrupt(at.local, at.x0, t, at.valid)
        at = at._replace(
            t=t,
            xt=xt.reshape(count, -1),
            latent=rearrange(latent, "b n l -> (b n) 1 l"),
            latent_teacher=(
                self.draw(at.source, count, 1, dim) if config.teacher_components > 1 else None
            ),
        )
        weighted = self.loss(
            at, self.predict(at), 1.0 / len(t), "component_weight", reduction="none"
        )
        term = weighted.detach().view(batch, rows).sum(1) * (batch / config.component_weight)
        return dataclasses.replace(
            output,
            loss=output.loss + self.hand_over(weighted.sum()),
            terms=output.terms and output.terms._replace(component=term),
            t_min=t.view(batch, rows),
            x_min=rearrange(at.xt, "(b n) d -> b n d", n=rows),
            latent_min=latent.detach(),
        )
