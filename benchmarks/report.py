"""`python -m benchmarks.report`: tables and figures from the committed results.

Prints the tables and the promises, and fails if one of `PAGES` says anything else than
benchmarks/results/cpu.json and gpu.json. A page holds a table or a number between
`<!-- results:NAME -->` and `<!-- /results -->`; `--write` fills these in and draws the figures.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import targets
from .results import (
    KINDS,
    Results,
    Table,
    baseline_of,
    markdown,
    missing,
    newest,
    parts_table,
    result_table,
    scaling_table,
)

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/speed.md", "docs/distributed.md", "README.md")
BLOCK = re.compile(r"(<!-- results:([\w-]+) -->)(.*?)(<!-- /results -->)", re.DOTALL)
OPENING = re.compile(r"<!-- results:([\w-]+) -->")
FIGURE = re.compile(r"benchmarks/figures/([\w.-]+\.svg)")


# What a block may hold ---------------------------------------------------------------------------


def _machine(results: Results) -> str:
    machine, rates = results.machine, results.machine["ceilings"]
    multiplies = ", ".join(f"{v / 1e12:.2f} TFLOP/s {k}" for k, v in rates["flops"].items())
    parts = [
        machine["device"],
        f"{machine['threads']} threads, {machine['instructions']}"
        if machine["kind"] == "cpu"
        else str(machine.get("clocks")),
        *[f"{name} {v}" for name, v in machine["versions"].items() if name in ("torch", "triton")],
        f"copies {rates['bytes_per_second'] / 1e9:.1f} GB/s, multiplies {multiplies}",
        f"load before the end {machine['load']:.1f}",
        f"commit {results.commit}, {results.date}",
    ]
    return "Measured on: " + "; ".join(parts) + "."


def _groups(*kinds: str) -> Callable[[Results], str]:
    def tables(results: Results) -> str:
        texts: list[str] = []
        for group in results.groups(*kinds):
            left_out = missing(group)
            lines = [f"**{group[0]['shape']}**", "", *markdown(result_table(group))]
            lines += ["", f"Not measured: {left_out}."] if left_out else []
            lines += ["", *parts] if (parts := markdown(parts_table(group))) else []
            texts.append("\n".join(lines))
        return "\n\n".join(texts)

    return tables


def _promises(results: Results) -> str:
    verdicts = targets.judge(results.records, results.machine["kind"])
    table: Table = [["", "wanted", "measured", "met"]]
    table += [[v.name, v.wanted, v.measured, "yes" if v.met else "**no**"] for v in verdicts]
    return "\n".join(markdown(table))


def _scaling(results: Results) -> str:
    return "\n".join(markdown(scaling_table(results.records)))


def _speed_up(results: Results) -> str:
    """How much faster than the plain formulation the masked language loss is, as it is called by
    default: not with what a suffix of the name asks for."""
    group = next((g for g in results.groups("loss") if g[0]["case"]["shape"] == "language"), [])
    base = baseline_of(group)
    ours = [
        r["seconds"] for r in group if r["library"] and r["seconds"] and "-" not in r["variant"]
    ]
    return f"{base['seconds'] / min(ours):.0f} ×" if base and ours else ""


BLOCKS: dict[str, Callable[[Results], str]] = {
    "machine": _machine,
    "loss": _groups("loss"),
    "sample": _groups("draw", "canvas", "ancestral", "confidence", "cached"),
    "step": _groups("step", "many"),
    "many": _groups("many"),
    "promises": _promises,
    "scaling": _scaling,
    "speed-up": _speed_up,
}


def fill(page: str, results: Mapping[str, Results]) -> str:
    """A page with every block replaced; one that begins a line stands between lines.

    Raises:
        ValueError: a block without an end, or of an unknown name; lists the known ones.
    """
    known = [f"{name}-{kind}" for kind in KINDS for name in BLOCKS]
    opened = OPENING.findall(page)
    for name in opened:
        if name not in known:
            raise ValueError(f"unknown block {name!r}; known are {', '.join(known)}")
    if len(BLOCK.findall(page)) != len(opened):
        raise ValueError(f"a block of {', '.join(opened)} has no <!-- /results --> of its own")

    def text(match: re.Match[str]) -> str:
        name, _, kind = match[2].rpartition("-")
        found = BLOCKS[name](results[kind]) if kind in results else ""
        whole = match.start() == 0 or page[match.start() - 1] == "\n"
        found = f"\n{found or 'No results yet.'}\n" if whole else found or match[3]
        return match[1] + found + match[4]

    return BLOCK.sub(text, page)


def check(name: str, page: str, results: Mapping[str, Results], figures: Path) -> int:
    """Hold a page against the results; the number of its blocks.

    Raises:
        ValueError: a block, or a figure that it shows, is not of the newest results.
    """
    filled = fill(page, results)
    if filled != page:
        pairs = zip(BLOCK.findall(page), BLOCK.findall(filled), strict=True)
        wrong = [old[1] for old, new in pairs if old[2] != new[2]]
        raise ValueError(
            f"{name}: {', '.join(wrong)} is not what the newest results say; "
            "run `python -m benchmarks.report --write`"
        )
    for figure in sorted(set(FIGURE.findall(page))):
        kind, path = Path(figure).stem.rsplit("-", 1)[-1], figures / figure
        if not path.exists():
            raise ValueError(f"{name} shows {figure}, which does not exist")
        if kind in results and results[kind].digest() not in path.read_text(encoding="utf-8"):
            raise ValueError(
                f"{figure} was not drawn from the newest results; "
                "run `python -m benchmarks.report --write`"
            )
    return len(OPENING.findall(page))


# The command -------------------------------------------------------------------------------------


def closing(results: Results) -> str:
    """Everything that a terminal shows of a run."""
    names = ("machine", "loss", "sample", "step", "scaling", "promises")
    end = "Complete." if results.complete else "Partial: not everything was measured."
    return "\n\n".join(filter(None, [*(BLOCKS[name](results) for name in names), end]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--write", action="store_true", help="fill in the pages, draw the figures")
    parser.add_argument("--check", action="store_true", help="only check; print no tables")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    options = parser.parse_args(arguments)
    figures = options.root / "benchmarks" / "figures"
    try:
        results = newest(options.root / "benchmarks" / "results")
        for kind in results if not options.check else ():
            print(closing(results[kind]))
        if options.write:
            from .figures import draw

            figures.mkdir(exist_ok=True)
            for kind in results:
                for path, svg in draw(results[kind], figures):
                    path.write_text(svg, encoding="utf-8")
        for name in PAGES:
            page = (options.root / name).read_text(encoding="utf-8")
            if options.write:
                page = fill(page, results)
                (options.root / name).write_text(page, encoding="utf-8")
            print(f"{name}: {check(name, page, results, figures)} blocks agree with the results")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
