"""Models of Hugging Face as denoisers: `MaskedLM`, and `CachedLM` for those that keep keys."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..checks import check_int, check_shape, describe
from ..heads import Head
from ..models.call import Wrapper, check_module
from ..models.linear_output import head_of, output_layer
from ..models.masked_lm import MaskedLM, has_linear_head
from ..samplers.caches import KeyValues, Window

__all__ = ["CachedLM", "MaskedLM", "has_linear_head"]


class CachedLM(Wrapper):
    """A decoder of Hugging Face as a denoiser that sees both sides, with all windows of samplers.

    Equivalent PyTorch of a call on all positions: `model(tokens, attention_mask=zeros).logits` with
    an additive mask (1, 1, D, D) that hides nothing. In the later calls of a block, keys and values
    of the other positions are those of the first: nothing is concatenated, those of the call are
    written over theirs.

        model = CachedLM(AutoModelForCausalLM.from_pretrained(name))
        sample_confidence(model, (B, D), mask_id=..., steps=64, block_length=32, window="block")

    With window="causal" a position sees its own block and those before. It serves one run at a
    time.

    Args:
        model: called as model(tokens (R, D), attention_mask, position_ids, past_key_values or
            cache, use_cache) with `update(keys, values, layer)` of the cache in every layer, and
            full attention in all of them, such as `LlamaForCausalLM`. Held, not copied.
        block_length: of a block-causal model: the blocks begin at multiples of it. None: what is
            committed together sees itself, as the whole prompt.
        linear_head: as of `MaskedLM`.
    """

    windows = ("suffix", "block", "causal")

    def __init__(
        self, model: nn.Module, *, block_length: int | None = None, linear_head: bool | None = None
    ):
        check_module(model)
        if block_length is not None:
            check_int(block_length, "block_length", minimum=1)
        if hasattr(model, "_orig_mod"):
            raise ValueError("model must not be compiled to keep keys, got one that is")
        names = inspect.signature(model.forward).parameters
        found = [name for name in ("cache", "past_key_values") if name in names]
        kinds = set(getattr(getattr(model, "config", None), "layer_types", None) or ())
        if not found or "position_ids" not in names or kinds - {"full_attention"}:
            raise TypeError(
                "model must take past_key_values and position_ids and have full attention in all "
                f"layers, got {describe(model)}"
                + (f" with {', '.join(sorted(kinds))}" if found and kinds else "")
            )
        linear = has_linear_head(model) if linear_head is None else linear_head
        super().__init__(model)
        self.block_length, self.kept, self._cache = block_length, KeyValues(), found[0]
        self._layer = [output_layer(model) if linear else None]  # not a submodule of its own

    def forward(
        self,
        tokens: Tensor,
        t: Tensor | None = None,
        *,
        window: Window | None = None,
        attention_mask: Tensor | None = None,
    ) -> Head:
        """(R, n) int64 to a head (R, n, V); attention_mask (R, D): 0 at padding on the left."""
        if window is None:  # all positions, nothing to keep
            length = tokens.shape[1]
            window = Window("all", 0, length, 0, length, True, length, len(tokens))

        def call() -> Tensor:
            layers, logits = self._call(tokens, window, attention_mask)
            if window.first and window.kind in ("suffix", "block"):
                self.kept.store(layers.tensors, window)
            return logits

        return head_of(self._layer[0], call, tokens)

    def commit(
        self,
        tokens: Tensor,
        t: Tensor,
        *,
        window: Window,
        attention_mask: Tensor | None = None,
    ) -> None:
        """Store the keys of tokens (R, stop − start) of filled blocks."""
        layers, _ = self._call(tokens, window, attention_mask)
        self.kept.store(layers.tensors, window)

    def _call(
        self, tokens: Tensor, window: Window, attention_mask: Tensor | None
    ) -> tuple[_Layers, Tensor]:
        start, stop, device = window.start, window.stop, tokens.device
        causal = window.kind == "causal"
        end = stop if causal else window.length
        place = torch.arange(end, device=device)
        seen = torch.ones(1, 1, stop - start, end, dtype=torch.bool, device=device)
        positions = place[None, start:stop]
        if causal and self.block_length is not None:
            block = place // self.block_length
            seen = seen & (block[None, :] <= block[start:stop, None])
        if attention_mask is not None:
            sizes = (len(tokens), window.length)
            check_shape(attention_mask, "attention_mask", "R, D", sizes)
            real = attention_mask[:, :end].bool()
            seen = seen & rearrange(real, "r k -> r 1 1 k")
            positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, start:stop]
        dtype = next(self.model.parameters()).dtype
        hidden = torch.zeros(seen.shape, dtype=dtype, device=device)
        # Eager attention takes the softmax in fp32, where a row of -inf would be NaN.
        least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        hidden.masked_fill_(~seen, least)
        layers = _Layers([] if window.first else self.kept.rows(window), start, stop, end, window)
        options = {"attention_mask": hidden, "position_ids": positions, self._cache: layers}
        logits = self.model(tokens, use_cache=True, **options).logits
        if not layers.tensors:
            raise TypeError(f"model must keep keys, got {describe(self.model)} that keeps none")
        return layers, logits


class _Layers:
    """What the layers of a model take for a cache: buffers (R, heads, D, width) for all positions.

    `update` writes the keys and values of the call and gives those that it sees.
    """

    def __init__(self, tensors: list[Tensor], start: int, stop: int, end: int, window: Window):
        self.tensors, self.new = list(tensors), not tensors
        self.start, self.stop, self.end, self.length = start, stop, end, window.length

    def get_seq_length(self, layer: int = 0) -> int:
        return self.start

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.new:
            for part in (keys, values):
                self.tensors.append(part.new_empty(*part.shape[:2], self.length, part.shape[3]))
        both = self.tensors[2 * layer : 2 * layer + 2]
        for buffer, part in zip(both, (keys, values), strict=True):
            buffer[:, :, self.start : self.stop] = part
        first, second = (buffer[:, :, : self.end] for buffer in both)
        return first, second
