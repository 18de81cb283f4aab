"""One run of the benchmarks: what is measured, in which order, and where it is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import harness, machine, store
from .cases import (
    SHAPES,
    Case,
    check_name,
    make_case,
    memory_cases,
    shape_names,
    sweep_cases,
)
from .groups import Group, Variant
from .harness import Settings
from .memory import MemoryWorker, available_bytes
from .registry import all_variants, make_group

SERIES = ("scaling", "linear-memory")
# Shapes whose torch.compile variants are measured on a CPU, where compiling takes half a minute.
COMPILED_ON_CPU = ("language", "rows", "cross-entropy")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for."""

    shapes: tuple[str, ...] = ()  # none: all
    backends: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    size: str | None = None
    seconds: float | None = None
    rounds: int | None = None
    threads: int | None = None
    time_budget: float | None = None
    results: Path | None = None
    memory: bool = True
    compile_all: bool = False
    resume: bool = False
    launch_parameters: Path | None = None

    def checked(self) -> Options:
        """With the defaults filled in.

        Raises:
            ValueError: an unknown name or an impossible number, with what is known or allowed.
        """
        for shape in self.shapes:
            check_name(shape, "shape", [*shape_names(), *SERIES])
        known = all_variants()
        for backend in self.backends:
            check_name(backend, "backend", known)
        device = self.device
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        kind = device.split(":")[0]
        check_name(kind, "device", ("cpu", "cuda"))
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but PyTorch sees no GPU")
        gpu = kind == "cuda"
        dtype = self.dtype or ("bf16" if gpu else "fp32")
        size = self.size or ("full" if gpu else "small")
        make_case("language", size, dtype, device)
        numbers = {"seconds": self.seconds, "rounds": self.rounds, "threads": self.threads}
        for name, value in {**numbers, "time-budget": self.time_budget}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        return dataclasses.replace(
            self,
            device=device,
            dtype=dtype,
            size=size,
            seconds=self.seconds or (1.0 if gpu else 2.0),
            rounds=self.rounds or (10 if gpu else 5),
            threads=self.threads or torch.get_num_threads(),
        )

    def settings(self) -> dict[str, Any]:
        """What two runs must share for the results of one to be kept for the other."""
        names = ("dtype", "device", "size", "seconds", "rounds", "threads", "memory")
        return {name: getattr(self, name) for name in names}

    def restricted(self) -> bool:
        """Whether less than everything was asked for."""
        return bool(self.shapes or self.backends or not self.memory or self.size == "tiny")


@dataclasses.dataclass
class Entry:
    """One group of a run."""

    group: Group
    variants: list[Variant]
    timed: bool = True

    @property
    def case(self) -> Case:
        return self.group.case


