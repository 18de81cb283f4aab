"""Rows cut into blocks, so that the loss judges a few words at a time.

N components tell at most log N nats about the passage that the loss compares them on, whatever
its length: with 8 components and 128 characters hardly any of the choices between words can be
learned. A component is independent over positions, so what it says of a block is the product over
the block alone, and the mixture over a block is as exact as over the row. `BlockModel` makes each
block of a row an example of `distill_step`, while the model behind it sees whole rows. What is
given up is the dependence between blocks; their borders move from step to step.

Shapes: B rows of D characters, J = D / P blocks of P characters, E = B·J examples (the blocks of a
row adjacent), N components.
"""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange
from torch import Tensor, nn


class BlockModel(nn.Module):
    """A model of rows (R, D), called with blocks (E·N, P) as `distill_step` calls it.

    Component n of the blocks of a row makes up one row, with the λ of all its blocks.

    Args:
        model: tokens (R, D), t (R,) and, for a student, latent (R, L) to logits (R, D, V).
        rows: B.
        blocks: J.
    """

    def __init__(self, model: Callable[..., Tensor], rows: int, blocks: int):
        super().__init__()
        self.model, self.rows, self.blocks = model, rows, blocks

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        latent: Tensor | None = None,
        *,
        shift: Tensor | None = None,
    ) -> Tensor:
        """tokens (E·N, P), t (E·N,), latent (E·N, L / J) to logits (E·N, P, V).

        shift: (E·N,) int64, one number (default 0): the first block starts at this character of
            the row; the last one goes on at the beginning of the row.
        """
        places = 0 if shift is None else int(shift[0])
        whole = join(tokens, self.rows, self.blocks).roll(places, dims=1)
        times = rearrange(t, "(b j n) -> j (b n)", b=self.rows, j=self.blocks)[0]
        if latent is None:
            logits = self.model(whole, times)
        else:
            logits = self.model(whole, times, join(latent, self.rows, self.blocks))
        logits = logits.roll(-places, dims=1)
        return rearrange(logits, "(b n) (j p) v -> (b j n) p v", b=self.rows, j=self.blocks)


def cut(x0: Tensor, blocks: int, shift: int) -> Tensor:
    """Rows (B, D) to the blocks (E, P) that a `BlockModel` with that shift puts together again."""
    return rearrange(x0.roll(-shift, dims=1), "b (j p) -> (b j) p", j=blocks)


def join(parts: Tensor, rows: int, blocks: int) -> Tensor:
    """(B·J·N, X), components of a block adjacent, to (B·N, J·X), components of a row adjacent."""
    return rearrange(parts, "(b j n) x -> (b n) (j x)", b=rows, j=blocks)
