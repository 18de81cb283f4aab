"""What is measured: named shapes, each at the paper's size and scaled down.

`full` sizes are those of the paper and are meant for a GPU, `small` ones for two CPU cores, `tiny`
ones for tests. Letters as in `di4c_fast`: B examples, N components, K draws, D positions,
V vocabulary, C width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

SIZES = ("full", "small", "tiny")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LETTERS = {"batch": "B", "components": "N", "positions": "D", "vocabulary": "V", "width": "C"}
LETTERS |= {"layers": "layers", "steps": "steps"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape at one size: everything that is needed to build the inputs again elsewhere."""

    kind: str  # loss, draw, canvas, ancestral, confidence, cached, step or many
    shape: str
    size: str
    dtype: str
    device: str
    vocabulary: int
    batch: int = 1
    components: int = 1
    positions: int = 1
    width: int = 0
    layers: int = 0
    steps: int = 0
    head: str = "logits"  # logits, linear or logistic
    masked: float | None = None  # share of masked positions; None: no masks at all
    cross_entropy: bool = False  # N = 1 and the likelihood alone
    note: str = ""  # which point of which sweep, or the condition, for the key
    threads: int = 0  # 0: those of the run
    busy: int = 0  # other processes that each keep a core busy meanwhile

    @property
    def key(self) -> str:
        """Unique within one set of results."""
        return "-".join(part for part in (self.kind, self.shape, self.dtype, self.note) if part)

    @property
    def model_bytes(self) -> int:
        """Weights of a transformer of these sizes."""
        weights = 12 * self.layers * self.width**2 + 2 * self.vocabulary * self.width
        return weights * self.torch_dtype.itemsize

    @property
    def title(self) -> str:
        """The shape with its sizes, for people."""
        letters = {letter: getattr(self, field) for field, letter in LETTERS.items()}
        if self.kind in ("draw", "canvas"):
            letters = {"rows": self.positions, "V": self.vocabulary, "C": self.width}
        if self.kind in ("confidence", "cached"):
            del letters["N"]
        parts = [f"{name}={value}" for name, value in letters.items() if value]
        if self.masked is not None:
            parts.append(f"{self.masked:.0%} masked")
        if self.head != "logits":
            parts.append(f"{self.head} head")
        parts.append(self.dtype)
        if self.threads:
            parts.append(f"{self.threads} threads" if self.threads > 1 else "1 thread")
        if self.busy:
            parts.append("one core busy")
        return f"{self.shape} ({', '.join(parts)})"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def logits_bytes(self) -> int:
        """The student's logits (or the rows of a draw) in the dtype of the case."""
        elements = self.batch * self.components * self.positions * self.vocabulary
        return elements * self.torch_dtype.itemsize

    @property
    def active_positions(self) -> int:
        """Masked positions of one example, or all of them."""
        if self.masked is None:
            return self.positions
        return min(self.positions, math.floor(self.masked * self.positions + 0.5))


