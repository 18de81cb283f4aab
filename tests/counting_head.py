"""A head of one's own that remembers which rows were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from di4c_fast import Head, TensorHead


class CountingHead(Head):
    """Logits in memory; `taken` are the rows of every `take` of this head, not of its parts."""

    def __init__(self, logits: Tensor, taken: list[Tensor] | None = None):
        self.inner = logits
        self.taken: list[Tensor] = [] if taken is None else taken

    @property
    def shape(self) -> torch.Size:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def take(self, rows: Tensor) -> Head:
        self.taken.append(rows)
        return TensorHead(self.inner.flatten(0, -2)[rows])

    def logits(self) -> Tensor:
        return self.inner

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.inner,)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Head:
        (logits,) = tensors
        assert logits is not None
        return CountingHead(logits, self.taken)
