"""Heads as the fused kernels see them: an operand for all positions, or one per chunk of them.

Shapes: B batch, C components, D positions, V vocabulary, W hidden width, P positions of a chunk.
A custom op takes tensors, numbers and strings only, so a head travels as its tensors and a
`HeadSpec`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .heads import Head, LinearHead, LogisticHead
from .kernels.triton.operands import Operand, chunk_operand, logistic_operand, tensor_operand

TENSOR, LINEAR, LOGISTIC = "tensor", "linear", "logistic"
PADDING = 64  # elements: rows of our own buffers start at multiples of it


def padded(vocabulary: int) -> int:
    """The row stride of a buffer of logits: wide loads, and fast matrix products."""
    return (vocabulary + PADDING - 1) // PADDING * PADDING


@dataclasses.dataclass(frozen=True)
class HeadSpec:
    """Everything about a head but its tensors."""

    kind: str
    num_classes: int = 0
    eps: float = 0.0
    clamp: str = "left"
    budget_bytes: int = 0  # 0: the default of the launch parameters

    def encode(self) -> str:
        return " ".join(str(value) for value in dataclasses.astuple(self))

    @staticmethod
    def decode(text: str) -> HeadSpec:
        kind, num_classes, eps, clamp, budget = text.split(" ")
        return HeadSpec(kind, int(num_classes), float(eps), clamp, int(budget))

    def shape(self, tensors: list[Tensor]) -> tuple[int, int, int, int]:
        """(B, C, D, V) of the head with these tensors; 3-dimensional heads have C = 1."""
        first = tensors[0]
        if self.kind == TENSOR:
            sizes = tuple(first.shape)
        elif self.kind == LINEAR:
            sizes = (*first.shape[:-1], tensors[1].shape[0])
        else:
            sizes = (*first.shape, self.num_classes)
        if len(sizes) == 3:
            sizes = (sizes[0], 1, *sizes[1:])
        batch, components, positions, vocabulary = sizes
        return batch, components, positions, vocabulary


def split_head(head: Head) -> tuple[HeadSpec, list[Tensor]]:
    """The spec and the tensors of a head of shape (B, C, D, V) or (B, D, V).

    A head of a kind that the kernels do not know is turned into its logits.
    """
    if isinstance(head, LogisticHead):
        spec = HeadSpec(LOGISTIC, head.num_classes, head.eps, head.clamp)
        return spec, [head.mu, head.log_scale]
    if isinstance(head, LinearHead):
        if head.weight.numel() == 0:
            raise ValueError(
                f"weight of {head!r} is empty, shape {tuple(head.weight.shape)}: a sharded "
                "parameter has to be gathered first"
            )
        # Rows taken out of another head have their own positions, which only that head knows.
        if head._positions is None:
            optional = [] if head.bias is None else [head.bias]
            spec = HeadSpec(LINEAR, budget_bytes=head.budget_bytes or 0)
            return spec, [head.hidden, head.weight, *optional]
    return HeadSpec(TENSOR), [head.logits()]


class Source:
    """The logits of one head, for all positions or for a chunk of them."""

    def __init__(self, spec: HeadSpec, tensors: list[Tensor]):
        self.spec = spec
        self.batch, self.components, self.positions, self.vocabulary = spec.shape(tensors)
        leading = (self.batch, self.components, self.positions)
        self.whole: Operand | None = None
        if spec.kind == TENSOR:
            logits = _with_components(tensors[0], (*leading, self.vocabulary))
            self.whole = tensor_operand(logits)
        elif spec.kind == LOGISTIC:
            mu, log_scale = (_with_components(tensor, leading) for tensor in tensors)
            self.whole = logistic_operand(mu, log_scale, spec.num_classes, spec.eps, spec.clamp)
        else:
            hidden, weight, *bias = tensors
            self.hidden = _with_components(hidden, (*leading, hidden.shape[-1]))
            self.weight = weight.to(hidden.dtype)
            self.bias = bias[0].to(hidden.dtype) if bias else None
            self._buffer: Tensor | None = None

    @property
    def linear(self) -> bool:
        return self.whole is None

    @property
    def bytes_per_position(self) -> int:
        """Memory of a chunk's logits, per position; 0 if they are there already."""
        if not self.linear:
            return 0
        return self.components * padded(self.vocabulary) * self.hidden.element_size()

    def new_logits(self, positions: int) -> Tensor:
        """An uninitialised buffer (P, C, padded V)."""
        return self.hidden.new_empty(positions, self.components, padded(self.vocabulary))

    def operand(self, index: Tensor, out: Tensor | None = None) -> Operand:
        """The operand of a chunk; a linear head computes it, into `out` or a buffer of its own.

        index: (P,) int64, the chunk's positions b·D + d. A buffer of this object is
        overwritten by the next call.
        """
        if self.whole is not None:
            return self.whole
        if out is None:
            if self._buffer is None or self._buffer.shape[0] < index.shape[0]:
                self._buffer = self.new_logits(index.shape[0])
            out = self._buffer[: index.shape[0]]
        self.logits_into(index, out)
        return chunk_operand(out[..., : self.vocabulary])

    def gather_hidden(self, index: Tensor) -> Tensor:
        """Hidden states of a chunk, (P * C, W)."""
        chunk = self.hidden[index // self.positions, :, index % self.positions]
        return chunk.reshape(-1, chunk.shape[-1])

    def logits_into(self, index: Tensor, out: Tensor) -> None:
        """Matrix product of the chunk's hidden states with the weight, plus the bias."""
        hidden = self.gather_hidden(index)
        flat = out.view(-1, out.shape[-1])[:, : self.vocabulary]
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=flat)
        elif self.bias.ndim == 1:
            torch.addmm(self.bias, hidden, self.weight.t(), out=flat)
        else:
            rows = self.bias[index % self.positions].unsqueeze(1)
            out[..., : self.vocabulary].copy_(rows.expand(-1, self.components, -1))
            flat.addmm_(hidden, self.weight.t())


