"""The triton backend of the loss: custom ops and autograd around the passes of `fused_passes`.

Two pairs of ops: `di4c_fast::mixture_loss` with its backward, and `di4c_fast::token_rows` with
its own. They are registered with `torch.library` and have fake versions, so `torch.compile` takes
them as they are. The forward op computes no gradient; the backward op reads the upstream gradient
on the device. Logits in fp64 go to the torch backend: the kernels compute in fp32.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
from torch import Tensor

from . import streaming
from .fused_heads import HeadSpec, padded, split_head
from .fused_passes import backward, forward, grad_log_weights, is_dense, new_like
from .fused_plan import Batch, Known, Request
from .heads import Head, TensorHead
from .loss.problem import LossInputs, LossTerms

__all__ = ["loss_per_example", "token_rows"]

DOUBLE_BACKWARD = (
    "di4c_fast: double backward through the fused loss is not supported; "
    'use backend="reference" for second derivatives'
)
KNOWN = len(dataclasses.fields(Known))


def loss_per_example(inputs: LossInputs, scale: float | None) -> tuple[Tensor, LossTerms]:
    """The loss of every example (B,) times `scale` (None: 1), and its unweighted terms.

    Equivalent mathematics: that of `di4c_fast.loss`.
    Differentiable with respect to the student's tensors and the component log-weights, once.
    """
    if inputs.dtype == torch.float64:
        return streaming.loss_per_example(inputs, scale)
    asked = {
        name: inputs.return_terms or name not in inputs.static_zero
        for name in ("teacher_weight", "consistency_weight", "component_weight")
    }
    has_u = inputs.consistency is not None and asked["consistency_weight"]
    spec, student = split_head(inputs.student)
    request = Request(
        mask_id=inputs.mask_id,
        correlation=inputs.control_variate,
        has_q=inputs.control_variate and (asked["teacher_weight"] or has_u),
        has_c=asked["component_weight"],
        has_u=has_u,
        scale=1.0 if scale is None else scale,
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in student),
    )
    teacher_spec, teacher = split_head(inputs.teacher)
    specs = [spec, teacher_spec]
    consistency: list[Tensor] = []
    if inputs.consistency is not None and has_u:
        consistency_spec, consistency = split_head(inputs.consistency)
        specs.append(consistency_spec)
    # Memory that several logits share (expanded tensors) cannot hold their gradients.
    in_place = (
        isinstance(inputs.student, TensorHead)
        and inputs.student.in_place_gradient
        and is_dense(student[0])
    )
    outputs = mixture_loss(
        student,
        [tensor.detach() for tensor in teacher],
        [tensor.detach() for tensor in consistency],
        inputs.x0,
        inputs.consistency_x if has_u else None,
        inputs.xu if has_u else None,
        None if inputs.active is None else inputs.active.contiguous(),
        inputs.log_weights,
        inputs.data_weight,
        inputs.teacher_weight,
        inputs.consistency_weight,
        inputs.component_weight,
        inputs.seed if has_u else None,
        ";".join(s.encode() for s in specs),
        request.encode(),
        in_place,
    )
    return outputs[0], LossTerms(*outputs[1].detach().unbind())


def token_rows(
    student: Head,
    targets: Tensor,
    log_weights: Tensor,
    active: Tensor | None,
    mask_id: int | None,
    correlation: bool,
) -> Tensor:
    """Joint log-likelihood, or the correlation term, of token rows (B, J, D): (B, J)."""
    if log_weights.dtype == torch.float64:
        return streaming.token_rows(student, targets, log_weights, active, mask_id, correlation)
    spec, tensors = split_head(student)
    request = Request(
        mask_id=mask_id,
        correlation=correlation,
        has_q=False,
        has_c=False,
        has_u=False,
        scale=1.0,
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
    )
    outputs = token_row_values(
        tensors,
        targets,
        None if active is None else active.contiguous(),
        log_weights,
        spec.encode(),
        request.encode(),
    )
    return outputs[0]


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Any:
    """Launch on the device of `tensor`, which need not be the current one, without autocast."""
    with torch.autocast(tensor.device.type, enabled=False):
        if tensor.is_cuda:
            with torch.cuda.device(tensor.device):
                yield
        else:
            yield


def _contiguous(values: Tensor) -> Tensor:
    return values.contiguous().float()


def _batch(
    student: list[Tensor],
    teacher: list[Tensor],
    consistency: list[Tensor],
    x0: Tensor,
    consistency_x: Tensor | None,
    xu: Tensor | None,
    active: Tensor | None,
    log_weights: Tensor,
    data_weight: Tensor,
    teacher_weight: Tensor,
    consistency_weight: Tensor,
    component_weight: Tensor,
    seed: Tensor | None,
    specs: str,
) -> Batch:
    decoded: list[HeadSpec | None] = [HeadSpec.decode(text) for text in specs.split(";")]
    decoded += [None] * (3 - len(decoded))
    weights = (data_weight, teacher_weight, consistency_weight, component_weight)
    data, first, second, component = (_contiguous(weight) for weight in weights)
    student_spec = decoded[0]
    assert student_spec is not None
    return Batch(
        student,
        teacher,
        consistency,
        x0,
        consistency_x,
        None if xu is None else xu.contiguous(),
        active,
        _contiguous(log_weights),
        (data, first, second, component),
        seed,
        (student_spec, decoded[1], decoded[2]),
    )


def _fake_known(batch: Batch, request: Request) -> list[Tensor]:
    """Tensors of the shapes of `Known`."""
    spec, teacher_spec, consistency_spec = batch.specs
    size, components, positions, vocabulary = spec.shape(batch.student)
    total = size * positions
    like = batch.student[0]
    draws = 0
    if consistency_spec is not None:
        draws = consistency_spec.shape(batch.consistency)[1]
    targets = draws + (batch.x0.shape[1] if batch.x0.ndim == 3 else 1)
    teacher = teacher_spec is not None and (request.has_q or request.has_c)
    reads_u = request.has_u and (request.has_q or batch.consistency_x is None)
    plan = batch.plan(request)
    row = padded(vocabulary)

    def new(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return like.new_empty(shape, dtype=dtype)

    teachers = teacher_spec.shape(batch.teacher)[1] if teacher_spec and teacher else 1
    return [
        new(size, targets, positions, dtype=torch.int64),
        new(total, components),
        new(total if teacher else 0, teachers),
        new(total if reads_u else 0, max(draws, 1)),
        new(total, targets, components),
        new(total if request.correlation else 0, targets),
        new(size, targets, components),
        new(size, targets),
        new(total, components) if teacher and request.has_q else new(0),
        new(total, components) if teacher and request.has_c else new(0),
        new(plan.kept_teacher, row),
        new(plan.kept_consistency, row),
        new(plan.kept_logits, components, row, dtype=like.dtype),
        new(0 if batch.active is None else total, dtype=torch.int64),
        new(dtype=torch.int64),
    ]


@torch.library.custom_op("di4c_fast::mixture_loss", mutates_args=())
def mixture_loss(
    student: list[Tensor],
    teacher: list[Tensor],
    consistency: list[Tensor],
    x0: Tensor,
    consistency_x: Tensor | None,
    xu: Tensor | None,
    active: Tensor | None,
    log_weights: Tensor,
    data_weight: Tensor,
    teacher_weight: Tensor,
    consistency_weight: Tensor,
    component_weight: Tensor,
    seed: Tensor | None,
    specs: str,
    request: str,
    in_place: bool,
) -> list[Tensor]:
    """Loss (B,), terms (5, B), then what the backward op needs (the fields of `Known`)."""
    batch = _batch(
        student, teacher, consistency, x0, consistency_x, xu, active, log_weights, data_weight,
        teacher_weight, consistency_weight, component_weight, seed, specs,
    )  # fmt: skip
    with on_device_of(student[0]):
        loss, terms, _, known = forward(batch, Request.decode(request))
    return [loss, terms, *(getattr(known, field.name) for field in dataclasses.fields(known))]


@mixture_loss.register_fake
def _(*args: Any) -> list[Tensor]:
    batch, request = _batch(*args[:14]), Request.decode(args[14])
    size = batch.x0.shape[0]
    like = batch.log_weights
    return [like.new_empty(size), like.new_empty(5, size), *_fake_known(batch, request)]


@torch.library.custom_op("di4c_fast::mixture_loss_backward", mutates_args=())
def mixture_loss_backward(
    student: list[Tensor],
    teacher: list[Tensor],
    consistency: list[Tensor],
    x0: Tensor,
    consistency_x: Tensor | None,
    xu: Tensor | None,
    active: Tensor | None,
    log_weights: Tensor,
    data_weight: Tensor,
    teacher_weight: Tensor,
    consistency_weight: Tensor,
    component_weight: Tensor,
    seed: Tensor | None,
    specs: str,
    request: str,
    known: list[Tensor],
    upstream: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the student's tensors and of the log-weights; empty where not needed."""
    batch = _batch(
        student, teacher, consistency, x0, consistency_x, xu, active, log_weights, data_weight,
        teacher_weight, consistency_weight, component_weight, seed, specs,
    )  # fmt: skip
    with on_device_of(student[0]):
        return _backward(batch, Request.decode(request), Known(*known), upstream, needs, False)


