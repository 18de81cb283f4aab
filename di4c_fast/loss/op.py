"""The loss as a node of the graph: an op where the call is traced, else an autograd function.

`di4c_fast::mixture` evaluates a problem, `di4c_fast::mixture_backward` gives its gradients. They
take a list of tensors and a text that holds everything else (`record`), have fake versions
and an autograd formula, and so work under `torch.compile` as they are. Eager calls save the time
of the dispatcher, about 0.4 ms a step, and heads of one's own, which no op can take, run, too.
Either way the gradient is computed from the upstream gradient, so backward may run again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, record
from ..checks import without_autocast
from ..heads import TensorHead
from ..passes.base import Values
from .driver import Saved, backward, forward, gradient_strides, is_dense, new_saved
from .problem import Problem

ONCE = (
    "the losses of di4c_fast can be differentiated once; a second derivative (a gradient "
    'penalty, a Hessian) needs backend="reference"'
)
BACKWARD_ONLY = (
    "the losses of di4c_fast have no forward-mode derivatives (jvp, forward_ad); use backward, or "
    'backend="reference"'
)
VALUES = len(Values._fields)


def evaluate(problem: Problem, backend: str) -> Values:
    """The values of a problem; differentiable with respect to the student and the log-weights."""
    student = problem.student
    if not torch.compiler.is_compiling():
        for tensor in (*student.tensors(), problem.log_weights):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(BACKWARD_ONLY)
    needs_grad = torch.is_grad_enabled() and student.requires_grad
    encoded = record.encode(problem)
    if encoded is None:
        parts = [t for t in (*student.tensors(), problem.log_weights) if t is not None]
        found = _Evaluation.apply(problem, None, backend, needs_grad, False, *parts)
    elif record.is_traced(encoded[0]):
        found = mixture(*encoded, backend, needs_grad)
    else:
        tensors, text = encoded
        in_place = isinstance(student, TensorHead) and _writes_over(student, problem)
        found = _Evaluation.apply(problem, text, backend, needs_grad, in_place, *tensors)
    rows, loss, *terms = found[:VALUES]
    return Values(rows, loss, *(term.detach() for term in terms))


def _writes_over(student: TensorHead, problem: Problem) -> bool:
    """Whether the gradient goes over the logits: memory that logits share cannot hold it.

    Only for eager calls: a compiled backward owns its memory.
    """
    logits = student.logits()
    if not student.in_place_gradient or not is_dense(logits):
        return False
    own = logits.untyped_storage()._cdata
    for name, head in (("teacher", problem.teacher), ("consistency", problem.consistency)):
        for tensor in () if head is None else head.tensors():
            if tensor is not None and tensor.untyped_storage()._cdata == own:
                raise ValueError(
                    f"in_place_gradient=True would overwrite {name}, which shares the memory of "
                    "the student's logits: pass a copy"
                )
    return True


@contextlib.contextmanager
def _on_device_of(tensor: Tensor) -> Iterator[None]:
    """Run on the device of `tensor`, which need not be the current one, without autocast."""
    guard = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    with without_autocast(tensor.device), guard, torch.no_grad():
        yield


def _passes(problem: Problem, backend: str) -> Any:
    return backends.passes_for(backend, problem.student.device, problem.dtype)


@torch.library.custom_op("di4c_fast::mixture", mutates_args=())
def mixture(tensors: list[Tensor], text: str, backend: str, needs_grad: bool) -> list[Tensor]:
    """The fields of `Values`, then the tensors of `Saved`."""
    problem = record.decode(Problem, tensors, text)
    with _on_device_of(problem.log_weights):
        values, saved = forward(problem, _passes(problem, backend), needs_grad)
    return [*values, *saved.tensors()]


@mixture.register_fake
def _(tensors: list[Tensor], text: str, backend: str, needs_grad: bool) -> list[Tensor]:
    problem = record.decode(Problem, tensors, text)
    _, saved = new_saved(problem, _passes(problem, backend), needs_grad)
    like, batch = problem.log_weights, problem.log_weights.shape[0]
    values = [like.new_empty(batch) for _ in range(VALUES - 1)]
    return [like.new_empty(batch, problem.targets), *values, *saved.tensors()]


@torch.library.custom_op("di4c_fast::mixture_backward", mutates_args=())
def mixture_backward(
    tensors: list[Tensor],
    text: str,
    backend: str,
    saved: list[Tensor],
    upstream: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the student's tensors and of the log-weights; empty where not needed.

    `upstream` holds those of the rows and of the loss, empty ones for 0.
    """
    problem = record.decode(Problem, tensors, text)
    given = [part if part.numel() else None for part in upstream]
    found = _gradients(problem, backend, Saved.of(saved), given, needs, False)
    return [problem.log_weights.new_empty(0) if part is None else part for part in found]