def _with_components(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.unsqueeze(1) if tensor.ndim == len(shape) - 1 else tensor


class LinearGradient:
    """Gradients of a linear head, gathered chunk by chunk; only those that are needed."""

    def __init__(self, source: Source, tensors: list[Tensor], needs: tuple[bool, ...]):
        self.source, self.tensors = source, tensors
        weight, *bias = tensors[1:]
        self.hidden = None
        if needs[0]:
            self.hidden = torch.zeros_like(source.hidden, memory_format=torch.contiguous_format)
        # Accumulated in fp32 and rounded once: chunks would otherwise each add their rounding.
        work = torch.promote_types(weight.dtype, torch.float32)
        self.weight = torch.zeros_like(weight, dtype=work) if needs[1] else None
        self.bias = torch.zeros_like(bias[0], dtype=work) if bias and needs[2] else None

    def add(self, index: Tensor, grad: Tensor) -> None:
        """Add a chunk: index (P,), grad (P, C, padded V) with respect to its logits."""
        source = self.source
        flat = grad.view(-1, grad.shape[-1])[:, : source.vocabulary]
        b, d = index // source.positions, index % source.positions
        if self.hidden is not None:
            chunk = torch.mm(flat, source.weight)
            self.hidden[b, :, d] = chunk.view(*grad.shape[:2], -1)
        if self.weight is not None:
            _accumulate_product(self.weight, flat, source.gather_hidden(index))
        if self.bias is not None:
            if self.bias.ndim == 1:
                self.bias += flat.sum(0, dtype=self.bias.dtype)
            else:
                rows = grad[..., : source.vocabulary].sum(1, dtype=self.bias.dtype)
                # Sorted accumulation: examples share positions, and results must repeat.
                self.bias.index_put_((d,), rows, accumulate=True)

    def results(self) -> list[Tensor | None]:
        hidden, weight, *bias = self.tensors
        grad_hidden = None if self.hidden is None else self.hidden.view(hidden.shape)
        results = [grad_hidden, _cast(self.weight, weight)]
        return [*results, *(_cast(self.bias, tensor) for tensor in bias)]


def _cast(gradient: Tensor | None, like: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(like.dtype)


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (V, W) += left.T (V, R) @ right (R, W), with fp32 sums."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    elif left.is_cuda and torch.version.hip is None:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype))
