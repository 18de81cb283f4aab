"""Logits that exist already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ..checks import check_bool, check_floating, check_rank
from ..groups import make_shard, unwrap
from ..passes.base import Operand
from .base import BuiltInHead, take_leading


@final
class TensorHead(BuiltInHead):
    """Logits that exist already, of any strides (expanded tensors are not copied).

    Args:
        logits: (..., V), floating point.
        in_place_gradient: `loss` may write the gradient over the logits, which saves as much
            memory as they take. They then hold the gradient after the backward pass, which can
            run only once; autograd raises if another operation has saved them for its own
            backward pass. Without effect where the logits are expanded.
        group, columns, vocabulary: as of `LinearHead`, of logits that are columns start .. stop - 1
            of a vocabulary spread over the ranks of a process group.
    """

    options = ("in_place_gradient",)

    def __init__(
        self,
        logits: Tensor,
        *,
        in_place_gradient: bool = False,
        group: Any = None,
        columns: tuple[int, int] | None = None,
        vocabulary: int | None = None,
    ):
        logits, found = unwrap(logits, -1, "logits")

        def check() -> tuple[int, Any]:
            check_floating(logits, "logits")
            check_rank(logits, "logits", minimum=1)
            check_bool(in_place_gradient, "in_place_gradient")
            return logits.shape[-1], self.facts()

        self._logits, self.in_place_gradient = logits, in_place_gradient
        self.shard = make_shard(check, logits, found, group, columns, vocabulary)

    @property
    def shape(self) -> torch.Size:
        return self._logits.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._logits.dtype

    @property
    def device(self) -> torch.device:
        return self._logits.device

    def logits(self) -> Tensor:
        return self._logits

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self._logits,)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> TensorHead:
        (logits,) = tensors
        return self.replaced(_logits=logits)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> TensorHead:
        return self.with_tensors([change(self._logits)])

    def operand(self, passes: Any = None) -> Operand:
        logits = self._logits
        if logits.stride(-1) != 1 and logits.shape[-1] > 1:
            # Once more in backward: a copy kept between the sweeps would be as large as the logits.
            logits = logits.contiguous()
        return Operand.of_all(logits if logits.ndim == 4 else logits.unsqueeze(1))

    def row_operand(self, passes: Any = None) -> Operand | None:
        if self._logits.stride(-1) != 1 and self.shape[-1] > 1:
            return None
        try:
            rows = self._logits.view(-1, self.shape[-1])
        except RuntimeError:
            return None
        return Operand.of_chunk(rows.unsqueeze(1))

    def load(self, rows: Tensor, out: Tensor, passes: Any = None) -> None:
        out.copy_(take_leading(self._logits.detach(), rows, self.shape[:-1]))

    def logits_at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        flat = self._logits.reshape(-1, self.shape[-1])
        return flat[rows, tokens]
