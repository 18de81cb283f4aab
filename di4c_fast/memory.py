"""Memory for large results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def zeros_strided(
    shape: Sequence[int], strides: Sequence[int], *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Zeros of a shape with strides of one's own.

    On a CPU the system zeroes a page when it is first touched, in huge pages where there are any;
    so parts that nobody writes cost no pass over memory.
    """
    count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    count = count if all(shape) else 0
    if device.type == "cpu":
        flat = torch.from_numpy(np.zeros(count, dtype=f"u{dtype.itemsize}")).view(dtype)
    else:
        flat = torch.zeros(count, dtype=dtype, device=device)
    return flat.as_strided(tuple(shape), tuple(strides))
