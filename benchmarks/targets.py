"""What the library promises of its speed and memory, judged from records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from .floors import format_bytes
from .memory import RESIDENT_NOISE

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Target:
    """One promise: `what` of a variant at a shape is at least, or at most, a number.

    what: "faster than", "less memory than", "more exact than" `other` (ratios), "of the floor" and
        "of the plan" (their time over the time taken), "of the logits" (peak over their size),
        "bytes" (peak).
    """

    shape: str
    variant: str
    what: str
    bound: float
    other: str = ""
    note: str = ""  # of the case, where it is not the plain one
    other_note: str | None = None  # of the other's case; None: the same
    size: str = ""  # the one size at which it is promised

    @property
    def most(self) -> bool:
        """Whether the bound is from above."""
        return self.what in ("of the logits", "bytes")

    def measured(self, records: Sequence[Record]) -> float | None:
        """The number; None if this run does not tell."""
        mine = find(records, self.shape, self.variant, self.note)
        note = self.note if self.other_note is None else self.other_note
        other = find(records, self.shape, self.other, note) if self.other else mine
        if mine is None or other is None or self.size not in ("", mine["case"]["size"]):
            return None
        above, below = {
            "faster than": (other["seconds"], mine["seconds"]),
            "less memory than": (other["peak_bytes"], mine["peak_bytes"]),
            "more exact than": (other["gradient_error"], mine["gradient_error"]),
            "of the floor": (mine["floor_seconds"], mine["seconds"]),
            "of the plan": (mine["plan_seconds"], mine["seconds"]),
            "of the logits": (mine["peak_bytes"], mine["logits_bytes"]),
            "bytes": (mine["peak_bytes"], 1),
        }[self.what]
        return None if above is None or below is None else above / max(below, 1e-12)

    def text(self, value: float) -> str:
        if self.what == "bytes":
            return format_bytes(value)
        return f"{value:.0%}" if self.what in ("of the floor", "of the plan") else f"{value:.3g} ×"

    def verdict(self, records: Sequence[Record]) -> Verdict | None:
        value = self.measured(records)
        if value is None:
            return None
        busy = {"busy": ", one core busy", "half": ", bf16"}.get(self.note, "")
        what = "peak memory" if self.what == "bytes" else self.what
        other = self.other + (" in fp32" if self.other_note == "" else "")
        return Verdict(
            f"{self.shape}{busy}: {self.variant} {what} {other}".strip(),
            f"at {'most' if self.most else 'least'} {self.text(self.bound)}",
            self.text(value),
            value <= self.bound if self.most else value >= self.bound,
        )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One promise: what was wanted, what was measured, whether it holds."""

    name: str
    wanted: str
    measured: str
    met: bool


def find(records: Iterable[Record], shape: str, variant: str, note: str = "") -> Record | None:
    """The record of a variant at a shape, if it was measured."""
    for record in records:
        case = record["case"]
        if (case["shape"], case["note"], record["variant"]) == (shape, note, variant):
            return record if record["status"] == "ok" else None
    return None


def judge(records: Sequence[Record], kind: str) -> list[Verdict]:
    """All promises that the records of a "cpu" or "gpu" run decide."""
    if any(record["case"]["size"] == "tiny" for record in records):
        return []  # sizes for tests, at which overheads are all there is
    verdicts = [target.verdict(records) for target in (CPU if kind == "cpu" else GPU)]
    verdicts += _linear_memory(records, "cpu" if kind == "cpu" else "triton")
    return [verdict for verdict in verdicts if verdict is not None]


