"""`python -m benchmarks.gpu`: everything that needs a GPU, in one go and under eight minutes.

In this order: the gpu-marked tests, the tuning of launch parameters, the benchmarks with the tuned
parameters. Works in a plain checkout, without installing the package and without a network. Each
stage is a process of its own with a time limit; one that fails or runs out of time does not keep
the next from running, and what it wrote stays. Exit status 1 if any stage failed.

Writes into $OUT if that is set, else into benchmarks/results/gpu-run/:
tests.log, tuning.json, tuning.log, benchmarks.log, summary.txt, benchmarks/gpu.json (partial.json
if the time was not enough for everything).

`--dry-run` goes through the same stages on the CPU at tiny sizes, with the kernels under Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 465.0
TEST_SECONDS = 170.0
TUNING_SECONDS = 75.0
LOG_BYTES = 4 << 20  # the end of a log that is kept
# A stage may run over what it was told by so much before it is stopped.
GRACE_SECONDS = 20.0
# Of the environment of every stage.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Stage:
    """One process: its output goes to the terminal and to a log."""

    def __init__(self, name: str, arguments: list[str], log: Path, seconds: float):
        self.name, self.arguments, self.log = name, arguments, log
        self.seconds = seconds
        self.status: int | None = None
        self.took = 0.0

    def run(self, environment: dict[str, str]) -> None:
        print(f"\n=== {self.name} (at most {self.seconds:.0f} s)", flush=True)
        began = time.monotonic()
        with self.log.open("w", encoding="utf-8", errors="replace") as file:
            process = subprocess.Popen(
                [sys.executable, *self.arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            assert process.stdout is not None
            reader = threading.Thread(target=_copy, args=(process.stdout, file), daemon=True)
            reader.start()
            try:
                self.status = process.wait(timeout=max(1.0, self.seconds))
            except subprocess.TimeoutExpired:
                # As by the keyboard, so that it closes its results.
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            reader.join(timeout=5)
        self.took = time.monotonic() - began
        _shorten(self.log)

    def line(self) -> str:
        how = "stopped at its limit" if self.status is None else f"exit status {self.status}"
        if self.status == 0:
            how = "passed"
        return f"{self.name}: {how} after {self.took:.0f} s"


def _copy(source: IO[str], file: IO[str]) -> None:
    for line in source:
        sys.stdout.write(line)
        sys.stdout.flush()
        file.write(line)
        file.flush()


def _shorten(log: Path) -> None:
    content = log.read_bytes()
    if len(content) > LOG_BYTES:
        log.write_bytes(b"(beginning left out)\n" + content[-LOG_BYTES:])


def output_folder() -> Path:
    named = os.environ.get("OUT")
    return Path(named) if named else ROOT / "benchmarks" / "results" / "gpu-run"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny sizes")
    parser.add_argument(
        "--stages",
        default="tests,tuning,benchmarks",
        help="which of them (default: %(default)s)",
    )
    parser.add_argument("--total-seconds", type=float, default=TOTAL_SECONDS)
    parser.add_argument("--tests", default="tests", help="file or folder of the tests")
    parser.add_argument("rest", nargs="*", help="options for the benchmarks, after --")
    options = parser.parse_args(arguments)
    chosen = options.stages.split(",")
    unknown = sorted(set(chosen) - {"tests", "tuning", "benchmarks"})
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; known are tests, tuning, benchmarks")

    out = output_folder()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **ENVIRONMENT}
    environment["PYTHONPATH"] = os.pathsep.join(
        part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part
    )
    if options.dry_run:
        environment["TRITON_INTERPRET"] = "1"
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        missing = _no_gpu()
        if missing:
            print(f"error: {missing}", file=sys.stderr)
            return 1

    deadline = time.monotonic() + options.total_seconds
    tuned = out / "tuning.json"
    tuned.unlink(missing_ok=True)  # never that of an earlier run
    stages: list[Stage] = []
    for name in ("tests", "tuning", "benchmarks"):
        if name not in chosen:
            continue
        left = deadline - time.monotonic()
        log = out / f"{name}.log"
        if name == "tests":
            command = ["-m", "pytest", options.tests, "-m", "gpu", "-q", "-p", "no:cacheprovider"]
            command += ["--durations=10", "--maxfail=40", "--continue-on-collection-errors"]
            stage = Stage(name, command, log, min(TEST_SECONDS, left))
        elif name == "tuning":
            seconds = min(10.0 if options.dry_run else TUNING_SECONDS, left - GRACE_SECONDS)
            command = ["-m", "benchmarks.tune", f"--seconds={seconds:.0f}", f"--output={tuned}"]
            if options.dry_run:
                command += ["--device=cpu", "--size=tiny"]
            stage = Stage(name, command, log, seconds + GRACE_SECONDS)
        else:
            # Groups that begin before the budget is spent still finish.
            budget = max(5.0, left - 2 * GRACE_SECONDS)
            command = ["-m", "benchmarks.run", f"--time-budget={budget:.0f}"]
            command += [f"--results={out / 'benchmarks'}"]
            if tuned.exists():
                command.append(f"--launch-parameters={tuned}")
            if options.dry_run:
                command += ["--device=cpu", "--size=tiny", "--seconds=0.01", "--rounds=1"]
            command += options.rest
            stage = Stage(name, command, log, left)
        stage.run(environment)
        stages.append(stage)
        _write_summary(out, stages)
    print("\n" + (out / "summary.txt").read_text(encoding="utf-8"), end="", flush=True)
    return int(any(_failed(stage) for stage in stages))


def _failed(stage: Stage) -> bool:
    if stage.name == "tuning":
        # What it found until its limit is as good as any.
        return not stage.log.with_suffix(".json").exists()
    # Without a GPU, or before there are any, no test is left: pytest's status 5.
    return stage.status not in ((0, 5) if stage.name == "tests" else (0,))


def _write_summary(out: Path, stages: Sequence[Stage]) -> None:
    lines = [stage.line() for stage in stages]
    for stage in stages:
        text = stage.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if stage.name == "tests":
            lines.append("tests: " + (text[-1] if text else "no output"))
        if stage.name == "benchmarks":  # the tables at the end
            starts = [i for i, line in enumerate(text) if line.startswith("Measured on:")]
            lines += ["", *text[starts[-1] :]] if starts else []
    (out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _no_gpu() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"PyTorch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU (--dry-run goes through everything on the CPU)"
    return None


if __name__ == "__main__":
    sys.exit(main())
