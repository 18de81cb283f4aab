"""Heads: where logits come from, so that one `loss` and one `sample` serve every model.

A head stands for a tensor of logits of shape (..., V) without necessarily holding it. The
functions of this package accept a plain tensor wherever they accept a head.
"""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    check_floating,
    check_int64,
    check_rank,
    check_same_device,
    describe,
)

__all__ = ["Head", "HeadLike", "LinearHead", "LogisticHead", "TensorHead", "as_head"]


class Head(abc.ABC):
    """Logits of shape (..., V), computed for the rows that somebody asks for.

    `shape` is the logical shape of the logits, `dtype` and `device` those of the tensors behind
    them. A row is one vector of V logits; rows are numbered row-major over the leading
    dimensions. Everything is differentiable with respect to the tensors behind the head.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> torch.Size: ...

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    @abc.abstractmethod
    def device(self) -> torch.device: ...

    @abc.abstractmethod
    def take(self, rows: Tensor) -> Head:
        """The head of the given rows alone.

        Args:
            rows: int64, any shape, row numbers on this head's device.

        Returns:
            A head of shape (*rows.shape, V); equivalent to
            `head.logits().flatten(0, -2)[rows]` without computing any other row.
        """

    @abc.abstractmethod
    def logits(self) -> Tensor:
        """All logits of the head as one tensor of shape `self.shape`."""

    @abc.abstractmethod
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors behind the head, in a fixed order; None where an optional one is absent."""

    @abc.abstractmethod
    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Head:
        """The same head over other tensors, given in the order of `tensors()`."""

    def detach(self) -> Head:
        """The same head cut off from the graph."""
        return self.with_tensors([None if t is None else t.detach() for t in self.tensors()])

    @property
    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in self.tensors())

    def __repr__(self) -> str:
        shape = tuple(self.shape)
        return f"{type(self).__name__}(shape={shape}, dtype={self.dtype}, device={self.device})"


HeadLike: TypeAlias = "Tensor | Head"


def as_head(logits: HeadLike, name: str = "logits") -> Head:
    """Wrap a tensor of logits into a `TensorHead`; return a head unchanged.

    >>> as_head(torch.zeros(2, 5))
    TensorHead(shape=(2, 5), dtype=torch.float32, device=cpu)

    Raises:
        TypeError: `logits` is neither a tensor nor a head, or not floating point.
    """
    if isinstance(logits, Head):
        return logits
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a Tensor of logits or a Head, got {describe(logits)}")
    check_floating(logits, name)
    return TensorHead(logits)


def _take_leading(tensor: Tensor, rows: Tensor, leading: torch.Size) -> Tensor:
    """`tensor[*index of row]` for tensors whose first dimensions are `leading`, of any strides."""
    if len(leading) == 0:
        return tensor.unsqueeze(0)[rows]
    index = []
    for size in reversed(leading[1:]):
        index.append(rows % size)
        rows = rows // size
    # Unlike torch.unravel_index, which wraps, this leaves row numbers out of range to indexing.
    at = (rows, *reversed(index))
    return tensor[at]


class TensorHead(Head):
    """Logits that exist already, of any strides (expanded tensors are not copied).

    Args:
        logits: (..., V), floating point.
        in_place_gradient: the triton backend of `loss` may write the gradient over the logits,
            which saves as much memory as they take. They then hold the gradient after the
            backward pass, which can run only once; autograd raises if another operation has
            saved them for its own backward pass. Other backends ignore it.
    """

    def __init__(self, logits: Tensor, *, in_place_gradient: bool = False):
        check_floating(logits, "logits")
        check_rank(logits, "logits", minimum=1)
        self._logits = logits
        self.in_place_gradient = in_place_gradient

    @property
    def shape(self) -> torch.Size:
        return self._logits.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._logits.dtype

    @property
    def device(self) -> torch.device:
        return self._logits.device

    def take(self, rows: Tensor) -> TensorHead:
        check_int64(rows, "rows")
        return self.with_tensors([_take_leading(self._logits, rows, self.shape[:-1])])

    def logits(self) -> Tensor:
        return self._logits

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self._logits,)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> TensorHead:
        (logits,) = tensors
        assert logits is not None
        head = copy.copy(self)
        head._logits = logits
        return head


