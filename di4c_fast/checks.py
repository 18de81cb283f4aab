"""Checks of arguments: every message names the argument, what was expected and what came."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(value: Any) -> str:
    """A short description of a value for an error message.

    >>> describe(torch.zeros(2, 3))
    'Tensor of shape (2, 3), torch.float32, cpu'
    >>> describe("a")
    "str 'a'"
    """
    if isinstance(value, Tensor):
        return f"Tensor of shape {tuple(value.shape)}, {value.dtype}, {value.device}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def warn_of_probabilities(logits: Any, name: str) -> None:
    """A warning where a few rows of a tensor (..., V) say that these are not logits.

    Only on a CPU, where looking is free.
    """
    if not isinstance(logits, Tensor) or logits.device.type != "cpu" or not logits.numel():
        return
    if torch.compiler.is_compiling():
        return
    rows = logits.detach()
    while rows.ndim > 2:
        rows = rows[0]
    rows = rows[:8]
    if rows.ndim < 2 or bool((rows[0] < 0).any()):
        return
    rows = rows.double()
    if rows.shape[1] > 1 and bool((rows >= 0).all() & ((rows.sum(1) - 1).abs() < 1e-2).all()):
        message = f"{name} must hold logits, got rows that sum to 1 as probabilities do"
        warnings.warn(f"{message}: take their log()?", stacklevel=5)


def check_kind(value: Any, kind: type, name: str) -> None:
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {describe(value)}")


def check_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {describe(value)}")
    # Sharded tensors would be read as if their local part were everything.
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor, which is not supported: call .full_tensor() or .to_local()"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got a Tensor of layout {value.layout}")


def check_floating(value: Any, name: str) -> None:
    check_tensor(value, name)
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be floating point (float64, float32, bfloat16 or float16), "
            f"got {value.dtype}"
        )


def check_int64(value: Any, name: str) -> None:
    check_tensor(value, name)
    if value.dtype != torch.int64:
        raise TypeError(f"{name} must have dtype torch.int64, got {value.dtype}")


def check_rank(
    value: Tensor, name: str, *, exactly: int | None = None, minimum: int | None = None
) -> None:
    if exactly is not None and value.ndim != exactly:
        raise ValueError(f"{name} must have {exactly} dimensions, got shape {tuple(value.shape)}")
    if minimum is not None and value.ndim < minimum:
        raise ValueError(
            f"{name} must have at least {minimum} dimensions, got shape {tuple(value.shape)}"
        )


def check_shape(value: Any, name: str, letters: str, sizes: Sequence[int]) -> None:
    """Check `value.shape` against sizes named by letters, e.g. "B,D"."""
    expected = tuple(sizes)
    if tuple(value.shape) != expected:
        raise ValueError(
            f"{name} must have shape ({letters}) = {expected}, got {tuple(value.shape)}"
        )


def check_same_device(value: Any, name: str, other: Any, other_name: str) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {value.device}"
        )


def check_same_shard(value: Any, name: str, other: Any, other_name: str) -> None:
    if value.shard != other.shard:
        raise ValueError(
            f"{name} must hold the columns of the vocabulary that {other_name} holds, "
            f"{other.shard or 'all'}, got {value.shard or 'all'}"
        )


def check_whole(head: Any, name: str, position_group: Any = None) -> None:
    if head.shard is not None or position_group is not None:
        raise ValueError(f"{name} takes no shard of a vocabulary or of positions")


def check_bool(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def check_int(value: Any, name: str, *, minimum: int | None = None) -> int:
    """Check an int that is no bool, and return it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_mask_id(value: Any, vocabulary: int) -> int | None:
    """Check the id of the mask token, or None for no mask, and return it."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"mask_id must be an int or None, got {describe(value)}")
    if not 0 <= value < vocabulary:
        raise ValueError(f"mask_id must be in [0, V) = [0, {vocabulary}), got {value}")
    if vocabulary == 1:
        raise ValueError("mask_id excludes the only class: V must be at least 2, got 1")
    return int(value)


def check_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def check_values(condition: Tensor, message: str, values: Tensor | None = None) -> None:
    """Check that every element of a boolean tensor holds.

    On the CPU a failure raises ValueError at once, with the first offending value. On a GPU the
    check is queued as a device-side assertion, which costs no host sync; a failure surfaces as a
    RuntimeError carrying the message at the next synchronising call.
    """
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(condition.all()):
            detail = ""
            if values is not None:
                index = tuple(int(i) for i in (~condition).nonzero()[0])
                detail = f", got {values[index].item()} at index {index}"
            raise ValueError(message + detail)
    elif condition.device.type != "meta":
        torch._assert_async(condition.all(), message)


def check_cu_seqlens(value: Any, total: int, device: torch.device) -> Tensor:
    """Cumulative lengths of S sequences that have `total` positions, as int64 (S + 1,)."""
    check_tensor(value, "cu_seqlens")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {value.dtype}")
    if value.ndim != 1 or value.numel() == 0:
        raise ValueError(f"cu_seqlens must have shape (S + 1,), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"cu_seqlens must be on {device}, got {value.device}")
    ends = value.long()
    fits = ends.diff(prepend=ends[:1]) >= 0
    fits[0] &= ends[0] == 0
    fits[-1] &= ends[-1] == total
    check_values(fits, f"cu_seqlens must rise from 0 to the {total} positions", ends)
    return ends


def check_token_range(tokens: Tensor, name: str, vocabulary: int) -> None:
    check_values(
        (tokens >= 0) & (tokens < vocabulary),
        f"{name} must hold token ids in [0, {vocabulary})",
        tokens,
    )


def check_number(value: Any, name: str, *, minimum: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if math.isnan(value) or math.isinf(value) or value < minimum:
        bound = "" if minimum == -math.inf else f" and at least {minimum:g}"
        raise ValueError(f"{name} must be finite{bound}, got {value}")


def check_within(value: Any, name: str, interval: str) -> None:
    """Check a number against an interval such as "(0, 1]"."""
    check_number(value, name)
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low or (value == low and interval[0] == "[")
    if not above or value > high or (value == high and interval[-1] == ")"):
        raise ValueError(f"{name} must be in {interval}, got {value}")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Run with the dtypes as they are: autocast would round fp32 products to half precision."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
