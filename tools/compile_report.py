"""Compile every kernel ahead of time and report registers, shared memory and spills.

    python -m tools.compile_report [--targets sm_90 gfx942] [--shapes language pixel]

Needs no GPU: the launchers run on tensors without memory, each launch is compiled for the target
instead of started, and the resource use is read from the binary (`cuobjdump`, which the Triton
wheel contains; the kernel descriptor on AMD). So the table shows exactly the configurations that
the library launches at the shapes of `SHAPES`. Not for use in a process that also runs kernels,
and not under TRITON_INTERPRET=1. Exits with 1 if a kernel spills on an NVIDIA target, or needs
more shared memory than the target has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Name: (backend, architecture, warp size, shared memory of a program in bytes).
TARGETS: dict[str, tuple[str, Any, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}


CONFIGS = {"gfx942": "amd_instinct_mi300x.json"}  # launch parameters of kernels/configs


@dataclasses.dataclass(frozen=True)
class Shape:
    """One use of the kernels. `weight_*` say which terms are asked for."""

    batch: int
    components: int  # N
    teachers: int  # M
    draws: int  # K; 0: no consistency
    positions: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    mask: bool = False
    logistic: str = ""  # clamp of a logistic student, teacher and consistency
    marginals: bool = True
    component: bool = True
    padded: bool = False  # rows at multiples of 64 elements, as in our own buffers


@dataclasses.dataclass(frozen=True)
class DrawShape:
    """One use of the kernels of `sample`."""

    rows: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    wanted: tuple[str, ...] = ()
    mask: bool = False
    guidance: bool = False
    tempered: bool = False  # a temperature, and a scale of guidance, for each row
    padded: bool = False
    greedy: bool = False


SHAPES: dict[str, Shape | DrawShape] = {
    "language": Shape(1, 16, 1, 16, 1024, 50258, mask=True),
    "language linear": Shape(1, 16, 1, 16, 1024, 50258, mask=True, padded=True),
    "language fp32": Shape(1, 16, 1, 16, 1024, 50257, torch.float32, mask=True),
    "low noise": Shape(1, 16, 1, 0, 1024, 50258, mask=True),
    "teacher mixture": Shape(1, 16, 16, 16, 1024, 50258, mask=True),
    "image": Shape(2, 32, 1, 32, 256, 1025),
    "image fp16": Shape(2, 32, 1, 32, 256, 1025, torch.float16),
    "pixel": Shape(8, 16, 1, 16, 3072, 256, torch.float32, logistic="left"),
    "pixel min": Shape(8, 16, 1, 16, 3072, 256, torch.float32, logistic="min"),
    "pixel 32": Shape(4, 32, 32, 32, 3072, 256, torch.float32, logistic="min"),
    "pixel many": Shape(2, 64, 1, 64, 3072, 256, torch.float32, logistic="left"),
    "pixel single": Shape(128, 1, 1, 0, 3072, 256, torch.float32, logistic="left"),
    "many components": Shape(1, 64, 1, 64, 1024, 50258, mask=True),
    "cross entropy": Shape(1, 1, 1, 0, 8192, 128256, marginals=False, component=False, padded=True),
    "draw language": DrawShape(8192, 50258, wanted=("argmax", "entropy"), mask=True),
    "draw language linear": DrawShape(8192, 50258, mask=True, padded=True),
    "draw large": DrawShape(
        512, 126464, wanted=("argmax", "entropy", "margin", "raw_prob"), tempered=True, padded=True
    ),
    "draw large fp32": DrawShape(
        512, 128257, torch.float32, ("argmax", "entropy", "margin", "raw_prob"), tempered=True
    ),
    "draw greedy": DrawShape(512, 126464, torch.float16, ("margin",), padded=True, greedy=True),
    "draw guided": DrawShape(2048, 50258, guidance=True, tempered=True),
    "draw filtered": DrawShape(512, 50258, torch.float32, ("entropy", "margin"), padded=True),
    "draw image": DrawShape(8192, 1025, guidance=True),
    "draw image all": DrawShape(
        8192, 1025, torch.float32, ("argmax", "entropy", "margin", "raw_prob"), tempered=True
    ),
    "draw text": DrawShape(65536, 27, torch.float32),
    "draw pixel": DrawShape(98304, 256, torch.float32, ("entropy",), padded=True),
    "draw pixel all": DrawShape(
        98304, 256, torch.float32, ("argmax", "entropy", "margin", "raw_prob"), True, True, True
    ),
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. Registers and spills are per thread."""

    shape: str
    kernel: str
    target: str
    warps: int
    registers: int
    shared: int  # bytes
    spills: int  # bytes of local memory on NVIDIA, registers on AMD
    load_bits: int  # width of the loads of one thread that bring most; 0 where not known


