"""Small models that keep keys and values, and what they say without keeping any."""

from __future__ import annotations

import types
from typing import Any

import torch
from sampler_cases import MASK, VOCAB
from torch import Tensor, nn

from di4c_fast.heads import LinearHead
from di4c_fast.samplers.caches import KeyValues, Window

WIDTH, LAYERS, POSITIONS = 8, 2, 24
Pair = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Layers of attention without a mask, in float64; keys and values (R, n, C) by layer."""

    def __init__(self, seed: int = 0, mask_bias: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.embedding = nn.Buffer(normal(VOCAB, WIDTH))
        self.places = nn.Buffer(normal(POSITIONS, WIDTH))
        self.layers = nn.Buffer(normal(LAYERS, 3, WIDTH, WIDTH) * 0.7)
        self.ff_out = nn.Linear(WIDTH, VOCAB).double()
        self.ff_out.weight.data = normal(VOCAB, WIDTH) * 1.5
        self.ff_out.bias.data = mask_bias * (torch.arange(VOCAB) == MASK).double()

    def embed(self, tokens: Tensor, start: int = 0, latent: Tensor | None = None) -> Tensor:
        h = self.embedding[tokens] + self.places[start : start + tokens.shape[-1]]
        return h if latent is None else h * (1 + latent[:, :1, None].double())

    def keys(self, layer: int, h: Tensor) -> Pair:
        return h @ self.layers[layer, 1], h @ self.layers[layer, 2]

    def attend(self, layer: int, h: Tensor, pair: Pair, seen: Tensor | None = None) -> Tensor:
        """seen: bool, broadcast over (R, queries, keys); None: all."""
        scores = h @ self.layers[layer, 0] @ pair[0].mT / WIDTH**0.5
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        return torch.tanh(h + scores.softmax(-1) @ pair[1])

    def logits(self, tokens: Tensor) -> Tensor:
        """(D,) -> (D, V) of the model itself."""
        return self.frozen(tokens, tokens, 0, len(tokens))

    # Everything computed anew

    @torch.no_grad()
    def frozen(self, first: Tensor, now: Tensor, start: int, stop: int) -> Tensor:
        """(D, V) of tokens (D,); outside [start, stop) keys are those of `first`, logits NaN."""
        old, h = self.embed(first), self.embed(now)[start:stop]
        for layer in range(LAYERS):
            pair = self.keys(layer, old)
            mixed = tuple(x.clone() for x in pair)
            for whole, part in zip(mixed, self.keys(layer, h), strict=True):
                whole[start:stop] = part
            old, h = self.attend(layer, old, pair), self.attend(layer, h, mixed)
        logits = torch.full((len(now), VOCAB), torch.nan, dtype=h.dtype)
        logits[start:stop] = self.ff_out(h)
        return logits

    @torch.no_grad()
    def block_causal(self, tokens: Tensor, block_length: int, latents: Tensor | None = None):
        """(D, V) where a position sees its own block and those before."""
        h = self.embed(tokens)
        block = torch.arange(len(tokens)) // block_length
        if latents is not None:
            h = h * (1 + latents[block, None].double())
        for layer in range(LAYERS):
            seen = block[None, :] <= block[:, None]
            h = self.attend(layer, h, self.keys(layer, h), seen)
        return self.ff_out(h)


class Frozen:
    """The naive loop's model: it knows from the tokens when a block begins."""

    def __init__(self, model: Attention, window: str, prompt: int, length: int, before: int = 0):
        self.model, self.window, self.prompt, self.length = model, window, prompt, length
        self.before, self.begin, self.first = before, -1, torch.empty(0)

    def logits(self, x: Tensor) -> Tensor:
        behind = int((x[self.prompt :] == MASK).nonzero()[0])
        begin = self.prompt + behind // self.length * self.length
        end = min(begin + self.length, len(x))
        if self.window == "causal":
            logits = torch.full((len(x), VOCAB), torch.nan, dtype=torch.float64)
            logits[begin:end] = self.model.block_causal(x[:end], self.length)[begin:end]
            return logits
        if begin != self.begin:
            self.begin, self.first = begin, x.clone()
            return self.model.logits(x)
        stop = end if self.window == "block" else len(x)
        return self.model.frozen(self.first, x, max(0, begin - self.before), stop)


