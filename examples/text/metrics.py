"""How good samples are: two n-gram measures, self-BLEU and repeated passages.

All are taken of held-out real text too, as the point of reference. `bits` alone is fooled by a
model that says little, but says it well; the other three show that.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ..common.report import Measure
from .data import Text, consecutive_windows
from .ngram import NGramModel

MEASURES = (
    Measure("bits", "bits per char.", 3, kept=4),
    Measure("reverse_bits", "reverse bits", 3, kept=4),
    Measure("self_bleu", "self-BLEU", 1, kept=4),
    Measure("repeats", "repeats", 4, kept=4),
)
GROUP = 64
REPEAT_LENGTH = 8


@dataclasses.dataclass(frozen=True)
class Score:
    """What the judge says of a set of samples.

    Attributes:
        bits: per character, under an n-gram model of the training text; smaller is more likely.
        reverse_bits: per character of the held-out text, under an n-gram model of the samples;
            smaller is better, and text that is missing from the samples costs most.
        self_bleu: 0 to 100, the mean BLEU of a sample against others; higher is less diverse.
        repeats: the share of passages of 8 characters that the samples say again.
    """

    bits: float
    reverse_bits: float
    self_bleu: float
    repeats: float


def repeats(samples: np.ndarray, length: int = REPEAT_LENGTH) -> float:
    """1 - (different n-grams) / (n-grams) over all samples (S, D); 0 if none comes twice."""
    grams = np.lib.stride_tricks.sliding_window_view(samples, length, axis=1)
    grams = np.ascontiguousarray(grams.reshape(-1, length))
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)


def self_bleu(texts: list[str], group: int = GROUP) -> float:
    """Mean sentence BLEU of each text against the others of its group, by words, 0 to 100.

    BLEU against many references grows with their number, so sets are comparable at the same
    group size only. What does not fill a last group is left out, unless it is the only one.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError(
            "the text example needs sacrebleu, matplotlib and tqdm: "
            "pip install 'di4c_fast[examples]'"
        ) from error

    bleu = BLEU(tokenize="none", effective_order=True)
    group = min(group, len(texts))
    scores = [
        bleu.sentence_score(text, block[:i] + block[i + 1 :]).score
        for first in range(0, len(texts) - group + 1, group)
        for block in [texts[first : first + group]]
        for i, text in enumerate(block)
    ]
    return float(np.mean(scores))


class Judge:
    """Scores samples of `length` characters against the real text."""

    def __init__(self, text: Text, length: int, order: int):
        self.text, self.order = text, order
        self.model = NGramModel([topic.numpy() for topic in text.train], self.vocabulary, order)
        self.held_out = consecutive_windows(text.held_out, length)

    @property
    def vocabulary(self) -> int:
        return len(self.text.alphabet)

    def score(self, samples: np.ndarray) -> Score:
        """samples: (S, D) tokens without the mask."""
        tokens = np.asarray(samples).astype(np.int64)
        reverse = NGramModel(tokens, self.vocabulary, self.order)
        return Score(
            self.model.bits(tokens),
            reverse.bits(self.held_out),
            self_bleu([self.text.decode(row) for row in tokens]),
            repeats(tokens),
        )

    def real(self, samples: int) -> tuple[Score, int]:
        """What held-out text scores, and how many windows of it: `samples` if there are as many.

        Windows lie side by side and are taken evenly from all of them. For `reverse_bits` the
        samples are windows of the training text, spread in the same way, since held-out text
        cannot be compared with itself.
        """
        count = min(samples, len(self.held_out))
        score = self.score(_spread(self.held_out, count))
        train = consecutive_windows(self.text.train, self.held_out.shape[1])
        reverse = NGramModel(_spread(train, count), self.vocabulary, self.order)
        return dataclasses.replace(score, reverse_bits=reverse.bits(self.held_out)), count


def _spread(windows: np.ndarray, count: int) -> np.ndarray:
    return windows[np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(int)]
