"""The loss and its gradient in float64, for shapes at which a dense float64 loss does not fit.

The joint terms couple all positions, but only through sums over positions. So the first sweep adds
these up, chunk by chunk; then the loss is, as a function of one chunk of positions, an ordinary
dense expression in which the rest is constant, and autograd differentiates it. Nothing here is
shared with the backends.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from di4c_fast import Head, LinearHead

SAMPLED_POSITIONS = 12
# Arguments of `di4c_fast.loss`; without "consistency" only the likelihood of x0 counts.
Problem = dict[str, Any]


@dataclasses.dataclass
class Truth:
    """The loss, and its gradients: rows at the sampled positions, and a whole weight."""

    loss: float
    positions: Tensor  # (P,) flattened b * D + d, sampled
    rows: list[Tensor]  # per tensor of the student's head with a row per position: (P, N, ...)
    weight: Tensor | None  # of a linear head, (V, C) fp32


def solve(problem: Problem, chunk_bytes: int, seed: int = 0) -> Truth:
    """Loss and gradients in float64.

    Args:
        chunk_bytes: about what a float64 tensor of one chunk of positions may take.
    """
    return _Solver(problem, chunk_bytes).solve(seed)


class _Solver:
    def __init__(self, problem: Problem, chunk_bytes: int):
        self.problem = problem
        self.student: Head = problem["student"]
        self.batch, self.components, self.positions, vocabulary = self.student.shape
        self.device = self.student.device
        self.consistency: Head | None = problem.get("consistency")
        self.mask_id, self.xu = problem.get("mask_id"), problem.get("xu")
        # The mask token is the last one in every benchmark, so excluding it is a slice.
        assert self.mask_id is None or self.mask_id == vocabulary - 1
        self.allowed = vocabulary if self.mask_id is None else vocabulary - 1
        active = torch.ones(self.batch, self.positions, dtype=torch.bool, device=self.device)
        if self.mask_id is not None:
            active = problem["xt"] == self.mask_id
        self.active = active.flatten().nonzero().squeeze(-1)
        self.chunk = max(1, chunk_bytes // (8 * self.components * vocabulary))
        linear = isinstance(self.student, LinearHead)
        self.weight = self.student.weight.detach().double() if linear else None
        self.targets = problem["x0"].unsqueeze(1)  # (B, J, D)
        self.alpha = [1.0]
        if self.consistency is not None:
            draws = problem["consistency_x"]
            if self.xu is not None:
                draws = torch.where(self.xu != self.mask_id, self.xu, draws)
            self.targets = torch.cat([self.targets, draws], dim=1)
            self.alpha = [problem["data_weight"], *[1.0 / draws.shape[1]] * draws.shape[1]]

    def solve(self, seed: int) -> Truth:
        shape = (self.batch, len(self.alpha), self.components)
        joint = torch.zeros(shape, dtype=torch.float64, device=self.device)
        local = joint.new_zeros(())
        with torch.no_grad():
            for chunk in self.active.split(self.chunk):
                per_row, divergence = self._terms(chunk, self._leaves(chunk))
                joint.index_add_(0, chunk // self.positions, per_row)
                local += divergence.sum()
        loss = float(self._value(joint, local))

        sampled = self._sampled(seed)
        # Every position contributes to the gradient of a weight; otherwise a few suffice.
        visited = sampled[torch.isin(sampled, self.active)] if self.weight is None else self.active
        weight = None if self.weight is None else torch.zeros_like(self.weight)
        rows: list[Tensor] = []
        for chunk in visited.split(self.chunk):
            leaves = [leaf.requires_grad_() for leaf in self._leaves(chunk)]
            per_row, divergence = self._terms(chunk, leaves)
            here = torch.zeros_like(joint).index_add(0, chunk // self.positions, per_row)
            value = self._value(joint - here.detach() + here, divergence.sum())
            gradients = list(torch.autograd.grad(value, leaves))
            if weight is not None:
                weight += gradients.pop(1)
            rows = rows or [g.new_zeros(len(sampled), *g.shape[1:]) for g in gradients]
            match = (sampled[:, None] == chunk).nonzero()
            for row, gradient in zip(rows, gradients, strict=True):
                row[match[:, 0]] = gradient[match[:, 1]]
        return Truth(loss, sampled, rows, None if weight is None else weight.float())

    def _value(self, joint: Tensor, local: Tensor) -> Tensor:
        """The loss from sums over all positions: (B, J, N) of log-ratios, () of divergences."""
        terms = -(joint - math.log(self.components)).logsumexp(-1)  # [B, J]
        scale = 1.0 if self.consistency is None else 1.0 / self.batch
        return ((terms * terms.new_tensor(self.alpha)).sum() + local) * scale

    def _sampled(self, seed: int) -> Tensor:
        """Some active positions and, to see that nothing leaks there, some that are not."""
        generator = torch.Generator().manual_seed(seed)
        everything = torch.arange(self.batch * self.positions)
        active = self.active.cpu()
        others = everything[~torch.isin(everything, active)]
        chosen = [
            pool[torch.randperm(len(pool), generator=generator)[:size]]
            for pool, size in ((active, SAMPLED_POSITIONS - 3), (others, 3))
        ]
        return torch.cat(chosen).to(self.device)

    # The rows of a chunk, P positions: (P, N, ...) ---------------------------------------------

    def _taken(self, head: Head, chunk: Tensor) -> Head:
        """The rows (P, count, V) of a (B, count, D, V) head, or (P, V) of a (B, D, V) head."""
        if len(head.shape) == 3:
            return head.take(chunk)
        component = torch.arange(head.shape[1], device=self.device)
        example, position = chunk // self.positions, chunk % self.positions
        rows = (example[:, None] * len(component) + component) * self.positions
        return head.take(rows + position[:, None])

    def _leaves(self, chunk: Tensor) -> list[Tensor]:
        tensors = [t.detach() for t in self._taken(self.student, chunk).tensors() if t is not None]
        if self.weight is not None:
            return [tensors[0].double(), self.weight.detach()]
        return [tensor.double() for tensor in tensors]

    def _logits(self, head: Head, chunk: Tensor, leaves: list[Tensor] | None = None) -> Tensor:
        """Float64 logits of the allowed columns, from a head's own tensors or from others."""
        taken = self._taken(head, chunk)
        if leaves is None:
            leaves = [t.detach().double() for t in taken.tensors() if t is not None]
        absent = [None] * (len(taken.tensors()) - len(leaves))
        return taken.with_tensors([*leaves, *absent]).logits()[..., : self.allowed]

    def _terms(self, chunk: Tensor, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Per position: log-ratios of the targets (P, J, N), and the divergences (P,)."""
        example, position = chunk // self.positions, chunk % self.positions
        targets = self.targets[example, :, position]  # [P, J]
        log_prob = self._logits(self.student, chunk, leaves).log_softmax(-1)  # [P, N, V]
        index = targets.unsqueeze(1).expand(-1, self.components, -1)
        picked = log_prob.gather(-1, index).transpose(1, 2)  # [P, J, N]
        if self.consistency is None:
            return picked, picked.new_zeros(len(chunk))
        marginal = log_prob.logsumexp(1) - math.log(self.components)  # [P, V]
        ratios = picked - marginal.gather(-1, targets).unsqueeze(-1)
        with torch.no_grad():
            teacher = self._logits(self.problem["teacher"], chunk).softmax(-1)
            drawn = self._logits(self.consistency, chunk).softmax(-1)  # [P, K, V]
            if self.xu is not None:
                tokens = self.xu[example, :, position]  # [P, K]
                revealed = tokens != self.mask_id
                drawn[revealed] = torch.nn.functional.one_hot(
                    tokens[revealed], self.allowed
                ).double()
        return ratios, _kl(teacher, marginal) + _kl(drawn.mean(1), marginal)


def _kl(target: Tensor, log_prob: Tensor) -> Tensor:
    return (torch.xlogy(target, target) - target * log_prob).sum(-1)
