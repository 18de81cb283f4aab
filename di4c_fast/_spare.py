"""Memory for gradients of logits on the CPU: zeroed by the system, or used a second time.

A tensor of many megabytes comes fresh from the system at every call and goes back when it is freed.
The faults on its first touch cost as much as all arithmetic of the backward sweep. So the memory of
the last such gradient, once no tensor refers to it any more, is kept for the next one of the same
size, as an allocator would.
"""

from __future__ import annotations

import collections
import weakref

import numpy as np
import torch
from torch import Tensor

# The most that is kept while nothing refers to it; a gradient of 16 x 128 x 8193 in fp32 has 67 MB.
SPARE_BYTES = 256 << 20

_spare: collections.deque[np.ndarray] = collections.deque(maxlen=1)


def gradient_memory(shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """A tensor on the CPU, and whether it is zero; if not, it holds an earlier gradient.

    NumPy asks the system for memory that is zeroed when it is touched, in huge pages where there
    are any: rows that are never written cost no pass, and the others no fault for every 4 KiB.
    """
    count, item = shape.numel(), f"u{dtype.itemsize}"
    try:
        memory = _spare.pop()
    except IndexError:
        memory = None
    fresh = memory is None or memory.nbytes != count * dtype.itemsize
    if memory is None or fresh:
        memory = np.zeros(count, dtype=item)
    lease = memory.view(item)
    if memory.nbytes <= SPARE_BYTES:
        # The lease lives as long as any tensor that shares its memory.
        weakref.finalize(lease, _spare.append, memory).atexit = False
    return torch.from_numpy(lease).view(dtype).view(shape), fresh


def release() -> None:
    """Give memory that is kept for the next gradient back to the system."""
    _spare.clear()
