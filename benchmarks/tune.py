"""`python -m benchmarks.tune`: find launch parameters of the Triton kernels for this GPU.

Coordinate descent over the launch parameters of the kernels, each judged by the shapes it
matters for, against the default in the same run. A candidate must pass the check of the
benchmarks, and is kept only if it is faster by more than the noise. Writes JSON in the
format of `kernels/configs/<device>.json`; nothing uses it until it is put there (or given to the
benchmarks with `--launch-parameters`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import make_case
from .groups import Group
from .harness import Clock, make_group

_LOGITS = ("language", "image")
_DRAWS = ("rows", "rows-large")
_TILES = (1024, 2048, 4096, 8192)
_WARPS = (1, 2, 4, 8)  # few compute per-column values fewer times, many hide latency
_STAGES = (1, 2, 3, 4)

# Field, its candidates, the shapes that it matters for; what costs most comes first, since the
# search may be stopped. Fields of shapes that no benchmark has keep their defaults.
SEARCH: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = (
    ("mixture_forward.elements", _TILES, _LOGITS),
    ("mixture_backward.elements", _TILES, _LOGITS),
    ("mixture_forward.warps", _WARPS, _LOGITS),
    ("mixture_backward.warps", _WARPS, _LOGITS),
    ("row_statistics.elements", _TILES, _LOGITS),
    ("row_statistics.warps", _WARPS, _LOGITS),
    ("marginal.elements", _TILES, _LOGITS),
    ("marginal.warps", _WARPS, _LOGITS),
    ("mixture_forward.split_columns", (2048, 8192, 16384), ("language",)),
    ("mixture_backward.split_columns", (2048, 8192, 16384), ("language",)),
    ("row_draw.elements", _TILES, _DRAWS),
    ("row_draw.warps", (1, 2, 4), _DRAWS),
    ("row_draw.blocks", (256, 1024), _DRAWS),
    ("row_draw.joined_rows", (1, 4), _DRAWS),
    ("mixture_forward.bins_elements", (256, 1024), ("pixel",)),
    ("mixture_backward.bins_elements", (512, 1024), ("pixel",)),
    ("mixture_forward.stages", _STAGES, _LOGITS),
    ("mixture_backward.stages", _STAGES, _LOGITS),
    ("row_statistics.stages", _STAGES, _LOGITS),
    ("marginal.stages", _STAGES, _LOGITS),
)
KEEP = 0.985  # a candidate must take at most this share of the time before it


@dataclasses.dataclass
class Problem:
    """A group with inputs and their truth, and the time of the best so far."""

    group: Group
    inputs: Any
    truth: Any
    seconds: float


def by_kernel(fields: dict[str, int]) -> dict[str, dict[str, int]]:
    """{"marginal.warps": 4} as {"marginal": {"warps": 4}}."""
    found: dict[str, dict[str, int]] = {}
    for field, value in fields.items():
        kernel, name = field.split(".")
        found.setdefault(kernel, {})[name] = value
    return found


class Search:
    """The descent; what `run` has found so far is there at any time."""

    def __init__(self, device: str, dtype: str, size: str, tuning: Any, deadline: float):
        self.device, self.dtype, self.size = device, dtype, size
        self.tuning, self.deadline = tuning, deadline
        self.clock = Clock(device)
        self.best: dict[str, int] = {}
        self.log: list[dict[str, Any]] = []
        self.seconds: dict[str, dict[str, float]] = {}  # by shape: with the defaults, and now
        self.finished = False

    def run(self) -> None:
        """Go through all fields until the deadline."""
        shapes: dict[str, Problem | None] = {}
        for field, candidates, names in SEARCH:
            # Shapes of other fields go: together they may not fit.
            shapes = {name: shapes[name] for name in names if name in shapes}
            kernel, name = field.split(".")
            for candidate in candidates:
                for shape in names:
                    if shape not in shapes and time.monotonic() < self.deadline:
                        shapes[shape] = self._problem(shape)
                problems = [problem for problem in shapes.values() if problem is not None]
                if time.monotonic() > self.deadline:
                    return
                with self._overridden(self.best):
                    record = self.tuning.launch_parameters(kernel, torch.device(self.device))
                if problems and candidate != getattr(record, name):
                    self._try(field, candidate, problems)
        self.finished = True

    def _overridden(self, fields: dict[str, int]) -> contextlib.AbstractContextManager[Any]:
        return self.tuning.override(**by_kernel(fields))

    def _problem(self, shape: str) -> Problem | None:
        group = make_group(make_case(shape, self.size, self.dtype, self.device))
        reason = group.unavailable("triton")
        if reason is not None:
            print(f"{shape}: {reason}", flush=True)
            return None
        try:
            inputs = group.make_inputs(0)
            with self._overridden(self.best):
                truth = group.truth(inputs)
                seconds = self._time(group, inputs)
        except Exception as error:
            print(f"{shape}: not tuned, {type(error).__name__}: {error}", flush=True)
            return None
        self.seconds.setdefault(shape, {"default": seconds})["tuned"] = seconds
        print(f"{shape}: {seconds * 1e3:.3f} ms", flush=True)
        return Problem(group, inputs, truth, seconds)

    def _time(self, group: Group, inputs: Any) -> float:
        call = functools.partial(group.call, "triton", inputs)

        def seconds(count: int) -> float:
            return statistics.median(self.clock.round([lambda: call] * count))

        if not self.clock.gpu:  # the interpreter: only to go through everything
            return seconds(1)
        seconds(2)  # compiles
        return seconds(max(3, min(20, int(0.15 / max(seconds(1), 1e-6)))))

    def _try(self, field: str, candidate: int, problems: Sequence[Problem]) -> None:
        entry: dict[str, Any] = {"field": field, "value": candidate}
        self.log.append(entry)
        try:
            with self._overridden({**self.best, field: candidate}):
                seconds = []
                for problem in problems:
                    group, inputs = problem.group, problem.inputs
                    wrong = group.check("triton", inputs, problem.truth).problem
                    if wrong:
                        raise ArithmeticError(wrong)
                    seconds.append(self._time(group, inputs))
        except Exception as error:  # too many registers, too much shared memory, a wrong result
            entry["error"] = f"{type(error).__name__}: {str(error)[:120]}"
            print(f"  {field}={candidate}: {entry['error']}", flush=True)
            return
        entry["ms"] = [round(value * 1e3, 4) for value in seconds]
        ratios = [now / p.seconds for now, p in zip(seconds, problems, strict=True)]
        ratio = statistics.geometric_mean(ratios)
        kept = ratio <= KEEP
        print(f"  {field}={candidate}: {ratio:.3f} of the time{', kept' * kept}", flush=True)
        if kept:
            self.best[field] = candidate
            for value, problem in zip(seconds, problems, strict=True):
                problem.seconds = value
                self.seconds[problem.group.case.shape]["tuned"] = value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--size", help="full, small or tiny; default: full on a GPU, else tiny")
    parser.add_argument("--seconds", type=float, default=75.0, help="stop after this long")
    parser.add_argument("--output", type=Path, default=Path("tuning.json"))
    options = parser.parse_args(arguments)
    gpu = options.device.startswith("cuda")
    dtype = options.dtype or ("bf16" if gpu else "fp32")
    size = options.size or ("full" if gpu else "tiny")
    try:
        from di4c_fast.kernels.triton import tuning

        from di4c_fast.passes import triton  # noqa: F401 - registers the records
    except ImportError as error:
        print(f"nothing to tune: {error}")
        return 0
    search = Search(options.device, dtype, size, tuning, time.monotonic() + options.seconds)
    try:
        search.run()
    except KeyboardInterrupt:
        print("interrupted: keeping what was found", flush=True)
    device = torch.cuda.get_device_name(options.device) if gpu else "cpu"
    measured = {
        **{"device": device, "torch": torch.__version__, "dtype": dtype, "size": size},
        **{"finished": search.finished, "seconds": search.seconds, "log": search.log},
    }
    found = {**by_kernel(search.best), "_measured": measured}
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written {options.output.name}: {json.dumps(by_kernel(search.best))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
