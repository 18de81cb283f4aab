"""What the library promises of its speed and memory, judged from records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .harness import format_bytes
from .memory import RESIDENT_NOISE

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One promise: what was wanted, what was measured, whether it holds."""

    name: str
    wanted: str
    measured: str
    met: bool


class Records:
    """Records of one run, found by shape and variant."""

    def __init__(self, records: Iterable[Record]):
        self.everything = list(records)

    def all(self, shape: str) -> list[Record]:
        return [r for r in self.everything if r["case"]["shape"] == shape]

    def get(self, shape: str, variant: str, note: str = "") -> Record | None:
        for record in self.all(shape):
            if record["variant"] == variant and record["case"]["note"] == note:
                return record if record["status"] == "ok" else None
        return None


def judge(records: Iterable[Record], kind: str) -> list[Verdict]:
    """All promises that the records of a "cpu" or "gpu" run decide."""
    found = Records(records)
    if any(record["case"]["size"] == "tiny" for record in found.everything):
        return []  # sizes for tests, at which overheads are all there is
    promises = _CPU if kind == "cpu" else _GPU
    verdicts = [promise(found) for promise in promises]
    return [verdict for verdict in verdicts if verdict is not None]


Promise = Callable[[Records], "Verdict | None"]


def _faster(shape: str, ours: str, other: str, factor: float, title: str) -> Promise:
    def promise(records: Records) -> Verdict | None:
        mine, theirs = records.get(shape, ours), records.get(shape, other)
        if mine is None or theirs is None or not mine["seconds"] or not theirs["seconds"]:
            return None
        ratio = theirs["seconds"] / mine["seconds"]
        return Verdict(
            f"{title}: {ours} against {other}",
            f"at least {factor:g} × faster",
            f"{ratio:.1f} ×",
            ratio >= factor,
        )

    return promise


def _peak(shape: str, ours: str, factor: float, title: str) -> Promise:
    """Peak at most `factor` × the student's logits."""

    def promise(records: Records) -> Verdict | None:
        mine = records.get(shape, ours)
        if mine is None or mine["peak_bytes"] is None:
            return None
        ratio = mine["peak_bytes"] / mine["logits_bytes"]
        return Verdict(
            f"{title}: peak memory of {ours}",
            f"at most {factor:g} × the logits",
            f"{ratio:.2f} ×",
            ratio <= factor,
        )

    return promise


def _peak_bytes(shape: str, ours: str, most: float, title: str, size: str | None = None) -> Promise:
    """Peak of at most so many bytes, at one size alone where the promise names it."""

    def promise(records: Records) -> Verdict | None:
        mine = records.get(shape, ours)
        if mine is None or mine["peak_bytes"] is None:
            return None
        if size is not None and mine["case"]["size"] != size:
            return None
        return Verdict(
            f"{title}: peak memory of {ours}",
            f"at most {format_bytes(most)}",
            format_bytes(mine["peak_bytes"]),
            mine["peak_bytes"] <= most,
        )

    return promise


def _smaller(shape: str, ours: str, other: str, factor: float, title: str) -> Promise:
    def promise(records: Records) -> Verdict | None:
        mine, theirs = records.get(shape, ours), records.get(shape, other)
        if mine is None or theirs is None:
            return None
        if mine["peak_bytes"] is None or theirs["peak_bytes"] is None:
            return None
        ratio = theirs["peak_bytes"] / max(mine["peak_bytes"], 1)
        return Verdict(
            f"{title}: memory of {ours} against {other}",
            f"at least {factor:g} × less",
            f"{ratio:.1f} ×",
            ratio >= factor,
        )

    return promise


def _within(shape: str, ours: str, factor: float, column: str, what: str, title: str) -> Promise:
    def promise(records: Records) -> Verdict | None:
        mine = records.get(shape, ours)
        if mine is None or not mine["seconds"] or not mine[column]:
            return None
        ratio = mine["seconds"] / mine[column]
        return Verdict(
            f"{title}: time of {ours}", f"at most {factor:g} × {what}", f"{ratio:.2f} ×",
            ratio <= factor,
        )  # fmt: skip

    return promise


def _by_positions(records: Records, ours: str) -> list[Record]:
    """The memory series of the linear head, by growing D."""
    points = [
        record
        for record in records.all("language-hidden")
        if record["variant"] == ours
        and record["case"]["note"].startswith("D=")
        and record["status"] == "ok"
        and record["peak_bytes"] is not None
    ]
    return sorted(points, key=lambda record: record["case"]["positions"])


def _logits_never_exist(ours: str) -> Promise:
    """At the largest D, where chunks are small beside it, less than the logits is taken."""

    def promise(records: Records) -> Verdict | None:
        points = _by_positions(records, ours)
        if not points:
            return None
        last = points[-1]
        ratio = last["peak_bytes"] / last["logits_bytes"]
        return Verdict(
            f"linear head, D={last['case']['positions']}: peak memory of {ours}",
            "below the logits, which never exist",
            f"{ratio:.2f} × the logits",
            ratio < 1.0,
        )

    return promise