def _backward(
    batch: Batch,
    request: Request,
    known: Known,
    upstream: Tensor,
    needs: list[bool],
    in_place: bool,
) -> list[Tensor]:
    upstream = _contiguous(upstream)
    gradients: list[Tensor | None] = [None]
    if needs[-1]:
        gradients = [grad_log_weights(batch, request, known, upstream, known.alpha)]
    students = backward(batch, request, known, upstream, known.alpha, tuple(needs[:-1]), in_place)
    empty = [batch.log_weights.new_empty(0) for _ in needs]
    results = [*students, *gradients]
    return [e if g is None else g for g, e in zip(results, empty, strict=True)]


def _fake_gradients(
    student: list[Tensor], spec: str, log_weights: Tensor, needs: list[bool]
) -> list[Tensor]:
    kind = HeadSpec.decode(spec.split(";")[0]).kind
    gradients = []
    for tensor, need in zip(student, needs, strict=False):
        if not need and not (kind == "logistic" and any(needs[:-1])):
            gradients.append(log_weights.new_empty(0, dtype=torch.float32))
        elif kind == "tensor":
            gradients.append(new_like(tensor))
        else:
            gradients.append(torch.empty_like(tensor, memory_format=torch.contiguous_format))
    size = tuple(log_weights.shape) if needs[-1] else (0,)
    return [*gradients, log_weights.new_empty(size, dtype=torch.float32)]


