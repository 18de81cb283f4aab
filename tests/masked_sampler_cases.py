"""For the masked sampler: a denoiser of three tokens with a table per state, a check of counts."""

from __future__ import annotations

import itertools
import math

import torch
from scipy import stats
from torch import Tensor

D, VOCAB, MASK = 3, 4, 3
STATES = VOCAB**D
# A correct implementation fails a check at this bound once in a million seeds.
P_VALUE = 1e-6


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """p-value of counts under probabilities; classes of probability 0 must be empty."""
    possible = probabilities > 0
    assert int(counts[~possible].sum()) == 0
    observed = counts[possible].double().numpy()
    expected = (probabilities[possible].double() / probabilities.double().sum()).numpy()
    return float(stats.chisquare(observed, expected * observed.sum()).pvalue)


def state_of(tokens: Tensor) -> Tensor:
    """Number of a token row (..., D) in base VOCAB."""
    powers = VOCAB ** torch.arange(tokens.shape[-1] - 1, -1, -1)
    return (tokens * powers).sum(-1)


ALL_ROWS = torch.tensor(list(itertools.product(range(VOCAB), repeat=D)))


class TabularDenoiser:
    """Any denoiser of D tokens: one table of logits per state, and per half of λ."""

    def __init__(self, seed: int, latent: bool = False):
        generator = torch.Generator().manual_seed(seed)
        self.table = 1.5 * torch.randn(2 if latent else 1, STATES, D, VOCAB, generator=generator)

    def __call__(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor:
        component = 0 if latent is None else (latent[:, 0] > 0.5).long()
        return self.table[component, state_of(tokens)] * (0.5 + t.view(-1, 1, 1))

    def probabilities(self, t: float, component: int) -> Tensor:
        """(STATES, D, VOCAB) denoising distributions in every state, the mask excluded."""
        logits = self.table[component].double() * (0.5 + t)
        logits[..., MASK] = -math.inf
        return logits.softmax(-1)

    def transition(self, t: float, s: float, component: int) -> Tensor:
        """(STATES, STATES): the naive ancestral step from t to s; s = None is the argmax."""
        probabilities = self.probabilities(t, component)
        if s is None:
            step = torch.nn.functional.one_hot(probabilities.argmax(-1), VOCAB).double()
        else:
            step = probabilities * (t - s) / t
            step[..., MASK] = s / t
        known = ALL_ROWS != MASK
        step[known] = torch.nn.functional.one_hot(ALL_ROWS, VOCAB).double()[known]
        a, b, c = step.unbind(1)
        return torch.einsum("xi,xj,xk->xijk", a, b, c).flatten(1)