@dataclasses.dataclass
class Launch:
    name: str  # of the kernel, without its underscore and "_kernel"
    compiled: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by the names of the kernel


class _NoDevice:
    """Stands in for Triton's driver: names a target, never runs anything."""

    def __init__(self, target: Any, index: int):
        self._target, self._index = target, index

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._index

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(target_name: str) -> Iterator[list[Launch]]:
    """Within the block, launches of Triton kernels compile for the target and are listed."""
    from di4c_fast.kernels.triton import tuning
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    import di4c_fast.passes.triton  # noqa: F401 makes the launch parameters known

    config = CONFIGS.get(target_name)
    own = {} if config is None else tuning.load_config(tuning.CONFIGS / config)
    backend, architecture, warp_size, _ = TARGETS[target_name]
    launches: list[Launch] = []
    original: Callable[..., Any] = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = original(self, *args, grid=grid, warmup=True, **kwargs)
        name = self.fn.__name__.strip("_").removesuffix("_kernel")
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        launches.append(Launch(name, compiled, grid, named))
        return compiled

    index = list(TARGETS).index(target_name)
    driver.set_active(_NoDevice(GPUTarget(backend, architecture, warp_size), index))
    JITFunction.run = run
    try:
        with tuning.override(**own):
            yield launches
    finally:
        JITFunction.run = original
        # Where there is no GPU there is no driver to go back to.
        with contextlib.suppress(RuntimeError):
            driver.reset_active()


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_everything(shape: Shape, usual: bool = False) -> None:
    """Run the passes that a loss of this shape needs, forward and backward.

    usual: only those of a loss that draws its targets and keeps its rows of q.
    """
    from di4c_fast.passes import base, triton

    size, positions, vocabulary = shape.batch, shape.positions, shape.vocabulary
    total, components, row = size * positions, shape.components, base.padded(vocabulary)
    targets = 1 + shape.draws
    integers = {"dtype": torch.int64}
    visit = base.Visit(0, total, positions)
    if shape.mask:
        triton.order(_meta(total, dtype=torch.bool))
        visit = base.Visit(0, total, positions, _meta(total, **integers), _meta(**integers))
    places = base.Places((size, positions), visit.rows, visit.count, total)

    def operand(number: int) -> base.Operand:
        if shape.logistic:
            mu = _meta(size, number, positions)
            bins = base.Bins(mu, 1e-6, shape.logistic)
            batch, component, position = mu.stride()
            return base.Operand(mu, (0, batch, component, position), number, vocabulary, bins)
        if not shape.padded:
            logits = _meta(size, number, positions, vocabulary, dtype=shape.dtype)
            return base.Operand.of_all(logits)
        return base.Operand.of_chunk(_meta(total, number, row, dtype=shape.dtype)[..., :vocabulary])

    def sums(number: int) -> base.RowSums:
        return base.RowSums(_meta(total, number), _meta(total, number))

    student, teacher = operand(components), operand(shape.teachers)
    consistency = operand(shape.draws) if shape.draws else None
    xu = _meta(size, shape.draws, positions, **integers) if shape.mask and shape.draws else None
    weight = _meta(size)
    mixture = base.Mixture(
        vocabulary - 1 if shape.mask else None,
        xu,
        _meta(size, components),
        weight,
        weight,
        shape.marginals,
        shape.component,
        correlation=shape.marginals,
        data_weight=weight,
        component_weight=weight,
        seed=_meta(**integers) if shape.draws else None,
        given=_meta(size, 1, positions, **integers),
    )
    each = _meta(total, components)
    statistics = base.Statistics(
        _meta(size, targets, positions, **integers),
        sums(components),
        sums(shape.teachers),
        sums(shape.draws) if shape.draws else None,
        _meta(total, targets, components),
        each,
        _meta(total),
        _meta(total),
        each,
        _meta(total, row),
        _meta(total, row),
        sums_known=usual,
    )
    needs = shape.marginals or shape.component
    u = consistency if shape.marginals or shape.draws else None
    t = teacher if needs else None
    chunk = base.Chunk(student, t, u, visit, mixture, statistics)
    triton.forward(chunk)
    weights = _meta(size, targets, components)
    joint = base.Joint(statistics.log_prob, weights, _meta(size, targets))
    swept = base.Swept(statistics, mixture, places)
    triton.joint(swept, joint)
    factors = triton.factors(swept, joint, None, weight)
    for rows_kept in (True,) if usual else (True, False):
        again = chunk._replace(t=None, u=None)
        if not rows_kept:
            none = _meta(0, row)
            known = dataclasses.replace(statistics, q=none, q_teacher=none)
            again = chunk._replace(statistics=known)
        triton.backward(again, factors, student)


