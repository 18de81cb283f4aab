"""Records as tables, for the terminal and for the README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .cases import AXES, BASE
from .harness import format_bytes, format_seconds
from .step_group import BUDGETS, PHASES
from .targets import Verdict

Record = dict[str, Any]
# What a speed-up is measured against, the first that ran.
BASELINES = ("dense", "multinomial", "naive", "plain", "eager")


def grouped(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by group, in their order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    return groups


def baseline_of(group: Sequence[Record]) -> Record | None:
    for name in BASELINES:
        for record in group:
            if record["variant"] == name and record["seconds"]:
                return record
    return None


def is_main(record: Record) -> bool:
    """Neither a point of a sweep nor of the memory series."""
    return not record["case"]["note"]


def result_rows(group: Sequence[Record]) -> list[list[str]]:
    """The cells of one group: variant, median, p20 to p80, speed-up, floor, memory, error."""
    base = baseline_of(group)
    rows = []
    for record in group:
        if record["status"] != "ok":
            continue
        seconds, peak = record["seconds"], record["peak_bytes"]
        rows.append(
            [
                record["title"],
                "" if seconds is None else format_seconds(seconds),
                "" if seconds is None else _spread(record),
                "" if seconds is None or base is None else f"{base['seconds'] / seconds:.1f} ×",
                _fraction(record),
                "" if peak is None else _peak_text(record),
                _error_text(record),
            ]
        )
    return rows


RESULT_HEADER = [
    "", "median", "p20 – p80", "speed-up", "of the floor", "peak memory", "error"
]  # fmt: skip


def _spread(record: Record) -> str:
    low, high = format_seconds(record["p20"]), format_seconds(record["p80"])
    if low.split()[1] == high.split()[1]:
        low = low.split()[0]
    return f"{low} – {high}"


def _fraction(record: Record) -> str:
    if record["seconds"] is None or not record["floor_seconds"]:
        return ""
    return f"{record['floor_seconds'] / record['seconds']:.0%}"


def _peak_text(record: Record) -> str:
    text = format_bytes(record["peak_bytes"])
    if record["case"]["kind"] == "loss":
        text += f" ({record['peak_bytes'] / record['logits_bytes']:.2f} ×)"
    return text


def _error_text(record: Record) -> str:
    error = record["gradient_error"]
    if error is None:
        error = record["loss_error"]
    return "" if error is None else f"{error:.0e}"


def skipped_lines(group: Sequence[Record]) -> list[str]:
    return [
        f"{record['title']}: {record['status']}, {record['reason']}"
        for record in group
        if record["status"] != "ok"
    ]


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns; the first one to the left, the others to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (text.ljust(w) if i == 0 else text.rjust(w)
                          for i, (text, w) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        lines.append("  ".join([first, *others]).rstrip())
    return lines


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table without the columns that are empty throughout."""
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] for row in rows)]
    lines = ["| " + " | ".join(header[i] for i in kept) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "---:" for i in kept) + "|")
    lines += ["| " + " | ".join(row[i] for i in kept) + " |" for row in rows]
    return lines


def closing_report(records: Sequence[Record], verdicts: Sequence[Verdict]) -> list[str]:
    """What the terminal shows at the end of a run."""
    lines: list[str] = []
    for group in grouped(r for r in records if is_main(r)).values():
        lines += ["", group[0]["shape"]]
        rows = result_rows(group)
        if rows:
            lines += ["  " + line for line in plain_table(RESULT_HEADER, rows)]
        lines += ["  -- " + line for line in skipped_lines(group)]
        split = phase_rows(group)
        if split:
            lines += ["", *["  " + line for line in plain_table(PHASE_HEADER, split)]]
    sweep = scaling_rows(records)
    if sweep:
        lines += ["", "scaling", *["  " + line for line in plain_table(*sweep)]]
    if verdicts:
        lines += ["", "promises"]
        rows = [[v.name, v.wanted, v.measured, "yes" if v.met else "NO"] for v in verdicts]
        lines += ["  " + line for line in plain_table(VERDICT_HEADER, rows)]
    return lines


VERDICT_HEADER = ["", "wanted", "measured", "met"]
PHASE_HEADER = ["time of a step", *PHASES]


def phase_rows(group: Sequence[Record]) -> list[list[str]]:
    rows = []
    for record in group:
        phases = record["details"].get("phases")
        if phases:
            rows.append([record["title"], *[format_seconds(phases[name]) for name in PHASES]])
    return rows


def scaling_rows(records: Sequence[Record]) -> tuple[list[str], list[list[str]]] | None:
    """One row per point of the sweeps, one column per variant: time and memory."""
    points = grouped(r for r in records if r["case"]["shape"] == "scaling")
    if not points:
        return None
    names: list[str] = []
    for group in points.values():
        names += [r["variant"] for r in group if r["variant"] not in names and r["seconds"]]
    header = ["", *names, *[f"{name} memory" for name in names], "speed-up"]
    rows = []
    for group in points.values():
        by_name = {record["variant"]: record for record in group}
        times, peaks = [], []
        for name in names:
            record = by_name.get(name)
            measured = record is not None and record["seconds"] is not None
            times.append(format_seconds(record["seconds"]) if measured and record else "")
            weighed = record is not None and record["peak_bytes"] is not None
            peaks.append(format_bytes(record["peak_bytes"]) if weighed and record else "")
        base = baseline_of(group)
        ours = [r for r in group if r["library"] and r["seconds"]]
        gain = ""
        if base is not None and ours:
            gain = f"{base['seconds'] / min(r['seconds'] for r in ours):.1f} ×"
        case = group[0]["case"]
        point = case["note"]
        if point == BASE:
            point = ", ".join(f"{letter}={case[field]:g}" for field, letter in AXES.items())
        rows.append([point, *times, *peaks, gain])
    return header, rows


def largest_rows(records: Sequence[Record]) -> list[list[str]]:
    """The largest N of a distillation step for some memory sizes."""
    rows = []
    for record in records:
        largest = record["details"].get("largest_components")
        if largest:
            cells = [str(largest[str(budget)]) for budget in BUDGETS]
            rows.append([record["title"], *cells, record["details"]["largest_how"]])
    return rows


LARGEST_HEADER = ["largest N", *[f"{budget} GB" for budget in BUDGETS], "how"]
