"""Training examples from a file: lines of text, or tokens in a safetensors file."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .checkpoint import replacing
from .pretrained import Pretrained

__all__ = ["Corpus", "read_corpus"]

MOST_UNKNOWN = 0.5


@dataclasses.dataclass(frozen=True)
class Corpus:
    """S examples of D positions.

    Attributes:
        tokens: (S, D) int64.
        valid: (S, D) bool, the positions that are noised and learned; the others are given.
        context: (S, ...) by name, handed to the models as keywords, such as attention_mask.
    """

    tokens: Tensor
    valid: Tensor
    context: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def all(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {"tokens": self.tokens, "valid": self.valid, **self.context}

    @property
    def fingerprint(self) -> str:
        """A checksum of all of it."""
        total = 0
        for name, value in sorted(self.all.items()):
            total = zlib.crc32(name.encode() + value.contiguous().numpy().tobytes(), total)
        return f"{total:08x}"

    def take(self, rows: Tensor | slice) -> Corpus:
        """Some of the examples."""
        context = {name: value[rows] for name, value in self.context.items()}
        return Corpus(self.tokens[rows], self.valid[rows], context)

    def save(self, path: str | os.PathLike[str]) -> None:
        """A file that `read_corpus` reads."""
        with replacing(path) as temporary:
            save_file({name: v.contiguous() for name, v in self.all.items()}, str(temporary))


def read_corpus(
    path: str | os.PathLike[str], model: Pretrained, *, length: int | None = None
) -> Corpus:
    """The examples of a file, checked against the model that will see them.

    Args:
        path: `*.safetensors` with "tokens" (S, D) of whole numbers, perhaps "valid" (S, D) bool
            (else every position counts that is not masked out by an "attention_mask") and
            context of the models by its own name, each (S, ...). Any other file is UTF-8 text,
            one example a line, empty lines left out; its special tokens and padding are given,
            not learned.
        length: texts are cut after so many tokens, special ones included; None cuts none.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty, not UTF-8 or not a complete safetensors file; tokens are not the
            model's; a row is longer than the model takes; text for a model without a tokenizer.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {path}")
    limit = model.positions
    if length is not None and (length < 1 or (limit is not None and length > limit)):
        raise ValueError(f"length must be between 1 and {limit or 'any number'}, got {length}")
    corpus = _tokens(path) if path.suffix == ".safetensors" else _texts(path, model, length)
    size = corpus.tokens.shape[1]
    if limit is not None and size > limit:
        raise ValueError(
            f"{path} has rows of {size} tokens, and the model takes {limit}: cut the examples"
            + ("" if path.suffix == ".safetensors" else ", or pass a length")
        )
    learned = corpus.tokens[corpus.valid]
    low, high = corpus.tokens.min().item(), corpus.tokens.max().item()
    if low < 0 or high >= model.vocabulary:
        raise ValueError(
            f"{path} has token ids from {low} to {high}, and the model knows those in "
            f"[0, {model.vocabulary}): it was made with another vocabulary"
        )
    if bool((learned == model.mask_id).any()):
        raise ValueError(f"{path} has the mask token {model.mask_id} among the tokens to learn")
    if not bool(corpus.valid.any(1).all()):
        row = int((~corpus.valid.any(1)).nonzero()[0])
        raise ValueError(f"{path} has no token to learn in example {row + 1}")
    return corpus


def _tokens(path: pathlib.Path) -> Corpus:
    try:
        tensors = load_file(str(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    tokens = tensors.pop("tokens", None)
    if tokens is None or tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        found = "none" if tokens is None else f"{tuple(tokens.shape)} of {tokens.dtype}"
        raise ValueError(
            f"{path} must hold whole numbers 'tokens' (S, D) with S, D >= 1, got {found}"
        )
    valid = tensors.pop("valid", None)
    for name, value in {"valid": valid, **tensors}.items():
        if value is not None and value.shape[:1] != tokens.shape[:1]:
            raise ValueError(
                f"{path} must hold {name!r} for its {len(tokens)} examples, "
                f"got {tuple(value.shape)}"
            )
    if valid is None:
        seen = tensors.get("attention_mask")
        valid = torch.ones_like(tokens) if seen is None else seen
    if valid.shape != tokens.shape:
        raise ValueError(
            f"{path} must hold 'valid' of the shape of tokens, {tuple(tokens.shape)}, "
            f"got {tuple(valid.shape)}"
        )
    return Corpus(tokens.long(), valid.bool(), tensors)


def _texts(path: pathlib.Path, model: Pretrained, length: int | None) -> Corpus:
    if model.tokenizer is None:
        raise ValueError(f"{path} is text, and the model has no tokenizer: pass token ids")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    texts = {number: line for number, line in enumerate(lines, 1) if line.strip()}
    if not texts:
        raise ValueError(f"{path} has no text in it")
    options: dict[str, Any] = {"truncation": length is not None, "max_length": length}
    rows = [
        model.tokenizer(text, return_special_tokens_mask=True, **options) for text in texts.values()
    ]
    for number, row in zip(texts, rows, strict=True):
        size = len(row["input_ids"])
        if model.positions is not None and size > model.positions:
            raise ValueError(
                f"line {number} of {path} has {size} tokens, and the model takes "
                f"{model.positions}: cut the line, or pass a length"
            )
    width = max(len(row["input_ids"]) for row in rows)
    fill = model.tokenizer.pad_token_id
    seen = torch.zeros(len(rows), width, dtype=torch.int64)
    valid, tokens = seen.bool(), torch.full_like(seen, model.mask_id if fill is None else fill)
    for i, row in enumerate(rows):
        count = len(row["input_ids"])
        tokens[i, :count] = torch.tensor(row["input_ids"])
        valid[i, :count] = torch.tensor(row["special_tokens_mask"]) == 0
        seen[i, :count] = 1
    unk = -1 if model.tokenizer.unk_token_id is None else model.tokenizer.unk_token_id
    unknown = float(tokens[valid].eq(unk).double().mean())
    if unknown > MOST_UNKNOWN:
        raise ValueError(
            f"{path} has words of which {unknown:.0%} are unknown to the tokenizer: "
            "it must be the one that the model was trained with, and the text such as it knows"
        )
    return Corpus(tokens, valid, {} if bool(seen.all()) else {"attention_mask": seen})
