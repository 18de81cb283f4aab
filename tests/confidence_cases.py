"""A small denoiser whose calls and rows are noted, and prompts, for the confidence sampler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from di4c_fast.heads import LinearHead

VOCAB, MASK, D, WIDTH = 11, 10, 14, 6


class Recorder(LinearHead):
    """Notes the rows that are taken from the head of a model call."""

    log: list[Tensor]

    def take(self, rows: Tensor) -> LinearHead:
        if self.hidden.ndim == 3:
            self.log.append(rows)
        return super().take(rows)


class Denoiser(nn.Module):
    """Logits that depend on the position, on neighbours, and on the mean of all tokens.

    In float64, so that the order of confidences does not hang on rounding.
    """

    def __init__(self, seed: int = 0, scale: float = 1.5, mask_bias: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.embedding = nn.Parameter(normal(VOCAB, WIDTH))
        self.position = normal(D, WIDTH)
        self.weight = normal(VOCAB, WIDTH) * scale
        self.bias = torch.zeros(VOCAB, dtype=torch.float64)
        self.bias[MASK] = mask_bias
        self.inputs: list[Tensor] = []
        self.times: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.rows: list[Tensor] = []

    def hidden(self, tokens: Tensor, latent: Tensor | None = None) -> Tensor:
        h = self.embedding[tokens]
        h = h + 0.7 * h.roll(1, 1) + self.position[: tokens.shape[1]] + h.mean(1, keepdim=True)
        if latent is not None:
            h = h + latent[:, :1, None].double() * self.position[: tokens.shape[1]]
        return torch.tanh(h)

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> LinearHead:
        self.inputs.append(tokens)
        self.times.append(t)
        if latent is not None:
            self.latents.append(latent)
        head = Recorder(self.hidden(tokens, latent), self.weight, self.bias)
        head.log = self.rows
        return head

    def logits(self, tokens: Tensor) -> Tensor:
        """(D,) -> (D, V), dense."""
        return (self.hidden(tokens[None])[0] @ self.weight.T + self.bias).detach()


def prompts(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(MASK, (batch, length), generator=torch.Generator().manual_seed(seed))