class LinearHead(Head):
    """Logits of a linear output layer, never all in memory: `hidden @ weight.T + bias`.

    Equivalent PyTorch: `F.linear(hidden, weight.to(hidden.dtype), bias)`, or with a bias per
    position `F.linear(hidden, weight.to(hidden.dtype)) + bias`.

    Args:
        hidden: (..., C), floating point; the last leading dimension counts positions (D).
        weight: (V, C); may be a slice of a larger tied embedding. Cast to the dtype of `hidden`
            for the product, so that half-precision activations meet fp32 master weights as
            they do under autocast.
        bias: (V,), or (D, V) for one row per position as in MaskGIT; None for no bias.
        budget_bytes: how much memory the logits of a chunk, and what is kept between the two
            sweeps of the loss, may take; None for the default of the backend that runs.

    Differentiable with respect to `hidden`, `weight` and `bias`.

    Raises:
        TypeError, ValueError: wrong kinds, ranks, sizes, dtypes or devices.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        budget_bytes: int | None = None,
    ):
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
        if budget_bytes is not None and budget_bytes <= 0:
            raise ValueError(f"budget_bytes must be positive, got {budget_bytes}")
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.budget_bytes = budget_bytes
        # The position of each row, where the rows are no longer those of a (..., D, C) tensor.
        self._positions: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def positions(self, rows: Tensor) -> Tensor:
        """The position (index into a (D, V) bias) of each of the given rows."""
        if self._positions is None:
            return rows % self.hidden.shape[-2]
        return self._positions.flatten()[rows]

    def take(self, rows: Tensor) -> LinearHead:
        check_int64(rows, "rows")
        head = copy.copy(self)
        head.hidden = _take_leading(self.hidden, rows, self.shape[:-1])
        positional = self.bias is not None and self.bias.ndim == 2
        head._positions = self.positions(rows) if positional else None
        return head

    def logits(self) -> Tensor:
        weight, bias = self.weight.to(self.hidden.dtype), self.bias
        if bias is None or bias.ndim == 1:
            # In one product, as `nn.Linear` does: half precision then rounds once.
            return F.linear(self.hidden, weight, None if bias is None else bias.to(weight.dtype))
        logits = F.linear(self.hidden, weight)
        bias = bias if self._positions is None else bias[self._positions]
        return logits + bias.to(logits.dtype)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.hidden, self.weight, self.bias)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> LinearHead:
        hidden, weight, bias = tensors
        assert hidden is not None
        assert weight is not None
        head = copy.copy(self)
        head.hidden, head.weight, head.bias = hidden, weight, bias
        return head


class LogisticHead(Head):
    """Logits of a truncated discretised logistic distribution, two numbers per row.

    The V = num_classes bins divide [-1, 1] evenly; bin v has the logit
    `log(F(right_v) - F(left_v))` with F the logistic distribution function of location `mu` and
    scale `exp(log_scale - 2)`. Computed in fp32 (fp64 for fp64 input), as

        left, right = (edge - mu) * exp(2 - log_scale)
        logit = logsigmoid(right) + log(sigmoid(-left) * (1 - exp(left - right)) + eps)

    which equals `logsigmoid(right) + log1p(eps - exp(logsigmoid(left) - logsigmoid(right)))`, the
    form of the sources, without its cancellation.

    Source: D3PM (arXiv 2107.03006, appendix B) and the CIFAR-10 model of tauLDR.

    Args:
        mu: (...), floating point, location.
        log_scale: same shape, log of the scale with an offset of 2.
        num_classes: V, the number of bins, at least 2.
        eps: keeps the logarithm finite in bins without mass; with 0 the bins are computed exactly.
        clamp: "left" uses the form above; "min" takes the minimum with the same form of the
            upper tail, `logsigmoid(-left) + log(sigmoid(right) * (1 - exp(left - right)) + eps)`,
            which is right in both tails.

    Differentiable with respect to `mu` and `log_scale`.

    Raises:
        TypeError, ValueError: wrong kinds, shapes, dtypes, devices, `num_classes` < 2, negative
            `eps`, unknown `clamp`.
    """

    def __init__(
        self,
        mu: Tensor,
        log_scale: Tensor,
        num_classes: int,
        eps: float = 1e-6,
        clamp: Literal["left", "min"] = "left",
    ):
        check_floating(mu, "mu")
        check_floating(log_scale, "log_scale")
        if mu.shape != log_scale.shape:
            raise ValueError(
                f"log_scale must have the shape of mu {tuple(mu.shape)}, "
                f"got {tuple(log_scale.shape)}"
            )
        check_same_device(log_scale, "log_scale", mu, "mu")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int):
            raise TypeError(f"num_classes must be an int, got {describe(num_classes)}")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not 0.0 <= eps < 1.0 or math.isnan(eps):
            raise ValueError(f"eps must be in [0, 1), got {eps}")
        if clamp not in ("left", "min"):
            raise ValueError(f'clamp must be "left" or "min", got {clamp!r}')
        self.mu = mu
        self.log_scale = log_scale
        self.num_classes = num_classes
        self.eps = eps
        self.clamp: Literal["left", "min"] = clamp

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.mu.shape, self.num_classes))

    @property
    def dtype(self) -> torch.dtype:
        return self.mu.dtype

    @property
    def device(self) -> torch.device:
        return self.mu.device

    def take(self, rows: Tensor) -> LogisticHead:
        check_int64(rows, "rows")
        leading = self.mu.shape
        return self.with_tensors(
            [_take_leading(tensor, rows, leading) for tensor in (self.mu, self.log_scale)]
        )

    def logits(self) -> Tensor:
        work = torch.promote_types(self.dtype, torch.float32)
        edges = torch.linspace(-1.0, 1.0, self.num_classes + 1, device=self.device, dtype=work)
        inverse_scale = torch.exp(2.0 - self.log_scale.to(work)).unsqueeze(-1)
        scaled = (edges - self.mu.to(work).unsqueeze(-1)) * inverse_scale
        left, right = scaled[..., :-1], scaled[..., 1:]
        # 1 - F(left)/F(right) = F(-left) (1 - e^(left - right)): the product has no cancellation.
        width = -torch.expm1(inverse_scale * (-2.0 / self.num_classes))
        if self.eps == 0.0:  # the plain bin, where both forms agree; its mass may underflow
            return F.logsigmoid(right) + F.logsigmoid(-left) + torch.log(width)
        logits = F.logsigmoid(right) + torch.log(torch.sigmoid(-left) * width + self.eps)
        if self.clamp == "min":
            upper = F.logsigmoid(-left) + torch.log(torch.sigmoid(right) * width + self.eps)
            logits = torch.minimum(logits, upper)
        return logits

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.mu, self.log_scale)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> LogisticHead:
        mu, log_scale = tensors
        assert mu is not None
        assert log_scale is not None
        head = copy.copy(self)
        head.mu, head.log_scale = mu, log_scale
        return head
