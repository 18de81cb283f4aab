"""Floors: the least that a computation must move and multiply, over what the machine can do."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .cases import DTYPES, Case


@dataclasses.dataclass(frozen=True)
class Machine:
    """Measured ceilings: bytes (read and written) per second of a copy, FLOP/s of a product."""

    bytes_per_second: float
    flops: dict[str, float]  # by dtype name


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes that must cross the memory bus, and operations of matrix products."""

    bytes: int
    flops: int = 0

    def seconds(self, machine: Machine, dtype: str) -> float:
        """The longer of both times: no version runs much faster."""
        moving = self.bytes / machine.bytes_per_second
        if not self.flops:
            return moving
        return max(moving, self.flops / machine.flops[dtype])


def measure_ceilings(device: str, dtype: str, quick: bool = False) -> Machine:
    """Copy bandwidth (bytes read plus written) and rate of a large matrix product."""
    gpu = device.startswith("cuda")

    def seconds(call: Callable[[], Any]) -> float:
        samples = []
        for _ in range(3 if quick else 9):
            started = time.perf_counter()
            call()
            if gpu:
                torch.cuda.synchronize(device)
            samples.append(time.perf_counter() - started)
        return statistics.median(samples[1:])

    # Several times the last cache, so that the copy measures memory.
    size = 1 << (22 if quick else 31 if gpu else 29)
    source = torch.empty(size, dtype=torch.uint8, device=device)
    source.view(torch.int32).random_()
    copy = torch.empty_like(source)
    bandwidth = 2 * size / seconds(functools.partial(copy.copy_, source))
    del source, copy

    side = 128 if quick else 8192 if gpu else 2048
    flops = {}
    for name in {"fp32", dtype}:
        left, right = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        flops[name] = 2 * side**3 / seconds(functools.partial(torch.matmul, left, right))
    return Machine(bandwidth, flops)


def loss_floor(case: Case) -> Work | None:
    """Each input read once at the active positions, each gradient written once.

    With a linear head the products that nothing avoids: the logits of student, teacher and
    draws, and the gradients of hidden states and weight. None for a logistic head, whose bytes
    are next to nothing: it is bound by exponentials.
    """
    if case.head == "logistic":
        return None
    size = case.torch_dtype.itemsize
    active = case.batch * case.active_positions
    rows = active * case.components
    everything = case.batch * case.components * case.positions
    if case.head == "logits":
        read = (2 * rows + active) * case.vocabulary  # student, draws (K = N), teacher
        return Work(size * (read + everything * case.vocabulary))
    product = 2 * case.width * case.vocabulary
    weight = case.width * case.vocabulary
    if case.cross_entropy:
        return Work(
            size * (2 * rows * case.width + 2 * weight),
            3 * rows * product,
        )
    hidden = 2 * rows + active + everything
    return Work(
        size * (hidden * case.width + 3 * weight),
        (4 * rows + active) * product,
    )


def draw_floor(case: Case) -> Work:
    """One read of the logits; with a linear head one product, hidden states and weight read."""
    size = case.torch_dtype.itemsize
    if case.head == "logits":
        return Work(size * case.positions * case.vocabulary)
    return Work(
        size * case.width * (case.positions + case.vocabulary),
        2 * case.positions * case.width * case.vocabulary,
    )


def format_bytes(count: float) -> str:
    """
    >>> format_bytes(2_500_000_000)
    '2.50 GB'
    """
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    unit = next((u for u in units if abs(count) >= units[u]), "")
    return f"{count / units[unit]:.2f} {unit}" if unit else f"{count:.0f} B"


def format_seconds(seconds: float) -> str:
    """
    >>> format_seconds(0.0123)
    '12.3 ms'
    """
    units = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
    unit = next((u for u in units if seconds >= 0.9995 * units[u]), "µs")
    return f"{seconds / units[unit]:.3g} {unit}"
