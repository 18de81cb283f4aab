"""A model called on a few rows at a time: the memory of a few rows, the gradient of one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..heads import Head, TensorHead
from ..heads.base import BuiltInHead


def call_in_pieces(
    call: Callable[..., Head], tensors: Sequence[Tensor | None], at_once: int | None
) -> Head:
    """The head (R, ...) of `call(*tensors)`, of at most `at_once` rows in a call.

    With a graph, only the heads' own tensors are kept: the backward pass calls the model once
    more on one piece after another, with the random state and the autocast of the first call, so
    that activations of one piece are alive at a time. What does not belong to the rows (an output
    weight) is that of the first piece. A head of one's own becomes its logits.

    Args:
        tensors: (R, ...) each, None where absent.
        at_once: None for all.
    """
    rows = next(len(tensor) for tensor in tensors if tensor is not None)
    if at_once is None or rows <= at_once:
        return call(*tensors)
    run: Callable[..., Head] = functools.partial(_built_in, call)
    if torch.is_grad_enabled():
        run = functools.partial(checkpoint, run, use_reentrant=False)
    starts = range(0, rows, at_once)
    pieces = ([t if t is None else t[i : i + at_once] for t in tensors] for i in starts)
    return _joined([run(*piece) for piece in pieces])


def _built_in(call: Callable[..., Head], *tensors: Any) -> Head:
    head = call(*tensors)
    return head if isinstance(head, BuiltInHead) else TensorHead(head.logits())


def _joined(heads: Sequence[Any]) -> Head:
    """Heads of one kind as one, along their first dimension."""
    parts: list[list[Tensor]] = [[] for _ in heads]

    def collect(part: list[Tensor], tensor: Tensor) -> Tensor:
        part.append(tensor)
        return tensor

    for head, part in zip(heads, parts, strict=True):
        head.map_rows(functools.partial(collect, part))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return heads[0].map_rows(lambda _: columns.pop(0))
