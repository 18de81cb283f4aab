"""An n-gram model with interpolated Kneser-Ney smoothing, on arrays.

`nltk.lm` has the same model, but looks up one n-gram at a time in dictionaries and takes minutes
where sorted arrays take a second.

With c_n the counts of n-grams at the highest order and, below it, the number of different tokens
that precede an n-gram in the text, and one discount d_n per order:

    P_n(w | h) = max(c_n(hw) - d_n, 0) / c_n(h) + d_n · kinds(h) / c_n(h) · P_{n-1}(w | h')

where c_n(h) sums c_n(hw) over w, kinds(h) counts the w that follow h, h' is h without its first
token, and P_0 is uniform. A context that was never seen leaves P_{n-1}.

Source: Kneser and Ney 1995; Chen and Goodman 1999 for the interpolation and d = n1 / (n1 + 2 n2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class _Order:
    """Sorted n-grams and contexts as numbers in base V, with their counts."""

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    kinds: np.ndarray
    discount: float


class NGramModel:
    """P(token | the order-1 tokens before it).

    Args:
        texts: token rows (T,), each a text of its own: n-grams do not cross them.
        vocabulary: V, ids are in [0, V).
        order: of the longest n-grams; V^order must be below 2^63.

    Raises:
        ValueError: an order that is too large for V, or no text as long as the order.
    """

    def __init__(self, texts: Iterable[np.ndarray], vocabulary: int, order: int):
        if order < 1 or vocabulary**order >= 2**63:
            raise ValueError(
                f"order must be at least 1 with vocabulary^order < 2^63, "
                f"got order {order} and vocabulary {vocabulary}"
            )
        self.vocabulary, self.order = vocabulary, order
        codes = np.concatenate([self._codes(np.asarray(text), order) for text in texts])
        if not len(codes):
            raise ValueError(f"texts must hold one of at least {order} tokens (the order)")
        grams, counts = np.unique(codes, return_counts=True)
        self._orders = [self._statistics(grams, counts)]
        for length in range(order - 1, 0, -1):
            # Each different longer n-gram is one more token that precedes its end.
            grams, counts = np.unique(grams % vocabulary**length, return_counts=True)
            self._orders.append(self._statistics(grams, counts))
        self._orders.reverse()

    def _codes(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """The n-grams of (..., T) tokens as numbers, (..., T - length + 1)."""
        size = max(0, tokens.shape[-1] - length + 1)
        codes = np.zeros((*tokens.shape[:-1], size), dtype=np.int64)
        for i in range(length):
            codes = codes * self.vocabulary + tokens[..., i : i + size]
        return codes

    def _statistics(self, grams: np.ndarray, counts: np.ndarray) -> _Order:
        contexts, first, kinds = np.unique(
            grams // self.vocabulary, return_index=True, return_counts=True
        )
        totals = np.add.reduceat(counts, first)
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        # Without n-grams seen once the estimate is 0 and nothing would be left for the unseen.
        discount = once / (once + 2 * twice) if once else 0.5
        return _Order(grams, counts, contexts, totals, kinds, min(discount, 0.95))

    def log2_prob(self, tokens: np.ndarray) -> np.ndarray:
        """log2 P of every token that has order-1 tokens before it.

        tokens: (..., T) int in [0, V); returns (..., max(0, T - order + 1)) float64.
        """
        tokens = np.asarray(tokens)
        size = max(0, tokens.shape[-1] - self.order + 1)
        prob = np.full((*tokens.shape[:-1], size), 1.0 / self.vocabulary)
        for length, stored in enumerate(self._orders, start=1):
            codes = self._codes(tokens[..., self.order - length :], length)
            context, known = _find(stored.contexts, codes // self.vocabulary)
            gram, seen = _find(stored.grams, codes)
            total = stored.totals[context]
            count = np.where(seen, np.maximum(stored.counts[gram] - stored.discount, 0.0), 0.0)
            back_off = stored.discount * stored.kinds[context]
            prob = np.where(known, (count + back_off * prob) / total, prob)
        return np.log2(prob)

    def bits(self, tokens: np.ndarray) -> float:
        """Mean -log2 P over the rows of (S, T) tokens: bits per character."""
        return float(-self.log2_prob(tokens).mean())


def _find(ordered: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where values stand in a sorted array, and whether they do."""
    index = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    return index, ordered[index] == values
