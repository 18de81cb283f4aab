"""The loss against its dense reference: time in one process, peak memory in a child of its own.

`python -m examples.digits.speed auto|reference` is the child: it prints the peak memory, in bytes
above the inputs, for each shape as a JSON list.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any, Literal, cast

import torch
from torch import Tensor
from tqdm import tqdm

import di4c_fast

Backend = Literal["auto", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference")
MASKED_SHARE = 0.6


@dataclasses.dataclass(frozen=True)
class Shape:
    """A loss problem: B examples, N components = K draws, D positions, V classes with the mask."""

    name: str
    batch: int
    components: int
    positions: int
    vocabulary: int
    repeats: int


def shapes(batch: int, components: int, levels: int) -> list[Shape]:
    """The example's own shape, and one with the vocabulary of a small tokeniser."""
    return [
        Shape("digits", batch, components, 64, levels + 1, 9),
        Shape("8k vocabulary", 1, 16, 64, 8193, 3),
    ]


class Problem:
    """Random logits and tokens of one shape, and the loss with its gradient."""

    def __init__(self, shape: Shape):
        generator = torch.Generator().manual_seed(0)
        b, n, d, v = shape.batch, shape.components, shape.positions, shape.vocabulary
        self.mask_id = v - 1
        self.student = torch.randn(b, n, d, v, generator=generator).requires_grad_()
        self.teacher = torch.randn(b, d, v, generator=generator)
        self.consistency = torch.randn(b, n, d, v, generator=generator)
        self.x0 = torch.randint(v - 1, (b, d), generator=generator)
        masked = torch.rand(b, d, generator=generator) < MASKED_SHARE
        self.xt = self.x0.masked_fill(masked, self.mask_id)
        self.xu = self.xt[:, None].repeat(1, n, 1)

    def run(self, backend: Backend) -> Tensor:
        """Forward and backward; the loss."""
        self.student.grad = None
        loss = di4c_fast.loss(
            self.student,
            self.teacher,
            self.x0,
            consistency=self.consistency,
            xt=self.xt,
            xu=self.xu,
            mask_id=self.mask_id,
            generator=torch.Generator().manual_seed(1),
            backend=backend,
        )
        loss.backward()
        return loss.detach()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One shape: median seconds and peak bytes by backend, and how far the losses differ."""

    name: str
    sizes: tuple[int, int, int, int]
    seconds: dict[str, float]
    peak_bytes: dict[str, int | None]
    relative_difference: float

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded to what they can carry."""
        seconds = {name: round(value, 5) for name, value in self.seconds.items()}
        difference = float(f"{self.relative_difference:.1e}")
        return {**dataclasses.asdict(self), "seconds": seconds, "relative_difference": difference}


def table(comparisons: list[Comparison]) -> str:
    """A line per shape: times, peaks and their ratios."""
    lines = [
        "di4c_fast.loss, forward and backward: the default backend against the dense reference",
        f"{'(B, N, D, V)':>20} {'ms':>10} {'ref. ms':>10} {'ratio':>7} {'MiB':>9} {'ref. MiB':>9} "
        f"{'ratio':>7}",
    ]
    for one in comparisons:
        ours, dense = (one.seconds[backend] for backend in BACKENDS)
        line = f"{one.sizes!s:>20} {ours * 1e3:>10.1f} {dense * 1e3:>10.1f} {dense / ours:>7.1f}"
        peaks = [one.peak_bytes[backend] for backend in BACKENDS]
        if None in peaks:
            lines.append(line + " (peak memory cannot be read on this system)")
        else:
            ours, dense = (max(peak or 0, 1) / 2**20 for peak in peaks)
            lines.append(f"{line} {ours:>9.1f} {dense:>9.1f} {dense / ours:>7.1f}")
    return "\n".join(lines)


def compare(batch: int, components: int, levels: int) -> list[Comparison]:
    """Time the backends in turn in this process, and measure their memory in two children."""
    problems = shapes(batch, components, levels)
    rounds = sum(shape.repeats + 1 for shape in problems)
    results: list[Comparison] = []
    with tqdm(total=rounds + 1, desc="loss speed", unit="round", dynamic_ncols=True) as bar:
        peaks = {backend: _peaks_of_child(backend, problems[0]) for backend in BACKENDS}
        bar.update()
        for index, shape in enumerate(problems):
            problem = Problem(shape)
            times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
            values: dict[str, float] = {}
            for round_ in range(shape.repeats + 1):
                for backend in BACKENDS:
                    started = time.perf_counter()
                    values[backend] = float(problem.run(backend))
                    if round_:  # the first round warms up
                        times[backend].append(time.perf_counter() - started)
                bar.update()
            scale = max(abs(values["reference"]), 1e-12)
            results.append(
                Comparison(
                    shape.name,
                    (shape.batch, shape.components, shape.positions, shape.vocabulary),
                    {backend: statistics.median(times[backend]) for backend in BACKENDS},
                    {backend: peaks[backend][index] for backend in BACKENDS},
                    abs(values["auto"] - values["reference"]) / scale,
                )
            )
    return results


def _peaks_of_child(backend: Backend, digits: Shape) -> list[int | None]:
    """Peak memory by shape; None where the child could not measure it."""
    sizes = [str(size) for size in (digits.batch, digits.components, digits.vocabulary - 1)]
    # Large blocks go back to the system when freed, so that one shape does not hide the next.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    child = subprocess.run(
        [sys.executable, "-m", __name__, backend, *sizes],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=pathlib.Path(__file__).resolve().parents[2],
    )
    if child.returncode:
        raise RuntimeError(f"the memory measurement of {backend} failed:\n{child.stderr}")
    peaks: list[int | None] = json.loads(child.stdout)
    return peaks


def _resident_bytes(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak) of this process, from Linux's /proc."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _peak_above_inputs(backend: Backend, shape: Shape) -> int | None:
    """Resident-set peak of one loss and gradient, above what was resident before it."""
    problem = Problem(shape)
    problem.run(backend)  # code and buffers that are loaded once are not the loss's memory
    problem.student.grad = None
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _resident_bytes("VmRSS")
        problem.run(backend)
        return max(0, _resident_bytes("VmHWM") - before)
    except OSError:
        return None


def _child(arguments: list[str]) -> None:
    backend = cast(Backend, arguments[0])
    batch, components, levels = (int(argument) for argument in arguments[1:])
    problems = shapes(batch, components, levels)
    print(json.dumps([_peak_above_inputs(backend, shape) for shape in problems]))


if __name__ == "__main__":
    _child(sys.argv[1:])
