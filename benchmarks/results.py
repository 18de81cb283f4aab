"""What pytest-benchmark has written, as records; which of them are compared, and tables of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cases import AXES, BASE
from .floors import format_bytes, format_seconds

KINDS = ("cpu", "gpu")
# What a speed-up is measured against, the first that ran.
BASELINES = ("dense", "multinomial", "naive", "plain", "eager")
Record = dict[str, Any]
Table = list[list[str]]  # the first row is the header


@dataclasses.dataclass
class Results:
    """One run: the machine, and a record for each variant of each group, in their order."""

    machine: dict[str, Any]
    commit: str
    date: str
    complete: bool
    records: list[Record]

    @staticmethod
    def load(path: Path) -> Results:
        """Read the JSON of `pytest benchmarks --benchmark-json=PATH`.

        Raises:
            ValueError: it is not such a file, naming it.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            records = [record | {"seconds": None} for record in content["not_measured"]]
            for entry in reversed(content["benchmarks"]):
                p20, median, p80 = np.quantile(entry["stats"]["data"], (0.2, 0.5, 0.8)).tolist()
                record = entry["extra_info"] | {"seconds": median, "p20": p20, "p80": p80}
                records.insert(0, record)
            commit = content["commit_info"]
            name = str(commit.get("id", "unknown"))[:10] + "-dirty" * bool(commit.get("dirty"))
            date, complete = content["datetime"][:10], content["complete"]
            return Results(content["machine_info"], name, date, complete, records)
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results of the benchmarks: {error!r}") from error

    def digest(self) -> str:
        """Identifies the numbers."""
        text = json.dumps(self.records, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def groups(self, *kinds: str) -> list[list[Record]]:
        """The records of each group, without the points of the sweeps."""
        groups: dict[str, list[Record]] = {}
        for record in self.records:
            case = record["case"]
            if (not kinds or case["kind"] in kinds) and not is_sweep(record):
                groups.setdefault(record["group"], []).append(record)
        return list(groups.values())


def newest(folder: Path) -> dict[str, Results]:
    """The results "cpu.json" and "gpu.json" of a folder, as far as they are there."""
    paths = {kind: folder / f"{kind}.json" for kind in KINDS}
    return {kind: Results.load(path) for kind, path in paths.items() if path.exists()}


def is_sweep(record: Record) -> bool:
    return record["case"]["note"] == BASE or "=" in record["case"]["note"]


def baseline_of(group: Sequence[Record]) -> Record | None:
    """The plain formulation among the records of one group."""
    by_name = {record["variant"]: record for record in group if record["seconds"]}
    return next((by_name[name] for name in BASELINES if name in by_name), None)


# Tables ------------------------------------------------------------------------------------------


def result_table(group: Sequence[Record]) -> Table:
    """One group: variant, median, p20 to p80, speed-up, floor, memory, error."""
    base = baseline_of(group)
    rows = [["", "median", "p20 – p80", "speed-up", "of the floor", "peak memory", "error"]]
    for record in group:
        seconds, peak, floor = record["seconds"], record["peak_bytes"], record["floor_seconds"]
        if seconds is None:
            continue
        low, high = format_seconds(record["p20"]), format_seconds(record["p80"])
        if low.split()[1] == high.split()[1]:
            low = low.split()[0]
        memory = "" if peak is None else format_bytes(peak)
        if memory and record["case"]["kind"] == "loss":
            memory += f" ({peak / record['logits_bytes']:.2f} ×)"
        error = record["gradient_error"] or record["loss_error"]
        rows.append(
            [
                record["title"],
                format_seconds(seconds),
                f"{low} – {high}",
                "" if base is None else f"{base['seconds'] / seconds:.1f} ×",
                "" if floor is None else f"{floor / seconds:.0%}",
                memory,
                "" if error is None else f"{error:.0e}",
            ]
        )
    return rows


def missing(group: Sequence[Record]) -> str:
    """The variants that were not measured, by their reasons."""
    reasons: dict[str, list[str]] = {}
    for record in group:
        if record["seconds"] is None:
            reasons.setdefault(record["reason"], []).append(record["variant"])
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())


def parts_table(group: Sequence[Record]) -> Table:
    """What the time of a call is made of, where that was measured."""
    records = [record for record in group if record["details"]]
    names = list(dict.fromkeys(name for record in records for name in record["details"]))
    rows = [["time of a call", *names]]
    for record in records:
        parts = record["details"]
        cells = [format_seconds(parts[name]) if name in parts else "" for name in names]
        rows.append([record["title"], *cells])
    return rows


def scaling_table(records: Iterable[Record]) -> Table:
    """One row per point of the sweeps, one column per variant."""
    points: dict[str, dict[str, Record]] = {}
    for record in records:
        if record["case"]["shape"] == "scaling" and record["seconds"]:
            points.setdefault(record["group"], {})[record["variant"]] = record
    names = list(dict.fromkeys(name for point in points.values() for name in point))
    rows = [["", *names, "speed-up"]]
    for point in points.values():
        base = baseline_of(list(point.values()))
        ours = [r["seconds"] for r in point.values() if r["library"]]
        case = next(iter(point.values()))["case"]
        title = case["note"]
        if title == BASE:
            title = ", ".join(f"{axis}={case[name]:g}" for name, axis in AXES.items() if case[name])
        rows.append(
            [
                title,
                *[format_seconds(point[n]["seconds"]) if n in point else "" for n in names],
                f"{base['seconds'] / min(ours):.1f} ×" if base and ours else "",
            ]
        )
    return rows


def markdown(table: Table) -> list[str]:
    """A table without the columns that are empty throughout; nothing without rows."""
    header, *rows = table
    if not rows:
        return []
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    lines = ["| " + " | ".join(row[i] for i in kept) + " |" for row in table]
    lines.insert(1, "|" + "|".join("---" if i == 0 else "---:" for i in kept) + "|")
    return lines
