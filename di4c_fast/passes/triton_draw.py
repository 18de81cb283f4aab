"""`draw` as launches of the row-draw kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..draw.law import SAMPLE_BLOCK
from ..kernels.triton.row_draw import MAX_VOCABULARY, Targets, row_draw
from . import torch_draw
from .base import Drawn, DrawOptions, Mixture, Operand, Statistics, Visit


def draw(x: Operand, y: Operand | None, visit: Visit, keys: Tensor, options: DrawOptions) -> Drawn:
    """One draw for each row of the visited slots; y are unconditional logits of guidance."""
    if x.vocabulary > MAX_VOCABULARY:  # more than the registers of one program hold
        return torch_draw.draw(x, y, visit, keys, options)
    device = x.logits.device
    seeded = DrawOptions(
        options.mask_id,
        _integer(options.seed, device),
        _integer(options.step, device),
        options.temperature,
        options.guidance,
        options.wanted,
    )
    token, argmax, values = row_draw(x, y, visit, keys.contiguous(), seeded, SAMPLE_BLOCK)
    return Drawn(token, argmax=argmax, **values)


def draw_targets(u: Operand, visit: Visit, mixture: Mixture, statistics: Statistics) -> None:
    """The last K target rows, one token from every component of u, and the row sums of u."""
    sums = statistics.consistency
    assert sums is not None
    assert mixture.given is not None
    assert mixture.seed is not None
    options = DrawOptions(mixture.mask_id, mixture.seed)
    targets = Targets(statistics.tokens, mixture.given, mixture.xu, sums.shift, sums.total)
    row_draw(u, None, visit, None, options, SAMPLE_BLOCK, targets)


def _integer(value: int | Tensor, device: torch.device) -> Tensor:
    """A seed or step as () int64 on the device, without a sync; ints are taken modulo 2^64."""
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        value = int(value)  # a tensor on the CPU
    value = (value + (1 << 63)) % (1 << 64) - (1 << 63)
    # Filled in by a kernel: a copy from pageable memory would wait for the device.
    return torch.full((), value, dtype=torch.int64, device=device)
