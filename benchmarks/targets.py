"""What the library promises of its speed and memory, judged from records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from .floors import format_bytes
from .results import Record

FASTER, SMALLER, FLOOR = "faster than", "less memory than", "of the floor"
EXACTER, LOGITS, BYTES = "more exact than", "of the logits", "bytes"
GROWTH, SHARE = "of the hidden gradient", "of the model's time"


@dataclasses.dataclass(frozen=True)
class Target:
    """One promise: `what` of a variant at a shape is at least, or at most, a number.

    what: "faster than", "less memory than", "more exact than" `other` (ratios), "of the floor" (its
        time over the time taken), "of the logits" (peak over their size),
        "bytes" (peak), "of the model's time" (what a sampler takes besides), "of the hidden
        gradient" (growth of the peak over its growth, from the other to this).
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
        return self.what in (LOGITS, BYTES, GROWTH, SHARE)

    def measured(self, records: Sequence[Record]) -> float | None:
        """The number; None if this run does not tell."""
        mine = find(records, self.shape, self.variant, self.note)
        note = self.note if self.other_note is None else self.other_note
        other = find(records, self.shape, self.other, note) if self.other else mine
        if mine is None or other is None or self.size not in ("", mine["case"]["size"]):
            return None
        compute: dict[str, Callable[[], float]] = {
            FASTER: lambda: other["seconds"] / mine["seconds"],
            SMALLER: lambda: other["peak_bytes"] / max(mine["peak_bytes"], 1),
            EXACTER: lambda: other["gradient_error"] / max(mine["gradient_error"], 1e-12),
            FLOOR: lambda: mine["floor_seconds"] / mine["seconds"],
            LOGITS: lambda: mine["peak_bytes"] / mine["logits_bytes"],
            BYTES: lambda: float(mine["peak_bytes"]),
            SHARE: lambda: share_of_the_rest(mine["details"]),
            GROWTH: lambda: (
                (mine["peak_bytes"] - other["peak_bytes"])
                / (hidden_gradient_bytes(mine["case"]) - hidden_gradient_bytes(other["case"]))
            ),
        }
        try:
            return compute[self.what]()
        except TypeError:  # something was not measured
            return None

    def text(self, value: float) -> str:
        if self.what == BYTES:
            return format_bytes(value)
        if self.what == GROWTH:
            return f"{value:.2f} × the hidden gradient"
        return f"{value:.0%}" if self.what in (FLOOR, SHARE) else f"{value:.3g} ×"

    def verdict(self, records: Sequence[Record]) -> Verdict | None:
        value = self.measured(records)
        if value is None:
            return None
        place = self.shape + (f", {self.note}" if self.note else "")
        what = {BYTES: "peak memory", GROWTH: "grows from"}.get(self.what, self.what)
        other = self.other if self.other_note is None else self.other_note or "fp32"
        return Verdict(
            f"{place}: {self.variant} {what} {other}".strip(),
            f"at {'most' if self.most else 'least'} {self.text(self.bound)}",
            self.text(value),
            value <= self.bound if self.most else value >= self.bound,
        )


class Verdict(NamedTuple):
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
    return [verdict for verdict in verdicts if verdict is not None]


def hidden_gradient_bytes(case: dict[str, Any]) -> int:
    size = 4 if case["dtype"] == "fp32" else 2
    return int(case["batch"] * case["components"] * case["positions"] * case["width"] * size)


def share_of_the_rest(parts: dict[str, float]) -> float:
    """What is none of the named parts, over these."""
    return parts["the rest"] / (sum(parts.values()) - parts["the rest"])


