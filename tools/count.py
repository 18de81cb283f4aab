"""Count the instructions of the Triton kernels, and what they take at least; needs no GPU.

    python -m tools.count [--targets sm_90] [--shapes language] [--set mixture_forward.warps=2 ...]
        [--write]

Every launch of a loss or a draw is compiled ahead of time for the target (`compile_report`),
disassembled, and counted along the shortest way: a turn of the loop over columns times its turns,
and what stands around it. Of a kernel that does no work per logit every instruction counts, once
per turn of its loops. The time of a launch is at least the longest of

    memory  its bytes over the bandwidth of a copy
    issue   its instructions over the four that a multiprocessor starts per clock
    a pipe  its instructions of one kind over the rate of that kind

where programs that do not fill the last round of multiprocessors count as if they did. Latency is
not in it: dependent instructions, barriers, starts of programs. So every time is *computed* and a
lower bound. Bytes in flight tell whether the latency of memory can be hidden.

`--write` puts the numbers into benchmarks/results/counts.json and the tables of sm_90 into
kernels/README.md.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from . import compile_report, machine_code
from .compile_report import SHAPES, DrawShape, Launch, Shape

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "counts.json"
README = ROOT / "kernels" / "README.md"
MARKS = ("<!-- counts: begin -->", "<!-- counts: end -->")
USUAL = ("language", "image", "pixel", "draw language")


@dataclasses.dataclass(frozen=True)
class Machine:
    target: str
    multiprocessors: int
    gigahertz: float  # under load
    terabytes: float  # per second, of a copy
    fp32: float  # instructions of a warp per clock and multiprocessor


MACHINES = {
    "A100": Machine("sm_80", 108, 1.41, 1.7, 2.0),
    "H100": Machine("sm_90", 132, 1.70, 3.0, 4.0),
    "H200": Machine("sm_90", 132, 1.70, 4.3, 4.0),
    "B200": Machine("sm_100", 148, 1.85, 7.0, 4.0),
}
RATES = {"integer product": 2.0, "special": 0.5, "load and store": 1.0, machine_code.OTHER: 2.0}
ISSUE = 4.0  # instructions of a warp per clock and multiprocessor
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
# Kernels without work per logit, and the bytes that they move per position, target and component.
PER_POSITION = {"order": 10, "joint": 12, "loss": 4, "factors": 8, "target_gradient": 10}
PER_EXAMPLE = ("order", "joint", "loss")  # programs are not those of positions


@dataclasses.dataclass(frozen=True)
class Count:
    """One launch. Instructions are those of a thread."""

    kernel: str
    tile: str
    warps: int
    registers: int
    spills: int
    per_logit: float  # instructions of a turn of the loop (of all, without a loop) per logit; or 0
    pipes: dict[str, float]  # the same by pipe
    loads: dict[int, int]  # from device memory, by their width in bits
    turns: float
    around: int  # instructions around the loop
    programs: float  # that work
    resident_warps: int  # of a multiprocessor
    flight: int  # bytes of a multiprocessor on their way
    moved: float  # bytes
    total: dict[str, float]  # instructions of a thread by pipe, all turns

    def times(self, machine: Machine) -> dict[str, float]:
        """Milliseconds at least, by what limits."""
        rounds = math.ceil(self.programs / machine.multiprocessors)
        scale = self.warps * rounds / machine.gigahertz * 1e-6
        rates = {**RATES, "fp32": machine.fp32}
        found = {pipe: self.total.get(pipe, 0.0) / rate * scale for pipe, rate in rates.items()}
        found["issue"] = sum(self.total.values()) / ISSUE * scale
        found["memory"] = self.moved / machine.terabytes * 1e-9
        return found


def _logits(launch: Launch) -> Tensor:
    """Those that the launch reads or, if none, writes."""
    names = ("x_ptr", "z_ptr", "grad_ptr", "out_ptr")
    return next(launch.arguments[name] for name in names if name in launch.arguments)


def bytes_moved(launch: Launch, active: float) -> float:
    """Through device memory, every array once; `active` is the share of positions."""
    a = launch.arguments
    if launch.name in PER_POSITION:
        slots = a.get("A", a.get("slots", launch.grid[0])) * active
        return float(slots * a.get("J", 1) * a.get("N", 1) * PER_POSITION[launch.name])
    vocabulary = a["V"]
    size = float(_logits(launch).dtype.itemsize)
    if any(a.get(name) is not None for name in ("BINS", "Z_BINS", "X_BINS")):
        size = 8 / vocabulary  # two numbers per row
    slots = a["slots"] * active if "slots" in a else 0.0
    row = slots * vocabulary
    if launch.name == "row_statistics":
        return row * a["C"] * size
    if launch.name == "marginal":
        return row * (a["C"] * size + 4 * (1 + a["ADD"]))
    if launch.name == "mixture_forward":
        rows = a["HAS_U"] + a["KEEP_Q"] + a["KEEP_T"]
        return row * (a["N"] * size + (4 if a["STORED_T"] else size) + 4 * rows)
    if launch.name == "mixture_backward":  # zeros where not active
        return row * (a["N"] * size * (1 + 1 / active) + 4 * (a["HAS_Q"] + a["HAS_C"]))
    rows = a.get("part", a["rows"]) if "rows" in a else a["R"]
    parts = 4.0 * rows * a.get("G", 0) * (2 + a.get("ENTROPY", 0) + a.get("RAW", 0))
    once = rows * vocabulary * size * (1 + a.get("GUIDED", False))
    if launch.name == "block_sums":
        return once * active + parts
    return (once if a["WHOLE"] else parts) * active


def count(launch: Launch, active: float) -> Count:
    a, meta = launch.arguments, launch.compiled.metadata
    cubin = launch.compiled.asm["cubin"]
    code = machine_code.disassemble(cubin)
    registers, spills = compile_report.cuda_usage(cubin)
    rows = a.get("BLOCK_N") or a.get("BLOCK_C") or a.get("BLOCK_R", 1)
    small = launch.name in PER_POSITION
    loops = [] if small else code.loops_over_columns()
    around = code.instructions if small else code.around(loops)
    total = machine_code.by_pipe(around)
    turn, turns = around, 0.0
    if small:
        columns = a.get("W") or a["BLOCK_J"]
        whole = a["J"] if "BLOCK_J" in a else a["A"] if a.get("HAS_ROWS", True) else a["D"]
        turns = math.ceil(whole / columns)
        for instruction in code.looped():
            total[instruction.pipe] += int(turns) - 1
        turn = []
    else:
        columns = a["BLOCK_V"] if "BLOCK_V" in a else a["BLOCK_G"] * a["WIDTH"]
    if loops:
        span = min(a["V"], a.get("split", a["V"]))
        turns = span / columns if len(loops) == 1 else float(span // columns)
        turn = code.turn(loops[0])
        for loop, times in zip(loops, (turns, float(span % columns > 0)), strict=False):
            for pipe, number in machine_code.by_pipe(code.turn(loop)).items():
                total[pipe] += number * times  # type: ignore[assignment]
    per = rows * columns / (32 * meta.num_warps)
    each = math.ceil(registers * 32 / 256) * 256 * meta.num_warps
    target = f"sm_{meta.target.arch}"
    resident = min(32, 64 // meta.num_warps, 65536 // each, SHARED[target] // (meta.shared + 1024))
    stages = max(1, a.get("STAGES", 2) - 1)
    return Count(
        launch.name,
        f"{rows} × {columns}",
        meta.num_warps,
        registers,
        spills,
        len(turn) / per,
        {pipe: number / per for pipe, number in machine_code.by_pipe(turn).items()},
        machine_code.loads_by_width(turn),
        turns,
        len(around),
        math.prod(launch.grid) * (1.0 if launch.name in PER_EXAMPLE else active),
        resident * meta.num_warps,
        0 if small else resident * rows * columns * _logits(launch).dtype.itemsize * stages,
        bytes_moved(launch, active),
        dict(total),
    )


def launches_of(shape: Shape | DrawShape, target: str) -> list[Launch]:
    with compile_report.compile_only(target) as launches:
        if isinstance(shape, DrawShape):
            compile_report.launch_draw(shape)
        else:
            usual = dataclasses.replace(shape, component=False)
            compile_report.launch_everything(usual, usual=True)
    return launches


def counts(shape: Shape | DrawShape, target: str) -> Iterator[Count]:
    """The launches of one evaluation with its gradient, without the component term, or of one
    draw, in their order."""
    active = 0.5 if isinstance(shape, Shape) and shape.mask else 1.0
    for launch in launches_of(shape, target):
        yield count(launch, active)


def table(name: str, target: str, rows: Iterable[Count]) -> str:
    """Markdown: a line per launch, times in milliseconds with what limits."""
    machines = {n: m for n, m in MACHINES.items() if m.target == target}
    head = ["kernel", "tile", "warps", "registers", "per logit", "special", "load, store"]
    head += ["warps/SM", "KB in flight"]
    lines = [[*head, *machines]]
    sums: collections.Counter[str] = collections.Counter()
    for row in rows:
        line = [row.kernel, row.tile, row.warps, f"{row.registers}{'!' * bool(row.spills)}"]
        line += [f"{row.per_logit:.1f}" if row.per_logit else ""]
        for pipe in ("special", "load and store"):
            line.append(f"{row.pipes.get(pipe, 0.0):.1f}" if row.per_logit else "")
        line += [row.resident_warps, f"{row.flight / 1024:.0f}" if row.flight else ""]
        for machine, facts in machines.items():
            times = row.times(facts)
            limit = max(times, key=times.__getitem__)
            sums[machine] += times[limit]  # type: ignore[assignment]
            line.append(f"{times[limit]:.3f} {limit} (memory {times['memory']:.3f})")
        lines.append([str(value) for value in line])
    lines.append(["**all**", *[""] * (len(head) - 1), *(f"**{sums[m]:.2f}**" for m in machines)])
    rule = ["---"] * len(lines[0])
    text = "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
    return f"**{name}, {target}**\n\n{text}\n"


def write(results: dict[str, dict[str, list[Count]]], tables: list[str]) -> None:
    import triton

    record = {
        "triton": triton.__version__,
        "machines": {name: dataclasses.asdict(machine) for name, machine in MACHINES.items()},
        "counts": {
            target: {shape: [dataclasses.asdict(row) for row in rows] for shape, rows in by.items()}
            for target, by in results.items()
        },
    }
    _replace(RESULTS, json.dumps(record, indent=1) + "\n")
    before, _, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    _replace(README, before + "\n".join([MARKS[0], "", *tables, MARKS[1]]) + after)


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def settings_of(pairs: Iterable[str]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        kernel, _, field = name.partition(".")
        if not (kernel and field and value.isdigit()):
            raise SystemExit(f"--set takes kernel.field=number, got {pair!r}")
        found.setdefault(kernel, {})[field] = int(value)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", nargs="+", choices=list(SHARED), default=list(SHARED))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(USUAL))
    parser.add_argument("--set", nargs="+", default=[], metavar="kernel.field=number")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    from di4c_fast.kernels.triton import tuning

    import di4c_fast.passes.triton  # noqa: F401 makes the launch parameters known

    results: dict[str, dict[str, list[Count]]] = {}
    tables = []
    with tuning.override(**settings_of(options.set)):
        for target in options.targets:
            for name in options.shapes:
                rows = list(counts(SHAPES[name], target))
                results.setdefault(target, {})[name] = rows
                text = table(name, target, rows)
                tables += [text] if target == "sm_90" else []
                print(text, flush=True)
    if options.write:
        write(results, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
