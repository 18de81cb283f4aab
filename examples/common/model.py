"""What the denoisers of the examples share: patches of tokens, a transformer, a head.

Shapes: R rows, T patches of P tokens, C width, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HEADS = 4

Model = TypeVar("Model", bound=nn.Module)


class Block(nn.Module):
    """Pre-norm attention and MLP, (R, T, C) to (R, T, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, place: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """place: what queries and keys (R, heads, T, C / heads) go through, if anything."""
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = rearrange(qkv, "r t (s h c) -> s r h t c", s=3, h=HEADS)
        if place is not None:
            q, k = place(q), place(k)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attention_out(rearrange(mixed, "r h t c -> r t (h c)"))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class PatchDenoiser(nn.Module):
    """Base of the denoisers. A patch is the sum of its tokens' embeddings, one table per place.

    A subclass makes its parts in the order in which they draw their random start: `tokens`, what
    is its own, `make_body`, what depends on λ, `start`.

    Args:
        vocabulary: V.
        patch: P.
        width: C.
    """

    offsets: Tensor
    latent: nn.Module | None

    def __init__(self, vocabulary: int, patch: int, width: int):
        super().__init__()
        self.vocabulary, self.patch, self.width = vocabulary, patch, width
        self.tokens = nn.Embedding(patch * vocabulary, width)
        self.register_buffer("offsets", torch.arange(patch) * vocabulary, persistent=False)

    def make_body(self, layers: int, outputs: int) -> None:
        """Blocks, and a head of `outputs` numbers per token."""
        self.blocks = nn.ModuleList(Block(self.width) for _ in range(layers))
        self.norm = nn.LayerNorm(self.width)
        self.head = nn.Linear(self.width, self.patch * outputs)

    def start(self) -> None:
        nn.init.normal_(self.tokens.weight, std=1.0 / math.sqrt(self.patch))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def embed(self, patches: Tensor) -> Tensor:
        """(R, T, P) int64 to (R, T, C)."""
        return self.tokens(patches + self.offsets).sum(dim=2)

    def run(self, x: Tensor, place: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(R, T, C) through blocks and head."""
        for block in self.blocks:
            x = block(x, place)
        return self.head(self.norm(x))


def check_given(value: Tensor | None, part: nn.Module | None, name: str) -> None:
    """A model must be given what it has a part for, and nothing else."""
    if (value is None) != (part is None):
        takes = "needs" if value is None else "takes no"
        raise ValueError(f"this model {takes} {name}")


def start_from(teacher: nn.Module, student: Model) -> Model:
    """The student with the teacher's weights; what depends on λ starts at its random start.

    The start must not be zero: components that are equal have the gradient of one component,
    and would stay equal.
    """
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("latent.") for name in missing)
    return student
