"""Break the kernels on purpose, one way at a time, and show which tests notice.

    python -m tools.mutate_kernels [--list] [number ...]

Every mutation is made in a copy of the checkout in a temporary folder. Prints the test that
fails first; exits with 1 if a mutation passes unnoticed. Not collected by pytest: it takes an hour.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .mutations import KERNELS, Mutation
from .mutations_cpu import CPU

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = [*KERNELS, *CPU]
SECONDS = 900  # after which a mutated kernel counts as one that hangs
NO_TESTS = (4, 5)  # how pytest says that there is no such test


class StaleError(Exception):
    """The table no longer fits the sources or the tests."""


def noticed_by(mutation: Mutation) -> str:
    """The first test that fails in a mutated copy, or how the run ended early; "" if all pass.

    Raises:
        StaleError: the source has nothing to break, or no test is selected.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("di4c_fast", "kernels", "tests", "tools", "benchmarks"):
            shutil.copytree(
                ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__")
            )
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        path = Path(folder, mutation.file)
        source = path.read_text(encoding="utf-8")
        if mutation.before not in source:
            raise StaleError(f"{mutation.file} no longer has what is to be broken")
        path.write_text(source.replace(mutation.before, mutation.after), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", f"tests/{mutation.tests}", "-q", "--tb=no"]
        command += ["--show-capture=no", "-p", "no:cacheprovider", "--maxfail=1"]
        if mutation.select:
            command += ["-k", mutation.select]
        environment = dict(os.environ)
        if mutation.file.startswith("kernels/cpu"):
            # A library of its own, built quickly. The narrow vectors have the most tails.
            environment |= {"XDG_CACHE_HOME": folder, "DI4C_FAST_CXXFLAGS": "-O1"}
            environment["DI4C_FAST_CPU"] = "plain"
        try:
            run = subprocess.run(
                command,
                cwd=folder,
                capture_output=True,
                text=True,
                env=environment,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"hangs for {SECONDS} s"
    lines = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if lines:
        return lines[0].split("::", 1)[-1].split(" - ")[0]
    if run.returncode in NO_TESTS:
        raise StaleError(f"{mutation.tests} has no test -k {mutation.select!r}")
    if run.returncode:
        return f"crashed with status {run.returncode}"
    if " passed" not in run.stdout:
        raise StaleError("every selected test is skipped")
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tools.mutate_kernels")
    parser.add_argument("--list", action="store_true", help="only show the numbers")
    parser.add_argument("numbers", nargs="*", type=int, help="which mutations; all if left out")
    arguments = parser.parse_args()
    unnoticed = 0
    for number in arguments.numbers or range(len(MUTATIONS)):
        mutation = MUTATIONS[number]
        title = f"{number:2} {mutation.name} ({mutation.file})"
        if arguments.list:
            print(title)
            continue
        try:
            found = noticed_by(mutation)
        except StaleError as error:
            found = f"STALE: {error}"
            unnoticed += 1
        unnoticed += not found
        print(f"{title}: {found or 'NOT NOTICED'}", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
