"""The loss and its gradient in float64, for shapes at which a dense float64 loss does not fit.

The joint terms couple all positions, but only through sums over positions. So the first sweep adds
these up, chunk by chunk; then the loss is, as a function of one chunk of positions, an ordinary
dense expression in which the rest is constant, and autograd differentiates it. Nothing here is
shared with the backends.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from di4c_fast import Head, LinearHead, LogisticHead, TensorHead

SAMPLED_POSITIONS = 12


@dataclasses.dataclass
class Problem:
    """The arguments of one loss, on one device.

    student, teacher, consistency: (B, N, D, V), (B, D, V), (B, K, D, V); the latter two are None
    where only the likelihood of x0 counts.
    """

    student: Head
    teacher: Head | None
    consistency: Head | None
    x0: Tensor
    consistency_x: Tensor | None
    xt: Tensor | None
    xu: Tensor | None
    mask_id: int | None
    data_weight: float

    @property
    def cross_entropy(self) -> bool:
        return self.teacher is None


@dataclasses.dataclass
class Truth:
    """The loss, and its gradients: rows at the sampled positions, or a whole weight."""

    loss: float
    positions: Tensor  # (P,) flattened b * D + d, sampled
    rows: list[Tensor]  # per tensor of the student's head with a row per position: (P, N, ...)
    weight: Tensor | None  # of a linear head, (V, C) fp32
    norms: list[float]  # of the gradients of `rows`, all active positions


def solve(problem: Problem, chunk_bytes: int, seed: int = 0) -> Truth:
    """Loss and gradients in float64.

    Args:
        chunk_bytes: about what a float64 tensor of one chunk of positions may take.
    """
    solver = _Solver(problem, chunk_bytes)
    return solver.solve(seed)


class _Solver:
    def __init__(self, problem: Problem, chunk_bytes: int):
        self.problem = problem
        self.batch, self.components, self.positions, vocabulary = problem.student.shape
        self.device = problem.student.device
        # The mask token is the last one in every benchmark, so excluding it is a slice.
        assert problem.mask_id is None or problem.mask_id == vocabulary - 1
        self.allowed = vocabulary if problem.mask_id is None else vocabulary - 1
        if problem.xt is None:
            active = torch.ones(self.batch, self.positions, dtype=torch.bool, device=self.device)
        else:
            active = problem.xt == problem.mask_id
        self.active = active.flatten().nonzero().squeeze(-1)
        rows = max(
            self.components, 1 if problem.consistency is None else problem.consistency.shape[1]
        )
        self.chunk = max(1, chunk_bytes // (8 * rows * vocabulary))
        self.wide = _widened(problem.student)

    def solve(self, seed: int) -> Truth:
        problem = self.problem
        targets = problem.x0.unsqueeze(1)
        if problem.consistency_x is not None:
            draws = problem.consistency_x
            if problem.xu is not None:
                draws = torch.where(problem.xu != problem.mask_id, problem.xu, draws)
            targets = torch.cat([targets, draws], dim=1)
        self.targets = targets  # (B, J, D)
        count = targets.shape[1]
        alpha = torch.full((count,), 1.0, dtype=torch.float64, device=self.device)
        alpha[0] = problem.data_weight
        if count > 1:
            alpha[1:] = 1.0 / (count - 1)
        self.alpha = alpha

        shape = (self.batch, count, self.components)
        joint = torch.zeros(shape, dtype=torch.float64, device=self.device)
        local = 0.0
        with torch.no_grad():
            for chunk in self._chunks(self.active):
                per_row, divergence = self._terms(chunk, self._take(chunk))
                joint.index_add_(0, chunk // self.positions, per_row)
                local += float(divergence.sum())
        log_weight = -math.log(self.components)
        terms = -(joint + log_weight).logsumexp(-1)  # [B, J]
        scale = 1.0 if problem.cross_entropy else 1.0 / self.batch
        loss = (float((terms * alpha).sum()) + local) * scale

        sampled = self._sampled(seed)
        linear = isinstance(problem.student, LinearHead)
        # Every position contributes to the gradient of a weight; otherwise a few suffice.
        visited = self.active if linear else sampled[torch.isin(sampled, self.active)]
        weight = torch.zeros_like(self.wide[1], dtype=torch.float64) if linear else None
        rows: list[Tensor] | None = None
        squares: list[float] = []
        for chunk in self._chunks(visited):
            leaves = [t.requires_grad_() for t in self._leaves(chunk)]
            per_row, divergence = self._terms(chunk, self._head(leaves))
            example = chunk // self.positions
            here = torch.zeros_like(joint).index_add(0, example, per_row)
            rest = joint - here.detach()
            cor = -(rest + here + log_weight).logsumexp(-1)
            value = ((cor * alpha).sum() + divergence.sum()) * scale
            gradients = list(torch.autograd.grad(value, leaves))
            if weight is not None:
                weight += gradients.pop(1)
            if rows is None:
                size = (len(sampled),)
                rows = [g.new_zeros(size + g.shape[1:]) for g in gradients]
                squares = [0.0] * len(gradients)
            match = (sampled[:, None] == chunk).nonzero()
            for index, gradient in enumerate(gradients):
                rows[index][match[:, 0]] = gradient[match[:, 1]]
                squares[index] += float(gradient.square().sum())
        assert rows is not None
        return Truth(
            loss,
            sampled,
            rows,
            None if weight is None else weight.float(),
            [math.sqrt(square) for square in squares],
        )

    def _sampled(self, seed: int) -> Tensor:
        """Some active positions and, to see that nothing leaks there, some that are not."""
        generator = torch.Generator().manual_seed(seed)
        total = self.batch * self.positions
        inactive = torch.ones(total, dtype=torch.bool)
        inactive[self.active.cpu()] = False
        chosen = []
        others = inactive.nonzero().squeeze(-1)
        for pool, size in ((self.active.cpu(), SAMPLED_POSITIONS - 3), (others, 3)):
            chosen.append(pool[torch.randperm(len(pool), generator=generator)[:size]])
        return torch.cat(chosen).to(self.device)

    def _chunks(self, positions: Tensor) -> Iterator[Tensor]:
        yield from positions.split(self.chunk)

    # The rows of a chunk, P positions: (P, N, ...) ---------------------------------------------

    def _row_numbers(self, chunk: Tensor, count: int) -> Tensor:
        """Rows of a (B, count, D, V) head for flattened positions: (P, count)."""
        example, position = chunk // self.positions, chunk % self.positions
        component = torch.arange(count, device=self.device)
        return (example[:, None] * count + component) * self.positions + position[:, None]

    def _leaves(self, chunk: Tensor) -> list[Tensor]:
        rows = self._row_numbers(chunk, self.components)
        taken = self.problem.student.take(rows).tensors()
        if isinstance(self.problem.student, LinearHead):
            assert taken[0] is not None
            return [taken[0].detach().double(), self.wide[1].detach()]
        return [tensor.detach().double() for tensor in taken if tensor is not None]

    def _head(self, leaves: list[Tensor]) -> Tensor:
        """Logits (P, N, allowed columns) from float64 tensors."""
        return _logits(self.problem.student, leaves)[..., : self.allowed]

    def _take(self, chunk: Tensor) -> Tensor:
        return self._head(self._leaves(chunk))

    def _terms(self, chunk: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Per position: log-ratios of the targets (P, J, N), and the divergences (P,)."""
        problem = self.problem
        example, position = chunk // self.positions, chunk % self.positions
        targets = self.targets[example, :, position]  # [P, J]
        log_prob = logits.log_softmax(-1)  # [P, N, V]
        index = targets.unsqueeze(1).expand(-1, self.components, -1)
        picked = log_prob.gather(-1, index).transpose(1, 2)  # [P, J, N]
        if problem.cross_entropy:
            return picked, picked.new_zeros(len(chunk))
        marginal = log_prob.logsumexp(1) - math.log(self.components)  # [P, V]
        ratios = picked - marginal.gather(-1, targets).unsqueeze(-1)
        divergence = _kl(self._teacher(chunk), marginal) + _kl(self._draws(chunk), marginal)
        return ratios, divergence

    @torch.no_grad()
    def _teacher(self, chunk: Tensor) -> Tensor:
        head = self.problem.teacher
        assert head is not None
        taken = head.take(chunk)
        wide = [t.double() for t in taken.tensors() if t is not None]
        return _logits(head, wide)[..., : self.allowed].softmax(-1)

    @torch.no_grad()
    def _draws(self, chunk: Tensor) -> Tensor:
        head, xu = self.problem.consistency, self.problem.xu
        assert head is not None
        taken = head.take(self._row_numbers(chunk, head.shape[1]))
        wide = [t.double() for t in taken.tensors() if t is not None]
        probs = _logits(head, wide)[..., : self.allowed].softmax(-1)  # [P, K, V]
        if xu is not None:
            example, position = chunk // self.positions, chunk % self.positions
            tokens = xu[example, :, position]  # [P, K]
            revealed = tokens != self.problem.mask_id
            probs[revealed] = 0.0
            where = revealed.nonzero()
            probs[where[:, 0], where[:, 1], tokens[revealed]] = 1.0
        return probs.mean(1)


def _widened(head: Head) -> list[Tensor]:
    if isinstance(head, LinearHead):
        return [head.hidden, head.weight.detach().double()]
    return []


def _logits(head: Head, wide: list[Tensor]) -> Tensor:
    if isinstance(head, TensorHead):
        return wide[0]
    if isinstance(head, LinearHead):
        return wide[0] @ wide[1].T
    assert isinstance(head, LogisticHead)
    return head.with_tensors(wide).logits()


def _kl(target: Tensor, log_prob: Tensor) -> Tensor:
    return (torch.xlogy(target, target) - target * log_prob).sum(-1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN anywhere gives NaN."""
    difference = actual.detach().double() - expected.double()
    norm = float(expected.double().norm())
    return float(difference.norm()) / norm if norm > 0 else float(difference.norm())
