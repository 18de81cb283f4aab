"""The torch backend of the loss: streams over positions with the analytic gradient.

Shapes: B batch, N components, M teacher components, K draws, D positions, V vocabulary,
J target rows (x0 and the K draws), A active positions, P positions of a chunk.

With p = softmax(z), w_n = e^{a_n}, s_v = sum_n w_n p_nv (so the marginal is m = log s), the wanted
distribution q = teacher_weight q_T + consistency_weight q_u and r_nv = w_n p_nv / s_v, the gradient
at a position is

    R_n     = sum_v q_v r_nv
    kappa_j = alpha_j (rho_jnd - joint weight_jn)          rho_jnd = r[n,d,x^j_d]
    dL/dz   = p_nv (R_n + component_weight w_n - sum_j kappa_jn - w_n q_v / s_v)
              - component_weight w_n q_T,v + sum_j kappa_jn [v = x^j_d]

The joint weights couple all positions, so there are two sweeps over them. The first reads z once
and leaves everything local: log-probabilities of the targets, R_n, the divergences, q/s, and, where
z is costly and there is room, its exponentials. The second, once the joint weights are known,
multiplies the exponentials with a matrix of rank 2 per position and adds the sparse part.

On the CPU the memory of a freed gradient of logits is used again (`_spare.py`).

Gradients are computed in the forward pass, times the scale of the reduction, and handed over by
the first backward; a second backward computes them again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ._autograd import first_order_only
from .checks import without_autocast
from .heads import Head
from .loss.problem import LossInputs, LossTerms
from .streaming_sources import (
    GradientUpdate,
    Source,
    chunks,
    make_source,
    placeholder,
    without_tensors,
)
from .streaming_sweeps import Evaluation
from .streaming_terms import (
    Statistics,
    active_positions,
    exponentials,
    joint_grad_log_weights,
    joint_terms,
    kappa_coefficients,
    target_index,
)


def loss_per_example(inputs: LossInputs, scale: float | None) -> tuple[Tensor, LossTerms]:
    """The loss of every example (B,) times `scale`, and its unweighted terms."""
    tensors = inputs.tensors()
    if not torch.is_grad_enabled():  # inside the function, tensors would still ask for gradients
        tensors = [None if tensor is None else tensor.detach() for tensor in tensors]
    outputs = _Loss.apply(inputs, scale, *tensors)
    return outputs[0], LossTerms(*outputs[1:])


def token_rows(
    student: Head,
    targets: Tensor,
    log_weights: Tensor,
    active: Tensor | None,
    mask_id: int | None,
    correlation: bool,
) -> Tensor:
    """Joint log-likelihood, or the correlation term, of token rows (B, J, D): (B, J)."""
    problem = _Rows(student, targets, active, mask_id, correlation)
    return _TokenRows.apply(problem, log_weights, *student.tensors())


class _Loss(torch.autograd.Function):
    """Outputs: the scaled loss (B,) and the five terms. Inputs: see `forward`."""

    @staticmethod
    def forward(ctx: Any, inputs: LossInputs, scale: float | None, *tensors: Tensor | None):
        detached = [None if tensor is None else tensor.detach() for tensor in tensors]
        record = inputs.with_tensors(detached)
        ctx.record = record.with_tensors([placeholder(tensor) for tensor in detached])
        ctx.scale = scale
        ctx.students = len(record.student.tensors())
        ctx.log_weights = _index_of_log_weights(record)
        ctx.save_for_backward(*tensors)
        # Without a common factor for all examples the gradient has to wait for the upstream one,
        # and fp16 would flush it to zero before a loss scale in the upstream gradient lifts it.
        half = any(t is not None and t.dtype == torch.float16 for t in record.student.tensors())
        needs = _needs(ctx)
        if scale is None or half:
            needs = (False,) * len(needs)
        factor = torch.full(
            (record.batch,),
            1.0 if scale is None else scale,
            dtype=record.dtype,
            device=record.student.device,
        )
        evaluation = Evaluation(record, factor, needs)
        evaluation.run()
        ctx.gradients = _gradients(evaluation) if any(needs) else None
        ctx.mark_non_differentiable(*evaluation.terms)
        return (evaluation.per_example, *evaluation.terms)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor, *_: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            record = ctx.record.with_tensors(ctx.saved_tensors)
            factor = upstream if ctx.scale is None else upstream * ctx.scale
            with without_autocast(upstream.device):
                evaluation = Evaluation(record, factor.to(record.dtype), _needs(ctx))
                evaluation.run()
            gradients = _gradients(evaluation)
        else:
            # The caller sums the examples, so they share one upstream gradient. The tensors are
            # ours alone until they are returned.
            common = upstream[0] if upstream.numel() else upstream.sum()
            if common.device.type != "cpu" or float(common) != 1.0:
                gradients = [None if g is None else g.mul_(common) for g in gradients]
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        result[2 : 2 + ctx.students] = gradients[:-1]
        result[2 + ctx.log_weights] = gradients[-1]
        return tuple(result)


def _index_of_log_weights(record: LossInputs) -> int:
    """Where the log-weights stand in `record.tensors()`."""
    return next(i for i, t in enumerate(record.tensors()) if t is record.log_weights)


def _needs(ctx: Any) -> tuple[bool, ...]:
    flags = ctx.needs_input_grad[2:]
    return (*flags[: ctx.students], flags[ctx.log_weights])


def _gradients(evaluation: Evaluation) -> list[Tensor | None]:
    return [*evaluation.student.gradients(), evaluation.grad_log_weights]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The arguments of `token_rows` that carry no graph."""

    head: Head
    targets: Tensor  # [B, J, D]
    active: Tensor | None
    mask_id: int | None
    correlation: bool

    def without_tensors(self) -> _Rows:
        return dataclasses.replace(self, head=without_tensors(self.head))


