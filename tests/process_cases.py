"""For the tests of processes: one of each over five classes, and the exact laws of the Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from di4c_fast.processes import GaussianProcess, MaskedProcess, MaskGITProcess

VOCAB, MASK = 5, 4
# Wide moves and a target that is not flat, so that nothing is symmetric by accident.
SMALL = GaussianProcess(VOCAB, rate_sigma=1.2, target_sigma=2.0, time_base=0.02)
PROCESSES = {
    "masked": MaskedProcess(MASK),
    "maskgit": MaskGITProcess(MASK),
    "maskgit, linear": MaskGITProcess(MASK, schedule="linear", teacher_steps=None),
    "gaussian": SMALL,
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(process: GaussianProcess, s: float, t: float) -> Tensor:
    """Q(s → t) from the matrix exponential."""
    passed = process.time_base * (process.time_exponential**t - process.time_exponential**s)
    return torch.matrix_exp(process.transitions.rate * passed)


def posterior(process: GaussianProcess, p0: Tensor, xt: int, u: float, t: float) -> Tensor:
    """Law of x_u given x_t and p(x_0 | x_t), by enumeration over x_0."""
    joint = exact(process, 0.0, u) * exact(process, u, t)[:, xt]  # [x_0, x_u]
    return p0.double() @ (joint / joint.sum(1, keepdim=True))
