"""The English text that ships with Python: the language reference, as `help()` prints it.

Topics overlap, since some are sections of others; each passage is kept once. Underlines and rules
of tables go, and runs of spaces and line ends become one space.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

HELD_OUT_SHARE = 0.15
# A topic longer than this share of the text stays in training, or it would be most of either part.
LONGEST_HELD_OUT = 0.07
OVERLAP_LENGTH, OVERLAP_SHARE = 60, 0.5


@dataclasses.dataclass(frozen=True)
class Text:
    """Training and held-out topics, as tokens 0..V-1 of `alphabet`.

    Attributes:
        alphabet: the V characters that occur in either part, sorted.
        train, held_out: (T,) int64, one tensor per topic.
        names: of the held-out topics.
    """

    alphabet: str
    train: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    names: tuple[str, ...]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of all of it: the text changes with the version of Python."""
        digest = hashlib.sha256(self.alphabet.encode())
        for topics in (self.train, self.held_out):
            for topic in topics:
                digest.update(topic.numpy().astype("<i8").tobytes() + b"|")
        return digest.hexdigest()[:16]

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters of tokens; ids beyond the alphabet (the mask) become '_'."""
        return "".join(self.alphabet[i] if i < len(self.alphabet) else "_" for i in tokens)


def clean(topics: Mapping[str, str]) -> dict[str, str]:
    """Topics by name, without rules and needless white space, longest first, without repeats.

    A topic is left out if half of its windows of 60 characters stand in longer topics, and its
    repeated part is small otherwise.
    """
    spaced = {
        name: re.sub(r"\s+", " ", re.sub(r"[-=*+~^]{4,}", " ", text)).strip()
        for name, text in topics.items()
    }
    seen: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(spaced, key=lambda name: (-len(spaced[name]), name)):
        text = spaced[name]
        windows = [
            text[i : i + OVERLAP_LENGTH] for i in range(max(1, len(text) - OVERLAP_LENGTH + 1))
        ]
        if sum(window in seen for window in windows) < OVERLAP_SHARE * len(windows):
            kept[name] = text
            seen.update(windows)
    return kept


def split(topics: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Names of training and held-out topics: the same for every run, spread over the alphabet.

    Topics are held out in the order of a checksum of their names until they are 15% of the text.
    """
    total = sum(map(len, topics.values()))
    held_out: list[str] = []
    size = 0
    for name in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if size < HELD_OUT_SHARE * total and len(topics[name]) < LONGEST_HELD_OUT * total:
            held_out.append(name)
            size += len(topics[name])
    return [name for name in topics if name not in held_out], held_out


def load(topics: Mapping[str, str] | None = None) -> Text:
    """The text of this Python, or of `topics` by name; nothing is downloaded."""
    if topics is None:
        from pydoc_data import topics as shipped

        topics = shipped.topics
    kept = clean(topics)
    train, held_out = split(kept)
    alphabet = "".join(sorted(set("".join(kept.values()))))
    index = {character: i for i, character in enumerate(alphabet)}

    def encode(names: list[str]) -> tuple[Tensor, ...]:
        return tuple(
            torch.tensor([index[character] for character in kept[name]], dtype=torch.int64)
            for name in names
        )

    return Text(alphabet, encode(train), encode(held_out), tuple(held_out))


def draw_windows(
    topics: tuple[Tensor, ...], size: int, length: int, generator: torch.Generator
) -> Tensor:
    """(size, length): windows at uniform places of the topics that are long enough."""
    usable = [topic for topic in topics if len(topic) >= length]
    places = torch.tensor([len(topic) - length + 1 for topic in usable])
    ends = places.cumsum(0)
    place = torch.randint(int(ends[-1]), (size,), generator=generator)
    topic = torch.searchsorted(ends, place, right=True)
    start = place - (ends - places)[topic]
    return torch.stack(
        [usable[i][s : s + length] for i, s in zip(topic.tolist(), start.tolist(), strict=True)]
    )


def consecutive_windows(topics: tuple[Tensor, ...], length: int) -> np.ndarray:
    """(A, length) windows side by side, without overlap; what is left of a topic is not used."""
    parts = [topic[: len(topic) // length * length].view(-1, length) for topic in topics]
    return torch.cat(parts).numpy()
