"""The networks of MDLM and SDTT, asked for the input of their last layer instead of all logits.

Both repositories call network(tokens (R, D), sigma (R,)) and get logits (R, D, V) from one linear
layer behind normalisation and modulation: `output_layer.linear` of their transformers (below
`backbone` in the checkpoints of Hugging Face), or the output embedding of the Mamba variant.
Students of Di4C append a token for λ, drawn inside the network, and drop it from the logits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..checks import check_shape, without_autocast
from ..heads import Head
from ..models.call import Wrapper
from ..models.latent import sinusoid
from ..models.linear_output import gives_linear_logits, head_of, output_layer, plain_linear

__all__ = ["Denoiser", "Loop"]


class Denoiser(Wrapper):
    """A network of these repositories as a module (tokens, t[, latent]) → head.

    Equivalent PyTorch: `network(tokens, sigma)` at the noise level of t, the λ of a student
    replaced where one (R, latent_dim) is given. Where the logits are the last linear layer's and
    nothing else, which is tried once on two positions, the result is
    `LinearHead(hidden, weight, bias)`; compiled, sharded, quantised or otherwise different networks
    give all their logits.

    Args:
        network: called as network(tokens (R, D) int64, sigma (R,) float32).
        noise_level: sigma (R,) of times (R,).
    """

    def __init__(self, network: Any, noise_level: Callable[[Tensor], Tensor]):
        super().__init__(network)
        self.noise_level = noise_level
        self.compiled = hasattr(network, "_orig_mod")
        self._linear: bool | None = None

    @property
    def latent_dim(self) -> int:
        """1 for a student of Di4C, 0 otherwise."""
        return 0 if self._latent_layer() is None else 1

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Head:
        return self.at(tokens, self.noise_level(t), latent)

    def at(self, tokens: Tensor, sigma: Tensor, latent: Tensor | None = None) -> Head:
        """The same at a noise level."""
        if latent is not None:
            check_shape(latent, "latent", "R, L", (tokens.shape[0], self.latent_dim))
        # The repositories switch autocast off around their networks, which switch it on inside.
        with without_autocast(tokens.device):
            if self._linear is None and len(tokens):
                self._linear = self._try(tokens[:, :2], sigma, latent)
            layer = self._last_layer() if self._linear else None
            return head_of(layer, lambda: self._call(tokens, sigma, latent), tokens, extra=1)

    def _call(self, tokens: Tensor, sigma: Tensor, latent: Tensor | None) -> Tensor:
        with self._latents(latent):
            output = self.model(tokens, sigma)
        return getattr(output, "logits", output)

    def _try(self, tokens: Tensor, sigma: Tensor, latent: Tensor | None) -> bool:
        """Whether the logits are those of the last layer, with nothing done to them."""
        layer = self._last_layer()
        if layer is None or not isinstance(self.model, nn.Module):
            return False
        if latent is None and self.latent_dim:  # no random numbers for a trial
            latent = sigma.new_full((len(tokens), 1), 0.5)
        call = functools.partial(self._call, tokens, sigma, latent)
        return gives_linear_logits(self.model, layer, call, tokens, extra=1)

    def _last_layer(self) -> nn.Linear | None:
        if self.compiled:
            return None
        inner = self._inner()
        layer = getattr(getattr(inner, "output_layer", None), "linear", None)
        return output_layer(getattr(inner, "model", None)) if layer is None else plain_linear(layer)

    def _latent_layer(self) -> nn.Module | None:
        inner = self._inner()
        if self.compiled or not getattr(inner, "is_di4c", False):
            return None
        layer = getattr(inner, "latent_projection", None)
        return layer if isinstance(layer, nn.Module) else None

    def _inner(self) -> Any:
        return getattr(self.model, "backbone", self.model)

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

        with layer.register_forward_pre_hook(put):
            yield


class Loop:
    """What stands in for a model's own sampling: its denoiser is made anew with its network."""

    def __init__(self, model: Any, as_model: Callable[[Any], Denoiser], original: Any = None):
        self.model, self._as_model, self.original = model, as_model, original
        self._denoiser: Denoiser | None = None

    @property
    def denoiser(self) -> Denoiser:
        if self._denoiser is None or self._denoiser.model is not self.model.backbone:
            self._denoiser = self._as_model(self.model)
        return self._denoiser
