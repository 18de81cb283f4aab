"""The denoiser: a transformer over 2x2 patches that predicts all 64 pixels.

Shapes: R rows, D = 64 pixels in reading order, T = 16 patches of P = 4 pixels, C width,
V = levels + 1 tokens (the mask last), L latent dimensions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from di4c_fast.models.latent import LatentEmbedding

from .config import POSITIONS, SIDE

PATCH = 2
PATCH_PIXELS = PATCH * PATCH
PATCHES = POSITIONS // PATCH_PIXELS
HEADS = 4


def patch_order() -> Tensor:
    """(64,) int64: the pixels of patch 0, then of patch 1, ... as indices into reading order."""
    grid = torch.arange(POSITIONS).view(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
    return grid.permute(0, 2, 1, 3).flatten()


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

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (R, heads, T, C / heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class DigitsDenoiser(nn.Module):
    """Teacher (`latent_dim` 0) and student of the example, as `di4c_fast` calls them.

    The time t is accepted and not used: what a masked denoiser should predict depends on t only
    through the tokens that are left.

    Position embeddings have the size of token embeddings; with smaller ones nothing is learned
    from a row of masks in the few iterations there are.

    Args:
        levels: grey levels; the mask token is `levels`.
        width, layers: of the transformer.
        latent_dim: L; 0 for a model without λ. λ enters as one vector per patch, added to the
            embeddings, which learns faster here than one extra token or one vector for all
            patches.
        latent_scale: factor on λ before its sinusoids.
        classes: labels of examples; 0 for a model without. Label `classes` stands for "no label",
            which guidance needs. A label enters as λ does, one vector per patch.
    """

    def __init__(
        self,
        levels: int,
        width: int,
        layers: int,
        latent_dim: int = 0,
        latent_scale: float = 1000.0,
        classes: int = 0,
    ):
        super().__init__()
        self.vocabulary, self.width = levels + 1, width
        self.tokens = nn.Embedding(PATCH_PIXELS * self.vocabulary, width)
        self.places = nn.Parameter(torch.randn(PATCHES, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, PATCH_PIXELS * self.vocabulary)
        self.latent = (
            LatentEmbedding(PATCHES * width, latent_dim, scale=latent_scale) if latent_dim else None
        )
        self.labels = nn.Embedding(classes + 1, PATCHES * width) if classes else None
        nn.init.normal_(self.tokens.weight, std=1.0 / math.sqrt(PATCH_PIXELS))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        order = patch_order()
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", order.argsort(), persistent=False)
        offsets = torch.arange(PATCH_PIXELS) * self.vocabulary
        self.register_buffer("offsets", offsets, persistent=False)

    order: Tensor
    inverse: Tensor
    offsets: Tensor

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        latent: Tensor | None = None,
        *,
        label: Tensor | None = None,
    ) -> Tensor:
        """tokens (R, 64) int64, t (R,), latent (R, L), label (R,) int64 to logits (R, 64, V)."""
        if (latent is None) != (self.latent is None):
            takes = "needs latents" if latent is None else "takes no latents"
            raise ValueError(f"this model {takes}")
        if (label is None) != (self.labels is None):
            takes = "needs labels" if label is None else "takes no labels"
            raise ValueError(f"this model {takes}")
        patches = tokens[:, self.order].unflatten(-1, (PATCHES, PATCH_PIXELS))
        x = self.tokens(patches + self.offsets).sum(dim=2) + self.places
        if self.latent is not None and latent is not None:
            x = x + self.latent(latent).sum(dim=1).unflatten(-1, (PATCHES, self.width))
        if self.labels is not None and label is not None:
            x = x + self.labels(label).unflatten(-1, (PATCHES, self.width))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).unflatten(-1, (PATCH_PIXELS, self.vocabulary))
        return logits.flatten(1, 2)[:, self.inverse]


def student_from_teacher(
    teacher: DigitsDenoiser,
    levels: int,
    width: int,
    layers: int,
    latent_dim: int,
    scale: float,
    classes: int = 0,
) -> DigitsDenoiser:
    """A student with the teacher's weights; what depends on λ starts at its random start.

    The start must not be zero: components that are equal have the gradient of one component,
    and would stay equal.
    """
    student = DigitsDenoiser(levels, width, layers, latent_dim, scale, classes)
    start_from(teacher, student)
    return student


def start_from(teacher: nn.Module, student: nn.Module) -> None:
    """Give a student all weights of its teacher; only `latent` stays as it is."""
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("latent.") for name in missing)
