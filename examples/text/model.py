"""The denoiser: a transformer over pairs of characters that predicts each of them.

Shapes: R rows, D characters, T = D / 2 patches of 2 characters, C width, V = characters and
the mask token (the last), L latent dimensions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from di4c_fast.models.latent import LatentEmbedding

from .config import HEADS, PATCH, Config

ROTARY_PERIOD = 1000.0


def rotary_angles(places: int, features: int) -> Tensor:
    """(2, places, features / 2): cosines and sines of place·frequency."""
    frequencies = ROTARY_PERIOD ** -(torch.arange(0, features, 2) / features)
    angles = torch.arange(places).unsqueeze(1) * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + half}) of the last dimension by the angle of their place."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class _Block(nn.Module):
    """Pre-norm attention and MLP, (R, T, C) to (R, T, C)."""

    def __init__(self, width: int):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (R, heads, T, C / heads)
        mixed = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class TextDenoiser(nn.Module):
    """Teacher (`latent_dim` 0) and student of the example, as `di4c_fast` calls them.

    The time t is accepted and not used: what a masked denoiser should predict depends on t only
    through the tokens that are left. Places enter by rotary angles alone, so that a passage reads
    the same wherever it stands in the window.

    Args:
        characters: of the alphabet; the mask token is `characters`.
        config: sizes.
        latent_dim: L; 0 for a model without λ. Each number of λ belongs to a stretch of D / L
            characters and enters as a vector that is added to the embeddings of its patches, by
            the same network for every stretch.
    """

    def __init__(self, characters: int, config: Config, latent_dim: int = 0):
        super().__init__()
        self.vocabulary, self.width = characters + 1, config.width
        self.patches = config.length // PATCH
        self.tokens = nn.Embedding(PATCH * self.vocabulary, config.width)
        self.blocks = nn.ModuleList(_Block(config.width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, PATCH * self.vocabulary)
        self.latent = (
            LatentEmbedding(config.width, scale=config.latent_scale) if latent_dim else None
        )
        nn.init.normal_(self.tokens.weight, std=1.0 / math.sqrt(PATCH))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        offsets = torch.arange(PATCH) * self.vocabulary
        self.register_buffer("offsets", offsets, persistent=False)
        angles = rotary_angles(self.patches, config.width // HEADS)
        self.register_buffer("angles", angles, persistent=False)

    offsets: Tensor
    angles: Tensor

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor:
        """tokens (R, D) int64, t (R,), latent (R, L) to logits (R, D, V)."""
        if (latent is None) != (self.latent is None):
            takes = "needs latents" if latent is None else "takes no latents"
            raise ValueError(f"this model {takes}")
        x = self.tokens(tokens.unflatten(-1, (-1, PATCH)) + self.offsets).sum(dim=2)
        if self.latent is not None and latent is not None:
            vectors = self.latent(latent.reshape(-1, 1)).view(*latent.shape, self.width)
            x = x + vectors.repeat_interleave(self.patches // latent.shape[1], dim=1)
        for block in self.blocks:
            x = block(x, self.angles)
        logits = self.head(self.norm(x)).unflatten(-1, (PATCH, self.vocabulary))
        return logits.flatten(1, 2)


def student_from_teacher(teacher: TextDenoiser, config: Config) -> TextDenoiser:
    """A student with the teacher's weights; what depends on λ starts at its random start.

    The start must not be zero: components that are equal have the gradient of one component,
    and would stay equal.
    """
    student = TextDenoiser(teacher.vocabulary - 1, config, config.latent_dim)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("latent.") for name in missing)
    return student
