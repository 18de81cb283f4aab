"""Logits of a linear output layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_bool,
    check_floating,
    check_int,
    check_rank,
    check_same_device,
    check_within,
)
from ..groups import make_shard, unwrap
from ..memory import empty
from .base import BuiltInHead, set_leading, take_leading


@final
class LinearHead(BuiltInHead):
    """Logits of a linear output layer, never all in memory: `hidden @ weight.T + bias`.

    Equivalent PyTorch: `F.linear(hidden, weight.to(hidden.dtype), bias)`, or with a bias per
    position `F.linear(hidden, weight.to(hidden.dtype)) + bias`; with `softcap` c of these logits
    `c * torch.tanh(logits / c)`.

    Args:
        hidden: (..., C), floating point; the last leading dimension counts positions (D).
        weight: (V, C); may be a slice of a larger tied embedding, or a DTensor `Shard(0)`, which
            says `columns` itself. Cast to the dtype of `hidden` for the product, so that
            half-precision activations meet fp32 master weights as they do under autocast.
        bias: (V,), or (D, V) for one row per position as in MaskGIT; None for no bias.
        softcap: in [1e-9, 1e9], the bound of the logits, as the final logits of Gemma have one
            (`final_logit_softcapping`); None for none.
        budget_bytes: how much memory the logits of a chunk, and what is kept between the two
            sweeps of the loss, may take; None for the default of the backend that runs.
        columns: (start, stop), the columns of the vocabulary that `weight` and `bias` of this rank
            are. The ranks of the group hold all columns between them, each one once, in shards of
            any width; the hidden states are the same on every rank. Token ids and `mask_id` of
            all functions stay those of the whole vocabulary, and every rank gets the value that
            one process with all of it gets. None: this is the whole vocabulary.
        group: the process group, with `columns`; None for the default group.
        vocabulary: V, with `columns`. None: the ranks tell each other their columns, so all of
            them build the head together; on a GPU that waits for the device.
        reduce_hidden_grad: the gradient of `hidden` is added up over the ranks; False leaves to
            every rank its own part. Gradients of `weight` and `bias` are those of its columns.

    Differentiable with respect to `hidden`, `weight` and `bias`. On a CPU the products of half
    precision are computed in fp32; on a GPU those of fp32 follow PyTorch's switch for TF32,
    `torch.backends.cuda.matmul`.

    Raises:
        TypeError, ValueError: wrong kinds, ranks, sizes, dtypes or devices.
    """

    options = ("softcap", "budget_bytes", "reduce_hidden_grad")
    loads_in_place = True

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        budget_bytes: int | None = None,
        group: Any = None,
        columns: tuple[int, int] | None = None,
        vocabulary: int | None = None,
        reduce_hidden_grad: bool = True,
    ):
        weight, found = unwrap(weight, 0, "weight")
        bias, other = unwrap(bias, -1, "bias")

        def check() -> tuple[int, Any]:
            if found and other and found != other:
                raise ValueError(
                    f"bias must be a DTensor of {found['vocabulary']} classes over the device_mesh "
                    "of weight"
                )
            _check(hidden, weight, bias, softcap, budget_bytes)
            check_bool(reduce_hidden_grad, "reduce_hidden_grad")
            self.softcap = None if softcap is None else float(softcap)
            return weight.shape[0], self.facts()

        self.reduce_hidden_grad, self.budget_bytes = reduce_hidden_grad, budget_bytes
        self.hidden, self.weight, self.bias = hidden, weight, bias
        # The position of each row, where the rows are no longer those of a (..., D, C) tensor.
        self._positions: Tensor | None = None
        self.shard = make_shard(check, weight, found, group, columns, vocabulary)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"width": self.weight.shape[1]}

    @property
    def positional(self) -> bool:
        """Whether the bias depends on the position."""
        return self.bias is not None and self.bias.ndim == 2

    def positions(self, rows: Tensor) -> Tensor:
        """The position (index into a (D, V) bias) of each of the given rows."""
        if self._positions is None:
            return rows % self.hidden.shape[-2]
        return self._positions.flatten()[rows]

    def logits(self) -> Tensor:
        weight, bias = self.weight.to(self.hidden.dtype), self.bias
        if bias is None or bias.ndim == 1:
            # In one product, as `nn.Linear` does: half precision then rounds once.
            bias = None if bias is None else bias.to(weight.dtype)
            return self._capped(F.linear(self.hidden, weight, bias))
        logits = F.linear(self.hidden, weight)
        bias = bias if self._positions is None else bias[self._positions]
        return self._capped(logits + bias.to(logits.dtype))

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """hidden, weight, bias; then, for taken rows of a (D, V) bias, their positions."""
        taken = () if self._positions is None else (self._positions,)
        return (self.hidden, self.weight, self.bias, *taken)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> LinearHead:
        hidden, weight, bias, *taken = tensors
        positions = taken[0] if taken else None
        return self.replaced(hidden=hidden, weight=weight, bias=bias, _positions=positions)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> LinearHead:
        every = self._positions
        if self.positional:
            leading = self.hidden.shape[:-1]
            if every is None:
                every = torch.arange(leading[-1], device=self.device).expand(leading)
            every = change(every)
        return self.replaced(hidden=change(self.hidden), _positions=every)

    @property
    def prepared_dtype(self) -> torch.dtype:
        # Few CPUs multiply half precision faster than fp32, and none more exactly.
        return self.work_dtype if self.device.type == "cpu" else self.dtype

    def prepared(self, *, widen: bool = True) -> LinearHead:
        work = self.prepared_dtype if widen else self.dtype
        bias = None if self.bias is None else self.bias.to(work)
        return self.replaced(hidden=self.hidden.to(work), weight=self.weight.to(work), bias=bias)

    def load(self, rows: Tensor, out: Tensor, passes: Any = None) -> None:
        hidden = take_leading(self.hidden, rows, self.hidden.shape[:-1]).flatten(0, -2)
        weight = self.weight.to(hidden.dtype).t()
        flat = out.view(-1, out.shape[-1])
        if self.bias is None:
            torch.mm(hidden, weight, out=flat)
        elif self.bias.ndim == 1:
            torch.addmm(self.bias.to(hidden.dtype), hidden, weight, out=flat)
        else:
            at = self.positions(rows.flatten())
            torch.index_select(self.bias.to(hidden.dtype), 0, at, out=flat)
            flat.addmm_(hidden, weight)
        if self.softcap is not None:
            flat.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits_at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        hidden = take_leading(self.hidden, rows, self.hidden.shape[:-1])
        work = self.work_dtype  # one rounding at the end, as a matrix product has
        logits = (hidden.to(work) * self.weight[tokens].to(work)).sum(-1)
        if self.bias is not None:
            at = (self.positions(rows), tokens) if self.positional else (tokens,)
            logits = logits + self.bias[at].to(work)
        return self._capped(logits).to(hidden.dtype)

    def new_gradients(self, needs: Sequence[bool]) -> list[Tensor | None]:
        hidden, weight, *others = needs
        whole = self.shard is None
        sums = super().new_gradients([hidden and not whole, False, *others])
        if hidden and whole:  # written once, so in its own dtype
            sums[0] = torch.zeros_like(self.hidden, memory_format=torch.contiguous_format)
        if weight:  # zeros without memory: the first product takes their place
            sums[1] = self.weight.new_zeros((), dtype=self.work_dtype).expand(self.weight.shape)
        return sums

    def share_gradients(self, sums: list[Tensor | None]) -> list[Tensor | None]:
        hidden, *others = sums
        if self.shard is None or not self.reduce_hidden_grad or hidden is None:
            return sums
        return [*self.shard.sum(hidden), *others]

    def add_gradient(
        self, sums: list[Tensor | None], rows: Tensor, gradient: Tensor, logits: Tensor
    ) -> None:
        if self.softcap is not None:  # the derivative of c tanh(z / c) is 1 - tanh²
            part, share = gradient * logits, -1.0 / self.softcap**2
            gradient = torch.addcmul(gradient, part, logits, value=share, out=part)
        flat = gradient.view(-1, gradient.shape[-1])
        leading, width = self.hidden.shape[:-1], self.hidden.shape[-1]
        if sums[0] is not None:
            product = torch.mm(flat, self.weight.to(flat.dtype))
            set_leading(sums[0], rows, leading, product.view(*rows.shape, width).to(sums[0].dtype))
        if sums[1] is not None:
            hidden = take_leading(self.hidden, rows, leading).reshape(-1, width)
            sums[1] = _add_product(sums[1], flat, hidden)
        if sums[2] is not None:
            if self.bias is not None and self.bias.ndim == 1:
                sums[2] += flat.sum(0, dtype=sums[2].dtype)
            else:  # sorted accumulation: rows share positions, and results must repeat
                at = (self.positions(rows.flatten()),)
                sums[2].index_put_(at, flat.to(sums[2].dtype), accumulate=True)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """total (V, C) + left.T (V, R) @ right (R, C), with sums in the dtype of `total`.

    In place, so that the product is not as large as the weight once more, but for the first one.
    """
    first, options = not any(total.stride()), dict[str, Any]()
    if left.dtype != total.dtype and left.is_cuda and torch.version.hip is None:
        options = {"out_dtype": total.dtype}
    else:
        left, right = left.to(total.dtype), right.to(total.dtype)
    if not first:
        return torch.addmm(total, left.t(), right, **options, out=total)
    if not options:
        options["out"] = empty(total.shape, dtype=total.dtype, device=total.device)
    return torch.mm(left.t(), right, **options)


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    budget_bytes: int | None,
) -> None:
    check_floating(hidden, "hidden")
    check_floating(weight, "weight")
    check_rank(hidden, "hidden", minimum=2)
    check_rank(weight, "weight", exactly=2)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape (V, C) with C = {hidden.shape[-1]}, the last size of "
            f"hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    check_same_device(weight, "weight", hidden, "hidden")
    if bias is not None:
        check_floating(bias, "bias")
        check_same_device(bias, "bias", hidden, "hidden")
        allowed = [(weight.shape[0],), (hidden.shape[-2], weight.shape[0])]
        if tuple(bias.shape) not in allowed:
            raise ValueError(
                f"bias must have shape (V,) = {allowed[0]} or (D, V) = {allowed[1]}, "
                f"got {tuple(bias.shape)}"
            )
    if softcap is not None:
        check_within(softcap, "softcap", "[1e-9, 1e9]")  # its square is a number of fp32
    if budget_bytes is not None:
        check_int(budget_bytes, "budget_bytes", minimum=1)
