"""Models: how they are called, latents, students made from teachers.

Wrong arguments raise a TypeError or ValueError that names them, what was expected and what came.
"""

from .latent import LatentShift, LatentToken, draw_latents
from .masked_lm import MaskedLM, has_linear_head
from .packed import PackedModel, Unpacked, pack, unpack
from .wrappers import with_latent_shift, with_latent_token

__all__ = [
    "LatentShift",
    "LatentToken",
    "MaskedLM",
    "PackedModel",
    "Unpacked",
    "draw_latents",
    "has_linear_head",
    "pack",
    "unpack",
    "with_latent_shift",
    "with_latent_token",
]