class _TokenRows(torch.autograd.Function):
    """Joint log-likelihood, or correlation, of token rows (B, J)."""

    @staticmethod
    def forward(ctx: Any, problem: _Rows, log_weights: Tensor, *tensors: Tensor | None):
        ctx.problem = problem.without_tensors()
        ctx.save_for_backward(log_weights, *tensors)
        source = make_source(problem.head.with_tensors(tensors), log_weights.dtype)
        value = joint_terms(
            _row_statistics(source, problem), log_weights, problem.correlation
        ).value
        return value if problem.correlation else 0.0 - value

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor):
        problem: _Rows = ctx.problem
        log_weights, *tensors = ctx.saved_tensors
        head = problem.head.with_tensors(tensors)
        with without_autocast(upstream.device):
            return _TokenRows._gradients(ctx, problem, log_weights, head, upstream)

    @staticmethod
    def _gradients(ctx: Any, problem: _Rows, log_weights: Tensor, head: Head, upstream: Tensor):
        source = make_source(head, log_weights.dtype, ctx.needs_input_grad[2:], problem.active)
        stats = _row_statistics(source, problem)
        joint = joint_terms(stats, log_weights, problem.correlation)
        alpha = upstream if problem.correlation else -upstream
        if source.wants_gradient:
            kappa = kappa_coefficients(joint, stats.b, alpha)
            targets = problem.targets[stats.b, :, stats.d]
            for chunk in chunks(stats.b, stats.d, source.chunk_size()):
                loaded = exponentials(source, chunk, problem.mask_id)
                factor = -kappa[chunk.part].sum(-1) * loaded.inverse
                index = target_index(targets, chunk, source.components)
                update = GradientUpdate(index, kappa[chunk.part])
                source.store_gradient(
                    chunk, update.add_to_(loaded.values.mul_(factor.unsqueeze(-1)))
                )
        grad_log_weights = None
        if ctx.needs_input_grad[1]:
            grad_log_weights = joint_grad_log_weights(joint, stats.b, alpha)
        return (None, grad_log_weights, *source.gradients())


def _row_statistics(source: Source, problem: _Rows) -> Statistics:
    """Log-probabilities of the targets and logsumexps of every active row."""
    batch, rows, positions = problem.targets.shape
    b, d = active_positions(problem.active, batch, positions, problem.targets.device)
    stats = Statistics.empty(b, d, source.components, rows, source.dtype)
    targets = problem.targets[b, :, d]
    for chunk in chunks(b, d, source.chunk_size()):
        index = target_index(targets, chunk, source.components)
        stats.put(chunk, exponentials(source, chunk, problem.mask_id, index))
    return stats
