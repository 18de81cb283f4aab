"""Calling models: signature, evaluation mode, conditioning, the shape of what comes back."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_same_device, check_tensor, describe, warn_of_probabilities
from ..heads import Head, HeadLike, as_head

Context = Mapping[str, Tensor]


class Wrapper(nn.Module):
    """A module around a model: its weights, below "model.", and its modes are the model's."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.training = getattr(model, "training", False)  # its parts keep their own modes


def check_callable(model: Any, name: str) -> None:
    if not callable(model):
        raise TypeError(f"{name} must be callable, got {describe(model)}")


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {describe(model)}")


def check_context(
    context: Context | None, batch: int, device: torch.device, name: str = "context"
) -> Context:
    """Conditioning tensors by keyword, each with one entry per example."""
    if context is None:
        return {}
    if not isinstance(context, Mapping):
        raise TypeError(f"{name} must be a mapping of tensors, got {type(context).__name__}")
    for key, value in context.items():
        entry = f"{name}[{key!r}]"
        check_tensor(value, entry)
        if value.ndim == 0 or value.shape[0] != batch:
            raise ValueError(
                f"{entry} must have B = {batch} as its first size, got {tuple(value.shape)}"
            )
        if value.device != device:
            raise ValueError(f"{entry} must be on {device}, got {value.device}")
    return context


def repeat_context(context: Context, times: int) -> Context:
    """Each example's entry `times` times in a row, as the rows of its components are."""
    return {key: value.repeat_interleave(times, dim=0) for key, value in context.items()}


def check_signature(
    model: Callable[..., HeadLike], name: str, count: int, context: Context
) -> None:
    """Raise where the call is certain to fail for its number or names of arguments."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        inspect.signature(function).bind(*[None] * count, **dict.fromkeys(context))
    except TypeError as error:
        called = ", ".join([*("tokens", "t", "latent")[:count], *(f"{key}=" for key in context)])
        raise TypeError(
            f"{name} must take ({called}), got {describe(model)} with the signature "
            f"{inspect.signature(function)}: {error}"
        ) from None
    except ValueError:  # a builtin without a signature
        return


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
    check_signature(model, name, len(arguments), context)
    output = model(*arguments, **context)
    head = as_head(output, f"the output of {name}")
    rows, positions = tokens.shape
    shape = tuple(head.shape)
    if len(shape) != 3 or shape[:2] != (rows, positions):
        raise ValueError(
            f"{name} must return logits of shape (R, D, V) with (R, D) = {(rows, positions)} "
            f"for tokens {tuple(tokens.shape)}, got {shape}"
        )
    if vocab_size is not None and head.vocabulary != vocab_size:
        raise ValueError(
            f"{name} must return logits over V = {vocab_size} classes, got shape {shape}"
        )
    check_same_device(head, f"the output of {name}", tokens, "its tokens")
    warn_of_probabilities(output, f"the output of {name}")
    return head


@contextlib.contextmanager
def evaluation_mode(*models: Any) -> Iterator[None]:
    """Every `nn.Module` among the models in eval mode; each submodule's own mode comes back."""
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