def _linear_memory(records: Sequence[Record], variant: str) -> list[Verdict]:
    """With a linear head, memory grows with D as the hidden gradient does; there are no logits."""
    points = sorted(
        (
            record
            for record in records
            if record["case"]["shape"] == "language-hidden"
            and record["case"]["note"].startswith("D=")
            and record["variant"] == variant
            and record["peak_bytes"] is not None
        ),
        key=lambda record: record["case"]["positions"],
    )
    if len(points) < 2:
        return []
    first, last = points[0], points[-1]
    allowed = hidden_gradient_bytes(last["case"]) - hidden_gradient_bytes(first["case"])
    grown = last["peak_bytes"] - first["peak_bytes"]
    noise = 2 * RESIDENT_NOISE if last["case"]["device"] == "cpu" else 0
    ratio = last["peak_bytes"] / last["logits_bytes"]
    sizes = [record["case"]["positions"] for record in (first, last)]
    return [
        Verdict(
            f"linear head, D={sizes[1]}: peak memory of {variant}",
            "below the logits, which never exist",
            f"{ratio:.2f} × the logits",
            ratio < 1.0,
        ),
        Verdict(
            f"linear head, D={sizes[0]} to {sizes[1]}: memory of {variant}",
            f"grows by the hidden gradient, {format_bytes(allowed)} (+10%)",
            f"{format_bytes(grown)}; logits grow by "
            f"{format_bytes(last['logits_bytes'] - first['logits_bytes'])}",
            grown <= 1.1 * allowed + noise,
        ),
    ]


def hidden_gradient_bytes(case: dict[str, Any]) -> int:
    size = 4 if case["dtype"] == "fp32" else 2
    return int(case["batch"] * case["components"] * case["positions"] * case["width"] * size)


FASTER, SMALLER, FLOOR, PLAN = "faster than", "less memory than", "of the floor", "of the plan"
CPU = [
    Target("language", "cpu", FASTER, 70, "dense"),
    Target("language", "cpu-in-place", FLOOR, 0.4),  # gradient memory is reused
    Target("language", "cpu", FASTER, 1, "cpu", note="half", other_note=""),
    Target("language", "cpu", FASTER, 35, "dense", note="busy"),
    Target("language", "cpu", "of the logits", 1.25),
    Target("language", "torch", FASTER, 10, "dense"),
    Target("language-hidden", "cpu", FASTER, 16, "dense"),
    Target("language-hidden", "cpu", FLOOR, 0.65),
    Target("image", "cpu", FASTER, 15, "dense"),
    Target("pixel", "cpu", FASTER, 12, "dense"),
    Target("digits", "cpu", FASTER, 4, "dense"),
    Target("cross-entropy", "cpu", FASTER, 1, "eager"),
    Target("cross-entropy", "cpu", FASTER, 1, "eager-compiled"),
    Target("rows", "cpu", FASTER, 100, "multinomial"),
    Target("rows", "cpu", FLOOR, 0.5),
    Target("rows", "cpu-all", FASTER, 60, "multinomial"),
    Target("rows", "cpu", FASTER, 50, "multinomial", note="busy"),
    Target("ancestral", "cpu", FASTER, 2.5, "naive"),
    Target("ancestral", "cpu", SMALLER, 8, "naive"),
    Target("confidence", "cpu", SMALLER, 4, "naive"),
]
GPU = [
    Target("language", "triton", PLAN, 1 / 2),  # 3 reads + 1 write + 2 reads
    Target("language", "triton", FASTER, 20, "dense"),
    Target("language", "triton", FASTER, 3, "dense-compiled"),
    Target("language", "triton", "of the logits", 1.1),
    Target("language", "triton-in-place", "of the logits", 0.1),
    Target("language-hidden", "triton", PLAN, 1 / 1.5),  # the products alone
    Target("language-hidden", "triton", "bytes", 2**30),
    Target("image", "triton", FASTER, 10, "dense"),
    Target("pixel", "triton", FASTER, 10, "dense"),
    Target("pixel", "triton", "of the logits", 0.5),  # no tensor of bins
    *(
        Target("cross-entropy", "triton", what, 1, peer)
        for peer in ("linear-cross-entropy", "liger", "cut-cross-entropy")
        for what in (FASTER, "more exact than")
    ),
    Target("rows", "triton-all", FLOOR, 1 / 1.3),
    Target("rows", "triton-all", FASTER, 1, "multinomial"),
    Target("rows", "triton-all", FASTER, 1, "gumbel-fp64"),
    Target("rows", "triton-all", FASTER, 1, "flashinfer"),
    Target("ancestral", "triton", FASTER, 2.5, "naive"),
    Target("ancestral", "triton", SMALLER, 8, "naive"),
    Target("head-rows", "triton", "bytes", 0.5e9),
    Target("confidence", "triton", "bytes", 0.5e9, size="full"),
]