class Cached(nn.Module):
    """The model with all windows; it notes its calls."""

    windows = ("suffix", "block", "causal")

    def __init__(self, model: Attention, block_length: int | None = None):
        super().__init__()
        self.model, self.block_length, self.kept = model, block_length, KeyValues()
        self.calls: list[tuple[Tensor, Window]] = []
        self.commits: list[tuple[Tensor, Window]] = []
        self.latents: list[Tensor | None] = []

    def hidden(self, tokens: Tensor, window: Window, latent: Tensor | None) -> tuple[Tensor, list]:
        causal = window.kind == "causal"
        start, stop = window.start, window.stop
        end = stop if causal else window.length
        kept = [] if window.first else self.kept.rows(window)
        h, pairs, seen = self.model.embed(tokens, start, latent), [], None
        if causal:
            block = torch.arange(end) // (self.block_length or end)
            seen = block[None, :] <= block[start:stop, None]
        for layer in range(LAYERS):
            new = self.model.keys(layer, h)
            pair = [x.new_zeros(len(tokens), window.length, WIDTH) for x in new]
            for whole, old in zip(pair, kept[2 * layer : 2 * layer + 2], strict=False):
                whole[:] = old
            for whole, part in zip(pair, new, strict=True):
                whole[:, start:stop] = part
            pairs += pair
            h = self.model.attend(layer, h, (pair[0][:, :end], pair[1][:, :end]), seen)
        return h, pairs

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None, *, window: Window):
        self.calls.append((tokens, window))
        self.latents.append(latent)
        h, pairs = self.hidden(tokens, window, latent)
        if window.first and window.kind != "causal":
            self.kept.store(pairs, window)
        return LinearHead(h, self.model.ff_out.weight, self.model.ff_out.bias)

    def commit(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None, *, window: Window):
        self.commits.append((tokens, window))
        self.kept.store(self.hidden(tokens, window, latent)[1], window)


class FastModel(nn.Module):
    """The model with the calls of Fast-dLLM's classes."""

    def __init__(self, model: Attention):
        super().__init__()
        self.model, self.count = model, 0
        self.config = types.SimpleNamespace(scale_logits=False, d_model=WIDTH)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.ff_out

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
        replace_position: Tensor | None = None,
    ):
        self.count += 1
        start, place = 0, slice(None)
        if replace_position is not None:
            place = replace_position.nonzero(as_tuple=True)[1]
            start = int(place[0])
        elif past_key_values is not None:
            start = past_key_values[0][0].shape[-2]
        h, kept = self.model.embed(input_ids, start), []
        for layer in range(LAYERS):
            keys, values = self.model.keys(layer, h)
            if past_key_values is not None:
                old = past_key_values[layer]
                if replace_position is None:
                    keys, values = (
                        torch.cat(two, -2) for two in zip(old, (keys, values), strict=True)
                    )
                else:
                    for whole, part in zip(old, (keys, values), strict=True):
                        whole[:, place] = part
                    keys, values = old
            kept.append((keys, values))
            query = h @ self.model.layers[layer, 0]
            heads = (x.unsqueeze(1) for x in (query, keys, values))
            mixed = nn.functional.scaled_dot_product_attention(*heads)
            h = torch.tanh(h + mixed.squeeze(1))
        past = kept if use_cache else None
        return types.SimpleNamespace(logits=self.model.ff_out(h), past_key_values=past)


class FastDream(FastModel):
    """With Dream's switch."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        dual_cache: bool = False,
        replace_position: Tensor | None = None,
    ):
        assert dual_cache == (replace_position is not None)
        return super().forward(input_ids, past_key_values, use_cache, replace_position)


def compiled(model: nn.Module) -> nn.Module:
    """What `torch.compile` gives looks like this; it takes seconds."""
    model._orig_mod = nn.Identity()
    return model
