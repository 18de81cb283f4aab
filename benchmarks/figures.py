"""Figures of a set of results: time against the floor, memory against N, scaling curves.

Readable on light and on dark pages: no background, text and axes in a grey that stands out from
both, colours of medium lightness that people with a colour vision deficiency tell apart, and a
marker of its own for every variant.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .cases import AXES, on_axis
from .store import ResultSet, write_atomically
from .tables import grouped, is_main

GREY = "#7a828c"
# Colour and marker of a variant; the library's own are filled.
STYLES = {
    "dense": ("#d55e00", "s"),
    "vectorised": ("#cc79a7", "D"),
    "dense-compiled": ("#d55e00", "^"),
    "vectorised-compiled": ("#cc79a7", "v"),
    "torch": ("#0f8fd0", "o"),
    "triton": ("#009e73", "o"),
    "torch-all": ("#0f8fd0", "P"),
    "cpu": ("#cc3311", "o"),
    "cpu-all": ("#cc3311", "P"),
    "triton-all": ("#009e73", "P"),
    "eager": ("#d55e00", "s"),
    "eager-compiled": ("#d55e00", "^"),
    "linear-cross-entropy": ("#cc79a7", "D"),
    "liger": ("#b8860b", "v"),
    "cut-cross-entropy": ("#b8860b", "<"),
    "multinomial": ("#d55e00", "s"),
    "gumbel-fp32": ("#cc79a7", "D"),
    "gumbel-fp32-compiled": ("#cc79a7", "v"),
    "gumbel-fp64": ("#b8860b", "^"),
    "flashinfer": ("#b8860b", "<"),
    "naive": ("#d55e00", "s"),
    "plain": ("#d55e00", "s"),
    "di4c-fast": ("#0f8fd0", "o"),
}
FILLED = {"torch", "triton", "cpu", "cpu-all", "torch-all", "triton-all", "di4c-fast"}
FLOOR: dict[str, Any] = {
    "marker": "|",
    "markersize": 16,
    "markeredgewidth": 2,
    "color": GREY,
}
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "di4c_fast",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.transparent": True,
}


def draw(results: ResultSet, folder: Path, digest: str) -> list[Path]:
    """Draw what the records allow, each with the digest of the results; the files written."""
    kind = results.header["machine"]["kind"]
    paths = []
    with plt.rc_context(SETTINGS):
        for name, figure in (
            ("speed", _speed(results.records)),
            ("memory", _memory(results.records)),
            ("scaling", _scaling(results.records)),
        ):
            if figure is None:
                continue
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            text = buffer.getvalue().replace("<svg ", f"<!-- results {digest} -->\n<svg ", 1)
            path = folder / f"{name}-{kind}.svg"
            write_atomically(path, text)
            paths.append(path)
    return paths


def _style(variant: str) -> dict[str, Any]:
    colour, marker = STYLES.get(variant, (GREY, "."))
    face = colour if variant in FILLED or marker in "x." else "none"
    return {"color": colour, "marker": marker, "markerfacecolor": face, "markersize": 6}


def _speed(records: Sequence[dict[str, Any]]) -> Any:
    """One line per shape: every variant's time, and the floor as an upright bar."""
    groups = [
        [r for r in group if r["seconds"]]
        for group in grouped(r for r in records if is_main(r)).values()
    ]
    groups = [group for group in groups if group]
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 0.55 * len(groups) + 1.4))
    # A marker stands for the same role at every shape, so the legend joins its names.
    handles: dict[Any, Any] = {}
    names: dict[Any, list[str]] = {}
    for line, group in enumerate(groups):
        times = [r["seconds"] * 1e3 for r in group]
        axes.plot([min(times), max(times)], [line, line], color=GREY, alpha=0.3, linewidth=1)
        for record, milliseconds in zip(group, times, strict=True):
            variant = record["variant"]
            handle = axes.plot(milliseconds, line, linestyle="", **_style(variant))[0]
            key = (*STYLES.get(variant, (GREY, ".")), variant in FILLED)
            handles.setdefault(key, handle)
            if variant not in names.setdefault(key, []):
                names[key].append(variant)
        floor = group[0]["floor_seconds"]
        if floor:
            handle = axes.plot(floor * 1e3, line, linestyle="", **FLOOR)[0]
            handles.setdefault("floor", handle)
            names["floor"] = ["floor of this machine"]
    labels = [
        ("di4c_fast: " if "di4c-fast" in names[key] or names[key][0] in FILLED else "")
        + " / ".join(names[key])
        for key in handles
    ]
    axes.set_yticks(range(len(groups)), [g[0]["case"]["shape"] for g in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds per call (further left is faster)")
    axes.grid(axis="x")
    axes.legend(handles.values(), labels, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _points(
    records: Sequence[dict[str, Any]], axis: str, column: str
) -> dict[str, list[tuple[float, float]]]:
    """Per variant, (value on the axis, value of the column)."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        place = on_axis(record, axis)
        if place is not None and record[column] is not None:
            point = (place, float(record[column]))
            curves.setdefault(record["variant"], []).append(point)
    return {name: sorted(points) for name, points in curves.items()}


def _memory(records: Sequence[dict[str, Any]]) -> Any:
    curves = _points(records, "components", "peak_bytes")
    if not curves:
        return None
    figure, axes = plt.subplots(figsize=(5.0, 3.2))
    for name, points in curves.items():
        style = _style(name)
        axes.plot(*zip(*[(n, max(b, 1.0) / 1e6) for n, b in points], strict=True), **style)
        axes.annotate(
            _label(name), (points[-1][0], max(points[-1][1], 1.0) / 1e6), xytext=(6, 0),
            textcoords="offset points", color=style["color"], va="center",
        )  # fmt: skip
    sizes = {
        place: r["logits_bytes"] / 1e6
        for r in records
        if (place := on_axis(r, "components")) is not None
    }
    axes.plot(*zip(*sorted(sizes.items()), strict=True), color=GREY, linestyle="--", linewidth=1)
    last = max(sizes)
    axes.annotate(
        "the logits", (last, sizes[last]), xytext=(6, -3), textcoords="offset points", va="top"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("components N")
    axes.set_ylabel("peak memory above the inputs, MB")
    axes.grid()
    return figure


def _label(variant: str) -> str:
    return f"di4c_fast: {variant}" if variant in FILLED else variant


def _scaling(records: Sequence[dict[str, Any]]) -> Any:
    curves = {axis: _points(records, axis, "seconds") for axis in AXES}
    shown = [axis for axis in AXES if curves[axis]]
    if not shown:
        return None
    figure, panels = plt.subplots(
        1, len(shown), figsize=(2.4 * len(shown) + 0.6, 2.8), sharey=True, squeeze=False
    )
    titles = {
        "components": "components N",
        "positions": "positions D",
        "vocabulary": "vocabulary V",
        "masked": "masked share",
    }
    named: dict[str, Any] = {}
    for axis, axes in zip(shown, panels[0], strict=True):
        for name, points in curves[axis].items():
            values, seconds = zip(*points, strict=True)
            handle = axes.plot(values, [s * 1e3 for s in seconds], **_style(name))[0]
            named.setdefault(_label(name), handle)
        if axis != "masked":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.set_yscale("log")
        axes.set_xlabel(titles[axis])
        axes.grid()
    panels[0][0].set_ylabel("milliseconds, forward and backward")
    figure.legend(
        named.values(), named.keys(), loc="lower center", ncols=len(named),
        bbox_to_anchor=(0.5, 0.98),
    )  # fmt: skip
    return figure
