"""Chunks of logits for the torch backend: where they are read and where their gradients go.

Shapes: B batch, N components, D positions, V vocabulary, P positions of a chunk, C hidden width.
A chunk holds all N components of P positions (b, d), which may belong to several examples.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ._spare import gradient_memory
from .heads import Head, LinearHead, TensorHead

NEG_INF = float("-inf")
# Bytes of fp32 logits in a chunk. On the CPU a chunk should stay in the second-level caches, yet
# be worth the hundred small operations it costs; on an accelerator it should fill the device.
CPU_CHUNK_BYTES = 8 << 20
ACCELERATOR_CHUNK_BYTES = 128 << 20
# A matrix product of fewer rows than this runs far below its peak rate.
LINEAR_MIN_ROWS = 64
# From this many classes on, writing row by row is faster than one indexed copy.
COPY_ROWS_FROM = 1024
# From this many logits of a position on, it is read straight from the caller's tensor.
DIRECT_FROM = 1 << 15


@dataclasses.dataclass(frozen=True)
class Chunk:
    """P positions: example `b` and position `d` of each, both (P,) int64."""

    index: int
    b: Tensor
    d: Tensor
    start: int  # offset into the list of all active positions

    @property
    def size(self) -> int:
        return self.b.shape[0]

    @property
    def part(self) -> slice:
        """Where the chunk stands in the list of all active positions."""
        return slice(self.start, self.start + self.size)

    def rows(self, components: int, positions: int) -> Tensor:
        """Row numbers (P, components) of a head (B, components, D, V)."""
        component = torch.arange(components, device=self.b.device)
        return (self.b[:, None] * components + component) * positions + self.d[:, None]


@dataclasses.dataclass
class GradientUpdate:
    """The part of dL/dz of a chunk that is not a multiple of the probabilities."""

    index: Tensor  # [P, N, J] target tokens
    kappa: Tensor  # [P, N, J]
    teacher: Tensor | None = None  # [P, V] q_T
    teacher_factor: Tensor | None = None  # [P, N] component_weight * w_n

    def add_to_(self, gradient: Tensor) -> Tensor:
        """Add it to the gradient (P, N, V) of the chunk, in place."""
        if self.teacher is not None:
            assert self.teacher_factor is not None
            factor = self.teacher_factor.unsqueeze(-1)
            gradient.addcmul_(factor, self.teacher.unsqueeze(-2), value=-1.0)
        return gradient.scatter_add_(-1, self.index, self.kappa)

    def positions(self) -> Iterator[GradientUpdate]:
        """The updates of the single positions of the chunk, without their first dimension."""
        if self.teacher is None or self.teacher_factor is None:
            yield from map(GradientUpdate, self.index, self.kappa)
        else:
            parts = (self.index, self.kappa, self.teacher, self.teacher_factor)
            yield from map(GradientUpdate, *parts)


def placeholder(tensor: Tensor | None) -> Tensor | None:
    """A tensor of the same shape, dtype and device that takes no memory and has no values."""
    return None if tensor is None else tensor.detach().new_empty(()).expand(tensor.shape)


def without_tensors(head: Head) -> Head:
    """The head with placeholders for its tensors: what a graph may hold beside them."""
    return head.with_tensors([placeholder(tensor) for tensor in head.tensors()])


def chunks(b: Tensor, d: Tensor, size: int, cut: int = 0) -> Iterator[Chunk]:
    """Chunks of at most `size` positions; none has positions on both sides of `cut`."""
    total = b.shape[0]
    inner = min(cut, total)
    starts = sorted({*range(0, inner, size), *range(inner, total, size)})
    for index, (start, stop) in enumerate(itertools.pairwise([*starts, total])):
        yield Chunk(index, b[start:stop], d[start:stop], start)


class Room:
    """How many bytes may be kept from one sweep to the next, by all that share the room."""

    def __init__(self, size: int):
        self.left = size

    def take(self, size: int) -> bool:
        """Take `size` bytes if they are left."""
        fits = size <= self.left
        if fits:
            self.left -= size
        return fits

    def reserve(self, size: int) -> Room:
        """A room of its own for `size` bytes, or for what is left."""
        part = min(size, self.left)
        self.left -= part
        return Room(part)


class Keep:
    """Tensors by number, as many as there is room for."""

    def __init__(self, room: Room):
        self.room = room
        self._tensors: dict[int, Tensor] = {}

    def put(self, number: int, values: Tensor, *, copy: bool = False) -> None:
        if self.room.take(values.numel() * values.element_size()):
            self._tensors[number] = values.clone() if copy else values

    def get(self, number: int) -> Tensor | None:
        return self._tensors.get(number)


class Source(abc.ABC):
    """Logits of a head (B, N, D, V) by chunk, and the gradients of the tensors behind it.

    Args:
        head: shape (B, N, D, V), or (B, D, V) for N = 1.
        dtype: of the chunks.
        needs_grad: for each tensor of `head.tensors()`, whether its gradient is asked for.

    What is loaded may lie in memory that the next load of the same source uses again.
    """

    def __init__(self, head: Head, dtype: torch.dtype, needs_grad: tuple[bool, ...] = ()):
        self.head = head.detach()
        self.dtype = dtype
        self.components = head.shape[1] if len(head.shape) == 4 else 1
        self.positions, self.vocabulary = head.shape[-2:]
        self.needs_grad = needs_grad or (False,) * len(head.tensors())
        self._kept = Keep(Room(0))
        self._buffer: Tensor | None = None

    @property
    def wants_gradient(self) -> bool:
        return any(self.needs_grad)

    @property
    def chunk_bytes(self) -> int:
        if self.head.device.type != "cpu":
            return ACCELERATOR_CHUNK_BYTES
        return CPU_CHUNK_BYTES

    @property
    def min_positions(self) -> int:
        return 1

    def chunk_size(self) -> int:
        """Positions in a chunk."""
        item = torch.empty((), dtype=self.dtype).element_size()
        per_position = max(1, self.components * self.vocabulary * item)
        return max(self.min_positions, self.chunk_bytes // per_position)

    @abc.abstractmethod
    def load(self, chunk: Chunk) -> Tensor:
        """Logits (P, N, V) of the chunk, which the caller may overwrite."""

    def load_shifted(self, chunk: Chunk, mask_id: int | None) -> tuple[Tensor, Tensor]:
        """Logits (P, N, V) minus the largest of their row, and that, (P, N).

        The mask column is -inf. A row without a class is left as it is, with 0 for its largest.
        """
        logits = self.load(chunk)
        if mask_id is not None:
            logits[..., mask_id].fill_(NEG_INF)
        peak = logits.amax(-1)
        peak = torch.where(peak == NEG_INF, 0.0, peak)
        return logits.sub_(peak.unsqueeze(-1)), peak

    def load_exponentials(self, chunk: Chunk, mask_id: int | None) -> Tensor | None:
        """exp(logits) (P, N, V) as they are, 0 in the mask column; too large or too small if so.

        None where this is no cheaper than `load_shifted`, or the result cannot be looked at
        without waiting for a device.
        """
        return None

    def buffer(self, chunk: Chunk) -> Tensor | None:
        """Memory (P, N, V) that holds nothing but what was loaded last, where there is some."""
        return None

    def release(self) -> None:
        """Let go of the memory that loads use; a later load takes it again."""
        self._buffer = None

    @abc.abstractmethod
    def store_gradient(self, chunk: Chunk, gradient: Tensor) -> None:
        """Add dL/dlogits (P, N, V) of the chunk to the gradients. `gradient` may be overwritten."""

    @abc.abstractmethod
    def gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of `head.tensors()`, None where none was asked for."""

    @property
    def keep_bytes(self) -> int:
        """How much may be kept from one sweep to the next, by all sources of an evaluation."""
        return 4 * self.chunk_bytes

    def keep_within(self, room: Room) -> None:
        """Where values are kept from now on; without this call none are."""
        self._kept = Keep(room)

    def keep(self, chunk: Chunk, values: Tensor) -> None:
        """Keep values of a chunk for a later sweep if there is room."""
        self._kept.put(chunk.index, values, copy=self.buffer(chunk) is not None)

    def kept(self, chunk: Chunk) -> Tensor | None:
        """The values kept for a chunk, or None."""
        return self._kept.get(chunk.index)

    @property
    def writes_directly(self) -> bool:
        """Whether `write_gradient` may be used for chunks that `load_exponentials` gave."""
        return False

    def write_gradient(
        self, chunk: Chunk, mask_id: int | None, factor: Tensor, update: GradientUpdate
    ) -> None:
        """Write exp(logits) * factor + `update` straight into the gradient tensor.

        `factor` broadcasts to (P, N, V). The exponentials are computed once more, which is cheaper
        than a copy of them on their way through memory.
        """
        raise NotImplementedError


