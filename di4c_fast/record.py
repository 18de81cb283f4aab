"""Frozen records as arguments of an op: a list of tensors, and a text with everything else."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .heads import Head, decode_head

Record = TypeVar("Record")
_parse = functools.lru_cache(ast.literal_eval)  # texts repeat from step to step


def is_traced(tensors: Sequence[Tensor]) -> bool:
    """Whether somebody looks at every operation: a compiler, a dispatch mode, a tensor subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def encode(record: Any) -> tuple[list[Tensor], str] | None:
    """Take a dataclass apart; None if one of its heads is a head of one's own.

    Its fields are tensors, heads, and what `ast.literal_eval` reads, but no dicts. In plain
    string operations, which torch.compile follows.
    """
    tensors: list[Tensor] = []
    texts = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Head):
            text, parts = value.encode(), value.tensors()
            if text is None:
                return None
            present = ",".join(["01"[part is not None] for part in parts])
            texts.append(f"{field.name!r}:{{{text!r}:({present},)}}")
            tensors += [part for part in parts if part is not None]
        elif isinstance(value, Tensor):
            texts.append(f"{field.name!r}:{{}}")
            tensors.append(value)
        else:
            texts.append(f"{field.name!r}:{value!r}")
    return tensors, "{" + ",".join(texts) + "}"


def decode(kind: type[Record], tensors: Sequence[Tensor], text: str) -> Record:
    """The record of class `kind` that `encode` took apart, over these tensors."""
    left = list(tensors)
    values = {}
    for name, value in _parse(text).items():
        if value == {}:
            value = left.pop(0)
        elif isinstance(value, dict):
            ((head, present),) = value.items()
            value = decode_head(head, [left.pop(0) if there else None for there in present])
        values[name] = value
    return kind(**values)
