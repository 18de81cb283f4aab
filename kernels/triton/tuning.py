"""Launch parameters: a frozen record beside each kernel, overrides by device from `configs/*.json`.

A kernel's record holds what its launch may choose freely, with the reason of every default. A file
`kernels/configs/<name>.json`, with <name> the device name in lower case and everything but letters
and digits replaced by "_", overrides fields for that device; `override` does so for a block of
code. Nothing is tuned behind the user's back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
Parameters = TypeVar("Parameters")

records: dict[str, type] = {}  # by the name of the kernel
_overrides: list[dict[str, dict[str, int]]] = []


def tunable(name: str) -> Any:
    """Make the frozen dataclass below known as the launch parameters of the kernel `name`.

    Its fields are positive ints; those in `powers_of_two` of the class must be powers of two.
    """

    def register(kind: type) -> type:
        records[name] = kind
        return kind

    return register


def checked(name: str, fields: Any, source: str) -> dict[str, int]:
    """The overrides of one kernel.

    Raises:
        ValueError: unknown kernel or field, a value that is no positive int or, where it has to
            be, no power of two; naming `source`.
    """
    if name not in records:
        raise ValueError(f"{source}: unknown kernel {name!r}; known are {sorted(records)}")
    kind = records[name]
    known = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(fields, dict) or set(fields) - known:
        raise ValueError(f"{source}: {name} must be an object of {sorted(known)}, got {fields!r}")
    for field, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{source}: {name}.{field} must be a positive int, got {value!r}")
        if value & (value - 1) and field in getattr(kind, "powers_of_two", ()):
            raise ValueError(f"{source}: {name}.{field} must be a power of two, got {value}")
    return fields


def config_name(device_name: str) -> str:
    """The file name, without suffix, of a device's overrides.

    >>> config_name("NVIDIA H200")
    'nvidia_h200'
    """
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def load_config(path: Path) -> dict[str, dict[str, int]]:
    """Read overrides, by kernel and field, from a JSON file.

    Raises:
        ValueError: not a JSON object, or as `checked`, naming the file.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    # Keys with a leading underscore carry the measurement behind the numbers.
    named = {key: value for key, value in values.items() if not key.startswith("_")}
    return {name: checked(name, fields, str(path)) for name, fields in named.items()}


@functools.cache
def _of_device(name: str) -> dict[str, dict[str, int]]:
    path = CONFIGS / f"{config_name(name)}.json"
    return load_config(path) if path.exists() else {}


def launch_parameters(name: str, device: torch.device) -> Any:
    """The record of the kernel `name` that holds on `device` at this moment."""
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    fields = dict(_of_device(model).get(name, {}))
    for override_ in _overrides:
        fields |= override_.get(name, {})
    return records[name](**fields)


@contextlib.contextmanager
def override(**kernels: dict[str, int]) -> Iterator[None]:
    """Use other launch parameters within a `with` block, for tuning and tests.

    >>> import di4c_fast.kernels.triton.mixture_forward
    >>> with override(mixture_forward={"warps": 4}):
    ...     launch_parameters("mixture_forward", torch.device("cpu")).warps
    4
    """
    _overrides.append({name: checked(name, given, "override") for name, given in kernels.items()})
    try:
        yield
    finally:
        _overrides.pop()


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value`.

    >>> [power_of_two(value) for value in (1, 3, 4, 1025)]
    [1, 4, 4, 2048]
    """
    return 1 << max(value - 1, 0).bit_length()