def make_source(
    head: Head,
    dtype: torch.dtype,
    needs_grad: tuple[bool, ...] = (),
    active: Tensor | None = None,
) -> Source:
    """The source of a head. A gradient is stored at all `active` (B, D) positions; None: at all."""
    # Not isinstance: a subclass may compute its logits in another way.
    if type(head) is TensorHead:
        return TensorSource(head, dtype, needs_grad, active)
    if type(head) is LinearHead:
        return LinearSource(head, dtype, needs_grad)
    return AutogradSource(head, dtype, needs_grad)


class TensorSource(Source):
    """Logits that exist."""

    def __init__(
        self,
        head: TensorHead,
        dtype: torch.dtype,
        needs_grad: tuple[bool, ...] = (),
        active: Tensor | None = None,
    ):
        super().__init__(head, dtype, needs_grad)
        logits = self.head.logits()
        self.logits = logits if logits.ndim == 4 else logits.unsqueeze(1)
        self._by_row = _rows_of(self.logits)
        self.gradient: Tensor | None = None
        if self.wants_gradient:
            self.gradient = self._new_gradient(active)

    def _new_gradient(self, active: Tensor | None) -> Tensor:
        """Zero at all positions that are not active; those that are will be written."""
        # Not zeros_like: the gradient of an expanded tensor needs memory of its own.
        shape, dtype, device = self.logits.shape, self.logits.dtype, self.logits.device
        if device.type != "cpu" or torch.compiler.is_compiling():
            return torch.zeros(shape, dtype=dtype, device=device)
        gradient, zero = gradient_memory(shape, dtype)
        if zero or active is None:
            return gradient
        if self.vocabulary < COPY_ROWS_FROM:
            return gradient.zero_()
        for b, d in (~active).nonzero().tolist():
            gradient[b].select(1, d).zero_()
        return gradient

    @property
    def keep_bytes(self) -> int:
        # Beside the gradient of the logits, an eighth of their size is little.
        logits = self.head.logits()
        return max(self.chunk_bytes, logits.numel() * self.dtype.itemsize // 8)

    def buffer(self, chunk: Chunk) -> Tensor:
        count = chunk.size * self.components
        if self._buffer is None or self._buffer.shape[0] < count:
            shape = (count, self.vocabulary)
            self._buffer = torch.empty(shape, dtype=self.dtype, device=self.logits.device)
        return self._buffer[:count].view(chunk.size, self.components, self.vocabulary)

    def load(self, chunk: Chunk) -> Tensor:
        values = self.buffer(chunk)
        if self._by_row is None:
            return values.copy_(self.logits[chunk.b, :, chunk.d])
        rows = chunk.rows(self.components, self.positions).flatten()
        if self._by_row.dtype == values.dtype:
            torch.index_select(self._by_row, 0, rows, out=values.flatten(0, 1))
            return values
        return values.copy_(self._by_row.index_select(0, rows).view(values.shape))

    def load_exponentials(self, chunk: Chunk, mask_id: int | None) -> Tensor | None:
        if self.logits.device.type != "cpu" or self.logits.dtype != self.dtype:
            return None
        values = self.buffer(chunk)
        if self.components * self.vocabulary < DIRECT_FROM:
            self.load(chunk).exp_()
        else:
            for to, logits in zip(values, _positions_of(self.logits, chunk), strict=True):
                torch.exp(logits, out=to)
        if mask_id is not None:
            values[..., mask_id].fill_(0.0)
        return values

    @property
    def writes_directly(self) -> bool:
        return (
            self.gradient is not None
            and self.gradient.dtype == self.dtype
            and self.components * self.vocabulary >= DIRECT_FROM
        )

    def write_gradient(
        self, chunk: Chunk, mask_id: int | None, factor: Tensor, update: GradientUpdate
    ) -> None:
        assert self.gradient is not None
        parts = zip(
            _positions_of(self.gradient, chunk),
            _positions_of(self.logits, chunk),
            factor,
            update.positions(),
            strict=True,
        )
        for to, logits, scale, one in parts:
            torch.exp(logits, out=to)
            if mask_id is not None:
                to[:, mask_id].fill_(0.0)
            one.add_to_(to.mul_(scale))

    def store_gradient(self, chunk: Chunk, gradient: Tensor) -> None:
        assert self.gradient is not None
        if not self._writes_by_row:
            self.gradient[chunk.b, :, chunk.d] = gradient.to(self.gradient.dtype)
            return
        for to, values in zip(_positions_of(self.gradient, chunk), gradient, strict=True):
            to.copy_(values)

    def gradients(self) -> tuple[Tensor | None, ...]:
        if self.gradient is None:
            return (None,)
        return (self.gradient.view(self.head.shape),)

    @property
    def _writes_by_row(self) -> bool:
        return self.logits.device.type == "cpu" and self.vocabulary >= COPY_ROWS_FROM


def _positions_of(tensor: Tensor, chunk: Chunk) -> Iterator[Tensor]:
    """Views (N, V) of a tensor (B, N, D, V), one for each position of the chunk."""
    for b, d in zip(chunk.b.tolist(), chunk.d.tolist(), strict=True):
        yield tensor[b].select(1, d)


def _rows_of(tensor: Tensor) -> Tensor | None:
    """A tensor (..., V) as (rows, V) if that needs no copy."""
    try:
        return tensor.view(tensor.shape[:-1].numel(), tensor.shape[-1])
    except RuntimeError:
        return None


class LinearSource(Source):
    """Logits of a linear layer, multiplied chunk by chunk; dW is summed in the compute dtype."""

    head: LinearHead

    def __init__(self, head: LinearHead, dtype: torch.dtype, needs_grad: tuple[bool, ...] = ()):
        super().__init__(head, dtype, needs_grad)
        hidden, weight, bias = self.head.hidden, self.head.weight, self.head.bias
        self.weight = weight.to(hidden.dtype)
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None
        needs_hidden, needs_weight, needs_bias = self.needs_grad
        if needs_hidden:
            rows = hidden.shape[:-1].numel()
            self.grad_hidden = hidden.new_zeros(rows, hidden.shape[-1])
        if needs_weight:
            self.grad_weight = torch.zeros_like(weight, dtype=dtype)
        if needs_bias:
            assert bias is not None
            self.grad_bias = torch.zeros_like(bias, dtype=dtype)

    @property
    def chunk_bytes(self) -> int:
        if self.head.budget_bytes is not None:
            # The chunk, its scratch space, its gradient and what is kept share the budget.
            return self.head.budget_bytes // 8
        return super().chunk_bytes

    @property
    def keep_bytes(self) -> int:
        return self.chunk_bytes if self.head.budget_bytes is not None else super().keep_bytes

    @property
    def min_positions(self) -> int:
        return -(-LINEAR_MIN_ROWS // self.components)

    def load(self, chunk: Chunk) -> Tensor:
        rows = chunk.rows(self.components, self.positions)
        return (
            self.head.with_tensors((self.head.hidden, self.weight, self.head.bias))
            .take(rows)
            .logits()
            .to(self.dtype)
        )

    def store_gradient(self, chunk: Chunk, gradient: Tensor) -> None:
        rows = chunk.rows(self.components, self.positions).flatten()
        by_row = gradient.flatten(0, 1)  # [P * N, V]
        if self.grad_bias is not None:
            if self.grad_bias.ndim == 1:
                self.grad_bias += by_row.sum(0)
            else:
                self.grad_bias.index_add_(0, self.head.positions(rows), by_row)
        product = by_row.to(self.weight.dtype)
        if self.grad_hidden is not None:
            self.grad_hidden[rows] = product @ self.weight
        if self.grad_weight is not None:
            hidden = self.head.take(rows).hidden  # type: ignore[attr-defined]
            if self.grad_weight.dtype == product.dtype:
                self.grad_weight.addmm_(product.t(), hidden)
            else:
                self.grad_weight += product.t() @ hidden

    def gradients(self) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = self.head.tensors()
        assert hidden is not None
        assert weight is not None
        return (
            None if self.grad_hidden is None else self.grad_hidden.view(hidden.shape),
            None if self.grad_weight is None else self.grad_weight.to(weight.dtype),
            None if self.grad_bias is None or bias is None else self.grad_bias.to(bias.dtype),
        )


class AutogradSource(Source):
    """Any other head: its own `logits()`, differentiated chunk by chunk by autograd.

    A tensor whose leading dimensions are those of the head is taken to hold one entry per row,
    which `take` selects; any other is taken to be shared by all rows.
    """

    def __init__(self, head: Head, dtype: torch.dtype, needs_grad: tuple[bool, ...] = ()):
        super().__init__(head, dtype, needs_grad)
        self.totals = [
            torch.zeros_like(tensor, dtype=dtype) if needed and tensor is not None else None
            for tensor, needed in zip(self.head.tensors(), self.needs_grad, strict=True)
        ]

    def load(self, chunk: Chunk) -> Tensor:
        rows = chunk.rows(self.components, self.positions)
        return self.head.take(rows).logits().to(self.dtype)

    def store_gradient(self, chunk: Chunk, gradient: Tensor) -> None:
        rows = chunk.rows(self.components, self.positions)
        part = self.head.take(rows).detach()
        wanted = [i for i, total in enumerate(self.totals) if total is not None]
        with torch.enable_grad():
            leaves = [
                tensor if tensor is None or i not in wanted else tensor.requires_grad_()
                for i, tensor in enumerate(part.tensors())
            ]
            logits = part.with_tensors(leaves).logits()
        targets = [leaf for i, leaf in enumerate(leaves) if i in wanted and leaf is not None]
        partial = torch.autograd.grad(logits, targets, gradient.to(logits.dtype), allow_unused=True)
        for i, value in zip(wanted, partial, strict=True):
            self._add(i, rows, value)

    def _add(self, index: int, rows: Tensor, value: Tensor | None) -> None:
        total, leading = self.totals[index], self.head.shape[:-1]
        if total is None or value is None:
            return
        if value.shape[: rows.ndim] == rows.shape and total.shape[: len(leading)] == leading:
            by_row = total.view(leading.numel(), *total.shape[len(leading) :])
            by_row.index_add_(0, rows.flatten(), value.flatten(0, rows.ndim - 1).to(total.dtype))
        else:  # a tensor that all rows share
            total += value

    def gradients(self) -> tuple[Tensor | None, ...]:
        return tuple(
            None if total is None or tensor is None else total.to(tensor.dtype)
            for tensor, total in zip(self.head.tensors(), self.totals, strict=True)
        )
