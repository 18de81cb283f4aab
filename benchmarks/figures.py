"""Figures of a set of results: time against the floor, memory against N, scaling curves.

Readable on light and on dark pages: no background, text and axes in a grey that stands out from
both, colours of medium lightness that people with a colour vision deficiency tell apart, and a
marker of its own for every role.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .cases import AXES, on_axis
from .groups import BACKENDS
from .results import Record, Results

GREY = "#7a828c"
# Colour and marker of a variant; those that play the same role look alike.
PLAIN, BETTER, PEER = ("#d55e00", "s"), ("#cc79a7", "D"), ("#b8860b", "<")
STYLES = {
    **dict.fromkeys(("dense", "eager", "multinomial", "naive", "plain"), PLAIN),
    **dict.fromkeys(("vectorised", "linear-cross-entropy", "gumbel-fp32"), BETTER),
    **dict.fromkeys(("liger", "cut-cross-entropy", "flashinfer", "gumbel-fp64"), PEER),
    "torch": ("#0f8fd0", "o"),
    "cpu": ("#cc3311", "o"),
    "triton": ("#009e73", "o"),
}
# other markers, the same colour
SUFFIXES = {"-compiled": "^", "-all": "P", "-in-place": "X"}
SUFFIXES |= {"-few": "v", "-in-turn": "d", "-in-memory": "D"}
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "di4c_fast",
    "font.size": 9,
    "font.family": "sans-serif",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), GREY),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), GREY),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.transparent": True,
}


def draw(results: Results, folder: Path) -> Iterator[tuple[Path, str]]:
    """What the records allow: files and their SVG, with the digest of the results in it."""
    for name, function in (("speed", _speed), ("memory", _memory), ("scaling", _scaling)):
        with plt.rc_context(SETTINGS):
            figure = function(results)
            if figure is None:
                continue
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
        mark = f"<!-- results {results.digest()} -->\n<svg "
        path = folder / f"{name}-{results.machine['kind']}.svg"
        yield path, buffer.getvalue().replace("<svg ", mark, 1)


def _style(variant: str) -> dict[str, Any]:
    marker = None
    for suffix, other in SUFFIXES.items():
        if variant.endswith(suffix):
            variant, marker = variant.removesuffix(suffix), other
    colour, usual = STYLES.get(variant, (GREY, "."))
    face = colour if variant in BACKENDS else "none"
    style = {"color": colour, "marker": marker or usual, "markerfacecolor": face}
    return style | {"markersize": 6}


def _label(variant: str) -> str:
    return f"di4c_fast: {variant}" if variant.split("-")[0] in BACKENDS else variant


def _speed(results: Results) -> Any:
    """One line per shape: every variant's time, and the floor as an upright bar."""
    groups = [[r for r in group if r["seconds"]] for group in results.groups()]
    groups = [group for group in groups if group]
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(7.5, 0.45 * len(groups) + 1.4))
    named: dict[Any, tuple[Any, list[str]]] = {}  # by style, so that the legend joins names
    for line, group in enumerate(groups):
        marks = [(_label(r["variant"]), r["seconds"] * 1e3, _style(r["variant"])) for r in group]
        ends = [end(time for _, time, _ in marks) for end in (min, max)]
        axes.plot(ends, [line, line], color=GREY, alpha=0.3, linewidth=1)
        if floor := group[0]["floor_seconds"]:
            style = {"marker": "|", "markersize": 16, "markeredgewidth": 2, "color": GREY}
            marks.append(("floor of this machine", floor * 1e3, style))
        for label, milliseconds, style in marks:
            handle = axes.plot(milliseconds, line, linestyle="", **style)[0]
            names = named.setdefault(tuple(style.items()), (handle, []))[1]
            if label not in names:
                names.append(label)
    axes.set_yticks(range(len(groups)), [_line(group[0]) for group in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds per call (further left is faster)")
    axes.grid(visible=False, axis="y")
    handles = [handle for handle, _ in named.values()]
    labels = [" / ".join(names) for _, names in named.values()]
    axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def _line(record: Record) -> str:
    note = {"busy": ", one core busy", "half": ", bf16"}.get(record["case"]["note"], "")
    return record["case"]["shape"] + note


def _points(
    records: Sequence[Record], axis: str, column: str, scale: float
) -> dict[str, list[tuple[float, float]]]:
    """Per variant, (value on the axis, scaled value of the column)."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        place = on_axis(record, axis)
        if place is not None and record["seconds"] and record[column] is not None:
            point = (place, max(float(record[column]) * scale, 1e-6))
            curves.setdefault(record["variant"], []).append(point)
    return {name: sorted(points) for name, points in curves.items()}


def _curves(
    results: Results, axes_shown: Sequence[str], column: str, scale: float, label: str
) -> Any:
    """One panel per axis, one curve per variant; for memory the size of the logits, too."""
    curves = {axis: _points(results.records, axis, column, scale) for axis in axes_shown}
    shown = [axis for axis in curves if any(len(points) > 1 for points in curves[axis].values())]
    if not shown:
        return None
    figure, panels = plt.subplots(
        1, len(shown), figsize=(2.2 * len(shown) + 1.6, 2.8), sharey=True, squeeze=False
    )
    named: dict[str, Any] = {}
    for axis, axes in zip(shown, panels[0], strict=True):
        lines = [(_label(name), points, _style(name)) for name, points in curves[axis].items()]
        if column == "peak_bytes":
            logits = next(iter(_points(results.records, axis, "logits_bytes", scale).values()))
            lines.append(("the logits", logits, {"color": GREY, "linestyle": "--"}))
        for name, points, style in lines:
            named.setdefault(name, axes.plot(*zip(*points, strict=True), **style)[0])
        if axis != "masked":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.set_yscale("log")
        axes.set_xlabel({"masked": "masked share", "threads": "threads"}.get(axis, AXES[axis]))
    panels[0][0].set_ylabel(label)
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 0.98)}
    figure.legend(named.values(), named.keys(), ncols=len(named), **place)
    return figure


def _memory(results: Results) -> Any:
    label = "peak memory above the inputs, MB"
    return _curves(results, ("components", "positions"), "peak_bytes", 1e-6, label)


def _scaling(results: Results) -> Any:
    return _curves(results, list(AXES), "seconds", 1e3, "milliseconds, forward and backward")