# fmt: off
_FIELDS = ("batch", "components", "positions", "vocabulary", "masked", "width", "layers", "steps")
# Kind, what all sizes share, and B, N, D, V, masked share, C, layers, steps of full, small, tiny.
SHAPES: dict[str, tuple[str, dict[str, Any], tuple[tuple[Any, ...], ...]]] = {
    # the paper's masked language model: OpenWebText with GPT-2's tokens and a mask
    "language": ("loss", {}, (
        (1, 16, 1024, 50258, 0.5), (1, 16, 128, 8193, 0.6), (1, 4, 12, 65, 0.6))),
    # the same from hidden states
    "language-hidden": ("loss", {"head": "linear"}, (
        (1, 16, 1024, 50258, 0.5, 768), (1, 16, 128, 8193, 0.6, 256), (1, 4, 12, 65, 0.6, 8))),
    # VQ images: MaskGIT on ImageNet, all positions and columns count
    "image": ("loss", {}, ((2, 32, 256, 1025), (1, 16, 256, 1025), (2, 4, 6, 33))),
    # pixels: two numbers per pixel instead of 256 logits
    "pixel": ("loss", {"head": "logistic"}, (
        (8, 16, 3072, 256), (1, 16, 768, 256), (2, 3, 8, 16))),
    # the digits of the demo: a vocabulary so small that overheads count
    "digits": ("loss", {}, (
        (128, 16, 64, 18, 0.5), (8, 16, 64, 18, 0.5), (2, 4, 6, 18, 0.5))),
    # the vocabulary of a large language model
    "large": ("loss", {"head": "linear"}, (
        (1, 16, 512, 126464, 0.5, 4096), (1, 4, 32, 126464, 0.5, 256), (1, 3, 6, 129, 0.5, 8))),
    # one component, the likelihood alone: what libraries for language models are made for
    "cross-entropy": ("loss", {"head": "linear", "cross_entropy": True}, (
        (1, 1, 8192, 128256, None, 4096), (1, 1, 512, 32000, None, 512), (1, 1, 10, 33, None, 8))),
    "rows": ("draw", {}, ((1, 1, 8192, 50258), (1, 1, 1024, 50258), (1, 1, 192, 257))),
    "rows-large": ("draw", {}, ((1, 1, 4096, 126464), (1, 1, 256, 126464), (1, 1, 192, 513))),
    # rows of a linear head: half of 1024 positions are still masked
    "head-rows": ("draw", {"head": "linear"}, (
        (1, 1, 512, 126464, None, 4096), (1, 1, 512, 50258, None, 512), (1, 1, 192, 65, None, 8))),
    # 256 positions with the vocabulary of Gemma, of which the model gives logits in half precision
    "canvas": ("canvas", {"dtype": "bf16"}, (
        (1, 1, 1024, 262144), (1, 1, 64, 262144), (1, 1, 192, 257))),
    "ancestral": ("ancestral", {}, (
        (16, 1, 1024, 50258, None, 768, 12, 16), (1, 1, 128, 50258, None, 768, 4, 16),
        (2, 1, 12, 33, None, 16, 1, 3))),
    # The head of a language model of 8 billion parameters, half of the sequence a prompt. Memory
    # is what counts: the small size keeps the vocabulary, so that there, too, the logits of the
    # masked positions are more than the head's budget.
    "confidence": ("confidence", {"head": "linear"}, (
        (1, 1, 1024, 126464, 0.5, 4096, 0, 4), (1, 1, 384, 126464, 0.5, 128, 0, 2),
        (2, 1, 14, 33, 0.5, 16, 0, 3))),
    # Decoding of a language model behind a prompt, in two blocks.
    "cached": ("cached", {"head": "linear"}, (
        (1, 1, 1280, 126464, 0.2, 4096, 8, 32), (1, 1, 320, 8193, 0.2, 512, 4, 12),
        (2, 1, 20, 33, 0.4, 16, 2, 4))),
    "distill": ("step", {}, (
        (1, 16, 1024, 50258, 0.5, 768, 12), (1, 16, 128, 8193, 0.5, 256, 4),
        (1, 2, 12, 33, 0.5, 16, 1))),
    # the other two systems of the paper: half of the arccos schedule, and pixels
    "distill-image": ("step", {}, (
        (1, 16, 256, 1025, None, 768, 12), (1, 16, 256, 1025, None, 256, 2),
        (1, 2, 12, 33, None, 16, 1))),
    "distill-pixel": ("step", {"head": "logistic"}, (
        (1, 16, 3072, 256, None, 256, 4), (1, 16, 768, 256, None, 128, 2),
        (1, 2, 12, 16, None, 16, 1))),
    # more components than fit: a deep model, whose activations are what grows with them
    "distill-many": ("many", {}, (
        (1, 256, 64, 50258, 0.5, 768, 12), (1, 256, 32, 513, 0.5, 64, 12),
        (1, 4, 12, 33, 0.5, 16, 1))),
}
# fmt: on

