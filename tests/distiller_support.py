"""Distillers with optimisers and schedules, and all that their checkpoints must bring back."""

from __future__ import annotations

import copy
import json
import math

import torch
from distill_support import CONFIG, MASK, PROCESS, B, D, Recorder, rng
from torch import Tensor

from di4c_fast.training import EMA, Distiller
from di4c_fast.training.checkpoint import encode

BATCHES = torch.randint(MASK, (16, B, D), generator=torch.Generator().manual_seed(7))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.96), weight_decay=0.1)


def exponential(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def warm_up_then_cosine(optimizer):
    schedules = torch.optim.lr_scheduler
    parts = [
        schedules.LinearLR(optimizer, 0.1, total_iters=2),
        schedules.CosineAnnealingLR(optimizer, 10),
    ]
    return schedules.SequentialLR(optimizer, parts, milestones=[2])


def milestones(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 2, 3])


def make(optimizer=sgd, schedule=None, seed=0, student=None, average=None, **options) -> Distiller:
    """A distiller; `optimizer` is made from parameters, `schedule` from the optimiser."""
    student = Recorder(True) if student is None else student
    optimizer = optimizer(student.parameters())
    options = {
        "process": PROCESS,
        "config": CONFIG,
        "generator": rng(seed),
        "scheduler": None if schedule is None else schedule(optimizer),
        "ema": None if average is None else EMA(student, average),
        **options,
    }
    return Distiller(student, Recorder(False, seed=1), optimizer, **options)


def make_full(optimizer=adam, schedule=None, seed=0, student=None, average=0.9, **options):
    """A distiller with everything that a checkpoint has to bring back."""
    student = Recorder(True, seed=seed, dropout=0.2) if student is None else student
    options = {"clip_norm": 5.0, "accumulate": 2, **options}
    return make(optimizer, schedule, seed, student, average, **options)


def break_gradient(distiller, times: int = 1) -> None:
    """Make the next gradients of a bias infinite."""
    left = [times]

    def hook(gradient):
        left[0] -= 1
        return gradient * math.inf if left[0] >= 0 else gradient

    distiller.student.out.bias.register_hook(hook)


def run(distiller, first: int, last: int) -> list[dict[str, Tensor]]:
    return [distiller.step(batch) for batch in BATCHES[first:last]]


def everything(distiller) -> dict[str, Tensor]:
    """Every number that training depends on, by name."""
    tensors: dict[str, Tensor] = {}
    states = copy.deepcopy(distiller._states())
    plain = encode(states, "states", tensors)
    tensors = {name: value.clone() for name, value in tensors.items()}
    for name, p in distiller.student.named_parameters():
        if distiller.pending:
            tensors[f"gradient/{name}"] = p.grad.clone()
    plain = [plain, distiller.iterations, distiller.examples, distiller.pending]
    tensors["plain"] = torch.tensor(list(json.dumps(plain).encode()))
    return tensors


def assert_same(ours, expected) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
