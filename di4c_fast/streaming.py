"""The torch backend of the loss: streams over positions with the analytic gradient.

Shapes: B batch, N components, M teacher components, K draws, D positions, V vocabulary,
J target rows (x0 and the K draws), A active positions, P positions of a chunk.

Two sweeps over the active positions. The first reads the student's logits z and leaves, per row,
the log-probabilities l of the targets; these give the joint weights of the components. The second
forms, per position, with p = exp l, w_n = e^{a_n}, s_v = sum_n w_n p_nv (so m = log s), the wanted
distribution q = teacher_weight q_T + consistency_weight q_u and r_nv = w_n p_nv / s_v,

    R_n     = sum_v q_v r_nv
    kappa_j = alpha_j (rho_jnd - joint weight_jn)          rho_jnd = r[n,d,x^j_d]
    dL/dz   = p_nv (w_n (-q_v / s_v + component_weight) + R_n - sum_j kappa_jn)
              - component_weight w_n q_T,v + sum_j kappa_jn [v = x^j_d]

Gradients are computed in the forward pass, times the scale of the reduction, and handed over by
the first backward; a second backward computes them again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .heads import Head
from .inputs import LossInputs, LossTerms
from .streaming_sample import draw_from_probs
from .streaming_sources import Chunk, Source, chunks, make_source
from .streaming_terms import (
    NEG_INF,
    Marginal,
    Statistics,
    active_positions,
    first_sweep,
    joint_grad_log_weights,
    joint_terms,
    kappa_coefficients,
    kl_divergence,
    load_logits,
    marginal_from_logs,
    marginal_from_probs,
    softmax_and_lse,
)


def loss_per_example(inputs: LossInputs, scale: float) -> tuple[Tensor, LossTerms]:
    """The loss of every example (B,) times `scale`, and its unweighted terms."""
    tensors = inputs.tensors()
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


class _Evaluation:
    """One evaluation of the loss: the sweeps, their results, and the gradients if wanted."""

    def __init__(self, inputs: LossInputs, scale: Tensor, needs_grad: tuple[bool, ...]):
        """scale: (B,), multiplies loss and gradients; needs_grad: one flag per student tensor
        and a last one for the component log-weights."""
        self.inputs, self.scale = inputs, scale
        self.dtype, self.device = inputs.dtype, inputs.student.device
        self.wants_gradient = any(needs_grad)
        self.student = make_source(inputs.student, self.dtype, needs_grad[:-1])
        self.teacher = make_source(inputs.teacher, self.dtype)
        self.consistency = None
        if inputs.consistency is not None and self._asked("consistency_weight"):
            self.consistency = make_source(inputs.consistency, self.dtype)
        sources = [s for s in (self.student, self.teacher, self.consistency) if s is not None]
        self.chunk_size = min(source.chunk_size() for source in sources)
        self.b, self.d = active_positions(
            inputs.active, inputs.batch, inputs.positions, self.device
        )
        self.student.start(self.b, self.d)
        self.weights = inputs.log_weights.exp()  # [B, N]
        self.wants_marginals = inputs.control_variate and (
            self._asked("teacher_weight") or self.consistency is not None
        )
        self.wants_component = self._asked("component_weight")

    def _asked(self, weight: str) -> bool:
        return self.inputs.return_terms or weight not in self.inputs.static_zero

    def run(self) -> None:
        inputs = self.inputs
        targets = self._targets()  # [B, J, D]
        second = self.wants_marginals or self.wants_component
        keep = second or self.student.wants_gradient
        stats = self._first_sweep(targets, keep)
        self.alive = (stats.lse > NEG_INF).any(1)  # [A]
        joint = joint_terms(stats, inputs.log_weights, inputs.control_variate)
        # Without an active position the value is 0 to the last bit, not a rounded logsumexp.
        values = torch.where(_occupied(stats, joint.value), joint.value, 0.0)  # [B, J]

        draws = max(inputs.draws, 1)
        alpha = torch.cat(
            [
                (inputs.data_weight * self.scale).unsqueeze(-1),
                (inputs.consistency_weight * self.scale / draws)
                .unsqueeze(-1)
                .expand(-1, targets.shape[1] - 1),
            ],
            dim=-1,
        )  # [B, J]
        zeros = torch.zeros(inputs.batch, dtype=self.dtype, device=self.device)
        self.sums = {
            name: zeros.clone() for name in ("teacher", "consistency", "component")
        }  # each [B]
        self.grad_log_weights = zeros.unsqueeze(-1).expand(-1, inputs.components).clone()
        if self.wants_gradient:
            self.grad_log_weights += joint_grad_log_weights(joint, self.b, alpha)
        if keep:
            kappa = (
                kappa_coefficients(joint, self.b, alpha) if self.student.wants_gradient else None
            )
            self._second_sweep(stats, kappa, targets)
        consistency = values[:, 1:].mean(1) if targets.shape[1] > 1 else zeros
        self.terms = LossTerms(
            values[:, 0],
            self.sums["teacher"],
            consistency,
            self.sums["consistency"],
            self.sums["component"],
        )
        self.per_example = zeros
        for term, weight in zip(
            self.terms,
            (
                inputs.data_weight,
                inputs.teacher_weight,
                inputs.consistency_weight,
                inputs.consistency_weight,
                inputs.component_weight,
            ),
            strict=True,
        ):
            # Left out rather than multiplied with 0: an infinite term must not give NaN.
            self.per_example = self.per_example + torch.where(weight > 0, term, 0.0) * weight
        self.per_example = self.per_example * self.scale

    def _targets(self) -> Tensor:
        """x0 and the consistency draws, (B, J, D)."""
        x0 = self.inputs.x0.unsqueeze(1)
        if self.consistency is None:
            return x0
        draws = self.inputs.consistency_x
        if draws is None:
            draws = self._draw(self.consistency)
        if self.inputs.xu is not None:
            draws = torch.where(self._revealed(self.inputs.xu), self.inputs.xu, draws)
        return torch.cat([x0, draws], dim=1)

    def _revealed(self, tokens: Tensor) -> Tensor:
        assert self.inputs.mask_id is not None
        return tokens != self.inputs.mask_id

    def _draw(self, source: Source) -> Tensor:
        """One token per component and active position (B, K, D), keeping q_u where it fits."""
        inputs = self.inputs
        draws = torch.zeros(
            inputs.batch, inputs.draws, inputs.positions, dtype=torch.int64, device=self.device
        )
        assert inputs.seed is not None
        for chunk in chunks(self.b, self.d, self.chunk_size):
            prob = self._probs(source, chunk)
            keys = chunk.rows(inputs.draws, inputs.positions).flatten()
            draws[chunk.b, :, chunk.d] = draw_from_probs(prob, inputs.seed, row_keys=keys)
            if self.wants_marginals:
                source.keep(chunk, self._mixture(prob, chunk))
        return draws

    def _probs(self, source: Source, chunk: Chunk) -> Tensor:
        return softmax_and_lse(load_logits(source, chunk, self.inputs.mask_id))[0]

    def _mixture(self, prob: Tensor, chunk: Chunk) -> Tensor:
        """q_u (P, V): the mean over draws, one-hot where a draw has revealed the token."""
        xu = self.inputs.xu
        if xu is not None:
            tokens = xu[chunk.b, :, chunk.d]  # [P, K]
            revealed = self._revealed(tokens)
            prob.masked_fill_(revealed.unsqueeze(-1), 0.0)
            prob.scatter_add_(-1, tokens.unsqueeze(-1), revealed.to(prob.dtype).unsqueeze(-1))
        return prob.mean(1)

    def _first_sweep(self, targets: Tensor, keep: bool) -> Statistics:
        return first_sweep(
            self.student, self.b, self.d, targets, self.inputs.mask_id, keep, self.chunk_size
        )

    def _second_sweep(self, stats: Statistics, kappa: Tensor | None, targets: Tensor) -> None:
        inputs = self.inputs
        for chunk in chunks(self.b, self.d, self.chunk_size):
            part = slice(chunk.start, chunk.start + chunk.size)
            row_term = None if kappa is None else -kappa[part].sum(-1)  # [P, N]
            gradient = self._chunk(chunk, stats.lse[part], self.alive[part], row_term)
            if kappa is not None:
                assert gradient is not None
                index = targets[chunk.b, :, chunk.d].unsqueeze(1)
                index = index.expand(-1, inputs.components, -1)
                gradient.scatter_add_(-1, index, kappa[part])
                self.student.store_gradient(chunk, gradient)

    def _chunk(
        self, chunk: Chunk, lse: Tensor, alive: Tensor, row_term: Tensor | None
    ) -> Tensor | None:
        """Add the chunk's marginal terms; dL/dz (P, N, V) but for its one-hot part."""
        inputs, b = self.inputs, chunk.b
        prob = self.student.kept(chunk)
        if not (self.wants_marginals or self.wants_component):
            assert row_term is not None
            prob = self._probs(self.student, chunk) if prob is None else prob
            return prob.mul_(row_term.unsqueeze(-1))

        live = alive.to(self.dtype).unsqueeze(-1)
        teacher = self._probs(self.teacher, chunk).mean(1) * live  # q_T, [P, V]
        mixture = self._consistency_mixture(chunk, live)  # q_u
        wanted = torch.zeros_like(teacher)
        if self.wants_marginals:
            wanted += teacher * (inputs.teacher_weight * self.scale)[b].unsqueeze(-1)
            if mixture is not None:
                wanted += mixture * (inputs.consistency_weight * self.scale)[b].unsqueeze(-1)
        component_weight = None
        if self.wants_component:
            component_weight = (inputs.component_weight * self.scale)[b].unsqueeze(-1)  # [P, 1]
            if row_term is not None:
                row_term = row_term + component_weight * self.weights[b]

        result = None
        if self.device.type == "cpu":  # elsewhere its checks would wait for the device
            prob = self._probs(self.student, chunk) if prob is None else prob
            result = marginal_from_probs(
                prob,
                self.weights[b],
                wanted,
                teacher,
                row_term,
                component_weight,
                self.wants_component,
            )
        if result is None:
            log_prob = load_logits(self.student, chunk, inputs.mask_id)
            log_prob -= torch.where(lse > NEG_INF, lse, 0.0).unsqueeze(-1)
            result = marginal_from_logs(
                log_prob,
                inputs.log_weights[b],
                wanted,
                teacher,
                row_term,
                component_weight,
                self.wants_component,
            )
        self._add_terms(chunk, result, teacher, mixture, live)
        return result.gradient

    def _consistency_mixture(self, chunk: Chunk, live: Tensor) -> Tensor | None:
        if self.consistency is None or not self.wants_marginals:
            return None
        mixture = self.consistency.kept(chunk)
        if mixture is None:
            mixture = self._mixture(self._probs(self.consistency, chunk), chunk)
        return mixture * live

    def _add_terms(
        self,
        chunk: Chunk,
        result: Marginal,
        teacher: Tensor,
        mixture: Tensor | None,
        live: Tensor,
    ) -> None:
        b = chunk.b
        if self.wants_marginals:
            self.sums["teacher"].index_add_(0, b, kl_divergence(teacher, result.log_marginal))
            if mixture is not None:
                self.sums["consistency"].index_add_(
                    0, b, kl_divergence(mixture, result.log_marginal)
                )
            self.grad_log_weights.index_add_(0, b, result.mass, alpha=-1.0)
        if self.wants_component:
            assert result.divergence is not None
            weighted = self.weights[b] * torch.where(live > 0, result.divergence, 0.0)
            self.sums["component"].index_add_(0, b, weighted.sum(-1))
            factor = (self.inputs.component_weight * self.scale)[b].unsqueeze(-1)
            self.grad_log_weights.index_add_(0, b, torch.where(factor > 0, weighted, 0.0) * factor)


