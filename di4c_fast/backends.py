"""Names of backends, the passes behind them, and why one does not run.

A backend is a module with the functions of `passes.base`; one line makes another known:

    di4c_fast.backends.register("mine", "my_package.passes")

The module is imported when it first runs. If it has a function `unavailable(device)`, that says
why it cannot run there (None if it can). "reference" is no set of passes: `loss` and `sample`
have it as dense formulas of their own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch

Backend: TypeAlias = str  # "auto", "reference", or a name that is registered
Reason = Callable[[torch.device], "str | None"]


class _Passes(NamedTuple):
    module: str
    reason: Reason | None
    float64: bool


_known: dict[str, _Passes] = {}
_preferred: list[str] = []


def register(
    name: str, module: str, reason: Reason | None = None, *, float64: bool = False
) -> None:
    """Make `backend=name` known to `loss` and `sample`.

    Args:
        name: of the backend; one that is known already is replaced.
        module: path of the module with the passes.
        reason: like the module's `unavailable`, asked before the module is imported.
        float64: whether it computes in fp64; if not, fp64 logits go to the torch backend.
    """
    if not isinstance(name, str) or name in ("auto", "reference"):
        raise ValueError(f'name must be a str other than "auto" and "reference", got {name!r}')
    _known[name] = _Passes(module, reason, float64)


def names() -> tuple[str, ...]:
    """What `backend` may be."""
    return ("auto", *_known, "reference")


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs for `backend=name` on this device, in this work dtype.

    "auto" is triton on a GPU, cpu on a CPU, and torch where those cannot run; a warning says so,
    once for each reason.

    Raises:
        RuntimeError: the backend that is asked for by name cannot run on the device.
    """
    better = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "torch")
    if _preferred:
        better = _preferred[-1]
    chosen = better if name == "auto" else name
    reason = unavailable(chosen, device)
    if reason is not None:
        if name != "auto":
            raise RuntimeError(f'backend="{name}" cannot run: {reason}')
        _warn_fallback(reason)
        return "torch"
    return chosen if dtype != torch.float64 or _known[chosen].float64 else "torch"


@contextlib.contextmanager
def preferred(name: str) -> Iterator[None]:
    """Within a `with` block "auto" is this backend, for samplers and trainers, too.

    >>> with preferred("torch"):
    ...     resolve("auto", torch.device("cpu"), torch.float32)
    'torch'
    """
    if name not in _known:
        raise ValueError(f"name must be one of {', '.join(_known)}, got {name!r}")
    _preferred.append(name)
    try:
        yield
    finally:
        _preferred.pop()


def passes_for(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The module of the passes that run for `backend=name`; see `resolve`."""
    return importlib.import_module(_known[resolve(name, device, dtype)].module)


@torch.compiler.assume_constant_result
def unavailable(name: str, device: torch.device) -> str | None:
    """Why a backend cannot run on `device`; None if it can."""
    if name == "reference":
        return None
    passes = _known[name]
    reason = passes.reason and passes.reason(device)
    if reason:
        return reason
    try:
        if importlib.util.find_spec(passes.module) is None:
            return f"there is no module {passes.module}"
        module = importlib.import_module(passes.module)
    except Exception as error:  # whatever a foreign package raises while it is imported
        return f"{passes.module} cannot be imported: {type(error).__name__}: {error}"
    ask = getattr(module, "unavailable", None)
    return None if ask is None else ask(device)


def _no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return (
            "the tensors are on the CPU; Triton needs a GPU (or TRITON_INTERPRET=1 before the "
            "start, for tests)"
        )
    if device.type != "cuda":
        return f"Triton kernels of di4c_fast do not run on {device.type} devices"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"the GPU has compute capability {major}.{minor}, 8.0 or newer is needed"
    return None


def _no_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"the tensors are on {device.type}, not on a CPU"


@functools.cache
def _warn_fallback(reason: str) -> None:
    warnings.warn(f'backend="auto" uses the torch backend, which is slower: {reason}', stacklevel=5)


register("triton", "di4c_fast.passes.triton", _no_triton)
register("cpu", "di4c_fast.passes.cpu", _no_cpu)
register("torch", "di4c_fast.passes.torch", float64=True)
