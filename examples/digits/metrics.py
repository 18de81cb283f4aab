"""How good samples are: a Fréchet distance and the distance of pairwise pixel joints.

Both compare with the whole data set, which is also what the models were trained on: they measure
how well a model of the data the samples come from, not generalisation.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
from torch import Tensor

from ..common.report import Measure
from .config import POSITIONS
from .data import Digits

MEASURES = (
    Measure("frechet", "Fréchet distance", 2, kept=3),
    Measure("pair_tv", "pixel-pair TV", 4, kept=5),
)
HIDDEN = (64, 32)
PAIR_LEVELS = 4
BOOTSTRAPS = 8


class DigitFeatures:
    """The last hidden layer of a classifier trained on four fifths of the real digits.

    scikit-learn's MLPClassifier, trained with its own seed, the same for every run.

    Attributes:
        accuracy: on the fifth that it did not see.
    """

    def __init__(self, digits: Digits):
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.model_selection import train_test_split
        from sklearn.neural_network import MLPClassifier

        self.levels = digits.levels
        x = self._scaled(digits.tokens.numpy())
        train_x, test_x, train_y, test_y = train_test_split(
            x, digits.labels.numpy(), test_size=0.2, random_state=0, stratify=digits.labels.numpy()
        )
        classifier = MLPClassifier(HIDDEN, alpha=1e-3, max_iter=60, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(train_x, train_y)
        self.accuracy = float(classifier.score(test_x, test_y))
        self._layers = list(zip(classifier.coefs_[:-1], classifier.intercepts_[:-1], strict=True))

    def _scaled(self, tokens: np.ndarray) -> np.ndarray:
        return tokens.astype(np.float64) / (self.levels - 1)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """(S, 64) tokens to (S, 32) activations."""
        x = self._scaled(tokens)
        for weight, bias in self._layers:
            x = np.maximum(x @ weight + bias, 0.0)
        return x


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of two feature sets (S, F).

    The trace of the root is the sum of the roots of the eigenvalues of C_a^½ C_b C_a^½.
    """
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0.0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def pair_joints(tokens: np.ndarray, levels: int) -> np.ndarray:
    """Joint laws of all pairs of pixels: (64, 64, Q, Q), Q = min(levels, 4) equal bins."""
    bins = min(levels, PAIR_LEVELS)
    one_hot = np.eye(bins, dtype=np.float64)[tokens * bins // levels].reshape(len(tokens), -1)
    joint = (one_hot.T @ one_hot / len(tokens)).reshape(POSITIONS, bins, POSITIONS, bins)
    return joint.transpose(0, 2, 1, 3)


def pair_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean total-variation distance over the 2016 pairs of two pixels, in [0, 1]."""
    distance = 0.5 * np.abs(a - b).sum(axis=(2, 3))
    return float(distance[np.triu_indices(POSITIONS, 1)].mean())


@dataclasses.dataclass(frozen=True)
class Score:
    """Distances of a set of samples to the real digits; smaller is better."""

    frechet: float
    pair_tv: float


class Judge:
    """Scores samples against the real digits.

    features: of a classifier trained before; None trains it.
    """

    def __init__(self, digits: Digits, features: DigitFeatures | None = None):
        self.features = features or DigitFeatures(digits)
        self._real = digits.tokens.numpy()
        self._levels = digits.levels
        self._real_features = self.features(self._real)
        self._real_joints = pair_joints(self._real, digits.levels)

    def score(self, samples: Tensor | np.ndarray) -> Score:
        """samples: (S, 64) tokens."""
        tokens = np.asarray(samples)
        return Score(
            frechet_distance(self.features(tokens), self._real_features),
            pair_distance(pair_joints(tokens, self._levels), self._real_joints),
        )

    def noise_floor(self, samples: int) -> Score:
        """What `samples` draws from the real digits themselves score, on average.

        No model of this data set can be expected to score less with as many samples.
        """
        rng = np.random.default_rng(0)
        size = len(self._real)
        scores = [
            self.score(self._real[rng.integers(size, size=samples)]) for _ in range(BOOTSTRAPS)
        ]
        return _mean(scores)


class ClassJudge:
    """Scores samples of given classes against the real digits of the same class.

    Each distance is the mean over the classes of that within a class. Labels alone explain most
    of what tells digits apart: taken over all classes at once, even independent pixels given the
    label come close to the noise floor.

    Attributes:
        classes: how many labels there are; sample i must be of class i mod classes.
    """

    def __init__(self, digits: Digits):
        self.features = DigitFeatures(digits)
        self.classes = int(digits.labels.max()) + 1
        self._judges = []
        for label in range(self.classes):
            mine = digits.labels == label
            some = Digits(digits.tokens[mine], digits.labels[mine], digits.levels)
            self._judges.append(Judge(some, self.features))

    def score(self, samples: Tensor | np.ndarray) -> Score:
        """samples: (S, 64) tokens, the i-th of class i mod `classes`, S >= 2 of each class."""
        tokens = np.asarray(samples)
        judges = enumerate(self._judges)
        return _mean([judge.score(tokens[label :: self.classes]) for label, judge in judges])

    def noise_floor(self, samples: int) -> Score:
        """As `Judge.noise_floor`, with as many draws from each class as the samples have."""
        return _mean([judge.noise_floor(samples // self.classes) for judge in self._judges])


def _mean(scores: list[Score]) -> Score:
    return Score(
        float(np.mean([score.frechet for score in scores])),
        float(np.mean([score.pair_tv for score in scores])),
    )
