"""The networks of MDLM and SDTT, asked for the input of their last layer instead of all logits.

Both repositories call network(tokens (R, D), sigma (R,)) and get logits (R, D, V) from one linear
layer behind normalisation and modulation: `output_layer.linear` of their transformers (below
`backbone` in the checkpoints of Hugging Face), or the output embedding of the Mamba variant.
Students of Di4C append a token for λ, drawn inside the network, and drop it from the logits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import without_autocast
from ..heads import Head, LinearHead, TensorHead
from ..models.call import evaluation_mode
from ..models.latent import sinusoid
from ..models.linear_output import plain_linear

__all__ = ["Network"]


class Network:
    """A network of these repositories as a callable (tokens, sigma[, latent]) → head.

    Equivalent PyTorch: `network(tokens, sigma)`, the λ of a student replaced where one is given.
    Where the logits are the last linear layer's and nothing else, which is tried once with two
    tokens, that layer is given no rows to work on and the result is
    `LinearHead(hidden, weight, bias)`. Compiled, sharded, quantised or otherwise different
    networks give all their logits.

    Args:
        network: called as network(tokens (R, D) int64, sigma (R,) float32).

    Raises:
        ValueError (when called): a latent of another shape than (R, latent_dim).
    """

    def __init__(self, network: Any):
        self.network = network
        self.compiled = hasattr(network, "_orig_mod")

    @property
    def latent_dim(self) -> int:
        """1 for a student of Di4C, 0 otherwise."""
        return 0 if self._latent_layer() is None else 1

    def __call__(self, tokens: Tensor, sigma: Tensor, latent: Tensor | None = None) -> Head:
        if latent is not None and tuple(latent.shape) != (tokens.shape[0], self.latent_dim):
            raise ValueError(
                f"latent must have shape (R, L) = {(tokens.shape[0], self.latent_dim)}, "
                f"got {tuple(latent.shape)}"
            )
        # The repositories switch autocast off around their networks, which switch it on inside.
        with without_autocast(tokens.device):
            if self._linear:
                head = self._call_for_head(tokens, sigma, latent)
                if head is not None:
                    return head
            return TensorHead(self._call(tokens, sigma, latent))

    def _call(self, tokens: Tensor, sigma: Tensor, latent: Tensor | None) -> Tensor:
        with self._latents(latent):
            output = self.network(tokens, sigma)
        return getattr(output, "logits", output)

    def _call_for_head(
        self, tokens: Tensor, sigma: Tensor, latent: Tensor | None
    ) -> LinearHead | None:
        """None if the last layer did not see one vector for each token."""
        layer = self._last_layer()
        if layer is None:
            return None
        inputs: list[Tensor] = []

        def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            hidden = arguments[0]
            kind = hidden.device.type
            if torch.is_autocast_enabled(kind):
                # As the layer itself would have done, whose autocast is over when we return.
                hidden = hidden.to(torch.get_autocast_dtype(kind))
            inputs.append(hidden)
            return (hidden[:, :0],)

        handle = layer.register_forward_pre_hook(keep)
        try:
            self._call(tokens, sigma, latent)
        finally:
            handle.remove()
        if len(inputs) != 1 or inputs[0].ndim != 3 or inputs[0].device != layer.weight.device:
            return None
        rows, positions = tokens.shape
        extra = inputs[0].shape[1] - positions
        if inputs[0].shape[0] != rows or extra not in (0, 1):
            return None
        return LinearHead(inputs[0][:, :positions], layer.weight, layer.bias)

    @functools.cached_property
    def _linear(self) -> bool:
        """Whether the logits are those of the last layer, with nothing done to them."""
        layer = self._last_layer()
        if layer is None or not isinstance(self.network, nn.Module):
            return False
        device = layer.weight.device
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
        sigma = torch.zeros(1, device=device)
        latent = torch.full((1, 1), 0.5, device=device) if self.latent_dim else None
        with torch.no_grad(), evaluation_mode(self.network):
            logits = self._call(tokens, sigma, latent)
            try:
                head = self._call_for_head(tokens, sigma, latent)
            except (RuntimeError, IndexError):
                return False  # what follows the layer cannot do without its rows
        if head is None or head.shape != logits.shape:
            return False
        # The same products, of which a scale or a cap would leave more than rounding.
        bound = max(4.0 * torch.finfo(head.dtype).eps, 1e-3) * float(logits.abs().amax())
        return bool(((head.logits() - logits).abs() <= bound).all())

    def _last_layer(self) -> nn.Linear | None:
        if self.compiled:
            return None
        inner = self._inner()
        layer = getattr(getattr(inner, "output_layer", None), "linear", None)
        if layer is None:
            getter = getattr(getattr(inner, "model", None), "get_output_embeddings", None)
            layer = getter() if callable(getter) else None
        return plain_linear(layer)

    def _latent_layer(self) -> nn.Module | None:
        inner = self._inner()
        if self.compiled or not getattr(inner, "is_di4c", False):
            return None
        layer = getattr(inner, "latent_projection", None)
        return layer if isinstance(layer, nn.Module) else None

    def _inner(self) -> Any:
        return getattr(self.network, "backbone", self.network)

    @contextlib.contextmanager
    def _latents(self, latent: Tensor | None) -> Iterator[None]:
        """The student's own λ, drawn inside the network, gives way to `latent` (R, 1)."""
        layer = self._latent_layer()
        if latent is None or layer is None:
            yield
            return

        def put(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            features = arguments[0]
            wave = sinusoid(1000.0 * latent.flatten().float(), features.shape[-1])
            return (wave.to(features.device, features.dtype),)

        handle = layer.register_forward_pre_hook(put)
        try:
            yield
        finally:
            handle.remove()
