"""Measuring the variants of a group: check, time interleaved, weigh.

A variant is first compared with the truth; only what passes is timed. The variants then take turns,
so that a change of the machine's state falls on all of them. On a GPU device events enclose each
call and the calls rotate among input sets that together exceed the L2 cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .cached import CachedGroup
from .canvas import CanvasGroup
from .cases import SHAPES, Case, make_case
from .draw import DrawGroup
from .floors import Machine, format_bytes
from .groups import Group, Variant
from .loss import LossGroup
from .memory import (
    MemoryUnknown,
    MemoryWorker,
    available_bytes,
    peak_in_this_process,
    peak_on_gpu,
)
from .results import Record
from .sampling import AncestralGroup, ConfidenceGroup
from .step import StepGroup

KINDS: dict[str, type[Group]] = {
    "loss": LossGroup,
    "draw": DrawGroup,
    "canvas": CanvasGroup,
    "ancestral": AncestralGroup,
    "confidence": ConfidenceGroup,
    "cached": CachedGroup,
    **dict.fromkeys(("step", "many"), StepGroup),
}
SAMPLES_PER_ROUND = 20


def make_group(case: Case) -> Group:
    """The group of a case."""
    return KINDS[case.kind](case)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how often to measure."""

    seconds: float = 2.0  # of timed calls per variant, where the rounds allow
    rounds: int = 5  # turns of every variant
    slow_rounds: int = 2  # turns of a variant that would take several times `seconds`


# Time --------------------------------------------------------------------------------------------


class Clock:
    """Times calls on one device; results are read at the end of a round."""

    def __init__(self, device: str):
        self.gpu = device.startswith("cuda")

    def round(self, calls: Sequence[Callable[[], Callable[[], Any]]]) -> list[float]:
        """Seconds of each call; each is given by a function that prepares it, untimed."""
        seconds, pairs = [], []
        if self.gpu:
            torch.cuda.synchronize()
        for prepare in calls:
            call = prepare()
            if self.gpu:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                result = call()
                last.record()
                pairs.append((first, last))
            else:
                started = time.perf_counter()
                result = call()
                seconds.append(time.perf_counter() - started)
            del result, call
        if self.gpu:
            torch.cuda.synchronize()
        return seconds or [first.elapsed_time(last) * 1e-3 for first, last in pairs]


def input_copies(device: str, input_bytes: int) -> int:
    """Input sets to rotate among, so that the L2 cache of a GPU holds none of them."""
    if not device.startswith("cuda"):
        return 1
    properties = torch.cuda.get_device_properties(torch.device(device))
    cache = getattr(properties, "L2_cache_size", 64 << 20)
    return max(1, min(8, math.ceil(3 * cache / max(1, input_bytes))))


def time_interleaved(
    turn: Callable[[str, int, int], list[float]], expected: dict[str, float], settings: Settings
) -> dict[str, list[float]]:
    """Samples in seconds of every variant; `turn(name, first, count)` times consecutive calls.

    Slow variants, by the seconds that are expected of them, get fewer turns; the order is
    rotated from round to round. A turn of several calls begins with one that is not counted: it
    pays for the memory that the variant before has given back.
    """
    samples: dict[str, list[float]] = {name: [] for name in expected}
    names = list(expected)
    for round_ in range(settings.rounds):
        shift = round_ % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            fitting = settings.seconds / max(expected[name], 1e-7)
            if round_ >= max(min(settings.slow_rounds, settings.rounds), int(fitting)):
                continue
            count = max(1, min(SAMPLES_PER_ROUND, int(fitting / settings.rounds)))
            extra = count > 1
            samples[name] += turn(name, len(samples[name]), count + extra)[extra:]
    return samples


@contextlib.contextmanager
def conditions(case: Case) -> Iterator[None]:
    """The number of threads and the busy cores of a case; no collection of garbage meanwhile."""
    threads, enabled = torch.get_num_threads(), gc.isenabled()
    gc.collect()
    gc.disable()
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(case.busy)]
    try:
        torch.set_num_threads(case.threads or threads)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()
        torch.set_num_threads(threads)
        if enabled:
            gc.enable()


# Memory ------------------------------------------------------------------------------------------


def peak_of(case: Case, variant: str) -> int:
    """The peak of one variant above its inputs, in this process or on its GPU."""
    group = make_group(case)
    known = [known.name for known in group.variants()]
    if variant not in known:
        raise ValueError(f"unknown variant {variant!r}; known are {', '.join(known)}")
    call = functools.partial(group.call, variant, group.make_inputs(0))
    if case.device != "cpu":
        return peak_on_gpu(call, case.device)
    # Imports, thread pools and workspaces are not the variant's memory.
    shape = case.shape if case.shape in SHAPES else "language"
    tiny = make_group(make_case(shape, "tiny", case.dtype, case.device))
    tiny.call(variant, tiny.make_inputs(0))
    started = time.monotonic()
    peak = peak_in_this_process(call)
    if time.monotonic() - started < 1.0:
        # The first call of this size also sets up what later calls reuse.
        peak = min(peak, peak_in_this_process(call))
    return peak