class BenchSession:
    """Measures groups when they are first asked for, and saves each as soon as it is done."""

    def __init__(self, options: Options, progress: Callable[[str], None] = lambda text: None):
        self.options = options = options.checked()
        assert options.device is not None
        assert options.dtype is not None
        assert options.size is not None
        assert options.threads is not None
        self.device, self.dtype, self.size = options.device, options.dtype, options.size
        self.progress = progress
        self.started = time.monotonic()
        self.entries: dict[str, Entry] = {}
        self.selected: dict[str, set[str]] = {}
        self.machine: Any = None
        self.worker: MemoryWorker | None = None
        self.overrides = contextlib.ExitStack()
        self.out_of_time = False
        self.measured = 0

    # What is measured ----------------------------------------------------------------------------

    def plan(self, what: str) -> list[Entry]:
        """The groups of one benchmark: a kind of shapes, "scaling" or "linear-memory"."""
        wanted = self.options.shapes
        if what in SERIES:
            if wanted and what not in wanted:
                return []
            maker = sweep_cases if what == "scaling" else memory_cases
            cases = maker(self.size, self.dtype, self.device)
        else:
            names = [name for name in SHAPES[what] if not wanted or name in wanted]
            cases = [self._fitting(name) for name in names]
        entries = []
        for case in cases:
            group = make_group(case)
            variants = group.variants()
            if what == "linear-memory":
                variants = [variant for variant in variants if variant.library]
            if self.options.backends:
                variants = [v for v in variants if v.name in self.options.backends]
            if not self._compiles(case):
                variants = [v for v in variants if not v.name.endswith("compiled")]
            if variants:
                entry = Entry(group, variants, timed=what != "linear-memory")
                entries.append(self.entries.setdefault(case.key, entry))
        return entries

    def _fitting(self, shape: str) -> Case:
        """The shape at the largest size not above the asked one at which the library fits."""
        sizes = {"full": ("full", "small"), "small": ("small",), "tiny": ("tiny",)}
        cases = [make_case(shape, size, self.dtype, self.device) for size in sizes[self.size]]
        if self.options.size is not None and self.device == "cpu":
            return cases[0]
        space = available_bytes(self.device)
        for case in cases:
            group = make_group(case)
            needs = [group.call_bytes(v.name) for v in group.variants() if v.library]
            if group.input_bytes() + min(needs) <= space:
                return case
        return cases[0]  # skipped later, with the sizes

    def _compiles(self, case: Case) -> bool:
        if self.device != "cpu" or self.options.compile_all:
            return True
        return case.shape in COMPILED_ON_CPU and self.size != "tiny"

    # Measuring -----------------------------------------------------------------------------------

    def select(self, key: str, variant: str) -> None:
        """Say that a variant will be asked for; those of a group are measured together."""
        self.selected.setdefault(key, set()).add(variant)

    def start(self) -> None:
        """Measure the machine and open the results."""
        if self.machine is not None:
            return
        options = self.options
        assert options.threads is not None
        torch.set_num_threads(options.threads)
        header = {
            "started": store.now(),
            "machine": machine.describe(self.device, options.threads),
            "clocks_before": machine.clock_state(self.device),
            "settings": options.settings(),
            "complete": False,
        }
        if options.launch_parameters is not None:
            header["launch_parameters"] = self._override(options.launch_parameters)
        self.progress("measuring the machine: copy bandwidth and matrix rate")
        self.machine = harness.ceilings(self.device, self.dtype, quick=self.size == "tiny")
        header["ceilings"] = dataclasses.asdict(self.machine)
        folder = options.results
        if folder is None:
            described = header["machine"]
            name = machine.device_slug(self.device, options.threads)
            folder = store.RESULTS / f"{name}-{described['date']}-{described['commit']}"
        self.results = store.ResultSet(folder, header)
        if options.resume:
            kept = self.results.resume()
            self.progress(f"resuming with {kept} results of an earlier run")
        if self.device == "cpu" and options.memory:
            self.worker = MemoryWorker(options.threads)

    def _override(self, path: Path) -> dict[str, dict[str, int]]:
        from di4c_fast.kernels.triton import tuning

        from di4c_fast.passes import triton  # noqa: F401 - registers the records

        fields = tuning.load_config(path)
        self.overrides.enter_context(tuning.override(**fields))
        return fields

    def records(self, key: str) -> dict[str, dict[str, Any]]:
        """The records of a group by variant, measured now unless they are known."""
        self.start()
        names = self.selected.get(key, set())
        known = {record["variant"]: record for record in self.results.group(key)}
        if names <= set(known):
            return known
        entry = self.entries[key]
        variants = [v for v in entry.variants if v.name in names]
        number = list(self.entries).index(key) + 1
        head = f"[{number}/{len(self.entries)}] {entry.case.title}"
        if self._spent():
            self.out_of_time = True
            reason = f"the time budget of {self.options.time_budget:.0f} s is spent"
            return {v.name: {"status": "skipped", "reason": reason, "seconds": None,
                             "title": v.title, "variant": v.name} for v in variants}  # fmt: skip
        began = time.monotonic()
        records = harness.measure(
            entry.group,
            variants,
            Settings(
                seconds=float(self.options.seconds or 1.0),
                rounds=int(self.options.rounds or 5),
                memory=self.options.memory,
            ),
            self.machine,
            self.worker,
            lambda text: self.progress(f"{head}: {text}"),
            timed=entry.timed,
        )
        self.results.add([store.finite(record) for record in records])
        self.measured += 1
        self.progress(f"{head}: done in {time.monotonic() - began:.1f} s")
        return {record["variant"]: record for record in self.results.group(key)}

    def _spent(self) -> bool:
        budget = self.options.time_budget
        return budget is not None and time.monotonic() - self.started > budget

    def finish(self, interrupted: bool, deselected: bool) -> None:
        """Close the results; they are complete if nothing was left out."""
        self.overrides.close()
        if self.worker is not None:
            self.worker.close()
        if self.machine is None:
            return
        measured = {(r["group"], r["variant"]) for r in self.results.records}
        wanted = {(key, name) for key, names in self.selected.items() for name in names}
        partial = interrupted or deselected or self.options.restricted() or self.out_of_time
        self.results.finish(
            finished=store.now(),
            clocks_after=machine.clock_state(self.device),
            complete=not partial and wanted <= measured,
        )


def parse_names(values: Sequence[str]) -> tuple[str, ...]:
    """Names given as `a,b` or by several options.

    >>> parse_names(["a,b", "c"])
    ('a', 'b', 'c')
    """
    return tuple(name for value in values for name in value.split(",") if name)
