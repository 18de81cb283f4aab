"""The protocol of heads, what the built-in ones share, and heads with excluded columns.

Shapes: V classes, R rows. A row is one vector of V logits; rows are numbered row-major over the
leading dimensions. The work dtype is fp32, or fp64 for fp64 logits.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_int64, check_values
from ..groups import Shard
from ..passes.base import Operand


class Head(abc.ABC):
    """Logits of shape (..., V), computed for the rows that somebody asks for.

    A subclass says its shape, dtype and device, gives the head of some rows (`take`), the logits
    (`logits`), and the tensors behind them (`tensors`, `with_tensors`). Everything is
    differentiable with respect to those tensors: the loss asks `take(rows).logits()` of a few rows
    at a time and sends their gradient back through it.
    """

    budget_bytes: int | None = None
    """How much memory the logits of a chunk may take; None: what the backend finds best."""

    loads_in_place: bool = False
    """Whether `load` takes no memory of the size of the logits beside `out`."""

    shard: Shard | None = None
    """Which columns of the vocabulary these are, where other ranks hold the others."""

    @property
    @abc.abstractmethod
    def shape(self) -> torch.Size:
        """The logical shape of the logits; of a shard, that of its columns."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""

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

    # What follows works for every head; the built-in ones have faster ways.

    @property
    def vocabulary(self) -> int:
        """V, the columns of all ranks together."""
        return self.shape[-1] if self.shard is None else self.shard.vocabulary

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype of arithmetic: fp32 for every input but fp64."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def chunk_dtype(self) -> torch.dtype:
        """The dtype of a buffer for `load`."""
        return self.dtype

    @property
    def prepared_dtype(self) -> torch.dtype:
        """`chunk_dtype` of `prepared()`."""
        return self.chunk_dtype

    @property
    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in self.tensors())

    def facts(self) -> dict[str, Any]:
        """What ranks that share the vocabulary, or positions, have to agree about."""
        kind = type(self).__name__
        return {"kind": kind, "dtype": self.dtype, "budget_bytes": self.budget_bytes}

    def detach(self) -> Head:
        """The same head cut off from the graph."""
        return self.with_tensors([None if t is None else t.detach() for t in self.tensors()])

    def within(self, dtype: torch.dtype) -> Head:
        """The same head with fp32 in place of fp64 tensors, unless `dtype` is fp64: passes in fp32
        read no fp64."""
        if dtype == torch.float64 or self.dtype != torch.float64:
            return self
        double = [t is not None and t.dtype == torch.float64 for t in self.tensors()]
        pairs = zip(self.tensors(), double, strict=True)
        return self.with_tensors([t.float() if wide else t for t, wide in pairs])  # type: ignore[union-attr]

    def prepared(self, *, widen: bool = True) -> Head:
        """The same logits for many calls of `load`: casts of whole tensors are done once.

        widen: half precision may become fp32 where that is faster and more exact; it takes the
        memory of a copy in fp32.
        """
        return self

    def operand(self, passes: Any = None) -> Operand | None:
        """The logits (B, C, D, V) as these passes read them where they are; None if they have to
        be computed."""
        return None

    def row_operand(self, passes: Any = None) -> Operand | None:
        """The same with slots for rows; None if they have to be computed or copied."""
        return None

    def load(self, rows: Tensor, out: Tensor, passes: Any = None) -> None:
        """Compute the logits of some rows: out (*rows.shape, V), of `chunk_dtype`.

        passes: the backend's passes, for a head whose logits they can compute.
        """
        with torch.no_grad():
            out.copy_(self.take(rows).logits())

    def logits_at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Single logits, `logits().flatten(0, -2)[rows, tokens]`: of the shape of `rows`."""
        return self.take(rows).logits().gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    def exclude(self, columns: Tensor) -> Head:
        """The same head with -inf in the given columns, (E,) int64."""
        if self.shard is not None:
            columns = columns[self.shard.owns(columns)] - self.shard.start
        return ExcludingHead(self, columns)

    def unflatten(self, batch: int, components: int) -> Head:
        """(B·N, ..., V) viewed as (B, N, ..., V)."""
        return self.take(self._row_numbers().unflatten(0, (batch, components)))

    def positions_first(self) -> Head:
        """(1, ..., D, V) viewed as (D, ..., 1, V)."""
        return self.take(self._row_numbers().transpose(0, -1))

    def split(self, first: int) -> tuple[Head, Head]:
        """The first entries of the first dimension, and the others."""
        rows = self._row_numbers()
        return self.take(rows[:first]), self.take(rows[first:])

    def encode(self) -> str | None:
        """Everything but the tensors, for `decode_head`; None for a head of one's own."""
        return None

    def new_gradients(self, needs: Sequence[bool]) -> list[Tensor | None]:
        """Sums for `add_gradient`: one for each tensor whose gradient is asked for."""
        return [
            torch.zeros_like(t, dtype=self.work_dtype, memory_format=torch.contiguous_format)
            if need and t is not None
            else None
            for t, need in zip(self.tensors(), needs, strict=True)
        ]

    def add_gradient(
        self, sums: list[Tensor | None], rows: Tensor, gradient: Tensor, logits: Tensor
    ) -> None:
        """Add to `sums` what dL/dlogits (*rows.shape, V) of some rows gives. Rows come once.

        logits: those of the rows, as `load` gives them.
        """
        leaves = [None if t is None else t.detach() for t in self.tensors()]
        wanted = [i for i, total in enumerate(sums) if total is not None]
        with torch.enable_grad():
            inputs = [leaves[i].requires_grad_() for i in wanted]  # type: ignore[union-attr]
            again = self.with_tensors(leaves).take(rows).logits()
            found = torch.autograd.grad(again, inputs, gradient.to(again.dtype), allow_unused=True)
        for i, part in zip(wanted, found, strict=True):
            if part is not None:
                sums[i] += part  # type: ignore[operator]

    def share_gradients(self, sums: list[Tensor | None]) -> list[Tensor | None]:
        """`sums` with what the ranks of a sharded vocabulary have to add up."""
        return sums

    def _row_numbers(self) -> Tensor:
        return torch.arange(self.shape[:-1].numel(), device=self.device).view(self.shape[:-1])

    def __repr__(self) -> str:
        shape = tuple(self.shape)
        return f"{type(self).__name__}(shape={shape}, dtype={self.dtype}, device={self.device})"


