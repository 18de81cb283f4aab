"""Which backend runs, and why another does not.

A loss backend is a module with two functions, `loss_per_example(inputs, scale)` and
`token_rows(student, targets, log_weights, active, mask_id, correlation)`. The first returns the
loss of every example times `scale`; a number says that the caller will sum them, so that all share
one upstream gradient, and None that it will not (a scale of 1).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Any, Literal

import torch

from .heads import Head

Backend = Literal["auto", "triton", "torch", "reference"]
LOSS_BACKENDS = ("auto", "triton", "torch", "reference")


def loss_backend(name: str, student: Head) -> Any:
    """The module that computes the loss for `student`.

    Raises:
        RuntimeError: `name` is "triton" and Triton cannot run on the device of `student`.
    """
    # Import statements rather than importlib: torch.compile traces through them.
    if name == "reference":
        from .reference import loss as reference_loss

        return reference_loss
    if name == "torch" or not _takes_triton(name, student.device):
        from . import streaming

        return streaming
    from . import fused

    return fused


def _takes_triton(name: str, device: torch.device) -> bool:
    reason = triton_unavailable(device)
    if name == "triton":
        if reason is not None:
            raise RuntimeError(f'backend="triton" cannot run: {reason}')
        return True
    if reason is None:
        return device.type != "cpu"
    if device.type == "cuda":
        _warn_fallback(reason)
    return False


@torch.compiler.assume_constant_result
def triton_unavailable(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`; None if they can."""
    if importlib.util.find_spec("di4c_fast.fused") is None:
        return "this version of di4c_fast has no Triton kernels for it"
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


@functools.cache
def _warn_fallback(reason: str) -> None:
    """Warn once per reason that `auto` took the torch backend on a GPU."""
    warnings.warn(f'backend="auto" uses the torch backend, which is slower: {reason}', stacklevel=4)
