"""The transformers of MaskGIT, asked for the input of their output product instead of all logits.

They end in `last_layer`, whose output times the transposed embedding of the tokens, plus a bias per
position, are the logits of codes and labels; those of the image's positions and codes are kept.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..heads import HeadLike, LinearHead
from ..models.call import Wrapper, evaluation_mode

__all__ = ["Denoiser"]

_OUTPUT = ("last_layer", "tok_emb", "bias", "codebook_size")
# Which networks have been seen to end in that product and nothing else.
_linear: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


class Denoiser(Wrapper):
    """A network called with codes (R, h, w), labels and which of them to drop."""

    def __init__(self, network: Any, side: int, amp: bool):
        super().__init__(network)
        self.side, self.amp = side, amp

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        latent: Tensor | None = None,
        *,
        labels: Tensor,
        drop: Tensor,
    ) -> HeadLike:
        codes = rearrange(tokens, "r (h w) -> r h w", h=self.side)
        more = {} if latent is None else {"z": latent}
        amp = self.amp and tokens.is_cuda  # as in the original

        def call(rows: int | None = None) -> Tensor:
            given = {name: value[:rows] for name, value in more.items()}
            return self.model(codes[:rows], labels[:rows], drop[:rows], **given)

        with torch.autocast("cuda") if amp else contextlib.nullcontext():
            if len(tokens) and self.model not in _linear:
                _linear[self.model] = self._try(lambda: call(1))
            if not _linear.get(self.model, False):
                return call()
            inner = getattr(self.model, "module", self.model)
            with _outputs_of(inner.last_layer, rows=False) as outputs:
                call()
            (hidden,) = outputs
            if amp:  # the product is one of half precision there
                hidden = hidden.to(torch.get_autocast_dtype("cuda"))
        positions, classes = tokens.shape[1], inner.codebook_size + 1
        bias = inner.bias[:positions, :classes]
        return LinearHead(hidden[:, :positions], inner.tok_emb.weight[:classes], bias)

    def _try(self, call: Callable[[], Tensor]) -> bool:
        """Whether the logits are `last_layer`'s output times the embeddings plus the bias."""
        inner, positions = getattr(self.model, "module", self.model), self.side**2
        if hasattr(self.model, "_orig_mod") or not all(hasattr(inner, n) for n in _OUTPUT):
            return False
        with torch.no_grad(), evaluation_mode(self.model):
            with _outputs_of(inner.last_layer, rows=True) as outputs:
                logits = call()
            if len(outputs) != 1:
                return False
            hidden = outputs[0][:, : len(inner.bias)]
            ours = torch.matmul(hidden, inner.tok_emb.weight.T) + inner.bias
            if not torch.equal(logits, ours[:, :positions, : inner.codebook_size + 1]):
                return False
            try:
                with _outputs_of(inner.last_layer, rows=False):
                    return len(call()) == 0
            except (RuntimeError, IndexError):  # what follows cannot do without the rows
                return False


@contextlib.contextmanager
def _outputs_of(layer: nn.Module, *, rows: bool) -> Iterator[list[Tensor]]:
    """The outputs of a layer's calls; rows: what follows gets them."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        outputs.append(output)
        return output if rows else output[:0]

    with layer.register_forward_hook(keep):
        yield outputs
