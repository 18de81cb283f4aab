"""The denoiser: a transformer over pairs of characters that predicts each of them.

Shapes: R rows, D characters, T = D / 2 patches of 2 characters, C width, V = characters and
the mask token (the last), L latent dimensions.
"""

from __future__ import annotations

import functools

import torch
from einops import rearrange, repeat
from torch import Tensor

from di4c_fast.models.latent import LatentEmbedding

from ..common.model import HEADS, PatchDenoiser, check_given
from .config import PATCH, Config

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


class TextDenoiser(PatchDenoiser):
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

    angles: Tensor

    def __init__(self, characters: int, config: Config, latent_dim: int = 0):
        super().__init__(characters + 1, PATCH, config.width)
        self.make_body(config.layers, self.vocabulary)
        self.latent = (
            LatentEmbedding(config.width, scale=config.latent_scale) if latent_dim else None
        )
        self.start()
        angles = rotary_angles(config.length // PATCH, config.width // HEADS)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor:
        """tokens (R, D) int64, t (R,), latent (R, L) to logits (R, D, V)."""
        check_given(latent, self.latent, "latents")
        x = self.embed(rearrange(tokens, "r (t p) -> r t p", p=PATCH))
        if self.latent is not None and latent is not None:
            # One number at a time, whichever row and stretch it is of.
            vectors = self.latent(rearrange(latent, "r l -> (r l) 1"))
            stretch = x.shape[1] // latent.shape[1]
            x = x + repeat(vectors, "(r l) 1 c -> r (l s) c", r=len(x), s=stretch)
        logits = self.run(x, functools.partial(rotate, angles=self.angles))
        return rearrange(logits, "r t (p v) -> r (t p) v", p=PATCH)
