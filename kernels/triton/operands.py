"""How the kernels address the logits of one operand (student, teacher or consistency)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ._tl import LOGISTIC_LEFT, LOGISTIC_MIN, LOGITS

MAX_ALIGN_BYTES = 16  # the widest load of one thread


@dataclasses.dataclass(frozen=True)
class Operand:
    """Logits (B, C, D, V), or two numbers per row from which the kernels compute them.

    The row of component c at slot i, which is position d of example b, starts at element
    i·strides[0] + b·strides[1] + c·strides[2] + d·strides[3] of `x` (and of `y`). A tensor of all
    positions has strides[0] = 0; a buffer of the positions of one chunk has strides[1] =
    strides[3] = 0.
    """

    x: Tensor
    y: Tensor
    components: int
    vocabulary: int
    strides: tuple[int, int, int, int]
    kind: int = LOGITS
    eps: float = 0.0

    @property
    def align(self) -> int:
        """The largest power of two of elements that divides every stride, up to 16 bytes."""
        if self.kind != LOGITS:
            return 1
        align = MAX_ALIGN_BYTES // self.x.element_size()
        # Without a base address that is aligned itself, wide loads are impossible.
        if self.x.data_ptr() % MAX_ALIGN_BYTES:
            return 1
        while align > 1 and any(stride % align for stride in self.strides):
            align //= 2
        return align


def tensor_operand(logits: Tensor) -> Operand:
    """Logits (B, C, D, V) of any strides but along V, which are copied unless contiguous."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    stride_b, stride_c, stride_d, _ = logits.stride()
    strides = (0, stride_b, stride_c, stride_d)
    return Operand(logits, logits, logits.shape[1], logits.shape[-1], strides)


def chunk_operand(logits: Tensor) -> Operand:
    """Logits (P, C, V) of the P positions of one chunk."""
    stride_i, stride_c, _ = logits.stride()
    return Operand(logits, logits, logits.shape[1], logits.shape[-1], (stride_i, 0, stride_c, 0))


def logistic_operand(
    mu: Tensor, log_scale: Tensor, num_classes: int, eps: float, clamp: str
) -> Operand:
    """Discretised logistics with mu and log_scale (B, C, D)."""
    if mu.stride() != log_scale.stride():
        mu, log_scale = mu.contiguous(), log_scale.contiguous()
    stride_b, stride_c, stride_d = mu.stride()
    kind = LOGISTIC_MIN if clamp == "min" else LOGISTIC_LEFT
    strides = (0, stride_b, stride_c, stride_d)
    return Operand(mu, log_scale, mu.shape[1], num_classes, strides, kind, eps)


def load_align(operand: Operand, block_components: int) -> int:
    """Elements of one load in a tile of several components.

    A thread that owns few columns of all components reduces over them without its neighbours, and
    keeps few values per column; so wide loads are for tiles of few components. 4 bytes per
    thread fill a cache line per warp, and are the least that an asynchronous copy takes.
    """
    least = max(1, 4 // operand.x.element_size())
    return min(operand.align, max(least, 16 // block_components))


@dataclasses.dataclass(frozen=True)
class Visit:
    """Which positions a launch visits: slots `first` .. `first + slots - 1`.

    With `rows` (int64, active positions first, then the others) slot s is position rows[s], and
    only the first `count` (() int64, on the device) are worked on; without, slot s is position s.
    """

    slots: int
    first: int = 0
    rows: Tensor | None = None
    count: Tensor | None = None

    def arguments(self, like: Tensor) -> tuple[Tensor, Tensor, int, bool]:
        if self.rows is None or self.count is None:
            return like, like, self.first, False
        return self.rows, self.count, self.first, True


def order_positions(active: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of `active` (B, D) bool with the active ones first, and how many those are.

    Both stay on the device: (B·D,) int64 and () int64. The order within each group is kept.
    """
    flat = active.reshape(-1)
    number = flat.cumsum(0)
    count = number[-1] if flat.numel() else number.sum()
    index = torch.arange(flat.numel(), device=flat.device)
    place = torch.where(flat, number - 1, count + index - number)
    return torch.empty_like(index).scatter_(0, place, index), count.clone()
