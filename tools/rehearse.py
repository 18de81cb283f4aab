"""Compile for a GPU every launch of the library's kernels that tests or benchmarks make on the CPU.

    TRITON_INTERPRET=1 python -m pytest -p tools.rehearse tests --launches launches.jsonl
    python -m tools.rehearse launches.jsonl [--targets sm_90 sm_100] [--write]

The first command writes down each launch once: the kernel, the dtypes of its tensors and whether
they are aligned, its numbers and constants. The second makes the same launches on tensors without
memory and compiles them ahead of time, as `tools.compile_report` does, with whatever Triton is
installed. Exits with 1 if one does not compile; the others are compiled all the same. `--write`
puts a summary by Triton and target into benchmarks/results/rehearsal.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "rehearsal.json"


def describe_argument(value: Any) -> Any:
    """What a launch depends on: of a tensor its dtype and whether it begins at a multiple of 16
    bytes, of a number whether 1 or divisible by 16."""
    if isinstance(value, Tensor):
        aligned = value.data_ptr() % 16 == 0
        return {"tensor": str(value.dtype).removeprefix("torch."), "aligned": aligned}
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, int):
        return value if value == 1 else 16 if value % 16 == 0 else 3
    if isinstance(value, tuple):
        return {"tuple": [describe_argument(part) for part in value]}
    return describe_argument(value.item())  # a number of numpy


def rebuild_argument(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(rebuild_argument(part) for part in value["tuple"])
    tensor = torch.empty(17, dtype=getattr(torch, value["tensor"]), device="meta")
    return tensor[not value["aligned"] :]  # without memory the base is 0


# Recording, as a plugin of pytest -----------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--launches", type=Path, help="where the launches of kernels are written")


def pytest_configure(config: Any) -> None:
    path = config.getoption("--launches")
    if path is None:
        return
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction

    seen: set[str] = set()
    run = GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.fn.__module__.startswith("di4c_fast."):  # of a test alone
            return run(self, *args, **kwargs)
        constants = _constants(self.fn)
        names = [name for name in self.arg_names if name not in kwargs]
        given = dict(zip(names, args, strict=False)) | kwargs
        launch = {
            "kernel": f"{self.fn.__module__}:{self.fn.__name__}",
            "arguments": {
                name: value if name in constants and not isinstance(value, tuple)
                else describe_argument(value)
                for name, value in given.items()
            },
        }  # fmt: skip
        line = json.dumps(launch, sort_keys=True)
        if line not in seen:
            seen.add(line)
            with path.open("a") as file:
                file.write(line + "\n")
        return run(self, *args, **kwargs)

    assert InterpretedFunction is not None
    GridExecutor.__call__ = recorded


def _constants(function: Any) -> set[str]:
    """Arguments whose exact value counts: compile-time constants and launch options."""
    kinds = function.__annotations__.items()
    named = {name for name, kind in kinds if "constexpr" in str(kind)}
    return named | {"num_warps", "num_stages", "num_ctas"}


def as_usual(line: str) -> str:
    """The launch with no more rows per program than a GPU is given: tests in the interpreter put
    many into one, since its time goes with the number of programs."""
    from di4c_fast.kernels.triton.row_draw import RowDraw, rows_and_warps

    launch = json.loads(line)
    a = launch["arguments"]
    if launch["kernel"].endswith(":_row_draw_kernel"):
        rows, warps = rows_and_warps(RowDraw(), a["WHOLE"], a["BLOCK_G"], a["WIDTH"], a["GUIDED"])
        if a["BLOCK_R"] > rows:
            a |= {"BLOCK_R": rows, "num_warps": warps}
    return json.dumps(launch, sort_keys=True)


# Compiling ----------------------------------------------------------------------------------------


def rehearse(lines: list[str], target: str) -> tuple[list[str], dict[str, Any]]:
    """Compile the launches. Returns what failed and why, and a summary: numbers of launches and
    failures, and the most bytes that each kernel spills on NVIDIA."""
    from .compile_report import TARGETS, compile_only, cuda_usage

    failures, spills = [], dict[str, int]()
    with compile_only(target) as compiled:
        for line in lines:
            launch = json.loads(line)
            module, name = launch["kernel"].split(":")
            kernel = getattr(importlib.import_module(module), name)
            arguments = {k: rebuild_argument(v) for k, v in launch["arguments"].items()}
            try:
                kernel[(1,)](**arguments)
            except Exception as error:
                failures.append(f"{launch['kernel']}: {type(error).__name__}: {error}\n  {line}")
                continue
            if TARGETS[target][0] != "cuda":
                continue
            spilled = cuda_usage(compiled[-1].compiled.asm["cubin"])[1]
            if spilled:
                print(f"{target}: spills {spilled} bytes: {line}", flush=True)
                spills[name] = max(spilled, spills.get(name, 0))
    summary = {"launches": len(lines), "failures": len(failures), "spills": spills}
    return failures, summary


def write(target: str, summary: dict[str, Any]) -> None:
    import triton

    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[f"Triton {triton.__version__}, {target}"] = summary
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    os.replace(part, RESULTS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("launches", type=Path, nargs="+")
    parser.add_argument("--targets", nargs="+", default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    recorded = (line for path in options.launches for line in path.read_text().splitlines())
    lines = sorted({as_usual(line) for line in recorded})
    failed = 0
    for target in options.targets:
        failures, summary = rehearse(lines, target)
        print(f"{target}: {len(lines)} launches, {len(failures)} do not compile", flush=True)
        for failure in failures:
            print(failure, file=sys.stderr)
        if options.write:
            write(target, summary)
        failed += len(failures)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
