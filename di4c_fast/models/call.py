"""Calling models: evaluation mode, conditioning tensors, the shape of what comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_same_device, check_tensor
from ..heads import Head, HeadLike, LinearHead, LogisticHead, TensorHead, as_head

Context = Mapping[str, Tensor]


def check_callable(model: Any, name: str) -> None:
    if not callable(model):
        raise TypeError(f"{name} must be callable, got {type(model).__name__}")


def check_context(context: Context | None, batch: int, device: torch.device) -> Context:
    """Conditioning tensors by keyword, each with one entry per example."""
    if context is None:
        return {}
    if not isinstance(context, Mapping):
        raise TypeError(f"context must be a mapping of tensors, got {type(context).__name__}")
    for key, value in context.items():
        name = f"context[{key!r}]"
        check_tensor(value, name)
        if value.ndim == 0 or value.shape[0] != batch:
            raise ValueError(
                f"{name} must have B = {batch} as its first size, got {tuple(value.shape)}"
            )
        if value.device != device:
            raise ValueError(f"{name} must be on {device}, got {value.device}")
    return context


def select_context(context: Context, examples: Tensor | slice) -> Context:
    return {key: value[examples] for key, value in context.items()}


def repeat_context(context: Context, times: int) -> Context:
    """Each example's entry `times` times in a row, as the rows of its components are."""
    return {key: value.repeat_interleave(times, dim=0) for key, value in context.items()}


def call_model(
    model: Callable[..., HeadLike],
    name: str,
    tokens: Tensor,
    t: Tensor,
    latent: Tensor | None,
    context: Context,
    vocab_size: int | None = None,
) -> Head:
    """`model(tokens, t[, latent], **context)` as a head, its shape checked against (R, D, V)."""
    arguments = (tokens, t) if latent is None else (tokens, t, latent)
    output = model(*arguments, **context)
    head = as_head(output, f"the output of {name}")
    rows, positions = tokens.shape
    shape = tuple(head.shape)
    if len(shape) != 3 or shape[:2] != (rows, positions):
        raise ValueError(
            f"{name} must return logits of shape (R, D, V) with (R, D) = {(rows, positions)} "
            f"for tokens {tuple(tokens.shape)}, got {shape}"
        )
    if vocab_size is not None and shape[2] != vocab_size:
        raise ValueError(
            f"{name} must return logits over V = {vocab_size} classes, got shape {shape}"
        )
    check_same_device(head, f"the output of {name}", tokens, "its tokens")
    return head


def unflatten_rows(head: Head, batch: int, components: int) -> Head:
    """View a head (B*N, D, V) as (B, N, D, V)."""
    sizes = (batch, components)
    if isinstance(head, LinearHead):
        hidden, *rest = head.tensors()
        assert hidden is not None
        return head.with_tensors([hidden.unflatten(0, sizes), *rest])
    if isinstance(head, (TensorHead, LogisticHead)):
        return head.with_tensors(
            [None if t is None else t.unflatten(0, sizes) for t in head.tensors()]
        )
    rows = torch.arange(head.shape[0] * head.shape[1], device=head.device)
    return head.take(rows.view(batch, components, head.shape[1]))


def split_examples(head: Head, first: int) -> tuple[Head, Head]:
    """A head (B, ...) as its first examples and the others.

    One split has one concatenation as its backward; two slices would each fill a whole
    gradient with zeros.
    """
    sizes = [first, head.shape[0] - first]
    if isinstance(head, LinearHead):
        hidden, *rest = head.tensors()
        assert hidden is not None
        front, back = hidden.split(sizes)
        return head.with_tensors([front, *rest]), head.with_tensors([back, *rest])
    if isinstance(head, (TensorHead, LogisticHead)):
        parts = [t.split(sizes) for t in head.tensors() if t is not None]
        return (
            head.with_tensors([part[0] for part in parts]),
            head.with_tensors([part[1] for part in parts]),
        )
    rows = torch.arange(head.shape[:-1].numel(), device=head.device).view(head.shape[:-1])
    return head.take(rows[:first]), head.take(rows[first:])


@contextlib.contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Every `nn.Module` among the models in eval mode; each submodule's own mode comes back."""
    training = [
        module
        for model in models
        if isinstance(model, nn.Module)
        for module in model.modules()
        if module.training
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
