"""The two sweeps of the torch backend over the positions.

Shapes, equations and the plan of the sweeps stand in `streaming.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .loss.problem import LossInputs, LossTerms
from .streaming_sample import (
    SAMPLE_BLOCK,
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
    Room,
    Source,
    chunks,
    make_source,
)
from .streaming_terms import (
    Exponentials,
    Statistics,
    active_positions,
    exponentials,
    joint_grad_log_weights,
    joint_terms,
    kappa_coefficients,
    kl_divergence,
    kl_divergence_finite,
    load_logits,
    marginal_from_logs,
    marginal_from_values,
    mixture_of,
    shares,
    smallest,
    target_index,
)

# Random numbers made at once for the draws; each takes about 20 bytes of scratch space.
DRAW_NUMBERS = 1 << 18


class Evaluation:
    """One evaluation of the loss: the sweeps, their results, and the gradients if wanted."""

    def __init__(self, inputs: LossInputs, scale: Tensor, needs_grad: tuple[bool, ...]):
        """scale: (B,), multiplies loss and gradients; needs_grad: one flag per student tensor
        and a last one for the component log-weights."""
        self.inputs = inputs
        self.dtype, self.device = inputs.dtype, inputs.student.device
        self.student = make_source(inputs.student, self.dtype, needs_grad[:-1], inputs.active)
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
        self.chunks = list(chunks(self.b, self.d, size, cut=self._kept_positions()))
        # Everything kept between the sweeps shares one room, and what saves most per byte comes
        # first: q_u, then q/s, then the student's exponentials.
        self.room = Room(self.student.keep_bytes)
        if self.consistency is not None:
            self.consistency.keep_within(self.room)
        # All (B,), times the scale.
        self.teacher_weight = inputs.teacher_weight * scale
        self.consistency_weight = inputs.consistency_weight * scale
        self.component_weight = inputs.component_weight * scale
        self.data_weight = inputs.data_weight * scale
        self.scale = scale
        self.weights = inputs.log_weights.exp()  # [B, N]

    def _kept_positions(self) -> int:
        """For how many positions the student's exponentials are kept beside q_u and q/s.

        With a chunk that ends there the room is used to the last position, also of short batches.
        """
        if self.student.writes_directly or not self.student.wants_gradient:
            return 0
        drawn = self.consistency is not None and self.inputs.consistency_x is None
        distributions = (1 + drawn) if self.wants_marginals else 0
        row = self.inputs.vocabulary * self.dtype.itemsize
        left = self.student.keep_bytes - self.b.shape[0] * distributions * row
        return max(0, left) // max(1, self.student.components * row)

    def _asked(self, weight: str) -> bool:
        return self.inputs.return_terms or weight not in self.inputs.static_zero

    def run(self) -> None:
        inputs = self.inputs
        self.targets = self._targets()  # [B, J, D]
        self.target_rows = self.targets[self.b, :, self.d]  # [A, J]
        draws = self.targets.shape[1] - 1
        self._forward_sweep()
        joint = joint_terms(self.stats, inputs.log_weights, inputs.control_variate)
        alpha = self.data_weight.unsqueeze(-1)  # [B, J]
        if draws:
            per_draw = (self.consistency_weight / draws).unsqueeze(-1).expand(-1, draws)
            alpha = torch.cat([alpha, per_draw], dim=-1)
        self.grad_log_weights += joint_grad_log_weights(joint, self.b, alpha)
        value = joint.value
        if self.student.wants_gradient:
            kappa = kappa_coefficients(joint, self.b, alpha)
            del joint
            self.stats.forget_targets()
            self._backward_sweep(kappa)

        zeros = torch.zeros(inputs.batch, dtype=self.dtype, device=self.device)
        self.terms = LossTerms(
            data_correlation=value[:, 0],
            teacher_marginal=self.teacher_sum,
            consistency_correlation=value[:, 1:].mean(1) if draws else zeros,
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
                loaded = exponentials(source, chunk, inputs.mask_id, blocks=True)
                assert loaded.sums is not None
                chosen = choose_block(loaded.sums, numbers_of_chunk)
                parts.append((chosen, take_block(loaded.values.flatten(0, 1), chosen)))
                if self.wants_marginals:
                    source.keep(chunk, self._mean_draw(loaded, chunk))
            chosen = torch.cat([block for block, _ in parts])
            race = token_uniforms(inputs.seed, 0, keys, chosen, self.dtype)
            winner = run_race(torch.cat([candidates for _, candidates in parts]), race)
            tokens = chosen * SAMPLE_BLOCK + winner
            for chunk, drawn in zip(group, tokens.split(rows), strict=True):
                draws[chunk.b, :, chunk.d] = drawn.view(chunk.size, inputs.draws)
        source.release()
        return draws

    def _exponentials(self, source: Source, chunk: Chunk) -> Exponentials:
        return exponentials(source, chunk, self.inputs.mask_id)

    def _mean_draw(self, loaded: Exponentials, chunk: Chunk) -> Tensor:
        """q_u (P, V): the mean over draws, one-hot where a draw has revealed the token."""
        draws = self.inputs.draws
        share = loaded.inverse / draws
        if self.inputs.xu is None:
            return mixture_of(loaded.values, share)
        tokens = self.inputs.xu[chunk.b, :, chunk.d]  # [P, K]
        revealed = self._revealed(tokens)
        mean = mixture_of(loaded.values, share.masked_fill_(revealed, 0.0))
        return mean.scatter_add_(-1, tokens, revealed.to(mean.dtype) / draws)

    # The distributions that the marginal is pulled towards ----------------------------------

    def _teacher(self, chunk: Chunk, alive: Tensor | None) -> Tensor:
        """q_T (P, V); `alive` (P,) is 0 at positions that the student leaves without a class."""
        loaded = self._exponentials(self.teacher, chunk)
        share = loaded.inverse if alive is None else loaded.inverse * alive.unsqueeze(-1)
        if self.inputs.teacher_components == 1:
            return loaded.values.mul_(share.unsqueeze(-1)).squeeze(1)
        return mixture_of(loaded.values, share / self.inputs.teacher_components)

    def _distributions(
        self, chunk: Chunk, alive: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """q_T, q_u and their weighted sum q, each (P, V); zero at positions that are not alive."""
        teacher = self._teacher(chunk, alive)
        if not self.wants_marginals:
            return teacher, None, torch.zeros_like(teacher)
        wanted = teacher * self.teacher_weight[chunk.b].unsqueeze(-1)
        if self.consistency is None:
            return teacher, None, wanted
        mean_draw = self.consistency.kept(chunk)
        if mean_draw is None:
            mean_draw = self._mean_draw(self._exponentials(self.consistency, chunk), chunk)
        if alive is not None:
            mean_draw = mean_draw * alive.unsqueeze(-1)
        wanted.addcmul_(mean_draw, self.consistency_weight[chunk.b].unsqueeze(-1))
        return teacher, mean_draw, wanted

    # The first sweep over the student's logits -----------------------------------------------

    def _forward_sweep(self) -> None:
        inputs, count = self.inputs, self.b.shape[0]
        self.stats = Statistics.empty(
            self.b, self.d, inputs.components, self.targets.shape[1], self.dtype
        )
        empty = torch.zeros(count, inputs.components, dtype=self.dtype, device=self.device)
        self.inverse, self.mass, self.weighted_divergence = (
            empty,
            torch.zeros_like(empty),
            torch.zeros_like(empty) if self.wants_component else None,
        )
        self.teacher_kl, self.consistency_kl = empty.new_zeros(2, count)
        # q/s of a chunk, [P, V]
        self.ratios = Keep(self.room.reserve(count * inputs.vocabulary * self.dtype.itemsize))
        self.student.keep_within(self.room)
        self.log_chunks: set[int] = set()  # those that exponentials were too small for
        self.direct_chunks: set[int] = set()  # those whose gradient goes straight to its place
        for chunk in self.chunks:
            self._forward_chunk(chunk)

        zeros = torch.zeros(inputs.batch, dtype=self.dtype, device=self.device)
        self.teacher_sum = zeros.index_add(0, self.b, self.teacher_kl)
        self.consistency_sum = zeros.index_add(0, self.b, self.consistency_kl)
        self.component_sum = zeros
        self.grad_log_weights = zeros.new_zeros(inputs.batch, inputs.components)
        if self.wants_marginals:
            self.grad_log_weights.index_add_(0, self.b, self.mass, alpha=-1.0)
        if self.weighted_divergence is not None:
            weighted = self.weighted_divergence
            self.component_sum = zeros.index_add(0, self.b, weighted.sum(-1))
            factor = self.component_weight[self.b].unsqueeze(-1)
            # Left out rather than multiplied with 0: an infinite term must not give NaN.
            gradient = torch.where(factor > 0, weighted, 0.0) * factor
            self.grad_log_weights.index_add_(0, self.b, gradient)

    def _forward_chunk(self, chunk: Chunk) -> None:
        index = target_index(self.target_rows, chunk, self.student.components)
        loaded = exponentials(
            self.student, chunk, self.inputs.mask_id, index, shift=not self._from_values
        )
        self.stats.put(chunk, loaded)
        self.inverse[chunk.part] = loaded.inverse
        if self.wants_marginals or self.wants_component:
            self._forward_marginal(chunk, loaded)
        if not self.student.wants_gradient or chunk.index in self.log_chunks:
            return
        if self.student.writes_directly and not loaded.shifted:
            self.direct_chunks.add(chunk.index)
        else:
            self.student.keep(chunk, loaded.values)

    def _forward_marginal(self, chunk: Chunk, loaded: Exponentials) -> None:
        inputs, b = self.inputs, chunk.b
        alive = self._alive(chunk) if loaded.shifted else None
        teacher, mean_draw, wanted = self._distributions(chunk, alive)
        result, divergence_of = None, kl_divergence_finite
        if self._from_values:
            reported = []
            if inputs.return_terms and self.wants_marginals:
                reported = [teacher] if mean_draw is None else [teacher, mean_draw]
            result = marginal_from_values(
                loaded.values,
                loaded.inverse,
                self.weights[b],
                wanted,
                teacher,
                reported,
                self.wants_component,
                inputs.mask_id,
            )
        if result is None:
            if not loaded.shifted:  # the logs of large logits have to be exact, too
                self.stats.put_total(
                    chunk, exponentials(self.student, chunk, inputs.mask_id, shift=True)
                )
            result = marginal_from_logs(
                self._log_prob(chunk),
                inputs.log_weights[b],
                wanted,
                teacher,
                self.wants_component,
            )
            divergence_of = kl_divergence
            self.log_chunks.add(chunk.index)
        elif self.student.wants_gradient:
            assert result.ratio is not None
            self.ratios.put(chunk.index, result.ratio)
        self.mass[chunk.part] = result.mass
        if self.wants_marginals:
            self.teacher_kl[chunk.part] = divergence_of(teacher, result.log_marginal)
            if mean_draw is not None:
                self.consistency_kl[chunk.part] = divergence_of(mean_draw, result.log_marginal)
        if self.weighted_divergence is not None:
            assert result.divergence is not None
            # A component of weight 0 is as good as absent, even where it is infinitely far.
            counts = self.weights[b] > 0
            if alive is not None:
                counts = counts & (alive.unsqueeze(-1) > 0)
            weighted = self.weights[b] * torch.where(counts, result.divergence, 0.0)
            self.weighted_divergence[chunk.part] = weighted

    @property
    def _from_values(self) -> bool:
        """Whether exponentials may be used: their underflow check waits for the device."""
        return self.device.type == "cpu"

    def _log_prob(self, chunk: Chunk) -> Tensor:
        logits = load_logits(self.student, chunk, self.inputs.mask_id)
        return self.stats.normalise_(chunk, logits)

    # The second sweep over the student's logits ----------------------------------------------

    def _backward_sweep(self, kappa: Tensor) -> None:
        inputs = self.inputs
        row = self.mass - kappa.sum(-1)  # [A, N]
        teacher_factor = None
        if self.wants_component:
            teacher_factor = self.component_weight[self.b].unsqueeze(-1) * self.weights[self.b]
            row += teacher_factor
        # row_n - w_n ratio_v as a product of rank 2: one pass, whatever the weights.
        rows = torch.stack([row, -self.weights[self.b]], dim=-1) * self.inverse.unsqueeze(-1)
        for chunk in self.chunks:
            index = target_index(self.target_rows, chunk, self.student.components)
            update = GradientUpdate(index, kappa[chunk.part])
            if teacher_factor is not None:
                update.teacher = self._teacher(chunk, self._alive(chunk))
                update.teacher_factor = teacher_factor[chunk.part]
            if chunk.index in self.log_chunks:
                gradient = self._gradient_from_logs(chunk, row[chunk.part])
                self.student.store_gradient(chunk, update.add_to_(gradient))
                continue
            direct = chunk.index in self.direct_chunks
            values = None if direct else self._student_values(chunk)
            ratio = self.ratios.get(chunk.index)
            if ratio is None and self.wants_marginals:
                known = self._student_values(chunk) if values is None else values
                ratio = self._ratio(chunk, known)
            # What was loaded there has done its work.
            free = self.student.buffer(chunk) if direct else None
            factor = self._value_factor(rows[chunk.part], ratio, free)
            if values is None:
                self.student.write_gradient(chunk, inputs.mask_id, factor, update)
            else:
                self.student.store_gradient(chunk, update.add_to_(values.mul_(factor)))
            del values, factor, ratio  # before those of the next chunk are made

    def _alive(self, chunk: Chunk) -> Tensor:
        """1.0 for positions at which some component allows some class, else 0.0: (P,)."""
        return (self.stats.total[chunk.part] > 0).any(1).to(self.dtype)

    def _student_values(self, chunk: Chunk) -> Tensor:
        """The student's exponentials (P, N, V), as they were kept or once more."""
        values = self.student.kept(chunk)
        return self._exponentials(self.student, chunk).values if values is None else values

    def _ratio(self, chunk: Chunk, values: Tensor) -> Tensor:
        """q/s (P, V) of a chunk for which there was no room."""
        wanted = self._distributions(chunk, self._alive(chunk))[2]
        mixture = mixture_of(values, self.weights[chunk.b] * self.inverse[chunk.part])
        return wanted / mixture.clamp_min_(smallest(self.dtype))

    def _value_factor(self, rows: Tensor, ratio: Tensor | None, out: Tensor | None) -> Tensor:
        """What the kept exponentials are multiplied with to give the dense part of dL/dz."""
        if ratio is None:
            return rows[..., :1]
        columns = torch.stack([torch.ones_like(ratio), ratio], dim=1)  # [P, 2, V]
        return torch.bmm(rows, columns) if out is None else torch.bmm(rows, columns, out=out)

    def _gradient_from_logs(self, chunk: Chunk, row: Tensor) -> Tensor:
        log_prob = self._log_prob(chunk)
        wanted = self._distributions(chunk, self._alive(chunk))[2]
        _, share = shares(log_prob, self.inputs.log_weights[chunk.b])
        gradient = log_prob.exp_().mul_(row.unsqueeze(-1))
        return gradient.sub_(share.mul_(wanted.unsqueeze(1)))