def launch_draw(shape: DrawShape) -> None:
    """Run the draw of this shape."""
    from di4c_fast.passes import base, triton

    rows, vocabulary = shape.rows, shape.vocabulary

    def operand() -> base.Operand:
        stride = base.padded(vocabulary) if shape.padded else vocabulary
        logits = _meta(rows, stride, dtype=shape.dtype)
        return base.Operand(logits, (0, 0, 0, stride), 1, vocabulary)

    scalar = _meta(dtype=torch.int64)
    each = _meta(rows)
    temperature: float | Tensor = each if shape.tempered else 1.0
    options = base.DrawOptions(
        vocabulary - 1 if shape.mask else None,
        scalar,
        scalar,
        0.0 if shape.greedy else temperature,
        each if shape.tempered and shape.guidance else 0.0,
        frozenset(shape.wanted),
    )
    visit = base.Visit(0, rows, rows)
    y = operand() if shape.guidance else None
    triton.draw(operand(), y, visit, _meta(rows, dtype=torch.int64), options)


def resources(shape_name: str, target_name: str, launch: Launch) -> Resources:
    """Registers, shared memory and spills of a compiled launch."""
    compiled = launch.compiled
    metadata = compiled.metadata
    bits = 0
    if TARGETS[target_name][0] == "cuda":
        registers, spills = cuda_usage(compiled.asm["cubin"])
        bits = _load_bits(compiled.asm["ptx"])
    else:
        text = compiled.asm["amdgcn"]
        registers = _amd_number(text, "vgpr_count")
        spills = _amd_number(text, "vgpr_spill_count") + _amd_number(text, "sgpr_spill_count")
    return Resources(
        shape_name,
        launch.name,
        target_name,
        metadata.num_warps,
        registers,
        metadata.shared,
        spills,
        bits,
    )


def _load_bits(ptx: str) -> int:
    """The width of the loads (direct, or asynchronous to shared memory) that bring most bits.

    The wider of equals: the code of a last tile loads as much, in small pieces, but runs once.
    """
    moved: dict[int, int] = {}
    for match in re.finditer(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx):
        width = int(match.group(1) or 1) * int(match.group(2))
        moved[width] = moved.get(width, 0) + width
    for match in re.finditer(r"cp\.async\.\w+\.shared\.global[^;]*?, (0x\w+|\d+)\s*[,;]", ptx):
        width = 8 * int(match.group(1), 0)
        moved[width] = moved.get(width, 0) + width
    return max(moved, key=lambda width: (moved[width], width)) if moved else 0


def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def cuda_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"REG:(\d+)", run.stdout)
    stack, local = re.search(r"STACK:(\d+)", run.stdout), re.search(r"LOCAL:(\d+)", run.stdout)
    assert registers is not None
    assert stack is not None
    assert local is not None
    return int(registers.group(1)), int(stack.group(1)) + int(local.group(1))


def _amd_number(text: str, field: str) -> int:
    match = re.search(rf"\.{field}:\s*(\d+)", text)
    return int(match.group(1)) if match else 0


def report(targets: list[str], shapes: list[str]) -> Iterator[Resources]:
    """Compile for every target and shape, with and without the component term; one row per
    kernel, in the order of launches."""
    for target_name in targets:
        for shape_name in shapes:
            with compile_only(target_name) as launches:
                shape = SHAPES[shape_name]
                if isinstance(shape, DrawShape):
                    launch_draw(shape)
                else:
                    for component in {shape.component, False}:
                        launch_everything(dataclasses.replace(shape, component=component))
            seen = set()
            for launch in launches:
                row = resources(shape_name, target_name, launch)
                if row not in seen:  # the same kernel, compiled for the same arguments
                    yield row
                seen.add(row)


def faults(row: Resources) -> list[str]:
    """What must not be: spills on NVIDIA, more shared memory than there is."""
    backend, _, _, limit = TARGETS[row.target]
    found = []
    if backend == "cuda" and row.spills:
        found.append(f"spills {row.spills} bytes")
    if row.shared > limit:
        found.append(f"needs {row.shared} bytes of shared memory, {row.target} has {limit}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 2
    header = ("target", "shape", "kernel", "warps", "registers", "shared", "spills", "load bits")
    widths = (7, 20, 26, 5, 9, 7, 6, 9)
    print("  ".join(f"{name:<{width}}" for name, width in zip(header, widths, strict=True)))
    broken = 0
    for row in report(options.targets, options.shapes):
        values = (
            row.target,
            row.shape,
            row.kernel,
            row.warps,
            row.registers,
            row.shared,
            row.spills,
            row.load_bits,
        )
        found = faults(row)
        broken += bool(found)
        line = "  ".join(f"{value!s:<{width}}" for value, width in zip(values, widths, strict=True))
        print(line.rstrip() + ("" if not found else "  <- " + "; ".join(found)), flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