def take_leading(tensor: Tensor, rows: Tensor, leading: torch.Size) -> Tensor:
    """`tensor[index of row]` for tensors whose first dimensions are `leading`, of any strides."""
    if len(leading) == 0:
        return tensor.unsqueeze(0)[rows]
    if tensor.is_contiguous():
        flat = tensor.view(leading.numel(), *tensor.shape[len(leading) :])
        return flat.index_select(0, rows.flatten()).view(rows.shape + flat.shape[1:])
    index = []
    for size in reversed(leading[1:]):
        index.append(rows % size)
        rows = rows // size
    at = (rows, *reversed(index))
    return tensor[at]


def set_leading(tensor: Tensor, rows: Tensor, leading: torch.Size, values: Tensor) -> None:
    """`tensor[index of row] = values` for a contiguous tensor."""
    tensor.view(leading.numel(), *tensor.shape[len(leading) :])[rows] = values


class BuiltInHead(Head):
    """What the built-in heads share: some of their tensors have one entry for each row."""

    options: tuple[str, ...] = ()  # attributes that are no tensors

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__bases__:
            if base is not BuiltInHead and issubclass(base, BuiltInHead):
                raise TypeError(
                    f"{cls.__name__} cannot subclass {base.__name__}, which is final: backends "
                    "read what is behind it; subclass di4c_fast.Head"
                )

    def replaced(self, **attributes: Any) -> Any:
        """A copy with other attributes: a loss makes about 17, and `copy.copy` is slow."""
        head = object.__new__(type(self))
        for name, value in {**vars(self), **attributes}.items():
            setattr(head, name, value)
        return head

    @abc.abstractmethod
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> Head:
        """The head with every tensor that belongs to the rows changed."""

    def take(self, rows: Tensor) -> Head:
        check_int64(rows, "rows")
        count = self.shape[:-1].numel()
        check_values((rows >= 0) & (rows < count), f"rows must be in [0, {count})", rows)
        leading = self.shape[:-1]
        return self.map_rows(lambda tensor: take_leading(tensor, rows, leading))

    def unflatten(self, batch: int, components: int) -> Head:
        return self.map_rows(lambda tensor: tensor.unflatten(0, (batch, components)))

    def positions_first(self) -> Head:
        last = len(self.shape) - 2
        return self.map_rows(lambda tensor: tensor.transpose(0, last))

    def split(self, first: int) -> tuple[Head, Head]:
        # One split has one concatenation as its backward; two slices would each fill a whole
        # gradient with zeros.
        sizes = [first, self.shape[0] - first]
        others: list[Tensor] = []

        def front(tensor: Tensor) -> Tensor:
            parts = tensor.split(sizes)
            others.append(parts[1])
            return parts[0]

        head = self.map_rows(front)
        return head, self.map_rows(lambda _: others.pop(0))

    def facts(self) -> dict[str, Any]:
        kinds = [None if t is None else (t.dtype, t.ndim) for t in self.tensors()]
        options = {name: getattr(self, name) for name in self.options}
        return {"kind": type(self).__name__, "tensors": kinds, **options}

    def encode(self) -> str:
        shard = None if self.shard is None else tuple(self.shard)
        options = [repr(getattr(self, name)) for name in self.options]
        return ",".join([repr(type(self).__name__), repr(shard), *options])


class ExcludingHead(Head):
    """Another head with -inf in some columns: see `Head.exclude`."""

    def __init__(self, inner: Head, columns: Tensor):
        check_int64(columns, "columns")
        self.inner, self.columns = inner, columns
        self.budget_bytes, self.shard = inner.budget_bytes, inner.shard
        self.loads_in_place = inner.loads_in_place

    def facts(self) -> dict[str, Any]:
        return self.inner.facts()

    @property
    def shape(self) -> torch.Size:
        return self.inner.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def chunk_dtype(self) -> torch.dtype:
        return self.inner.chunk_dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def take(self, rows: Tensor) -> Head:
        return ExcludingHead(self.inner.take(rows), self.columns)

    def logits(self) -> Tensor:
        return self.inner.logits().index_fill(-1, self.columns, -math.inf)

    def load(self, rows: Tensor, out: Tensor, passes: Any = None) -> None:
        self.inner.load(rows, out, passes)
        out.index_fill_(-1, self.columns, -math.inf)

    def logits_at(self, rows: Tensor, tokens: Tensor) -> Tensor:
        excluded = torch.isin(tokens, self.columns)
        return self.inner.logits_at(rows, tokens).masked_fill(excluded, -math.inf)

    def share_gradients(self, sums: list[Tensor | None]) -> list[Tensor | None]:
        return self.inner.share_gradients(sums)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.inner.tensors()

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Head:
        return ExcludingHead(self.inner.with_tensors(tensors), self.columns)

    @property
    def prepared_dtype(self) -> torch.dtype:
        return self.inner.prepared_dtype

    def prepared(self, *, widen: bool = True) -> Head:
        return ExcludingHead(self.inner.prepared(widen=widen), self.columns)
