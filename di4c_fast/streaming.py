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
there is room (such as in the gradient tensor), e^{z - max}. The second, once the joint weights are
known, multiplies these with a matrix of rank 2 per position and adds the sparse part.

Gradients are computed in the forward pass, times the scale of the reduction, and handed over by
the first backward; a second backward computes them again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ._autograd import first_order_only
from ._checks import without_autocast
from .heads import Head
from .inputs import LossInputs, LossTerms
from .streaming_sample import (
    SAMPLE_BLOCK,
    block_sums,
    block_uniforms,
    blocks_of,
    choose_block,
    run_race,
    take_block,
    token_uniforms,
)
from .streaming_sources import (
    Chunk,
    GradientUpdate,
    Keep,
    Source,
    chunks,
    make_source,
    placeholder,
    without_tensors,
)
from .streaming_terms import (
    Statistics,
    active_positions,
    exponentials_,
    joint_grad_log_weights,
    joint_terms,
    kappa_coefficients,
    kl_divergence,
    load_logits,
    marginal_from_logs,
    marginal_from_values,
    mixture_of,
    shares,
    target_index,
)

# Random numbers made at once for the draws; each takes about 20 bytes of scratch space.
DRAW_NUMBERS = 1 << 19


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


class _Evaluation:
    """One evaluation of the loss: the sweeps, their results, and the gradients if wanted."""

    def __init__(self, inputs: LossInputs, scale: Tensor, needs_grad: tuple[bool, ...]):
        """scale: (B,), multiplies loss and gradients; needs_grad: one flag per student tensor
        and a last one for the component log-weights."""
        self.inputs = inputs
        self.dtype, self.device = inputs.dtype, inputs.student.device
        self.student = make_source(inputs.student, self.dtype, needs_grad[:-1])
        self.teacher = make_source(inputs.teacher, self.dtype)
        self.consistency = None
        if inputs.consistency is not None and self._asked("consistency_weight"):
            self.consistency = make_source(inputs.consistency, self.dtype)
        self.wants_component = self._asked("component_weight")
        self.wants_marginals = inputs.control_variate and (
            self._asked("teacher_weight") or self.consistency is not None
        )
        sources = [s for s in (self.student, self.teacher, self.consistency) if s is not None]
        size = min(source.chunk_size() for source in sources)
        self.b, self.d = active_positions(
            inputs.active, inputs.batch, inputs.positions, self.device
        )
        self.chunks = list(chunks(self.b, self.d, size))
        # All (B,), times the scale.
        self.teacher_weight = inputs.teacher_weight * scale
        self.consistency_weight = inputs.consistency_weight * scale
        self.component_weight = inputs.component_weight * scale
        self.data_weight = inputs.data_weight * scale
        self.scale = scale
        self.weights = inputs.log_weights.exp()  # [B, N]

    def _asked(self, weight: str) -> bool:
        return self.inputs.return_terms or weight not in self.inputs.static_zero

    def run(self) -> None:
        inputs = self.inputs
        self.targets = self._targets()  # [B, J, D]
        draws = self.targets.shape[1] - 1
        self._forward_sweep()
        joint = joint_terms(self.stats, inputs.log_weights, inputs.control_variate)
        alpha = self.data_weight.unsqueeze(-1)  # [B, J]
        if draws:
            per_draw = (self.consistency_weight / draws).unsqueeze(-1).expand(-1, draws)
            alpha = torch.cat([alpha, per_draw], dim=-1)
        self.grad_log_weights += joint_grad_log_weights(joint, self.b, alpha)
        if self.student.wants_gradient:
            self._backward_sweep(kappa_coefficients(joint, self.b, alpha))

        zeros = torch.zeros(inputs.batch, dtype=self.dtype, device=self.device)
        self.terms = LossTerms(
            data_correlation=joint.value[:, 0],
            teacher_marginal=self.teacher_sum,
            consistency_correlation=joint.value[:, 1:].mean(1) if draws else zeros,
            consistency_marginal=self.consistency_sum,
            component=self.component_sum,
        )
        weights = (
            inputs.data_weight,
            inputs.teacher_weight,
            inputs.consistency_weight,
            inputs.consistency_weight,
            inputs.component_weight,
        )
        total = zeros
        for term, weight in zip(self.terms, weights, strict=True):
            # Left out rather than multiplied with 0: an infinite term must not give NaN.
            total = total + torch.where(weight > 0, term, 0.0) * weight
        self.per_example = total * self.scale

    # The sweep over the consistency logits ------------------------------------------------

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
        inputs, vocabulary = self.inputs, self.inputs.vocabulary
        draws = torch.zeros(
            inputs.batch, inputs.draws, inputs.positions, dtype=torch.int64, device=self.device
        )
        if not self.chunks:
            return draws
        assert inputs.seed is not None
        # Random numbers are made for many chunks at once: Philox is a hundred small operations.
        numbers = self.chunks[0].size * inputs.draws * (blocks_of(vocabulary) + SAMPLE_BLOCK)
        group_size = max(1, DRAW_NUMBERS // numbers)
        for begin in range(0, len(self.chunks), group_size):
            group = self.chunks[begin : begin + group_size]
            rows = [chunk.size * inputs.draws for chunk in group]
            keys = torch.cat([c.rows(inputs.draws, inputs.positions).flatten() for c in group])
            uniforms = block_uniforms(inputs.seed, 0, keys, vocabulary, self.dtype)
            parts = []
            for chunk, numbers_of_chunk in zip(group, uniforms.split(rows), strict=True):
                values, inverse = self._exponentials(source, chunk)
                by_row = values.flatten(0, 1)
                chosen = choose_block(block_sums(by_row), numbers_of_chunk)
                parts.append((chosen, take_block(by_row, chosen)))
                if self.wants_marginals:
                    source.keep(chunk, self._mean_draw(values, inverse, chunk))
            chosen = torch.cat([block for block, _ in parts])
            race = token_uniforms(inputs.seed, 0, keys, chosen, self.dtype)
            winner = run_race(torch.cat([candidates for _, candidates in parts]), race)
            tokens = chosen * SAMPLE_BLOCK + winner
            for chunk, drawn in zip(group, tokens.split(rows), strict=True):
                draws[chunk.b, :, chunk.d] = drawn.view(chunk.size, inputs.draws)
        return draws

    def _exponentials(self, source: Source, chunk: Chunk) -> tuple[Tensor, Tensor]:
        shifted, _ = source.load_shifted(chunk, self.inputs.mask_id)
        return exponentials_(shifted)[:2]

    def _mean_draw(self, values: Tensor, inverse: Tensor, chunk: Chunk) -> Tensor:
        """q_u (P, V): the mean over draws, one-hot where a draw has revealed the token."""
        share = inverse / inverse.shape[1]
        if self.inputs.xu is None:
            return torch.bmm(share.unsqueeze(1), values).squeeze(1)
        tokens = self.inputs.xu[chunk.b, :, chunk.d]  # [P, K]
        revealed = self._revealed(tokens)
        mean = torch.bmm(share.masked_fill(revealed, 0.0).unsqueeze(1), values).squeeze(1)
        return mean.scatter_add_(-1, tokens, revealed.to(mean.dtype) / inverse.shape[1])

    # The distributions that the marginal is pulled towards ----------------------------------

    def _distributions(self, chunk: Chunk, alive: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """q_T, q_u and their weighted sum q, each (P, V); zero at positions that are not alive."""
        values, inverse = self._exponentials(self.teacher, chunk)
        share = inverse / inverse.shape[1] * alive.unsqueeze(-1)
        teacher = torch.bmm(share.unsqueeze(1), values).squeeze(1)
        mean_draw = None
        if self.consistency is not None and self.wants_marginals:
            mean_draw = self.consistency.kept(chunk)
            if mean_draw is None:
                mean_draw = self._mean_draw(*self._exponentials(self.consistency, chunk), chunk)
            mean_draw = mean_draw * alive.unsqueeze(-1)
        if not self.wants_marginals:
            return teacher, None, torch.zeros_like(teacher)
        wanted = teacher * self.teacher_weight[chunk.b].unsqueeze(-1)
        if mean_draw is not None:
            factor = self.consistency_weight[chunk.b].unsqueeze(-1)
            wanted = torch.addcmul(wanted, mean_draw, factor)
        return teacher, mean_draw, wanted

    # The first sweep over the student's logits -----------------------------------------------

    def _forward_sweep(self) -> None:
        inputs, count = self.inputs, self.b.shape[0]
        self.stats = Statistics.empty(
            self.b, self.d, inputs.components, self.targets.shape[1], self.dtype
        )
        self.mass = torch.zeros(count, inputs.components, dtype=self.dtype, device=self.device)
        self.inverse = torch.zeros_like(self.mass)
        self.grad_log_weights = torch.zeros(
            inputs.batch, inputs.components, dtype=self.dtype, device=self.device
        )
        zeros = torch.zeros(inputs.batch, dtype=self.dtype, device=self.device)
        self.teacher_sum, self.consistency_sum, self.component_sum = zeros, zeros, zeros
        self.ratios = Keep(self.student.keep_bytes)  # q/s of a chunk, [P, V]
        self.log_chunks: set[int] = set()  # those that exponentials were too small for
        for chunk in self.chunks:
            self._forward_chunk(chunk)

    def _forward_chunk(self, chunk: Chunk) -> None:
        shifted, peak = self.student.load_shifted(chunk, self.inputs.mask_id)
        picked = shifted.gather(-1, target_index(self.targets, chunk, self.student.components))
        values, inverse, log_total = exponentials_(shifted)
        self.stats.put(chunk, picked, peak, log_total)
        self.inverse[chunk.part] = inverse
        if self.wants_marginals or self.wants_component:
            self._forward_marginal(chunk, values, inverse)
        if self.student.wants_gradient:
            self.student.keep(chunk, values)

    def _forward_marginal(self, chunk: Chunk, values: Tensor, inverse: Tensor) -> None:
        alive = (inverse > 0).any(1).to(self.dtype)  # [P]
        inputs, b = self.inputs, chunk.b
        teacher, mean_draw, wanted = self._distributions(chunk, alive)
        result = None
        if self._from_values:
            reported = None
            if inputs.return_terms:
                reported = teacher if mean_draw is None else teacher + mean_draw
            result = marginal_from_values(
                values,
                inverse,
                self.weights[b],
                wanted,
                teacher,
                reported if self.wants_marginals else None,
                self.wants_component,
            )
        if result is None:
            result = marginal_from_logs(
                self._log_prob(chunk),
                inputs.log_weights[b],
                wanted,
                teacher,
                self.wants_component,
            )
            self.log_chunks.add(chunk.index)
        elif self.student.wants_gradient:
            assert result.ratio is not None
            self.ratios.put(chunk.index, result.ratio)
        self.mass[chunk.part] = result.mass
        if self.wants_marginals:
            self.grad_log_weights.index_add_(0, b, result.mass, alpha=-1.0)
            divergence = kl_divergence(teacher, result.log_marginal)
            self.teacher_sum = self.teacher_sum.index_add(0, b, divergence)
            if mean_draw is not None:
                divergence = kl_divergence(mean_draw, result.log_marginal)
                self.consistency_sum = self.consistency_sum.index_add(0, b, divergence)
        if self.wants_component:
            assert result.divergence is not None
            # A component of weight 0 is as good as absent, even where it is infinitely far.
            counts = (alive.unsqueeze(-1) > 0) & (self.weights[b] > 0)
            weighted = self.weights[b] * torch.where(counts, result.divergence, 0.0)
            self.component_sum = self.component_sum.index_add(0, b, weighted.sum(-1))
            factor = self.component_weight[b].unsqueeze(-1)
            self.grad_log_weights.index_add_(0, b, torch.where(factor > 0, weighted, 0.0) * factor)

    @property
    def _from_values(self) -> bool:
        """Whether exponentials may be used: their underflow check waits for the device."""
        return self.device.type == "cpu"

    def _log_prob(self, chunk: Chunk) -> Tensor:
        logits = load_logits(self.student, chunk, self.inputs.mask_id)
        return self.stats.normalise_(chunk, logits)

    # The second sweep over the student's logits ----------------------------------------------

    def _backward_sweep(self, kappa: Tensor) -> None:
        for chunk in self.chunks:
            row = self.mass[chunk.part] - kappa[chunk.part].sum(-1)  # [P, N]
            teacher_factor = None
            if self.wants_component:
                teacher_factor = self.component_weight[chunk.b].unsqueeze(-1)
                teacher_factor = teacher_factor * self.weights[chunk.b]
                row = row + teacher_factor
            index = target_index(self.targets, chunk, self.student.components)
            update = GradientUpdate(index, kappa[chunk.part])
            if teacher_factor is not None:
                alive = self.stats.alive[chunk.part].to(self.dtype)
                update.teacher = self._distributions(chunk, alive)[0]
                update.teacher_factor = teacher_factor
            if chunk.index in self.log_chunks:
                gradient = self._gradient_from_logs(chunk, row)
                self.student.store_gradient(chunk, update.add_to_(gradient))
                continue
            ratio, values = self.ratios.get(chunk.index), None
            if ratio is None and self.wants_marginals:
                values = self._student_values(chunk)
                ratio = self._ratio(chunk, values)
            factor = self._value_factor(chunk, row, ratio)
            if not self.student.update_kept(chunk, factor, update):
                values = self._student_values(chunk) if values is None else values
                self.student.store_gradient(chunk, update.add_to_(values.mul_(factor)))

    def _student_values(self, chunk: Chunk) -> Tensor:
        """The student's exponentials (P, N, V), as they were kept or once more."""
        values = self.student.kept(chunk)
        return self._exponentials(self.student, chunk)[0] if values is None else values

    def _ratio(self, chunk: Chunk, values: Tensor) -> Tensor:
        """q/s (P, V) of a chunk for which there was no room."""
        wanted = self._distributions(chunk, self.stats.alive[chunk.part].to(self.dtype))[2]
        scaled = self.weights[chunk.b] * self.inverse[chunk.part]
        return wanted / mixture_of(values, scaled)

    def _value_factor(self, chunk: Chunk, row: Tensor, ratio: Tensor | None) -> Tensor:
        """What the kept exponentials are multiplied with to give the dense part of dL/dz."""
        inverse = self.inverse[chunk.part]
        scaled_row = (row * inverse).unsqueeze(-1)  # [P, N, 1]
        if ratio is None:
            return scaled_row
        # row_n - w_n ratio_v as a product of rank 2: one pass, whatever the weights.
        rows = torch.cat([scaled_row, -(self.weights[chunk.b] * inverse).unsqueeze(-1)], dim=-1)
        columns = torch.stack([torch.ones_like(ratio), ratio], dim=1)  # [P, 2, V]
        return torch.bmm(rows, columns)

    def _gradient_from_logs(self, chunk: Chunk, row: Tensor) -> Tensor:
        log_prob = self._log_prob(chunk)
        alive = self.stats.alive[chunk.part].to(self.dtype)
        wanted = self._distributions(chunk, alive)[2]
        _, share = shares(log_prob, self.inputs.log_weights[chunk.b])
        gradient = log_prob.exp_().mul_(row.unsqueeze(-1))
        return gradient.sub_(share.mul_(wanted.unsqueeze(1)))


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
        evaluation = _Evaluation(record, factor, needs)
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
        source = make_source(head, log_weights.dtype, ctx.needs_input_grad[2:])
        stats = _row_statistics(source, problem)
        joint = joint_terms(stats, log_weights, problem.correlation)
        alpha = upstream if problem.correlation else -upstream
        if source.wants_gradient:
            kappa = kappa_coefficients(joint, stats.b, alpha)
            for chunk in chunks(stats.b, stats.d, source.chunk_size()):
                shifted, _ = source.load_shifted(chunk, problem.mask_id)
                values, inverse, _ = exponentials_(shifted)
                factor = -kappa[chunk.part].sum(-1) * inverse
                index = target_index(problem.targets, chunk, source.components)
                update = GradientUpdate(index, kappa[chunk.part])
                source.store_gradient(chunk, update.add_to_(values.mul_(factor.unsqueeze(-1))))
        grad_log_weights = None
        if ctx.needs_input_grad[1]:
            grad_log_weights = joint_grad_log_weights(joint, stats.b, alpha)
        return (None, grad_log_weights, *source.gradients())


def _row_statistics(source: Source, problem: _Rows) -> Statistics:
    """Log-probabilities of the targets and logsumexps of every active row."""
    batch, rows, positions = problem.targets.shape
    b, d = active_positions(problem.active, batch, positions, problem.targets.device)
    stats = Statistics.empty(b, d, source.components, rows, source.dtype)
    for chunk in chunks(b, d, source.chunk_size()):
        shifted, peak = source.load_shifted(chunk, problem.mask_id)
        picked = shifted.gather(-1, target_index(problem.targets, chunk, source.components))
        stats.put(chunk, picked, peak, exponentials_(shifted)[2])
    return stats
