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
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 465.0
TEST_SECONDS = 170.0
TUNING_SECONDS = 75.0
# A stage may run over what it was told by so much before it is stopped.
GRACE_SECONDS = 20.0
STAGES = ("tests", "tuning", "benchmarks")


@dataclasses.dataclass
class Stage:
    """One process: its output goes to the terminal and to a log."""

    name: str
    log: Path
    status: int | None = None  # None: stopped at its limit
    took: float = 0.0

    def run(self, arguments: Sequence[str], seconds: float, environment: dict[str, str]) -> None:
        print(f"\n=== {self.name} (at most {seconds:.0f} s)", flush=True)
        began = time.monotonic()
        with open(self.log, "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        follow = ["tail", "--lines=+1", "--follow", f"--pid={process.pid}", str(self.log)]
        with subprocess.Popen(follow):
            try:
                self.status = process.wait(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                # As by the keyboard, so that it closes its results.
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                process.kill()
                process.wait()
        self.took = time.monotonic() - began

    def lines(self) -> list[str]:
        """What the summary says of it."""
        how = {None: "stopped at its limit", 0: "passed"}
        lines = [
            f"{self.name}: {how.get(self.status, f'exit status {self.status}')} "
            f"after {self.took:.0f} s"
        ]
        text = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if self.name == "tests":
            lines.append("tests: " + (text[-1] if text else "no output"))
        if self.name == "benchmarks":  # the tables at the end
            starts = [i for i, line in enumerate(text) if line.startswith("Measured on:")]
            lines += ["", *text[starts[-1] :]] if starts else []
        return lines

    def failed(self) -> bool:
        if self.name == "tuning":
            # What it found until its limit is as good as any.
            return not self.log.with_suffix(".json").exists()
        # Without a GPU, or before there are any, no test is left: pytest's status 5.
        return self.status not in ((0, 5) if self.name == "tests" else (0,))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny sizes")
    parser.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    parser.add_argument("--total-seconds", type=float, default=TOTAL_SECONDS)
    parser.add_argument("--tests", default="tests", help="file or folder of the tests")
    parser.add_argument("rest", nargs="*", help="options for the benchmarks, after --")
    options = parser.parse_args(arguments)
    chosen = options.stages.split(",")
    for name in chosen:
        if name not in STAGES:
            parser.error(f"unknown stage {name!r}; known are {', '.join(STAGES)}")
    dry = options.dry_run
    if not dry and not torch.cuda.is_available():
        print("error: PyTorch sees no GPU (see --dry-run)", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results" / "gpu-run")
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    if dry:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    deadline = time.monotonic() + options.total_seconds
    tuned = out / "tuning.json"
    tuned.unlink(missing_ok=True)  # never that of an earlier run
    done: list[Stage] = []
    for name in filter(chosen.__contains__, STAGES):
        left = deadline - time.monotonic()
        if name == "tests":
            limit = min(TEST_SECONDS, left)
            command = ["pytest", options.tests, "-m", "gpu", "-q", "-p", "no:cacheprovider"]
            command += ["--durations=10", "--maxfail=40", "--continue-on-collection-errors"]
        elif name == "tuning":
            seconds = min(10.0 if dry else TUNING_SECONDS, left - GRACE_SECONDS)
            limit = seconds + GRACE_SECONDS
            command = ["benchmarks.tune", f"--seconds={seconds:.0f}", f"--output={tuned}"]
            command += ["--device=cpu", "--size=tiny"] if dry else []
        else:
            # Groups that begin before the budget is spent still finish.
            limit, budget = left, max(5.0, left - 2 * GRACE_SECONDS)
            command = ["benchmarks.run", f"--time-budget={budget:.0f}"]
            command += [f"--results={out / 'benchmarks'}"]
            command += [f"--launch-parameters={tuned}"] if tuned.exists() else []
            if dry:
                command += ["--device=cpu", "--size=tiny", "--seconds=0.01", "--rounds=1"]
            command += options.rest
        done.append(Stage(name, out / f"{name}.log"))
        done[-1].run(command, limit, environment)
        lines = [line for stage in done for line in stage.lines()]
        (out / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + (out / "summary.txt").read_text(encoding="utf-8"), end="", flush=True)
    return int(any(stage.failed() for stage in done))


if __name__ == "__main__":
    sys.exit(main())
