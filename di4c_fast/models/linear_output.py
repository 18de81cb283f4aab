"""Models whose last layer is linear, asked for the input of that layer instead of all logits.

Shapes: R rows, D positions, C hidden width, V classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..heads import Head, LinearHead, TensorHead
from .call import evaluation_mode

__all__ = ["call_for_head", "gives_linear_logits", "head_of", "output_layer", "plain_linear"]


def output_layer(model: Any) -> nn.Linear | None:
    """The layer that computes a model's logits; None if that is no plain linear layer.

    Taken from `model.get_output_embeddings()`, the convention of Hugging Face. Quantised, adapted
    (LoRA) and sharded layers are not plain: they do not compute `F.linear(x, weight, bias)`.
    """
    getter = getattr(model, "get_output_embeddings", None)
    return plain_linear(getter() if callable(getter) else None)


def plain_linear(layer: Any) -> nn.Linear | None:
    """The layer if it computes `F.linear(x, weight, bias)`, else None."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
        return None
    if tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
        return None
    return layer if layer.weight.is_floating_point() else None


def call_for_head(
    model: Any, tokens: Tensor, *args: Any, scale: float = 1.0, **kwargs: Any
) -> Head:
    """`model(tokens, *args, **kwargs).logits` as a head, see `head_of`."""
    return head_of(
        output_layer(model), lambda: model(tokens, *args, **kwargs).logits, tokens, scale=scale
    )


def head_of(
    layer: nn.Linear | None,
    call: Callable[[], Tensor],
    tokens: Tensor,
    *,
    scale: float = 1.0,
    extra: int = 0,
) -> Head:
    """The logits that `call()` gives as a head, without computing them if possible.

    Equivalent PyTorch: `LinearHead(hidden * scale, layer.weight, layer.bias)` with `hidden` the
    input of `layer` during the call, which is given no rows to work on. Where the logits do not
    come from that layer in one call of it, all of them, in a `TensorHead`.

    Args:
        layer: the last one of the model; None for no such layer.
        tokens: (R, D) int64, what the model is called with.
        scale: what the model multiplies the logits of its last layer with.
        extra: up to so many positions may follow the D of the tokens; they are dropped.
    """
    if layer is None:
        return TensorHead(call())
    with _inputs_of(layer, rows=False) as inputs:
        logits = call()
    if not inputs:  # the weights are used without a call of the layer, as LLaDA's tied ones are
        return TensorHead(logits)
    hidden, (rows, positions) = inputs[-1], tokens.shape
    whole = len(inputs) == 1 and hidden.ndim == 3 and hidden.shape[0] == rows
    whole = whole and 0 <= hidden.shape[1] - positions <= extra
    if not whole or {hidden.device, layer.weight.device} != {tokens.device}:
        return TensorHead(call().to(tokens.device))
    hidden = hidden[:, :positions]
    if scale == 1.0:
        return LinearHead(hidden, layer.weight, layer.bias)
    bias = None if layer.bias is None else layer.bias * scale
    return LinearHead(hidden * scale, layer.weight, bias)


def gives_linear_logits(
    model: nn.Module, layer: nn.Linear, call: Callable[[], Tensor], tokens: Tensor, extra: int = 0
) -> bool:
    """Whether the logits of `call()` are the layer's, bit for bit, with nothing done to them.

    Tried by two calls in eval mode, one of them without rows for the layer: scaled and capped
    logits, and models that need the rows afterwards, are told apart.
    """
    with torch.no_grad(), evaluation_mode(model):
        with _inputs_of(layer, rows=True) as inputs:
            logits = call()
        if len(inputs) != 1:
            return False
        (hidden,) = inputs
        bias = None if layer.bias is None else layer.bias.to(hidden.dtype)
        ours = F.linear(hidden, layer.weight.to(hidden.dtype), bias)[:, : tokens.shape[1]]
        if not torch.equal(logits, ours.to(logits.dtype)):
            return False
        try:
            return isinstance(head_of(layer, call, tokens, extra=extra), LinearHead)
        except (RuntimeError, IndexError):  # what follows the layer cannot do without its rows
            return False


@contextlib.contextmanager
def _inputs_of(layer: nn.Linear, *, rows: bool) -> Iterator[list[Tensor]]:
    """The inputs of a layer's calls, in the dtype of its products; rows: it may work on them."""
    inputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = arguments
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        inputs.append(hidden)
        return (hidden if rows else hidden[:, :0],)

    with layer.register_forward_pre_hook(keep):
        yield inputs