@mixture_backward.register_fake
def _(
    tensors: list[Tensor],
    text: str,
    backend: str,
    saved: list[Tensor],
    upstream: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    problem = record.decode(Problem, tensors, text)
    parts = [*problem.student.tensors(), problem.log_weights]
    found = []
    for part, need in zip(parts, needs, strict=True):
        if part is None or not need:
            found.append(problem.log_weights.new_empty(0))
        elif part is problem.log_weights:
            found.append(torch.empty(part.shape, dtype=part.dtype, device=part.device))
        elif isinstance(problem.student, TensorHead):
            found.append(part.new_empty_strided(part.shape, gradient_strides(part)))
        else:
            found.append(torch.empty_like(part, memory_format=torch.contiguous_format))
    return found


def _gradients(
    problem: Problem,
    backend: str,
    saved: Saved,
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
    in_place: bool,
) -> list[Tensor | None]:
    with _on_device_of(problem.log_weights):
        passes = _passes(problem, backend)
        return backward(problem, passes, saved, upstream, needs, in_place)


def _keep(ctx: Any, text: str | None, backend: str, tensors: Any, output: Any) -> None:
    """What the way back needs of a call."""
    ctx.text, ctx.backend, ctx.count = text, backend, len(tensors)
    ctx.save_for_backward(*tensors, *output[VALUES:])
    ctx.set_materialize_grads(False)


def _kept(ctx: Any, problem: Problem | None, needs: Sequence[bool], upstream: Any) -> Any:
    """The arguments of the way back, and where the gradients go among the tensors of the call."""
    tensors, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    if problem is None:
        problem = record.decode(Problem, tensors, ctx.text)
    parts = [*problem.student.tensors(), problem.log_weights]
    # None for an optional tensor that is absent.
    at = [next((i for i, t in enumerate(tensors) if t is part), None) for part in parts]
    wanted = [i is not None and needs[i] for i in at]
    return problem, tensors, saved, upstream[:2], wanted, at


def _placed(count: int, at: Any, wanted: Any, found: Any) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * count
    for i, need, part in zip(at, wanted, found, strict=True):
        if need:
            gradients[i] = part
    return gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, text, backend, _ = inputs
    ctx.needs = [tensor.requires_grad for tensor in tensors]
    _keep(ctx, text, backend, tensors, output)


def _autograd(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    _, tensors, saved, given, wanted, at = _kept(ctx, None, ctx.needs, upstream)
    none = saved[0].new_empty(0, dtype=torch.float32)
    parts = [none if part is None else part for part in given]
    found = mixture_backward(list(tensors), ctx.text, ctx.backend, list(saved), parts, wanted)
    return _placed(ctx.count, at, wanted, found), None, None, None


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(ONCE)


mixture.register_autograd(_autograd, setup_context=_save)
mixture_backward.register_autograd(_refuse)


class _Evaluation(torch.autograd.Function):
    """`mixture` of a problem whose tensors are `tensors`; `text` is None for a head of one's own,
    whose tensors are the student's and the log-weights."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        text: str | None,
        backend: str,
        needs_grad: bool,
        in_place: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        with _on_device_of(problem.log_weights):
            values, saved = forward(problem, _passes(problem, backend), needs_grad)
        # A problem that holds the tensors itself would keep them beyond the backward pass.
        ctx.problem, ctx.in_place = problem if text is None else None, in_place
        ctx.number = saved.number
        _keep(ctx, text, backend, tensors, [*values, *saved.tensors()])
        ctx.mark_non_differentiable(*values[2:])
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[5:]
        problem, tensors, saved, given, wanted, at = _kept(ctx, ctx.problem, needs, upstream)
        over = ctx.in_place and wanted[0]
        found = _gradients(problem, ctx.backend, Saved.of(saved, ctx.number), given, wanted, over)
        if over:
            torch.autograd.graph.increment_version(tensors[at[0]])
        if torch.is_grad_enabled():
            found = [None if g is None else _Once.apply(g.detach().requires_grad_()) for g in found]
        return (None, None, None, None, None, *_placed(ctx.count, at, wanted, found))


class _Once(torch.autograd.Function):
    """The identity, whose derivative is refused rather than 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ONCE)
