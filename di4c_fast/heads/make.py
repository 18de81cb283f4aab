"""Heads from what a caller passes, and from what an op carries."""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from ..checks import check_floating, describe
from ..groups import Shard
from .base import Head
from .linear import LinearHead
from .logistic import LogisticHead
from .tensor import TensorHead

_parse = functools.lru_cache(ast.literal_eval)  # texts repeat from step to step
BUILT_IN = {kind.__name__: kind for kind in (TensorHead, LinearHead, LogisticHead)}

HeadLike: TypeAlias = "Tensor | Head"


def as_head(logits: HeadLike, name: str = "logits") -> Head:
    """Wrap a tensor of logits into a `TensorHead`; return a head unchanged.

    >>> import torch
    >>> as_head(torch.zeros(2, 5))
    TensorHead(shape=(2, 5), dtype=torch.float32, device=cpu)

    Raises:
        TypeError: `logits` is neither a tensor nor a head, or not floating point.
    """
    if isinstance(logits, Head):
        return logits
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a Tensor of logits or a Head, got {describe(logits)}")
    check_floating(logits, name)
    return TensorHead(logits)


def decode_head(text: str, tensors: Sequence[Tensor | None]) -> Head:
    """The head that `encode()` described, over these tensors."""
    name, shard, *options = _parse(f"({text},)")
    head = object.__new__(BUILT_IN[name])
    head.shard = None if shard is None else Shard(*shard)
    for option, value in zip(head.options, options, strict=True):
        setattr(head, option, value)
    return head.with_tensors(tensors)