class _Loss(torch.autograd.Function):
    """Outputs: the scaled loss (B,) and the five terms. Inputs: see `forward`."""

    @staticmethod
    def forward(ctx: Any, inputs: LossInputs, scale: float | None, *tensors: Tensor | None):
        detached = [None if tensor is None else tensor.detach() for tensor in tensors]
        record = inputs.with_tensors(detached)
        ctx.record = record.with_tensors(
            [None if tensor is None else tensor.new_empty(0) for tensor in detached]
        )
        ctx.scale = scale
        ctx.students = len(record.student.tensors())
        ctx.log_weights = _index_of_log_weights(record)
        ctx.save_for_backward(*tensors)
        # Without a common factor for all examples the gradient has to wait for the upstream one.
        needs = _needs(ctx) if scale is not None else (False,) * (ctx.students + 1)
        factor = torch.full(
            (record.batch,),
            1.0 if scale is None else scale,
            dtype=record.dtype,
            device=record.student.device,
        )
        evaluation = _Evaluation(record, factor, needs)
        evaluation.run()
        ctx.gradients = _gradients(evaluation) if any(needs) else None
        ctx.mark_non_differentiable(*evaluation.terms)
        return (evaluation.per_example, *evaluation.terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            record = ctx.record.with_tensors(ctx.saved_tensors)
            factor = upstream if ctx.scale is None else upstream * ctx.scale
            evaluation = _Evaluation(record, factor.to(record.dtype), _needs(ctx))
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


def _gradients(evaluation: _Evaluation) -> list[Tensor | None]:
    return [*evaluation.student.gradients(), evaluation.grad_log_weights]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The arguments of `token_rows` that carry no graph."""

    head: Head
    targets: Tensor  # [B, J, D]
    active: Tensor | None
    mask_id: int | None
    correlation: bool


class _TokenRows(torch.autograd.Function):
    """Joint log-likelihood, or correlation, of token rows (B, J)."""

    @staticmethod
    def forward(ctx: Any, problem: _Rows, log_weights: Tensor, *tensors: Tensor | None):
        ctx.problem = problem
        ctx.save_for_backward(log_weights, *tensors)
        source = make_source(problem.head.with_tensors(tensors), log_weights.dtype)
        stats = _row_statistics(source, problem, keep=False)
        value = joint_terms(stats, log_weights, problem.correlation).value
        value = torch.where(_occupied(stats, value), value, 0.0)
        return value if problem.correlation else -value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor):
        problem: _Rows = ctx.problem
        log_weights, *tensors = ctx.saved_tensors
        source = make_source(
            problem.head.with_tensors(tensors), log_weights.dtype, ctx.needs_input_grad[2:]
        )
        stats = _row_statistics(source, problem, keep=source.wants_gradient)
        joint = joint_terms(stats, log_weights, problem.correlation)
        alpha = upstream if problem.correlation else -upstream
        if source.wants_gradient:
            kappa = kappa_coefficients(joint, stats.b, alpha)
            for chunk in chunks(stats.b, stats.d, source.chunk_size()):
                part = slice(chunk.start, chunk.start + chunk.size)
                gradient = source.kept(chunk)
                if gradient is None:
                    gradient = softmax_and_lse(load_logits(source, chunk, problem.mask_id))[0]
                gradient *= -kappa[part].sum(-1, keepdim=True)
                index = problem.targets[chunk.b, :, chunk.d].unsqueeze(1)
                index = index.expand(-1, source.components, -1)
                source.store_gradient(chunk, gradient.scatter_add_(-1, index, kappa[part]))
        grad_log_weights = None
        if ctx.needs_input_grad[1]:
            grad_log_weights = joint_grad_log_weights(joint, stats.b, alpha)
        return (None, grad_log_weights, *source.gradients())


def _row_statistics(source: Source, problem: _Rows, keep: bool) -> Statistics:
    batch, _, positions = problem.targets.shape
    b, d = active_positions(problem.active, batch, positions, problem.targets.device)
    source.start(b, d)
    return first_sweep(source, b, d, problem.targets, problem.mask_id, keep, source.chunk_size())


def _occupied(stats: Statistics, value: Tensor) -> Tensor:
    """Which examples have a position that counts: (B, 1)."""
    alive = (stats.lse > NEG_INF).any(1).to(value.dtype)
    counts = value.new_zeros(value.shape[0]).index_add_(0, stats.b, alive)
    return (counts > 0).unsqueeze(-1)
