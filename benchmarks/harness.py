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
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import machine as machines
from .cases import Case
from .floors import Machine
from .groups import Check, Group, Variant
from .memory import RESIDENT_NOISE, MemoryUnknown, MemoryWorker, available_bytes, peak_on_gpu

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and how often to measure."""

    seconds: float = 2.0  # of timed calls per variant, where the rounds allow
    rounds: int = 5  # turns of every variant
    slow_rounds: int = 2  # turns of a variant that would take several times `seconds`
    samples_per_round: int = 20
    memory: bool = True
    details: bool = True


def quantile(samples: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics.

    >>> quantile([3.0, 1.0, 2.0], 0.5)
    2.0
    """
    ordered = sorted(samples)
    if not ordered:
        raise ValueError("samples must not be empty")
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def format_bytes(count: float) -> str:
    """
    >>> format_bytes(2_500_000_000)
    '2.50 GB'
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return (
                f"{count / size:.3g} {unit}" if count / size < 1 else f"{count / size:.2f} {unit}"
            )
    return f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """
    >>> format_seconds(0.0123)
    '12.3 ms'
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            value = seconds / size
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    return f"{seconds * 1e6:.2g} µs"


class Clock:
    """Times calls on one device; results are read at the end of a round."""

    def __init__(self, device: str):
        self.gpu = device.startswith("cuda")
        self.device = torch.device(device)

    def round(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Seconds of each call."""
        if not self.gpu:
            seconds = []
            for call in calls:
                started = time.perf_counter()
                result = call()
                seconds.append(time.perf_counter() - started)
                del result
            return seconds
        pairs = []
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            for call in calls:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                result = call()
                last.record()
                del result
                pairs.append((first, last))
            torch.cuda.synchronize()
        return [first.elapsed_time(last) * 1e-3 for first, last in pairs]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def input_copies(device: str, input_bytes: int) -> int:
    """Input sets to rotate among, so that the L2 cache of a GPU holds none of them."""
    if not device.startswith("cuda"):
        return 1
    properties = torch.cuda.get_device_properties(torch.device(device))
    cache = getattr(properties, "L2_cache_size", 64 << 20)
    return max(1, min(8, math.ceil(3 * cache / max(1, input_bytes))))


def time_interleaved(
    calls: dict[str, Callable[[int], Any]],
    expected: dict[str, float],
    clock: Clock,
    settings: Settings,
) -> dict[str, list[float]]:
    """Samples in seconds of every call; `calls[name](i)` is the i-th call of a variant.

    Slow variants, by the seconds that are expected of them, get fewer turns; the order is
    rotated from round to round. A turn of several calls begins with one that is not counted: it
    pays for the memory that the variant before has given back.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    turns, per_turn = {}, {}
    for name, seconds in expected.items():
        fitting = settings.seconds / max(seconds, 1e-7)
        turns[name] = settings.rounds
        if fitting < settings.rounds:
            turns[name] = max(min(settings.slow_rounds, settings.rounds), int(fitting))
        per_turn[name] = max(1, min(settings.samples_per_round, int(fitting / settings.rounds)))
    names = list(calls)
    with no_collection():
        for turn in range(settings.rounds):
            shift = turn % len(names) if names else 0
            for name in names[shift:] + names[:shift]:
                if turn < turns[name]:
                    done = len(samples[name])
                    if per_turn[name] > 1:
                        clock.round([functools.partial(calls[name], done)])
                    batch = [
                        functools.partial(calls[name], done + k) for k in range(per_turn[name])
                    ]
                    samples[name] += clock.round(batch)
    return samples


def measure(
    group: Group,
    variants: Sequence[Variant],
    settings: Settings,
    machine: Machine,
    worker: MemoryWorker | None,
    progress: Progress = lambda text: None,
    timed: bool = True,
) -> list[dict[str, Any]]:
    """One record per variant, whatever happens to it."""
    case = group.case
    records = {v.name: _new_record(case, v) for v in variants}
    space = available_bytes(case.device)
    need = group.input_bytes()
    if need > space:
        for record in records.values():
            _skip(record, _does_not_fit("the inputs", need, space))
        return list(records.values())
    group.reset()
    runnable = []
    for variant in variants:
        reason = group.unavailable(variant.name)
        whole = need + group.call_bytes(variant.name)
        if reason is None and whole > space:
            reason = _does_not_fit("the call", whole, space)
        if reason is None:
            runnable.append(variant)
        else:
            _skip(records[variant.name], reason)
    if not runnable:
        return list(records.values())

    try:
        inputs = [group.make_inputs(seed) for seed in range(input_copies(case.device, need))]
        truth = group.truth(inputs[0])
    except torch.OutOfMemoryError as error:
        for variant in runnable:
            _skip(records[variant.name], f"out of memory: {_first_line(error)}")
        return list(records.values())
    passed = []
    for variant in runnable:
        progress(f"checking {variant.title}")
        if _checked(group, variant, inputs[0], truth, records[variant.name]):
            passed.append(variant)
    del truth
    if timed:
        _time(group, [v for v in passed if v.timed], inputs, settings, records, progress)
    if settings.details and timed:
        for variant in passed:
            records[variant.name]["details"] = group.details(variant.name, inputs[0])
    if settings.memory:
        for variant in passed:
            progress(f"memory of {variant.title}")
            _weigh(group, variant, inputs[0], worker, records[variant.name])
    del inputs
    _release(case.device)
    _add_floors(group, machine, records)
    return list(records.values())


def _new_record(case: Case, variant: Variant) -> dict[str, Any]:
    return {
        "group": case.key,
        "variant": variant.name,
        "title": variant.title,
        "library": variant.library,
        "case": case.spec(),
        "shape": case.title,
        "status": "ok",
        "reason": None,
        "loss_error": None,
        "gradient_error": None,
        "error_limit": None,
        "seconds": None,
        "p20": None,
        "p80": None,
        "samples": [],
        "peak_bytes": None,
        "memory_note": None,
        "logits_bytes": case.logits_bytes,
        "floor_seconds": None,
        "plan_seconds": None,
        "details": {},
    }


def _skip(record: dict[str, Any], reason: str, status: str = "skipped") -> None:
    record["status"], record["reason"] = status, reason


def _does_not_fit(what: str, need: int, space: int) -> str:
    return f"{what} would take about {format_bytes(need)}, {format_bytes(space)} are available"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _checked(
    group: Group, variant: Variant, inputs: Any, truth: Any, record: dict[str, Any]
) -> bool:
    """Run the variant's correctness check; False if it may not be timed."""
    try:
        check: Check = group.check(variant.name, inputs, truth)
    except torch.OutOfMemoryError as error:
        _release(group.case.device)
        _skip(record, f"out of memory: {_first_line(error)}")
        return False
    except MemoryError as error:
        _skip(record, f"out of memory: {_first_line(error)}")
        return False
    except Exception as error:
        _release(group.case.device)
        _skip(record, _first_line(error), "failed")
        return False
    record["loss_error"], record["gradient_error"] = check.loss_error, check.gradient_error
    record["error_limit"] = check.limit
    if check.problem is not None:
        _skip(record, check.problem, "wrong")
        return False
    return True


def _time(
    group: Group,
    variants: Sequence[Variant],
    inputs: Sequence[Any],
    settings: Settings,
    records: dict[str, dict[str, Any]],
    progress: Progress,
) -> None:
    if not variants:
        return
    progress(f"timing {len(variants)} variants in turn")

    def nth(name: str) -> Callable[[int], Any]:
        return lambda i: group.call(name, inputs[i % len(inputs)])

    remaining, clock = list(variants), Clock(group.case.device)
    while remaining:
        # Warm up, and drop what does not survive a call as it will be timed.
        expected: dict[str, float] = {}
        for variant in list(remaining):
            warm = [functools.partial(nth(variant.name), 0)]
            try:
                seconds = clock.round(warm)[0]
                if seconds < 0.5 * settings.seconds:
                    seconds = clock.round(warm)[0]
                expected[variant.name] = seconds
            except Exception as error:
                _release(group.case.device)
                status = "skipped" if isinstance(error, torch.OutOfMemoryError) else "failed"
                _skip(records[variant.name], _first_line(error), status)
                remaining.remove(variant)
        try:
            calls = {variant.name: nth(variant.name) for variant in remaining}
            samples = time_interleaved(calls, expected, clock, settings)
        except torch.OutOfMemoryError:
            # The hungriest variant goes, the others start again.
            _release(group.case.device)
            worst = max(remaining, key=lambda v: group.call_bytes(v.name))
            _skip(records[worst.name], "out of memory while timing")
            remaining.remove(worst)
            continue
        for name, values in samples.items():
            record = records[name]
            record["samples"] = [round(value, 9) for value in values]
            record["seconds"] = quantile(values, 0.5)
            record["p20"], record["p80"] = quantile(values, 0.2), quantile(values, 0.8)
        return


def _weigh(
    group: Group,
    variant: Variant,
    inputs: Any,
    worker: MemoryWorker | None,
    record: dict[str, Any],
) -> None:
    case = group.case
    try:
        if case.device.startswith("cuda"):
            record["peak_bytes"] = peak_on_gpu(
                lambda: group.call(variant.name, inputs), case.device
            )
        elif worker is not None:
            record["peak_bytes"] = worker.peak(case.spec(), variant.name)
            record["memory_note"] = f"resident set, ±{format_bytes(RESIDENT_NOISE)}"
    except MemoryUnknown as error:
        record["memory_note"] = str(error)
    except torch.OutOfMemoryError as error:
        _release(case.device)
        record["memory_note"] = _first_line(error)


def _add_floors(group: Group, machine: Machine, records: dict[str, dict[str, Any]]) -> None:
    for key, work in (("floor_seconds", group.work()), ("plan_seconds", group.plan_work())):
        if work is not None:
            seconds = work.seconds(machine, group.case.dtype)
            for record in records.values():
                record[key] = seconds


def ceilings(device: str, dtype: str, quick: bool = False) -> Machine:
    """The measured ceilings of this machine; see `machine.measure_ceilings`."""
    return machines.measure_ceilings(device, dtype, quick)
