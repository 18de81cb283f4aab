"""The denoiser: a transformer over 2x2 patches that predicts all 64 pixels.

Shapes: R rows, D = 64 pixels in reading order, T = 16 patches of P = 4 pixels, C width,
V = levels + 1 tokens (the mask last), L latent dimensions.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from di4c_fast.models.latent import LatentEmbedding

from ..common.model import PatchDenoiser, check_given
from .config import POSITIONS, SIDE

PATCH = 2
PATCHES = POSITIONS // PATCH**2


class DigitsBase(PatchDenoiser):
    """A denoiser of 8x8 pixels.

    Position embeddings have the size of token embeddings; with smaller ones nothing is learned
    from a row of masks in the few iterations there are.
    """

    def __init__(self, vocabulary: int, width: int):
        super().__init__(vocabulary, PATCH**2, width)
        self.places = nn.Parameter(torch.randn(PATCHES, width))

    def embed_pixels(self, tokens: Tensor) -> Tensor:
        """(R, 64) in reading order to patches (R, T, C)."""
        h = SIDE // PATCH
        patches = rearrange(tokens, "r (h a w b) -> r (h w) (a b)", h=h, a=PATCH, b=PATCH)
        return self.embed(patches) + self.places

    def run_pixels(self, x: Tensor) -> Tensor:
        """Patches (R, T, C) to the head's numbers for each pixel, (R, 64, outputs)."""
        h = SIDE // PATCH
        return rearrange(self.run(x), "r (h w) (a b v) -> r (h a w b) v", h=h, a=PATCH, b=PATCH)


class DigitsDenoiser(DigitsBase):
    """Teacher (`latent_dim` 0) and student of the example, as `di4c_fast` calls them.

    The time t is accepted and not used: what a masked denoiser should predict depends on t only
    through the tokens that are left.

    Args:
        levels: grey levels; the mask token is `levels`.
        width, layers: of the transformer.
        latent_dim: L; 0 for a model without λ. λ enters as one vector per patch, added to the
            embeddings, which learns faster here than one extra token or one vector for all
            patches.
        latent_scale: factor on λ before its sinusoids.
        classes: labels of examples; 0 for a model without. Label `classes` stands for "no label",
            which guidance needs. A label enters as λ does, one vector per patch.
        latent_fades: λ's vectors are times the share of masked pixels, so that λ says less the
            fewer pixels it could tie together.
    """

    def __init__(
        self,
        levels: int,
        width: int,
        layers: int,
        latent_dim: int = 0,
        latent_scale: float = 1000.0,
        classes: int = 0,
        latent_fades: bool = False,
    ):
        super().__init__(levels + 1, width)
        self.latent_fades = latent_fades
        self.make_body(layers, self.vocabulary)
        self.latent = (
            LatentEmbedding(PATCHES * width, latent_dim, scale=latent_scale) if latent_dim else None
        )
        self.labels = nn.Embedding(classes + 1, PATCHES * width) if classes else None
        self.start()

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        latent: Tensor | None = None,
        *,
        label: Tensor | None = None,
    ) -> Tensor:
        """tokens (R, 64) int64, t (R,), latent (R, L), label (R,) int64 to logits (R, 64, V)."""
        check_given(latent, self.latent, "latents")
        check_given(label, self.labels, "labels")
        x = self.embed_pixels(tokens)
        if self.latent is not None and latent is not None:
            vectors = self.latent(latent).sum(dim=1)
            if self.latent_fades:
                masked = tokens == self.vocabulary - 1
                vectors = vectors * masked.to(x.dtype).mean(dim=1, keepdim=True)
            x = x + rearrange(vectors, "r (t c) -> r t c", t=PATCHES)
        if self.labels is not None and label is not None:
            x = x + rearrange(self.labels(label), "r (t c) -> r t c", t=PATCHES)
        return self.run_pixels(x)
