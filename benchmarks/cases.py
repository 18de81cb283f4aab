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
LETTERS = {
    "batch": "B",
    "components": "N",
    "positions": "D",
    "vocabulary": "V",
    "width": "C",
    "layers": "layers",
    "steps": "steps",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape at one size: everything that is needed to build the inputs again elsewhere."""

    kind: str  # loss, draw, ancestral, confidence or step
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
    def title(self) -> str:
        """The shape with its sizes, for people."""
        letters = {letter: getattr(self, field) for field, letter in LETTERS.items()}
        if self.kind == "draw":
            letters = {"rows": self.positions, "V": self.vocabulary, "C": self.width}
        if self.kind == "confidence":
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
_LOSS = {
    # the paper's masked language model: OpenWebText with GPT-2's tokens and a mask
    "language": {
        "full": {"components": 16, "positions": 1024, "vocabulary": 50258, "masked": 0.5},
        "small": {"components": 16, "positions": 128, "vocabulary": 8193, "masked": 0.6},
        "tiny": {"components": 4, "positions": 12, "vocabulary": 65, "masked": 0.6},
    },
    # the same from hidden states
    "language-hidden": {
        "full": {"components": 16, "positions": 1024, "vocabulary": 50258, "masked": 0.5,
                 "width": 768, "head": "linear"},
        "small": {"components": 16, "positions": 128, "vocabulary": 8193, "masked": 0.6,
                  "width": 256, "head": "linear"},
        "tiny": {"components": 4, "positions": 12, "vocabulary": 65, "masked": 0.6,
                 "width": 8, "head": "linear"},
    },
    # VQ images: MaskGIT on ImageNet, all positions and columns count
    "image": {
        "full": {"batch": 2, "components": 32, "positions": 256, "vocabulary": 1025},
        "small": {"batch": 1, "components": 32, "positions": 64, "vocabulary": 1025},
        "tiny": {"batch": 2, "components": 4, "positions": 6, "vocabulary": 33},
    },
    # pixels: two numbers per pixel instead of 256 logits
    "pixel": {
        "full": {"batch": 8, "components": 16, "positions": 3072, "vocabulary": 256,
                 "head": "logistic"},
        "small": {"batch": 1, "components": 16, "positions": 768, "vocabulary": 256,
                  "head": "logistic"},
        "tiny": {"batch": 2, "components": 3, "positions": 8, "vocabulary": 16,
                 "head": "logistic"},
    },
    # the digits of the demo: a vocabulary so small that overheads count
    "digits": {
        "full": {"batch": 128, "components": 16, "positions": 64, "vocabulary": 18, "masked": 0.5},
        "small": {"batch": 8, "components": 16, "positions": 64, "vocabulary": 18, "masked": 0.5},
        "tiny": {"batch": 2, "components": 4, "positions": 6, "vocabulary": 18, "masked": 0.5},
    },
    # the vocabulary of a large language model
    "large": {
        "full": {"components": 16, "positions": 512, "vocabulary": 126464, "masked": 0.5,
                 "width": 4096, "head": "linear"},
        "small": {"components": 4, "positions": 32, "vocabulary": 126464, "masked": 0.5,
                  "width": 256, "head": "linear"},
        "tiny": {"components": 3, "positions": 6, "vocabulary": 129, "masked": 0.5,
                 "width": 8, "head": "linear"},
    },
    # one component, the likelihood alone: what libraries for language models are made for
    "cross-entropy": {
        "full": {"positions": 8192, "vocabulary": 128256, "width": 4096, "head": "linear",
                 "cross_entropy": True},
        "small": {"positions": 512, "vocabulary": 32000, "width": 512, "head": "linear",
                  "cross_entropy": True},
        "tiny": {"positions": 10, "vocabulary": 33, "width": 8, "head": "linear",
                 "cross_entropy": True},
    },
}

_DRAW = {
    "rows": {
        "full": {"positions": 8192, "vocabulary": 50258},
        "small": {"positions": 1024, "vocabulary": 50258},
        "tiny": {"positions": 192, "vocabulary": 257},
    },
    "rows-large": {
        "full": {"positions": 4096, "vocabulary": 126464},
        "small": {"positions": 256, "vocabulary": 126464},
        "tiny": {"positions": 192, "vocabulary": 513},
    },
    # rows of a linear head: half of 1024 positions are still masked
    "head-rows": {
        "full": {"positions": 512, "vocabulary": 126464, "width": 4096, "head": "linear"},
        "small": {"positions": 512, "vocabulary": 50258, "width": 512, "head": "linear"},
        "tiny": {"positions": 192, "vocabulary": 65, "width": 8, "head": "linear"},
    },
}

_ANCESTRAL = {
    "ancestral": {
        "full": {"batch": 16, "positions": 1024, "vocabulary": 50258, "width": 768,
                 "layers": 12, "steps": 16},
        "small": {"batch": 1, "positions": 128, "vocabulary": 50258, "width": 768,
                  "layers": 4, "steps": 16},
        "tiny": {"batch": 2, "positions": 12, "vocabulary": 33, "width": 16, "layers": 1,
                 "steps": 3},
    },
}

# The head of a language model of 8 billion parameters, half of the sequence a prompt. Memory is
# what counts: the small size keeps the vocabulary, so that there, too, the logits of the masked
# positions are more than the head's budget.
_CONFIDENCE = {
    "confidence": {
        "full": {"positions": 1024, "vocabulary": 126464, "width": 4096, "steps": 4,
                 "masked": 0.5, "head": "linear"},
        "small": {"positions": 384, "vocabulary": 126464, "width": 128, "steps": 2,
                  "masked": 0.5, "head": "linear"},
        "tiny": {"batch": 2, "positions": 14, "vocabulary": 33, "width": 16, "steps": 3,
                 "masked": 0.5, "head": "linear"},
    },
}

_STEP = {
    "distill": {
        "full": {"components": 16, "positions": 1024, "vocabulary": 50258, "width": 768,
                 "layers": 12, "masked": 0.5},
        "small": {"components": 8, "positions": 128, "vocabulary": 8193, "width": 256,
                  "layers": 4, "masked": 0.5},
        "tiny": {"components": 2, "positions": 12, "vocabulary": 33, "width": 16, "layers": 1,
                 "masked": 0.5},
    },
}
# fmt: on

SHAPES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "loss": _LOSS,
    "draw": _DRAW,
    "ancestral": _ANCESTRAL,
    "confidence": _CONFIDENCE,
    "step": _STEP,
}
NAMES = [name for shapes in SHAPES.values() for name in shapes]

# Points of the scaling sweeps, around a base that the dense formulation can follow.
_SWEEP_BASE: dict[str, dict[str, Any]] = {
    "full": {"components": 16, "positions": 256, "vocabulary": 50258, "masked": 0.5},
    "small": {"components": 8, "positions": 64, "vocabulary": 4097, "masked": 0.6},
    "tiny": {"components": 2, "positions": 6, "vocabulary": 33, "masked": 0.5},
}
_SWEEPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "full": {
        "components": (1, 2, 4, 8, 16, 32, 64),
        "positions": (64, 128, 256, 512, 1024),
        "vocabulary": (1025, 8193, 50258, 126464),
        "masked": (0.05, 0.25, 0.5, 0.75, 1.0),
    },
    "small": {
        "components": (1, 4, 8, 16, 32),
        "positions": (32, 64, 128, 256),
        "vocabulary": (1025, 4097, 16385),
        "masked": (0.1, 0.6, 1.0),
    },
    "tiny": {"components": (1, 2), "masked": (0.5, 1.0)},
}
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
        ("shape", shape, NAMES),
        ("size", size, SIZES),
        ("dtype", dtype, DTYPES),
    ):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    kind = next(kind for kind, shapes in SHAPES.items() if shape in shapes)
    fields = {**SHAPES[kind][shape][size], **changes}
    return Case(kind=kind, shape=shape, size=size, dtype=dtype, device=device, **fields)


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