# Points of the scaling sweeps, around a base that the dense formulation can follow.
# fmt: off
_SWEEP_BASE: dict[str, dict[str, Any]] = {
    "full": {"components": 16, "positions": 256, "vocabulary": 50258, "masked": 0.5},
    "small": {"components": 8, "positions": 64, "vocabulary": 4097, "masked": 0.6},
    "tiny": {"components": 2, "positions": 6, "vocabulary": 33, "masked": 0.5},
}
_SWEEPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "full": {"components": (1, 2, 4, 8, 16, 32, 64), "positions": (64, 128, 256, 512, 1024),
             "vocabulary": (1025, 8193, 50258, 126464), "masked": (0.05, 0.25, 0.5, 0.75, 1.0)},
    "small": {"components": (1, 4, 8, 16, 32), "positions": (32, 64, 128, 256),
              "vocabulary": (1025, 4097, 16385), "masked": (0.1, 0.6, 1.0)},
    "tiny": {"components": (1, 2), "masked": (0.5, 1.0)},
}
# fmt: on
AXES = {"components": "N", "positions": "D", "vocabulary": "V", "masked": "masked"}
AXES |= {"threads": "threads"}
BASE = "base"  # the note of the point that all sweeps share
# Positions at which the peak memory with a linear head is compared.
_MEMORY_POSITIONS = {"full": (512, 1024, 4096), "small": (128, 512, 1024), "tiny": (8, 16)}


def make_case(shape: str, size: str, dtype: str, device: str, **changes: Any) -> Case:
    """A named shape at a size.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    for what, name, known in (
        ("shape", shape, SHAPES),
        ("size", size, SIZES),
        ("dtype", dtype, DTYPES),
    ):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    kind, shared, sizes = SHAPES[shape]
    given = dict(zip(_FIELDS, sizes[SIZES.index(size)], strict=False))
    fields = {"dtype": dtype} | given | shared | changes
    return Case(kind=kind, shape=shape, size=size, device=device, **fields)


def sweep_cases(size: str, dtype: str, device: str, threads: int) -> list[Case]:
    """The points of the sweeps, each once: N, D, V, masked share, on a CPU threads.

    Then the linear head at growing D, for its memory.
    """
    base = {**_SWEEP_BASE[size], "threads": threads if device == "cpu" else 0}
    sweeps = dict(_SWEEPS[size])
    if device == "cpu" and threads > 1:
        sweeps["threads"] = (1, threads)
    changed = [
        (f"{AXES[axis]}={point}", {axis: point})
        for axis, points in sweeps.items()
        for point in points
        if point != base[axis]
    ]
    return [
        Case("loss", "scaling", size, dtype, device, note=note, **{**base, **change})
        for note, change in [(BASE, {}), *changed]
    ] + [
        make_case("language-hidden", size, dtype, device, positions=points, note=f"D={points}")
        for points in _MEMORY_POSITIONS[size]
    ]


def condition_cases(size: str, dtype: str, device: str) -> list[Case]:
    """On a CPU: half precision, and loss and draws while another process keeps a core busy."""
    if device != "cpu":
        return []
    busy = [
        make_case(shape, size, dtype, device, busy=1, note="busy") for shape in ("language", "rows")
    ]
    half = [make_case("language", size, "bf16", device, note="half")] if dtype == "fp32" else []
    return [*half, *busy]


def on_axis(record: Mapping[str, Any], axis: str) -> float | None:
    """Where a record of the sweeps lies on one of `AXES`; None if it belongs to another sweep."""
    case = record["case"]
    if case["shape"] != "scaling":
        return None
    if case["note"] != BASE and not case["note"].startswith(f"{AXES[axis]}="):
        return None
    return float(case[axis])
