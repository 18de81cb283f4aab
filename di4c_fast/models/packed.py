"""Packed batches: sequences of unequal length one after the other, for models that take them so.

    rows = unpack(tokens, cu_seqlens)                       # (1, T) and (S + 1,) to (S, L)
    student, teacher = PackedModel(student), PackedModel(teacher)
    output = distill_step(student, teacher, rows.tokens, valid=rows.valid,
                          context={"lengths": rows.lengths}, process=process)

Shapes: S sequences, T positions of all of them, L of the longest, R rows of a call, V classes,
K latent dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_cu_seqlens, check_int, check_rank, check_tensor, check_values
from ..heads import Head, as_head
from .call import Wrapper, check_module

__all__ = ["PackedModel", "Unpacked", "pack", "unpack"]


class Unpacked(NamedTuple):
    """A packed batch as rows of one length."""

    tokens: Tensor  # (S, L, ...)
    valid: Tensor  # (S, L) bool, False where there is padding
    lengths: Tensor  # (S,) int64


def unpack(
    packed: Tensor, cu_seqlens: Tensor, *, length: int | None = None, fill: int = 0
) -> Unpacked:
    """Rows of one length from sequences one after the other.

    Args:
        packed: (1, T, ...) or (T, ...), tokens or anything else that positions have.
        cu_seqlens: (S + 1,) int32 or int64, cumulative lengths 0 .. T.
        length: L; None for the longest there is, which on a GPU waits for the device.
        fill: what padding holds.

    >>> unpack(torch.arange(5), torch.tensor([0, 2, 5])).tokens.tolist()
    [[0, 1, 0], [2, 3, 4]]
    """
    check_tensor(packed, "packed")
    check_rank(packed, "packed", minimum=1)
    flat = packed.squeeze(0) if packed.ndim > 1 and packed.shape[0] == 1 else packed
    lengths = check_cu_seqlens(cu_seqlens, len(flat), packed.device).diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    if length is not None and check_int(length, "length") < longest:
        raise ValueError(f"length must be at least the longest sequence, {longest}, got {length}")
    valid = _valid(lengths, longest if length is None else length)
    tokens = flat.new_full((*valid.shape, *flat.shape[1:]), fill)
    tokens[valid] = flat
    return Unpacked(tokens, valid, lengths)


def pack(rows: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(S, L, ...) and (S,) to (1, T, ...) and cu_seqlens (S + 1,) int32, the way back.

    >>> pack(torch.tensor([[0, 1, 0], [2, 3, 4]]), torch.tensor([2, 3]))
    (tensor([[0, 1, 2, 3, 4]]), tensor([0, 2, 5], dtype=torch.int32))
    """
    most = rows.shape[1]
    check_values((lengths >= 0) & (lengths <= most), f"lengths must be from 0 to {most}", lengths)
    valid = _valid(lengths, most)
    return rows[valid].unsqueeze(0), F.pad(lengths.cumsum(0), (1, 0)).int()


def _valid(lengths: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=lengths.device) < lengths.unsqueeze(-1)


class PackedModel(Wrapper):
    """A model of packed batches as the callable (tokens, t, latent, lengths=, ...) of this package.

    Equivalent PyTorch:

        packed, cu_seqlens = pack(tokens, lengths)
        head = model(packed, t, latent, cu_seqlens=cu_seqlens, **context)   # (1, T, V)
        rows = unpack(head, cu_seqlens)                                     # (R, D, V)

    Steps and samplers hand out rows of one length D and ask for logits of such; the model sees no
    padding. The logits of padding are those of some position and not to be read: give `valid`,
    or a prompt that covers it. Of a `LinearHead` hidden states are laid out in rows, of a
    tensor the logits themselves, which is a copy of all of them: return a `LinearHead`.

    Args:
        model: an `nn.Module` called as model(tokens (1, T), t (R,), cu_seqlens=(R + 1,) int32) or
            with latent (R, K) after t; returns logits (1, T, V) or a head. Row r of `t`, `latent`
            and the context belongs to sequence r.
    """

    def __init__(self, model: nn.Module):
        check_module(model)
        super().__init__(model)

    def forward(
        self, tokens: Tensor, t: Tensor, *latent: Tensor, lengths: Tensor, **context: Any
    ) -> Head:
        """tokens (R, D), t (R,), latent (R, K), lengths (R,) int64 to a head (R, D, V)."""
        packed, cu_seqlens = pack(tokens, lengths)
        head = as_head(self.model(packed, t, *latent, cu_seqlens=cu_seqlens, **context))
        valid = _valid(lengths, tokens.shape[1])
        if tuple(head.shape[:-1]) != tuple(packed.shape):
            raise ValueError(
                f"the model of packed batches must return logits (1, T, V) with T = "
                f"{packed.shape[1]}, got {tuple(head.shape)}"
            )
        if packed.shape[1] == 0:  # nothing but padding
            raise ValueError("lengths must leave a position in some row, got only rows of 0")
        places = (valid.flatten().cumsum(0) - 1).clamp(min=0)
        return head.take(places.view(valid.shape))