# All of it ---------------------------------------------------------------------------------------


class NoRoom(RuntimeError):
    """Something needs more memory than there is."""

    def __init__(self, what: str, need: int, space: int):
        sizes = f"about {format_bytes(need)}, {format_bytes(space)} are available"
        super().__init__(f"{what} would take {sizes}")


def measure(
    case: Case,
    variants: Sequence[Variant],
    settings: Settings,
    machine: Machine,
    worker: MemoryWorker | None = None,
) -> list[Record]:
    """One record per variant, whatever happens to it. worker: for peaks; None: not measured."""
    group = make_group(case)
    records = {variant.name: new_record(case, variant) for variant in variants}
    usual = not case.busy and case.threads in (0, torch.get_num_threads())
    weighed = usual and not case.note.startswith(("V=", "masked="))
    _measure(group, records, settings, worker if weighed else None)
    work = group.work()
    if work is not None and usual:
        for record in records.values():
            record["floor_seconds"] = work.seconds(machine, case.dtype)
    return list(records.values())


def new_record(case: Case, variant: Variant) -> Record:
    return {
        "group": case.key,
        "variant": variant.name,
        "title": variant.title,
        "library": variant.library,
        "case": dataclasses.asdict(case),
        "shape": case.title,
        "status": "ok",
        "reason": None,
        "loss_error": None,
        "gradient_error": None,
        "samples": [],
        "peak_bytes": None,
        "memory_note": None,
        "logits_bytes": case.logits_bytes,
        "floor_seconds": None,
        "details": {},
    }


def _measure(
    group: Group, records: dict[str, Record], settings: Settings, worker: MemoryWorker | None
) -> None:
    case = group.case
    space, need = available_bytes(case.device), group.input_bytes()

    @contextlib.contextmanager
    def trying(names: Sequence[str]) -> Iterator[None]:
        """What is raised is the reason why variants are not measured."""
        try:
            yield
        except Exception as error:
            gc.collect()
            if case.device != "cpu":
                torch.cuda.empty_cache()
            memory = isinstance(error, (torch.OutOfMemoryError, MemoryError, NoRoom))
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            if not isinstance(error, NoRoom):
                reason = f"{type(error).__name__}: {reason}"
            for name in names:
                status = "skipped" if memory else "failed"
                records[name] |= {"status": status, "reason": reason, "samples": []}

    def fits(what: str, bytes_: int) -> None:
        if bytes_ > space:
            raise NoRoom(what, bytes_, space)

    def good() -> list[str]:
        return [name for name, record in records.items() if record["status"] == "ok"]

    group.reset()
    for name, record in records.items():
        with trying([name]):
            fits("the inputs", need)
            reason = group.unavailable(name)
            if reason is None:
                fits("the call", need + group.call_bytes(name))
            else:
                record |= {"status": "skipped", "reason": reason}
    if not good():
        return
    inputs: list[Any] = []
    truth = None
    with trying(good()):
        inputs += [group.make_inputs(seed) for seed in range(input_copies(case.device, need))]
        truth = group.truth(inputs[0])
    expected: dict[str, float] = {}
    for name in good():
        with trying([name]):
            began = time.monotonic()
            check = group.check(name, inputs[0], truth)
            expected[name] = time.monotonic() - began
            errors = {"loss_error": check.loss_error, "gradient_error": check.gradient_error}
            # JSON has no NaN; the reason says it.
            records[name] |= {k: e for k, e in errors.items() if e is not None and math.isfinite(e)}
            records[name] |= {
                "status": "ok" if check.problem is None else "wrong",
                "reason": check.problem,
            }
    del truth

    clock = Clock(case.device)

    def turn(name: str, first: int, count: int) -> list[float]:
        def prepare(number: int) -> Callable[[], Any]:
            given = group.fresh(name, inputs[number % len(inputs)])
            return functools.partial(group.call, name, given)

        with trying([name]):
            if records[name]["status"] == "ok":
                return clock.round([functools.partial(prepare, first + i) for i in range(count)])
        return []

    with conditions(case):
        for name in good():
            # Warm up, and see how long a call takes; a slow one has run long enough by its check.
            if name.endswith("compiled") or expected[name] < 2 * settings.seconds:
                seconds = turn(name, 0, 1) and turn(name, 0, 1)
                expected[name] = seconds[0] if seconds else 0.0
        samples = time_interleaved(turn, {name: expected[name] for name in good()}, settings)
    for name in good():
        records[name]["samples"] = samples[name]
    for name in good():
        if not name.endswith("compiled"):
            with trying([name]):
                records[name]["details"] = group.details(name, inputs[0])
    inputs.clear()
    for name in good() if worker is not None else ():
        if case.device == "cpu" and name.endswith("compiled"):
            continue  # compiling again in the child takes too long
        weigh = functools.partial(worker.peak, peak_of) if case.device == "cpu" else peak_of
        try:
            records[name]["peak_bytes"] = weigh(case, name)
        except (MemoryUnknown, torch.OutOfMemoryError) as error:
            records[name]["memory_note"] = str(error)
