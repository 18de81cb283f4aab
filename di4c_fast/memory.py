"""Memory for large results on the CPU, used again from call to call.

The system clears every page of new memory: a third of the time of a loss of 67 MB of logits. So
large blocks wait for the next request of about their size once their tensor is gone.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MINIMUM = 1 << 20  # bytes: what the allocator reuses itself is below
LIMIT = 512 << 20  # bytes that wait at most
_waiting: dict[int, np.ndarray] = {}  # by id, oldest first; single operations are atomic


def empty_cache() -> None:
    """Give the memory that waits for reuse back to the system, as `torch.cuda.empty_cache` does.

    At most 512 MB wait, of gradients and computed logits on the CPU.
    """
    _waiting.clear()


def _wait(block: np.ndarray) -> None:
    if block.nbytes > LIMIT:
        return
    _waiting[id(block)] = block
    held = list(_waiting.values())
    excess = sum(block.nbytes for block in held) - LIMIT
    while excess > 0:
        oldest = held.pop(0)
        excess -= oldest.nbytes
        _waiting.pop(id(oldest), None)


def empty_strided(
    shape: Sequence[int], strides: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, bool]:
    """`torch.empty_strided`, and whether it holds zeros: new memory does on a CPU, at no cost
    for the parts that nobody writes."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    size = count * dtype.itemsize if all(shape) else 0
    if device.type != "cpu" or size < MINIMUM:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device), False
    fitting = [b for b in list(_waiting.values()) if 0 <= b.nbytes - size <= size // 4]
    taken = (_waiting.pop(id(block), None) for block in fitting)
    used = next((block for block in taken if block is not None), None)
    block = np.zeros(size, np.uint8) if used is None else used
    view = block[:size]
    weakref.finalize(view, _wait, block).atexit = False
    flat = torch.from_numpy(view).view(dtype)
    return flat.as_strided(tuple(shape), tuple(strides)), used is None


def empty(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty` with memory that is used again."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return empty_strided(shape, strides, dtype=dtype, device=device)[0]
