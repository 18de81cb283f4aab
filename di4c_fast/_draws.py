"""Uniform numbers from a `torch.Generator`, wherever it and its user live."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import describe


def check_generator(generator: torch.Generator | None) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {describe(generator)}")


def uniform(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform numbers in [0, 1) on `device`, drawn where the generator lives.

    A CPU generator thus gives the same numbers for tensors on every device.
    """
    check_generator(generator)
    source = device if generator is None else generator.device
    drawn = torch.rand(*shape, generator=generator, device=source, dtype=dtype)
    return drawn if device is None else drawn.to(device)
