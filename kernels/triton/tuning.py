"""Launch parameters: one frozen record, defaults, overrides by device from `configs/*.json`.

Nothing is tuned behind the user's back. The defaults come from the ahead-of-time resource report
(`python -m tools.compile_report`). A file `configs/<name>.json`, with <name> the device
name in lower case with everything but letters and digits replaced by "_", overrides fields for
that device; `override` does so for a block of code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclasses.dataclass(frozen=True)
class LaunchParameters:
    """What the kernels may choose freely: tile sizes (elements), warps, memory budget.

    Element counts are powers of two. `*_warps` are warps per program.
    """

    row_elements: int = 2048  # row statistics: 2-byte elements of a tile, half as many of fp32
    row_warps: int = 8
    row_stages: int = 2  # blocks of columns on their way from memory, in shared memory
    marginal_elements: int = 2048  # marginal: C * BLOCK_V
    marginal_warps: int = 8
    marginal_stages: int = 3
    forward_elements: int = 2048  # mixture forward: N * BLOCK_V
    forward_warps: int = 8
    forward_stages: int = 3
    backward_elements: int = 2048
    backward_warps: int = 8
    backward_stages: int = 3
    logistic_elements: int = 2048  # logistic kernels; half of it in statistics and draws
    logistic_warps: int = 8
    component_tile: int = 32  # the largest N that is held in one tile; loops beyond
    split_columns: int = 4096  # columns of one program of the mixture kernels
    draw_elements: int = 2048
    draw_warps: int = 8  # half of them for logistic rows
    draw_stages: int = 2
    draw_kernel_rows: int = 16  # most rows of one program of the draw kernel
    # Row draws: elements of a tile; rows of at most half as many are whole. Both are halved for
    # logistic rows, the elements per warp also with guidance.
    sample_elements: int = 2048
    # One warp, so that sums over a block need no barrier.
    sample_warps: int = 1
    sample_whole_elements: int = 512  # elements per warp where a row is one tile
    sample_rows: int = 16  # most rows of one program there
    sample_blocks: int = 512  # blocks of 128 tokens per warp where rows are put together
    sample_joined_rows: int = 2  # most rows of one program there
    sample_scratch_bytes: int = 64 * 2**20  # numbers per block between the two kernels
    # Rows of q_u and q_T that may exist at a time, where a share of the logits is less.
    distribution_bytes: int = 64 * 2**20
    budget_bytes: int = 512 * 2**20  # LinearHead: logits of a chunk and what is kept of them
    minimum_rows: int = 1024  # LinearHead: rows of a matrix product, whatever the budget

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field.name} must be a positive int, got {value!r}")
        for name in (
            "row_elements",
            "marginal_elements",
            "forward_elements",
            "backward_elements",
            "logistic_elements",
            "component_tile",
            "split_columns",
            "draw_elements",
            "draw_kernel_rows",
            "sample_elements",
            "sample_warps",
            "sample_whole_elements",
            "sample_rows",
            "sample_blocks",
            "sample_joined_rows",
            "row_warps",
            "marginal_warps",
            "forward_warps",
            "backward_warps",
            "logistic_warps",
            "draw_warps",
        ):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")


_overrides: list[LaunchParameters] = []


def config_name(device_name: str) -> str:
    """The file name, without suffix, of a device's overrides.

    >>> config_name("NVIDIA H200")
    'nvidia_h200'
    """
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def load_config(path: Path) -> dict[str, Any]:
    """Read overrides from a JSON file.

    Raises:
        ValueError: not a JSON object, or an unknown field, naming the file.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    known = {field.name for field in dataclasses.fields(LaunchParameters)}
    # Keys with a leading underscore carry the measurement behind the numbers.
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{path} has unknown fields {unknown}; known are {sorted(known)}")
    return values


@functools.cache
def _for_device_name(name: str) -> LaunchParameters:
    path = CONFIGS / f"{config_name(name)}.json"
    return LaunchParameters(**load_config(path)) if path.exists() else LaunchParameters()


def launch_parameters(device: torch.device) -> LaunchParameters:
    """The launch parameters that hold on `device` at this moment."""
    if _overrides:
        return _overrides[-1]
    if device.type != "cuda":
        return _for_device_name(device.type)
    return _for_device_name(torch.cuda.get_device_name(device))


@contextlib.contextmanager
def override(**fields: int) -> Iterator[LaunchParameters]:
    """Use other launch parameters within a `with` block (for tuning and tests).

    >>> with override(forward_elements=1024) as parameters:
    ...     parameters.forward_elements
    1024
    """
    base = _overrides[-1] if _overrides else LaunchParameters()
    _overrides.append(dataclasses.replace(base, **fields))
    try:
        yield _overrides[-1]
    finally:
        _overrides.pop()


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`.

    >>> [power_of_two(value) for value in (1, 3, 4, 1025)]
    [1, 4, 4, 2048]
    """
    return 1 << max(value - 1, 0).bit_length()
