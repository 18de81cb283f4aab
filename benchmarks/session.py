"""One run: what is measured, in which order, and its times for pytest-benchmark."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .cases import SHAPES, Case, condition_cases, make_case, sweep_cases
from .floors import Machine, measure_ceilings
from .groups import Variant
from .harness import Record, Settings, make_group, measure, new_record
from .memory import MemoryWorker


class Replay:
    """A timer whose consecutive pairs of readings differ by recorded durations.

    pytest-benchmark times one test after the other, which cannot interleave variants. The harness
    does, and this clock then tells pytest-benchmark the same durations.
    """

    __name__ = "replay"

    def __init__(self) -> None:
        self._readings: deque[float] = deque()
        self._now = 0.0

    def __call__(self) -> float:
        if self._readings:
            self._now = self._readings.popleft()
        return self._now

    def play(self, benchmark: Any, samples: Sequence[float]) -> None:
        """Give `samples` (seconds) to a `benchmark` fixture that uses this timer."""
        self._readings.clear()
        reading = self._now
        for sample in samples:
            self._readings += (reading, reading + sample)
            reading += sample
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)


REPLAY = Replay()


@dataclasses.dataclass
class Run:
    """What one run measures, and what it has measured so far.

    Raises:
        ValueError: an unknown name or an impossible number, with what is known or allowed.
    """

    device: str | None = None  # a GPU if there is one
    dtype: str | None = None  # bf16 on a GPU, fp32 on a CPU
    size: str | None = None  # full on a GPU, small on a CPU
    seconds: float | None = None
    rounds: int = 5
    time_budget: float | None = None
    no_memory: bool = False
    launch_parameters: Path | None = None

    def __post_init__(self) -> None:
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = self.device.split(":")[0]
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"unknown device {self.device!r}; known are cpu, cuda")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but PyTorch sees no GPU")
        self.gpu = kind == "cuda"
        self.dtype = self.dtype or ("bf16" if self.gpu else "fp32")
        self.size = self.size or ("full" if self.gpu else "small")
        for name in ("seconds", "rounds", "time_budget"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        seconds = self.seconds or (1.0 if self.gpu else 2.0)
        self.settings = Settings(seconds=seconds, rounds=self.rounds)
        self.began = time.monotonic()
        self.cases: dict[str, tuple[Case, list[Variant]]] = {}
        self.asked: dict[str, list[str]] = {}  # variants of a group that are not deselected
        self.records: dict[str, dict[str, Record]] = {}
        self.machine: Machine | None = None
        self.worker = None if self.no_memory else MemoryWorker()
        self.overrides = contextlib.ExitStack()
        options = (self.size, self.dtype, self.device)
        cases = [make_case(shape, *options) for shape in SHAPES]
        cases += condition_cases(*options) + sweep_cases(*options, torch.get_num_threads())
        for case in cases:
            self.cases[case.key] = (case, make_group(case).variants())

    def start(self) -> Machine:
        """The machine, measured before the first group."""
        if self.machine is None:
            if self.gpu:
                torch.cuda.set_device(self.device)
            if self.launch_parameters is not None:
                from di4c_fast.kernels.triton import tuning

                from di4c_fast.passes import triton  # noqa: F401 - registers the records

                fields = tuning.load_config(self.launch_parameters)
                self.overrides.enter_context(tuning.override(**fields))
            self.machine = measure_ceilings(self.device, self.dtype, quick=self.size == "tiny")
        return self.machine

    def record(self, group: str, variant: str) -> Record:
        """The record of a variant; its group is measured when it is first asked for."""
        if group not in self.records:
            case, known = self.cases[group]
            variants = [v for v in known if v.name in self.asked[group]]
            if self.time_budget is not None and time.monotonic() - self.began > self.time_budget:
                reason = f"the time budget of {self.time_budget:.0f} s is spent"
                record = new_record(case, next(v for v in variants if v.name == variant))
                return record | {"status": "skipped", "reason": reason}
            records = measure(case, variants, self.settings, self.start(), self.worker)
            self.records[group] = {record["variant"]: record for record in records}
        return self.records[group][variant]

    def complete(self) -> bool:
        """Whether everything was measured, as far as it can be on this machine."""
        everything = {key: {v.name for v in known} for key, (_, known) in self.cases.items()}
        found = {key: set(records) for key, records in self.records.items()}
        return found == everything and not self.no_memory and self.size != "tiny"

    def close(self) -> None:
        self.overrides.close()
        if self.worker is not None:
            self.worker.close()
