"""Caches of keys and values: what a cached model is told of a call, and what it may keep.

A cached model names in its attribute `windows` what it can do, and is called with one keyword more:
model(tokens, t[, latent], window=Window(...), **context) -> logits of those tokens. It keeps
the keys and values itself, as it knows how; `KeyValues` holds them by sequence.

    class Cached:
        windows = ("suffix", "block")

        def __init__(self, model):
            self.model, self.kept = model, KeyValues()

        def __call__(self, tokens, t, *, window):
            past = None if window.first else self.kept.rows(window)
            logits, keys_and_values = self.model(tokens, past, window.start)
            if window.first:
                self.kept.store(keys_and_values, window)
            return logits

With window="causal" it has commit(tokens, t[, latent], window=..., **context), too: it stores the
keys of its tokens for good, each seen from its own block on.

Sources: Fast-dLLM (arXiv 2505.22618) for "suffix" and "block", BD3LM (arXiv 2503.09573) for
"causal".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_values, describe

__all__ = ["KeyValues", "Window", "check_latents", "check_window"]

WINDOWS = ("all", "suffix", "block", "causal")


@dataclasses.dataclass(frozen=True)
class Window:
    """Which positions a call is about. All numbers are known on the host.

    Attributes:
        kind: "suffix", "block" or "causal".
        begin, end: bounds of the block; its masked positions are what is filled.
        start, stop: the tokens of the call are those of positions [start, stop).
        first: nothing that is in the cache holds any more. The block's first call, on all
            positions; with "causal" what begins at position 0.
        length: D, positions of a sequence.
        batch: sequences of the run; twice as many with guidance, the others without the prompt.
        sequences: (R,) int64, those of the call in ascending order, on the device; None: all. In a
            later call of a block never one that was not in its first.
    """

    kind: str
    begin: int
    end: int
    start: int
    stop: int
    first: bool
    length: int
    batch: int = 0
    sequences: Tensor | None = None

    @property
    def size(self) -> int:
        """Positions of the call."""
        return self.stop - self.start

    @property
    def rows(self) -> int:
        """R, the sequences of the call."""
        return self.batch if self.sequences is None else len(self.sequences)


class KeyValues:
    """Tensors with one row per sequence, which later calls of a block need.

    `store` keeps what the block's first call brought, or with "causal" what has been committed;
    `rows` gives the rows of a later call.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._window: Window | None = None

    def store(self, tensors: Sequence[Tensor], window: Window) -> None:
        """Keep tensors (R, ...) of the window's sequences, in place of all others."""
        for tensor in tensors:
            if tensor.ndim == 0 or len(tensor) != window.rows:
                raise ValueError(
                    f"tensors must have R = {window.rows} as their first size, "
                    f"got {tuple(tensor.shape)}"
                )
        self.tensors, self._window = list(tensors), window

    def rows(self, window: Window) -> list[Tensor]:
        """The tensors of the window's sequences; of others nothing is kept from then on.

        Raises:
            ValueError: they are of another batch, length or block, or not there.
        """
        kept, causal = self._window, window.kind == "causal"
        wanted = (window.batch, window.length, window.start if causal else window.begin)
        held = None
        if kept is not None:
            held = (kept.batch, kept.length, kept.stop if causal else kept.begin)
        if kept is None or held != wanted:
            what = "stop of what was committed" if causal else "begin of its block"
            raise ValueError(
                f"window must be that of the cache, (batch, length, {what}) = {held}, "
                f"got {wanted}: a model serves one run at a time, beginning with its first call"
            )
        if window.rows == kept.rows:  # the same, as the sequences of a block only grow fewer
            return self.tensors
        numbers = window.sequences
        if numbers is None or window.rows > kept.rows:
            raise ValueError(
                f"window must be of sequences in the cache, {kept.rows}, got {window.rows}"
            )
        if kept.sequences is not None:
            place = torch.full((kept.batch,), -1, device=numbers.device)
            place[kept.sequences] = torch.arange(kept.rows, device=numbers.device)
            numbers = place[numbers]
            check_values(numbers >= 0, "window must be of sequences in the cache")
        tensors = [tensor[numbers] for tensor in self.tensors]
        if not causal:
            self.tensors = tensors
            self._window = dataclasses.replace(kept, sequences=window.sequences)
        return tensors


def check_window(
    model: Any, kind: Any, block_length: int | None, prompt_length: int, length: int
) -> None:
    """The window is one that the model has a cache for, and the blocks are those of the model.

    block_length: of the run, None for a single block.
    """
    check_choice(kind, "window", WINDOWS)
    if kind == "all":
        return
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"window={kind!r} needs a model that is not compiled, got one that is")
    known = getattr(model, "windows", ())
    if kind not in known:
        raise ValueError(
            f"window={kind!r} needs a model with a cache for it, with an attribute `windows` that "
            f"names it, got {describe(model)} with {', '.join(known) or 'none'}"
        )
    if kind != "causal":
        return
    if not callable(getattr(model, "commit", None)):
        raise TypeError(
            f"window='causal' needs a model with a method commit, got {describe(model)}"
        )
    own = getattr(model, "block_length", None)
    if own is not None:
        if block_length != own:
            raise ValueError(f"block_length must be that of the model, {own}, got {block_length}")
        if prompt_length % own:
            raise ValueError(
                f"prompt must hold whole blocks of {own} tokens, got {prompt_length} tokens"
            )
        if length % own:
            raise ValueError(f"D must be a multiple of the model's blocks of {own}, got {length}")


def check_latents(window: str, latent_every: Any, options: Mapping[str, Any]) -> None:
    """A block with a cache has one λ: (B, L) of all steps, or that of its first step."""
    check_choice(latent_every, "latent_every", ("step", "block"))
    latent = options["latent"]
    fixed = latent_every == "block" or (isinstance(latent, Tensor) and latent.ndim == 2)
    if window != "all" and options["latent_dim"] and not fixed:
        raise ValueError(
            f"window={window!r} needs one λ for a block: latent (B, L), or latent_every='block', "
            "got one per step"
        )
