"""The handwritten digits that scikit-learn ships: 1797 real images, 8x8 pixels, 17 levels."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from .config import POSITIONS

SOURCE_LEVELS = 17


@dataclasses.dataclass(frozen=True)
class Digits:
    """tokens: (1797, 64) int64, rows of pixels, in [0, levels). labels: (1797,) int64."""

    tokens: Tensor
    labels: Tensor
    levels: int


def quantise(pixels: np.ndarray, levels: int) -> np.ndarray:
    """Grey values 0..16 to `levels` equal bins 0..levels-1; 17 levels leaves them as they are.

    >>> quantise(np.array([0, 7, 8, 9, 16]), 2).tolist()
    [0, 0, 0, 1, 1]
    """
    if not 2 <= levels <= SOURCE_LEVELS:
        raise ValueError(f"levels must be between 2 and {SOURCE_LEVELS}, got {levels}")
    return pixels.astype(np.int64) * levels // SOURCE_LEVELS


def load(levels: int) -> Digits:
    """The whole data set; it comes with scikit-learn, nothing is downloaded."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits example needs scikit-learn, matplotlib and tqdm: "
            "pip install 'di4c_fast[examples]'"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    tokens = quantise(np.asarray(pixels).reshape(-1, POSITIONS), levels)
    return Digits(torch.from_numpy(tokens), torch.from_numpy(labels.astype(np.int64)), levels)
