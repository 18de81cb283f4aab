"""Heads of one's own, as a user would write them; they note what is asked of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from di4c_fast import Head


class OwnHead(Head):
    """Logits in memory. Subclasses compute them from tensors, the first ones with entries by row.

    `taken` are the rows of every `take` of this head, not of its parts; `computed` the numbers of
    rows of every call of `logits`, of its parts too.
    """

    by_row = 1  # how many of the tensors have an entry for each row

    def __init__(self, *parts: Tensor | None):
        self.parts = parts
        self.taken: list[Tensor] = []
        self.computed: list[int] = []

    @property
    def first(self) -> Tensor:
        assert self.parts[0] is not None
        return self.parts[0]

    @property
    def shape(self) -> torch.Size:
        return self.first.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.first.dtype

    @property
    def device(self) -> torch.device:
        return self.first.device

    def take(self, rows: Tensor) -> Head:
        self.taken.append(rows)
        last = self.first.ndim - 2

        def of_rows(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.flatten(0, last)[rows]

        chosen = map(of_rows, self.parts[: self.by_row])
        head = self.with_tensors([*chosen, *self.parts[self.by_row :]])
        head.taken = []
        return head

    def logits(self) -> Tensor:
        self.computed.append(self.shape[:-1].numel())
        return self.first

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.parts

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> OwnHead:
        head = type(self)(*tensors)
        head.taken, head.computed = self.taken, self.computed
        head.budget_bytes = self.budget_bytes
        return head


class Capped(OwnHead):
    """The logits of a linear layer between -4 and 4."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None = None):
        super().__init__(hidden, weight, bias)
        self.weight, self.bias = weight, bias

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.first.shape[:-1], self.weight.shape[0]))

    def logits(self) -> Tensor:
        logits = self.first @ self.weight.T
        return 4.0 * torch.tanh((logits if self.bias is None else logits + self.bias) / 4.0)