CPU = [
    Target("language", "cpu", FASTER, 70, "dense"),
    Target("language", "cpu", FLOOR, 0.4),  # the memory of the gradient is used again
    Target("language", "cpu-in-place", LOGITS, 0.1),
    Target("language", "cpu", FASTER, 1, "cpu", note="half", other_note=""),
    Target("language", "cpu", FASTER, 35, "dense", note="busy"),
    Target("language", "cpu", LOGITS, 1.25),
    Target("language-hidden", "cpu", FASTER, 16, "dense"),
    Target("language-hidden", "cpu", FLOOR, 0.65),
    Target("language-hidden", "cpu", LOGITS, 1, note="D=1024"),  # which never exist
    # 10% and twice the noise of a resident set, 2 MiB of 14.7 MB
    Target("language-hidden", "cpu", GROWTH, 1.24, "cpu", note="D=1024", other_note="D=128"),
    Target("image", "cpu", FASTER, 15, "dense"),
    Target("pixel", "cpu", FASTER, 12, "dense"),
    Target("digits", "cpu", FASTER, 4, "dense"),
    Target("cross-entropy", "cpu", FASTER, 1, "eager"),
    Target("cross-entropy", "cpu", FASTER, 1, "eager-compiled"),
    Target("rows", "cpu", FASTER, 100, "multinomial"),
    Target("rows", "cpu", FLOOR, 0.5),
    Target("rows", "cpu-all", FASTER, 60, "multinomial"),
    Target("rows", "cpu", FASTER, 50, "multinomial", note="busy"),
    Target("canvas", "cpu", FASTER, 8, "plain"),
    Target("canvas", "cpu", SMALLER, 6, "plain"),
    Target("ancestral", "cpu", FASTER, 2.5, "naive"),
    Target("ancestral", "cpu", SMALLER, 8, "naive"),
    Target("confidence", "cpu", SMALLER, 4, "naive"),
    Target("distill", "cpu", FASTER, 3.5, "plain"),
    Target("distill-many", "cpu-in-turn", SMALLER, 6, "cpu"),
    Target("distill-many", "cpu-in-memory", SMALLER, 1, "cpu-few"),  # in the memory of √N
    Target("cached", "cpu-suffix", FASTER, 1.7, "cpu"),
    Target("cached", "cpu-block", FASTER, 1.7, "cpu"),
    Target("cached", "cpu-block", SHARE, 0.1),
]
GPU = [
    # half of the rate of 3 reads, 1 write and 2 reads, which take 1.48 × the floor
    Target("language", "triton", FLOOR, 0.34),
    Target("language", "triton", FASTER, 20, "dense"),
    Target("language", "triton", FASTER, 3, "dense-compiled"),
    Target("language", "triton", LOGITS, 1.1),
    Target("language", "triton-in-place", LOGITS, 0.1),
    # 1.5 × the products, student twice, draws once, which take 1.23 × the floor
    Target("language-hidden", "triton", FLOOR, 0.54),
    Target("language-hidden", "triton", BYTES, 2**30),
    Target("language-hidden", "triton", LOGITS, 1, note="D=4096"),
    Target("language-hidden", "triton", GROWTH, 1.1, "triton", note="D=4096", other_note="D=512"),
    Target("image", "triton", FASTER, 10, "dense"),
    Target("pixel", "triton", FASTER, 10, "dense"),
    Target("pixel", "triton", LOGITS, 0.5),  # no tensor of bins
    *(
        Target("cross-entropy", "triton", what, 1, peer)
        for peer in ("linear-cross-entropy", "liger", "cut-cross-entropy")
        for what in (FASTER, EXACTER)
    ),
    Target("rows", "triton-all", FLOOR, 1 / 1.3),
    Target("rows", "triton-all", FASTER, 1, "multinomial"),
    Target("rows", "triton-all", FASTER, 1, "gumbel-fp64"),
    Target("rows", "triton-all", FASTER, 1, "flashinfer"),
    Target("ancestral", "triton", FASTER, 2.5, "naive"),
    Target("ancestral", "triton", SMALLER, 8, "naive"),
    Target("head-rows", "triton", BYTES, 0.5e9),
    Target("confidence", "triton", BYTES, 0.5e9, size="full"),
]
