"""The transformer of the benchmarks: a plain encoder with time, and λ as an extra token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from di4c_fast import Head, LinearHead, LogisticHead
from di4c_fast.models.latent import LatentEmbedding, LatentToken
from di4c_fast.samplers.caches import KeyValues, Window


class Transformer(nn.Module):
    """(tokens (R, D), t (R,)[, latent (R, 1)]) -> logits (R, D, V).

    `forward` returns the logits, `as_head` a head of the same numbers: a `LinearHead` with this
    budget, or with `bins` a `LogisticHead` of two numbers per position.
    """

    def __init__(
        self,
        vocabulary: int,
        positions: int,
        width: int,
        layers: int,
        *,
        latent: bool = False,
        bins: bool = False,
        budget_bytes: int | None = None,
    ):
        super().__init__()
        self.classes, self.budget_bytes = vocabulary if bins else 0, budget_bytes
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(positions, width))
        self.time = LatentEmbedding(width)
        self.latent = LatentToken(width) if latent else None
        options = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        sizes = (width, max(1, width // 64), 4 * width)
        blocks = [nn.TransformerEncoderLayer(*sizes, **options) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, 2 if bins else vocabulary, bias=False)

    def hidden(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens) + self.position
        x = x + self.time(t.float().unsqueeze(-1)).to(x.dtype)
        if self.latent is not None:
            assert latent is not None
            x = self.latent(x, latent)
        x = self.blocks(x)
        if self.latent is not None:
            x = self.latent.strip(x)
        return self.norm(x)

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor:
        if self.classes:
            return self.as_head(tokens, t, latent).logits()
        return self.output(self.hidden(tokens, t, latent))

    def as_head(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Head:
        hidden = self.hidden(tokens, t, latent)
        if self.classes:
            return LogisticHead(*self.output(hidden).unbind(-1), self.classes)
        return LinearHead(hidden, self.output.weight, budget_bytes=self.budget_bytes)


class CachedTransformer(Transformer):
    """(tokens (R, D), t (R,)) -> `LinearHead` (R, D, V), which keeps keys and values if asked."""

    windows = ("suffix", "block")

    def __init__(self, *sizes: int):
        super().__init__(*sizes)
        self.kept = KeyValues()

    def hidden(self, tokens: Tensor, start: int, kept: list[Tensor]) -> Tensor:
        """kept: keys and values (R, heads, D, C) of all layers; empty on a call of all positions,
        which fills it, else written over at those of the call."""
        stop, first = start + tokens.shape[1], not kept
        x = self.embedding(tokens) + self.position[start:stop]
        for i, block in enumerate(self.blocks):
            own = block.self_attn
            parts = F.linear(block.norm1(x), own.in_proj_weight, own.in_proj_bias)
            parts = parts.unflatten(2, (3, own.num_heads, -1))
            query, *pair = parts.permute(2, 0, 3, 1, 4)
            if first:
                kept += pair
            else:
                for whole, part in zip(kept[2 * i : 2 * i + 2], pair, strict=True):
                    whole[:, :, start:stop] = part
            seen = F.scaled_dot_product_attention(query, kept[2 * i], kept[2 * i + 1])
            x = x + own.out_proj(seen.transpose(1, 2).flatten(2))
            x = x + block.linear2(F.gelu(block.linear1(block.norm2(x))))
        return self.norm(x)

    def forward(self, tokens: Tensor, t: Tensor, *, window: Window | None = None) -> LinearHead:
        if window is None or window.first:
            kept: list[Tensor] = []
            hidden = self.hidden(tokens, 0, kept)
            if window is not None:
                self.kept.store(kept, window)
        else:
            hidden = self.hidden(tokens, window.start, self.kept.rows(window))
        return LinearHead(hidden, self.output.weight)


class TiedModel:
    """(tokens (B, D), t (B,)) -> logits (B, D, V): embeddings tied to the head, and no layers.

    A position sees its own token, its neighbours and its place, so that what a step fills changes
    what comes after it. The head is all that costs. `as_head` is a `LinearHead` of the same
    numbers.
    """

    def __init__(self, weight: Tensor, place: Tensor):
        self.weight = weight  # (V, C), entries of size 2 / sqrt(C)
        self.place = place  # (D, C), entries of size 1

    def hidden(self, tokens: Tensor) -> Tensor:
        # With the channels turned by one, no token predicts itself or its neighbours.
        x = F.layer_norm(self.weight[tokens], self.weight.shape[1:]).roll(1, -1)
        x = x + x.roll(1, 1) + x.roll(-1, 1) + self.place
        return F.layer_norm(x, self.weight.shape[1:])

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.weight)

    def as_head(self, tokens: Tensor, t: Tensor) -> LinearHead:
        return LinearHead(self.hidden(tokens), self.weight)
