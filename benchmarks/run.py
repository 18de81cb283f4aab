"""`python -m benchmarks.run`: measure everything, print the closing table.

The same as `pytest benchmarks`, quieter, with shorter turns and a time budget; options are passed
on (`python -m benchmarks.run --shape language`). An interrupted run keeps what it measured, and
`--resume` goes on with it. `python -m benchmarks.report` then writes tables and figures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent
# Everything within eight minutes on two cores, set-up included: shorter turns, and an end.
DEFAULTS = {"--time-budget": 440, "--seconds": 0.8, "--rounds": 3}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in given or "--help" in given:
        print(__doc__)
        print("options: see the section di4c_fast of `pytest benchmarks --help`")
        return 0
    for name, value in DEFAULTS.items():
        if not any(argument.startswith(name) for argument in given):
            given.append(f"{name}={value}")
    root = str(FOLDER.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    arguments = ["-q", "--no-header", "-p", "no:cacheprovider", str(FOLDER), *given]
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
