"""`python -m benchmarks.report`: the README's tables and figures, from the newest results.

Prints the tables, draws the figures, and fails if the README's numbers are not those of the newest
complete results. In the README a table stands between `<!-- results:NAME -->` and
`<!-- /results -->`; `--write` fills these in.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import store, targets
from .harness import format_bytes
from .store import ResultSet, write_atomically
from .tables import (
    LARGEST_HEADER,
    PHASE_HEADER,
    RESULT_HEADER,
    VERDICT_HEADER,
    grouped,
    is_main,
    largest_rows,
    markdown_table,
    phase_rows,
    plain_table,
    result_rows,
    scaling_rows,
)

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FIGURES = Path(__file__).resolve().parent / "figures"
KINDS = ("cpu", "gpu")
BLOCK = re.compile(r"(<!-- results:([\w-]+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
OPENING = re.compile(r"<!-- results:([\w-]+) -->")
MISSING = "No results yet.\n"


class Inconsistent(RuntimeError):
    """The README does not say what the newest results say."""


# Tables ------------------------------------------------------------------------------------------


def _machine(results: ResultSet) -> list[str]:
    header = results.header
    described, rates = header["machine"], header["ceilings"]
    parts = [described["device"]]
    if described["kind"] == "cpu":
        parts.append(f"{described['threads']} threads")
    else:
        parts.append(f"driver {described.get('driver')}")
    versions = described["versions"]
    parts += [f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions]
    multiplies = ", ".join(f"{v / 1e12:.2f} TFLOP/s {k}" for k, v in rates["flops"].items())
    parts.append(f"copies {rates['bytes_per_second'] / 1e9:.1f} GB/s, multiplies {multiplies}")
    parts.append(f"commit {described['commit']}, {described['date']}")
    return ["Measured on: " + "; ".join(parts) + "."]


def _kind_table(*kinds: str) -> Callable[[ResultSet], list[str]]:
    def table(results: ResultSet) -> list[str]:
        lines: list[str] = []
        chosen = [r for r in results.records if r["case"]["kind"] in kinds and is_main(r)]
        for group in grouped(chosen).values():
            lines += [f"**{group[0]['shape']}**", ""]
            rows = result_rows(group)
            if rows:
                lines += [*markdown_table(RESULT_HEADER, rows), ""]
            skipped = [r for r in group if r["status"] != "ok"]
            if skipped:
                reasons = "; ".join(f"{r['title']} ({r['reason']})" for r in skipped)
                lines += [f"Not measured: {reasons}.", ""]
        return lines[:-1]

    return table


def _step_table(results: ResultSet) -> list[str]:
    lines = _kind_table("step")(results)
    records = [r for r in results.records if r["case"]["kind"] == "step"]
    for header, rows in (
        (PHASE_HEADER, phase_rows(records)),
        (LARGEST_HEADER, largest_rows(records)),
    ):
        if rows:
            lines += ["", *markdown_table(header, rows)]
    return lines


def _promises(results: ResultSet) -> list[str]:
    verdicts = targets.judge(results.records, results.header["machine"]["kind"])
    rows = [[v.name, v.wanted, v.measured, "yes" if v.met else "**no**"] for v in verdicts]
    return markdown_table(VERDICT_HEADER, rows) if rows else [MISSING.strip()]


def _scaling(results: ResultSet) -> list[str]:
    table = scaling_rows(results.records)
    return markdown_table(*table) if table else [MISSING.strip()]


TABLES: dict[str, Callable[[ResultSet], list[str]]] = {
    "machine": _machine,
    "loss": _kind_table("loss"),
    "sample": _kind_table("draw", "ancestral", "confidence"),
    "step": _step_table,
    "promises": _promises,
    "scaling": _scaling,
}


def blocks(newest: Mapping[str, ResultSet]) -> dict[str, str]:
    """The text of every block that a README may hold, by name."""
    texts = {}
    for kind in KINDS:
        for name, table in TABLES.items():
            results = newest.get(kind)
            text = MISSING if results is None else "\n".join(table(results)) + "\n"
            texts[f"{name}-{kind}"] = text
    return texts


def fill(readme: str, texts: Mapping[str, str]) -> str:
    """The README with every block replaced.

    Raises:
        ValueError: a block without an end, or of an unknown name; lists the known ones.
    """
    found = BLOCK.findall(readme)
    opened = OPENING.findall(readme)
    if len(found) != len(opened):
        closed = {name for _, name, _, _ in found}
        missing = [name for name in opened if name not in closed] or opened
        raise ValueError(f"README: block {missing[0]!r} has no <!-- /results --> of its own")
    for name in opened:
        if name not in texts:
            raise ValueError(f"README: unknown block {name!r}; known are {', '.join(texts)}")
    return BLOCK.sub(lambda match: match[1] + texts[match[2]] + match[4], readme)


def check(readme: str, newest: Mapping[str, ResultSet], figures: Path = FIGURES) -> int:
    """Hold a README against the newest results; the number of blocks that it has.

    Raises:
        Inconsistent: a table, or a figure that it shows, is not of the newest results.
    """
    texts = blocks(newest)
    filled = fill(readme, texts)
    if filled != readme:
        pairs = zip(BLOCK.findall(readme), BLOCK.findall(filled), strict=True)
        wrong = [old[1] for old, new in pairs if old[2] != new[2]]
        raise Inconsistent(
            f"README: {', '.join(wrong)} is not what the newest results say; "
            "run `python -m benchmarks.report --write`"
        )
    for name in sorted(set(re.findall(r"benchmarks/figures/([\w.-]+\.svg)", readme))):
        kind = Path(name).stem.rsplit("-", 1)[-1]
        path = figures / name
        if not path.exists():
            raise Inconsistent(f"README shows {name}, which does not exist")
        if kind in newest and digest(newest[kind]) not in path.read_text(encoding="utf-8"):
            raise Inconsistent(
                f"{name} was not drawn from the newest results; run `python -m benchmarks.report`"
            )
    return len(OPENING.findall(readme))


def digest(results: ResultSet) -> str:
    """Identifies the numbers of a set."""
    text = json.dumps(results.records, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# The command -------------------------------------------------------------------------------------


def print_tables(results: ResultSet) -> None:
    print("\n".join(_machine(results)))
    for group in grouped(r for r in results.records if is_main(r)).values():
        print(f"\n{group[0]['shape']}")
        for line in plain_table(RESULT_HEADER, result_rows(group)):
            print("  " + line)
    table = scaling_rows(results.records)
    if table:
        print("\nscaling")
        for line in plain_table(*table):
            print("  " + line)
    for header, rows in (
        (PHASE_HEADER, phase_rows(results.records)),
        (LARGEST_HEADER, largest_rows(results.records)),
    ):
        if rows:
            print()
            for line in plain_table(header, rows):
                print("  " + line)
    print("\npromises")
    for verdict in targets.judge(results.records, results.header["machine"]["kind"]):
        mark = "met   " if verdict.met else "NOT MET"
        print(f"  {mark} {verdict.name}: {verdict.wanted}; measured {verdict.measured}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--write", action="store_true", help="fill in the README's blocks")
    parser.add_argument("--check", action="store_true", help="only check; draw and print nothing")
    parser.add_argument("--no-figures", action="store_true", help="do not draw")
    parser.add_argument("--root", type=Path, default=store.RESULTS, help="folder of the results")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--figures", type=Path, default=FIGURES, help="where figures go")
    options = parser.parse_args(arguments)

    newest = store.newest(options.root)
    if not newest and not options.check:
        partial = store.result_sets(options.root)
        print(f"no complete results under {options.root.name}/ ({len(partial)} partial)")
    try:
        readme = options.readme.read_text(encoding="utf-8")
        if not options.check:
            for kind in KINDS:
                if kind in newest:
                    print_tables(newest[kind])
                    if not options.no_figures:
                        _draw(newest[kind], options.figures)
        if options.write:
            readme = fill(readme, blocks(newest))
            write_atomically(options.readme, readme)
        count = check(readme, newest, options.figures)
    except (Inconsistent, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"README: {count} blocks agree with the newest results" if count else
          "README: has no blocks of results")  # fmt: skip
    return 0


def _draw(results: ResultSet, folder: Path) -> None:
    try:
        from .figures import draw
    except ImportError as error:
        print(f"no figures: {error}")
        return
    for path in draw(results, folder, digest(results)):
        print(f"drawn {path.name} ({format_bytes(path.stat().st_size)})")


if __name__ == "__main__":
    sys.exit(main())