def _hidden_memory(ours: str) -> Promise:
    """With a linear head, memory grows with D as the hidden gradient does, and no faster."""

    def promise(records: Records) -> Verdict | None:
        points = _by_positions(records, ours)
        if len(points) < 2:
            return None
        first, last = points[0], points[-1]
        allowed = hidden_gradient_bytes(last["case"]) - hidden_gradient_bytes(first["case"])
        grown = last["peak_bytes"] - first["peak_bytes"]
        noise = 2 * RESIDENT_NOISE if last["case"]["device"] == "cpu" else 0
        sizes = f"D={first['case']['positions']} to {last['case']['positions']}"
        return Verdict(
            f"linear head: memory of {ours} from {sizes}",
            f"grows by the hidden gradient, {format_bytes(allowed)} (+10%)",
            f"{format_bytes(grown)}; logits grow by "
            f"{format_bytes(last['logits_bytes'] - first['logits_bytes'])}",
            grown <= 1.1 * allowed + noise,
        )

    return promise


def hidden_gradient_bytes(case: dict[str, Any]) -> int:
    size = 4 if case["dtype"] == "fp32" else 2
    return int(case["batch"] * case["components"] * case["positions"] * case["width"] * size)


def _best_peer(shape: str, ours: str, peers: Sequence[str]) -> Promise:
    def promise(records: Records) -> Verdict | None:
        mine = records.get(shape, ours)
        others = [r for r in (records.get(shape, name) for name in peers) if r and r["seconds"]]
        if mine is None or not mine["seconds"] or not others:
            return None
        best = min(others, key=lambda record: record["seconds"])
        ratio = mine["seconds"] / best["seconds"]
        worse = mine["gradient_error"] > best["gradient_error"]
        return Verdict(
            f"N = 1: {ours} against the best peer, {best['variant']}",
            "no slower, gradient error no larger",
            f"{ratio:.2f} × its time, error {mine['gradient_error']:.1e} against "
            f"{best['gradient_error']:.1e}",
            ratio <= 1.0 and not worse,
        )

    return promise


_LANGUAGE, _HIDDEN = "masked language, logits in", "masked language, hidden states in"
_CPU: list[Promise] = [
    _faster("language", "torch", "dense", 30, _LANGUAGE),
    _peak("language", "torch", 1.25, _LANGUAGE),
    _logits_never_exist("torch"),
    _hidden_memory("torch"),
    _faster("rows", "torch", "multinomial", 10, "row draws"),
    _faster("ancestral", "di4c-fast", "naive", 2.5, "ancestral sampling"),
    _smaller("ancestral", "di4c-fast", "naive", 8, "ancestral sampling"),
    _smaller("confidence", "di4c-fast", "naive", 4, "confidence sampling"),
]
_GPU: list[Promise] = [
    _within("language", "triton", 2.0, "plan_seconds", "3 reads + 1 write + 2 reads", _LANGUAGE),
    _faster("language", "triton", "dense", 20, _LANGUAGE),
    _faster("language", "triton", "dense-compiled", 3, _LANGUAGE),
    _peak("language", "triton", 1.1, _LANGUAGE),
    _peak("language", "triton-in-place", 0.1, _LANGUAGE),
    _within("language-hidden", "triton", 1.5, "plan_seconds", "the products alone", _HIDDEN),
    _peak_bytes("language-hidden", "triton", 2**30, _HIDDEN),
    _logits_never_exist("triton"),
    _hidden_memory("triton"),
    _faster("image", "triton", "dense", 10, "VQ image"),
    _faster("pixel", "triton", "dense", 10, "pixel"),
    _peak("pixel", "triton", 0.5, "pixel (no tensor of bins)"),
    _best_peer("cross-entropy", "triton", ("linear-cross-entropy", "liger", "cut-cross-entropy")),
    _within("rows", "triton-all", 1.3, "floor_seconds", "one read", "row draws"),
    _faster("rows", "triton-all", "multinomial", 1, "row draws"),
    _faster("rows", "triton-all", "gumbel-fp64", 1, "row draws"),
    _faster("rows", "triton-all", "flashinfer", 1, "row draws"),
    _faster("ancestral", "di4c-fast", "naive", 2.5, "ancestral sampling"),
    _smaller("ancestral", "di4c-fast", "naive", 8, "ancestral sampling"),
    _peak_bytes("head-rows", "triton", 0.5e9, "draws from hidden states"),
    _peak_bytes("confidence", "di4c-fast", 0.5e9, "confidence sampling, above the model", "full"),
]
