"""Models whose last layer is linear, asked for the input of that layer instead of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..heads import Head, LinearHead, TensorHead

__all__ = ["call_for_head", "output_layer", "plain_linear"]


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
    """`model(tokens, *args, **kwargs).logits` as a head, without computing the logits if possible.

    Equivalent PyTorch: `LinearHead(hidden * scale, layer.weight, layer.bias)` with `hidden` the
    input of `output_layer(model)` during the call, which is given no rows to work on. A model
    whose logits do not come from that layer in one call gives them all, in a `TensorHead`.

    Args:
        tokens: (R, D) int64.
        scale: what the model multiplies the logits of its output layer with.
    """
    layer = output_layer(model)
    if layer is None:
        return TensorHead(model(tokens, *args, **kwargs).logits)
    inputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        inputs.append(arguments[0])
        return (arguments[0][:, :0],)

    handle = layer.register_forward_pre_hook(keep)
    try:
        output = model(tokens, *args, **kwargs)
    finally:
        handle.remove()
    if not inputs:
        # The weights are used without a call of the layer, as tied embeddings of LLaDA are.
        return TensorHead(output.logits)
    hidden = inputs[-1]
    whole = len(inputs) == 1 and hidden.shape[:-1] == tokens.shape
    if not whole or hidden.device != tokens.device or layer.weight.device != tokens.device:
        return TensorHead(model(tokens, *args, **kwargs).logits.to(tokens.device))
    if torch.is_autocast_enabled(hidden.device.type):
        # The layer itself would have cast its input.
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    bias: Tensor | None = layer.bias
    if scale != 1.0:
        hidden = hidden * scale
        bias = None if bias is None else bias * scale
    return LinearHead(hidden, layer.weight, bias)