@mixture_loss_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    return _fake_gradients(args[0], args[13], args[7], args[17])


@torch.library.custom_op("di4c_fast::mixture_loss_backward_", mutates_args=("student",))
def mixture_loss_backward_(
    student: Tensor,
    teacher: list[Tensor],
    consistency: list[Tensor],
    x0: Tensor,
    consistency_x: Tensor | None,
    xu: Tensor | None,
    active: Tensor | None,
    log_weights: Tensor,
    data_weight: Tensor,
    teacher_weight: Tensor,
    consistency_weight: Tensor,
    component_weight: Tensor,
    seed: Tensor | None,
    specs: str,
    request: str,
    known: list[Tensor],
    upstream: Tensor,
    needs: list[bool],
) -> Tensor:
    """The same with the gradient written over the student's logits."""
    batch = _batch(
        [student], teacher, consistency, x0, consistency_x, xu, active, log_weights, data_weight,
        teacher_weight, consistency_weight, component_weight, seed, specs,
    )  # fmt: skip
    with on_device_of(student):
        return _backward(batch, Request.decode(request), Known(*known), upstream, needs, True)[-1]


@mixture_loss_backward_.register_fake
def _(*args: Any) -> Tensor:
    size = tuple(args[7].shape) if args[17][-1] else (0,)
    return args[7].new_empty(size, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    student, teacher, consistency, *others, specs, request, in_place = inputs
    known = output[2:]
    optional = [index for index, tensor in enumerate(others) if tensor is not None]
    ctx.layout = (len(student), len(teacher), len(consistency), len(others), optional)
    ctx.save_for_backward(*student, *teacher, *consistency, *(others[i] for i in optional), *known)
    ctx.specs, ctx.request, ctx.in_place = specs, request, in_place
    ctx.student_needs = [tensor.requires_grad for tensor in student]
    ctx.weights_need = others[4].requires_grad
    # Only the loss carries a gradient; the rest is there for the backward op.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    students, teachers, draws, number, optional = ctx.layout
    nothing = [None] * number
    if upstream[0] is None:
        return [None] * students, [None] * teachers, [None] * draws, *nothing, None, None, None
    saved = list(ctx.saved_tensors)
    cuts = [students, students + teachers, students + teachers + draws]
    others: list[Tensor | None] = [None] * number
    for place, tensor in zip(optional, saved[cuts[2] :], strict=False):
        others[place] = tensor
    known = saved[cuts[2] + len(optional) :]
    student = saved[: cuts[0]]
    needs = [*ctx.student_needs, ctx.weights_need]
    arguments = (
        saved[cuts[0] : cuts[1]],
        saved[cuts[1] : cuts[2]],
        *others,
        ctx.specs,
        ctx.request,
        known,
        upstream[0],
        needs,
    )
    if ctx.in_place and needs[0] and not torch.compiler.is_compiling():
        logits = student[0].detach()
        grads = [logits, mixture_loss_backward_(logits, *arguments)]
    else:
        grads = mixture_loss_backward(student, *arguments)
    by_need = [g if need else None for g, need in zip(grads, needs, strict=True)]
    other_grads: list[Tensor | None] = [None] * number
    other_grads[4] = by_need[-1]
    return (
        by_need[:-1],
        [None] * teachers,
        [None] * draws,
        *other_grads,
        None,
        None,
        None,
    )


mixture_loss.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("di4c_fast::token_rows", mutates_args=())
def token_row_values(
    student: list[Tensor],
    targets: Tensor,
    active: Tensor | None,
    log_weights: Tensor,
    spec: str,
    request: str,
) -> list[Tensor]:
    """Values (B, J) of the token rows, then the fields of `Known`."""
    decoded = Request.decode(request)
    batch = _rows_batch(student, targets, active, log_weights, spec)
    with on_device_of(student[0]):
        _, _, values, known = forward(batch, decoded, loss=False)
    # The kernel's value is the negative log-likelihood, or the correlation.
    value = values if decoded.correlation else 0.0 - values
    fields = [getattr(known, field.name) for field in dataclasses.fields(known)]
    return [value.clone(), *fields]


def _rows_batch(
    student: list[Tensor], targets: Tensor, active: Tensor | None, log_weights: Tensor, spec: str
) -> Batch:
    weights = _contiguous(log_weights)
    decoded = HeadSpec.decode(spec)
    none = (weights, weights, weights, weights)
    return Batch(
        student, [], [], targets, None, None, active, weights, none, None, (decoded, None, None)
    )


@token_row_values.register_fake
def _(
    student: list[Tensor],
    targets: Tensor,
    active: Tensor | None,
    log_weights: Tensor,
    spec: str,
    request: str,
) -> list[Tensor]:
    batch = _rows_batch(student, targets, active, log_weights, spec)
    value = log_weights.new_empty(targets.shape[:2], dtype=torch.float32)
    return [value, *_fake_known(batch, Request.decode(request))]


@torch.library.custom_op("di4c_fast::token_rows_backward", mutates_args=())
def token_rows_backward(
    student: list[Tensor],
    targets: Tensor,
    active: Tensor | None,
    log_weights: Tensor,
    spec: str,
    request: str,
    values: Tensor,
    known: list[Tensor],
    upstream: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the student's tensors and of the log-weights; empty where not needed."""
    decoded = Request.decode(request)
    batch = _rows_batch(student, targets, active, log_weights, spec)
    with on_device_of(student[0]):
        # An impossible row has no gradient, so its weight is 0 rather than infinity times 0.
        alpha = upstream if decoded.correlation else -upstream
        alpha = torch.where(torch.isfinite(values), alpha, 0.0).float().contiguous()
        ones = alpha.new_ones(alpha.shape[0])
        record = dataclasses.replace(Known(*known), alpha=alpha)
        return _backward(batch, decoded, record, ones, needs, False)


@token_rows_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    return _fake_gradients(args[0], args[4], args[3], args[9])


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    student, targets, active, log_weights, spec, request = inputs
    ctx.students, ctx.has_active = len(student), active is not None
    optional = [] if active is None else [active]
    ctx.save_for_backward(*student, targets, log_weights, *optional, *output)
    ctx.spec, ctx.request = spec, request
    ctx.needs = [*(tensor.requires_grad for tensor in student), log_weights.requires_grad]
    ctx.set_materialize_grads(False)


def _rows_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    if upstream[0] is None:
        return [None] * ctx.students, None, None, None, None, None
    saved = list(ctx.saved_tensors)
    student, rest = saved[: ctx.students], saved[ctx.students :]
    targets, log_weights, *rest = rest
    active = rest.pop(0) if ctx.has_active else None
    values, *known = rest
    grads = token_rows_backward(
        student, targets, active, log_weights, ctx.spec, ctx.request, values, known,
        upstream[0], ctx.needs,
    )  # fmt: skip
    by_need = [g if need else None for g, need in zip(grads, ctx.needs, strict=True)]
    return by_need[:-1], None, None, by_need[-1], None, None


token_row_values.register_autograd(_rows_gradients, setup_context=_save_rows)


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(DOUBLE_BACKWARD)


mixture_loss_backward.register_autograd(_refuse)
token_rows_backward.register_autograd(_refuse)
