"""Packed batches: sequences of unequal length, one after the other in one row.

Shapes: S sequences, T positions of all of them, N components, L the longest length.

In the problem of a packed batch every position is an example of its own: the student (1, N, T, V)
is viewed as (T, N, 1, V). The passes know positions and no sequences, so they run as they are.
Only what is joint goes by sequence: sums over positions, and what is given for each sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..heads import Head
from .problem import Problem


def pack_problem(problem: Problem) -> Problem:
    """The problem of S sequences from that of one row; weights and log-weights are theirs."""
    ends = problem.ends
    assert ends is not None
    if problem.position_group is not None:
        raise ValueError("cu_seqlens and position_group cannot be given together")

    def first(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.transpose(0, -1).contiguous()

    heads: dict[str, Any] = {
        name: head and head.positions_first() for name, head in _heads(problem).items()
    }
    total = problem.sizes[2]
    sequences = torch.arange(ends.numel() - 1, device=ends.device)
    return dataclasses.replace(
        problem,
        **heads,
        tokens=first(problem.tokens),
        xu=first(problem.xu),
        active=first(problem.active),
        sequence=sequences.repeat_interleave(ends.diff(), output_size=total),
    )


def pad_problem(problem: Problem) -> Problem:
    """A packed problem as one of S padded rows, whose padding is not active."""
    assert problem.ends is not None
    starts, lengths = problem.ends[:-1, None], problem.ends.diff()
    total, longest = problem.sizes[0], int(lengths.max()) if lengths.numel() else 0
    places = torch.arange(longest, device=lengths.device)
    at = (starts + places).clamp(max=max(total - 1, 0))  # [S, L]
    active = places < lengths.unsqueeze(1)
    if problem.active is not None:
        active = active & problem.active[at, 0]

    def rows(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor[at, :, 0].transpose(1, 2)

    def head(packed: Head | None) -> Head | None:
        if packed is None:
            return None
        if len(packed.shape) == 3:
            return packed.take(at)
        several = packed.shape[1]
        components = torch.arange(several, device=at.device)
        return packed.take(at.unsqueeze(1) * several + components.view(1, -1, 1))

    heads: dict[str, Any] = {name: head(packed) for name, packed in _heads(problem).items()}
    return dataclasses.replace(
        problem,
        **heads,
        tokens=rows(problem.tokens),
        xu=rows(problem.xu),
        active=active,
        ends=None,
        sequence=None,
    )


def _heads(problem: Problem) -> dict[str, Head | None]:
    return {name: getattr(problem, name) for name in ("student", "teacher", "consistency")}
