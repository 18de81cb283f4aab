"""`python -m benchmarks.run`: measure everything, print the tables.

The same as `pytest benchmarks`, quieter, with shorter turns and a time budget; options are passed
on (`python -m benchmarks.run -k language`). A complete run becomes benchmarks/results/cpu.json or
gpu.json, from which `python -m benchmarks.report --write` fills the pages; any other, an
interrupted one included, is left beside it as partial.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from .report import closing
from .results import Results

FOLDER = Path(__file__).resolve().parent
# Everything within eleven minutes on two cores, set-up included: shorter turns, and an end.
DEFAULTS = {"--time-budget": 645, "--seconds": 0.4, "--rounds": 3}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        epilog="other options: sections di4c_fast and benchmark of `pytest benchmarks --help`",
    )
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder")
    options, given = parser.parse_known_args(arguments)
    for name, value in DEFAULTS.items():
        if not any(argument.startswith(name) for argument in given):
            given.append(f"{name}={value}")
    options.results.mkdir(parents=True, exist_ok=True)
    partial = options.results / "partial.json"
    partial.unlink(missing_ok=True)
    given += ["-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "-v", "--tb=short"]
    given += ["--benchmark-quiet", f"--benchmark-json={partial}"]
    status = int(pytest.main([str(FOLDER / "bench_speed.py"), *given]))
    if partial.exists() and partial.stat().st_size:
        results = Results.load(partial)
        print(closing(results))
        if results.complete:
            partial.replace(options.results / f"{results.machine['kind']}.json")
    return status


if __name__ == "__main__":
    sys.exit(main())
