"""One op for every backend, and the same without an op for a head of one's own.

`di4c_fast::mixture` evaluates a problem, `di4c_fast::mixture_backward` gives its gradients. They
take a list of tensors and a text that holds everything else (`record`), have fake versions
and an autograd formula, and so work under `torch.compile` as they are. The gradient is computed
in the backward op from the upstream gradient, so backward may run again and gives the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, record
from ..checks import without_autocast
from ..heads import TensorHead
from .driver import Saved, backward, forward, is_dense, new_gradient, new_saved
from .problem import Problem, Values

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
        found = _Evaluation.apply(
            problem, backend, needs_grad, problem.log_weights, *student.tensors()
        )
    else:
        tensors, text = encoded
        in_place = isinstance(student, TensorHead) and _writes_over(student, problem)
        found = mixture(tensors, text, backend, needs_grad, in_place)
    rows, marginal, component, teacher_kl, consistency_kl = found[:VALUES]
    return Values(rows, marginal, component, teacher_kl.detach(), consistency_kl.detach())


def _writes_over(student: TensorHead, problem: Problem) -> bool:
    """Whether the gradient goes over the logits: memory that logits share cannot hold it."""
    logits = student.logits()
    if not student.in_place_gradient or torch.compiler.is_compiling() or not is_dense(logits):
        return False  # a compiled backward owns its memory
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
def mixture(
    tensors: list[Tensor], text: str, backend: str, needs_grad: bool, in_place: bool
) -> list[Tensor]:
    """The fields of `Values`, then the tensors of `Saved`."""
    problem = record.decode(Problem, tensors, text)
    with _on_device_of(problem.log_weights):
        values, saved = forward(problem, _passes(problem, backend), needs_grad)
    return [*values, *saved.tensors()]


@mixture.register_fake
def _(
    tensors: list[Tensor], text: str, backend: str, needs_grad: bool, in_place: bool
) -> list[Tensor]:
    problem = record.decode(Problem, tensors, text)
    _, saved = new_saved(problem, _passes(problem, backend), needs_grad)
    like, batch = problem.log_weights, problem.sizes[0]
    values = [like.new_empty(batch) for _ in range(VALUES - 1)]
    return [like.new_empty(batch, problem.tokens.shape[1]), *values, *saved.tensors()]


@torch.library.custom_op("di4c_fast::mixture_backward", mutates_args=())
def mixture_backward(
    tensors: list[Tensor],
    text: str,
    backend: str,
    saved: list[Tensor],
    upstream: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the student's tensors and of the log-weights; empty where not needed."""
    return _gradients(tensors, text, backend, saved, upstream, needs, False)


def _gradients(
    tensors: list[Tensor],
    text: str,
    backend: str,
    saved: list[Tensor],
    upstream: list[Tensor],
    needs: list[bool],
    in_place: bool,
) -> list[Tensor]:
    problem = record.decode(Problem, tensors, text)
    rows, marginal, component = upstream
    with _on_device_of(problem.log_weights):
        found = backward(
            problem,
            _passes(problem, backend),
            Saved.of(saved),
            (rows, marginal, component),
            needs,
            in_place,
        )
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
            found.append(new_gradient(part, zero=False))
        else:
            found.append(torch.empty_like(part, memory_format=torch.contiguous_format))
    return found


@torch.library.custom_op("di4c_fast::mixture_backward_", mutates_args=("logits",))
def mixture_backward_(
    logits: Tensor,
    others: list[Tensor],
    text: str,
    backend: str,
    saved: list[Tensor],
    upstream: list[Tensor],
    needs: list[bool],
) -> Tensor:
    """The same with the gradient written over the student's logits: that of the log-weights."""
    return _gradients([logits, *others], text, backend, saved, upstream, needs, True)[-1]


@mixture_backward_.register_fake
def _(
    logits: Tensor,
    others: list[Tensor],
    text: str,
    backend: str,
    saved: list[Tensor],
    upstream: list[Tensor],
    needs: list[bool],
) -> Tensor:
    weights = record.decode(Problem, [logits, *others], text).log_weights
    return torch.empty(
        weights.shape if needs[-1] else (0,), dtype=weights.dtype, device=weights.device
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.text, ctx.backend, _, ctx.in_place = inputs
    ctx.count = len(tensors)
    ctx.needs = [tensor.requires_grad for tensor in tensors]
    ctx.save_for_backward(*tensors, *output[VALUES:])
    ctx.like = [(value.shape, value.dtype, value.device) for value in output[:3]]
    ctx.set_materialize_grads(False)


def _upstream(upstream: Any, like: list[Any]) -> list[Tensor]:
    return [
        torch.zeros(shape, dtype=dtype, device=device) if part is None else part
        for part, (shape, dtype, device) in zip(upstream[:3], like, strict=True)
    ]


def _autograd(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, others = list(saved[: ctx.count]), list(saved[ctx.count :])
    problem = record.decode(Problem, tensors, ctx.text)
    parts = [*problem.student.tensors(), problem.log_weights]
    # Where each of them stands in the list of tensors; None for an optional one that is absent.
    at = [next((i for i, t in enumerate(tensors) if t is part), None) for part in parts]
    needs = [i is not None and ctx.needs[i] for i in at]
    rest = (ctx.text, ctx.backend, others, _upstream(upstream, ctx.like), needs)
    if ctx.in_place and needs[0] and not torch.compiler.is_compiling():
        logits = tensors[0].detach()
        found = [logits, mixture_backward_(logits, tensors[1:], *rest)]
    else:
        found = mixture_backward(tensors, *rest)
    gradients: list[Tensor | None] = [None] * ctx.count
    for i, need, part in zip(at, needs, found, strict=True):
        if i is not None and need:
            gradients[i] = part
    return gradients, None, None, None, None


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(ONCE)


mixture.register_autograd(_autograd, setup_context=_save)
mixture_backward.register_autograd(_refuse)


class _Evaluation(torch.autograd.Function):
    """`mixture` for a head of one's own, which no op can take."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        backend: str,
        needs_grad: bool,
        log_weights: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        with _on_device_of(log_weights):
            values, saved = forward(problem, _passes(problem, backend), needs_grad)
        ctx.problem, ctx.backend, ctx.count = problem, backend, len(tensors)
        ctx.save_for_backward(*tensors, log_weights, *saved.tensors())
        ctx.mark_non_differentiable(*values[3:])
        ctx.like = [(value.shape, value.dtype, value.device) for value in values[:3]]
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # checks their versions
        (*needs_log,) = ctx.needs_input_grad
        needs = [*needs_log[4:], needs_log[3]]
        problem = ctx.problem
        with _on_device_of(problem.log_weights):
            found = backward(
                problem,
                _passes(problem, ctx.backend),
                Saved.of(saved[ctx.count + 1 :]),
                tuple(_upstream(upstream, ctx.like)),  # type: ignore[arg-type]
                needs,
            )
        if torch.is_grad_enabled():
            found = [None if g is None else _Once.apply(g.detach().requires_grad_()) for g in found]
        return (None, None, None, found[-1], *found[:-1])


class _Once(torch.autograd.Function):
    """The identity, whose derivative is refused rather than 0."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ONCE)
