"""Training of teacher and student on the digits, for any system."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from di4c_fast.heads import as_head
from di4c_fast.models import draw_latents
from di4c_fast.training import DistillModule

from ..common.rundir import RunDirectory
from ..common.training import Training, masked_cross_entropy
from .config import POSITIONS, Config
from .data import Digits
from .systems import system_of


def train_teacher(
    config: Config, digits: Digits, run: RunDirectory, seed: int, checkpoint_every: int = 100
) -> nn.Module:
    """The teacher, trained or resumed, with averaged weights."""
    torch.manual_seed(seed)
    system = system_of(config)
    model = system.teacher()

    def loss(generator: torch.Generator, part: slice) -> Tensor:
        x0, labels = draw_batch(digits, config.teacher_batch, generator)
        t = system.times(len(x0), generator)
        xt = system.process.corrupt(x0, t, generator=generator)[part]
        given = {name: value[part] for name, value in system.context(labels, generator).items()}
        head = as_head(model(xt, t[part], **given))
        return masked_cross_entropy(head.logits(), x0[part], system.counted(xt), system.columns)

    return Training("teacher", config, run, seed, checkpoint_every).with_loss(model, loss)


def distill_student(
    config: Config,
    digits: Digits,
    teacher: nn.Module,
    run: RunDirectory,
    seed: int,
    checkpoint_every: int = 100,
) -> nn.Module:
    """The teacher's Di4C student, trained or resumed, with averaged weights."""
    torch.manual_seed(seed + 1)
    system = system_of(config)
    module = DistillModule(
        system.student(teacher), teacher, process=system.process, config=system.recipe()
    )

    def batch(generator: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Any]]:
        x0, labels = draw_batch(digits, config.student_batch, generator)
        t = system.student_times(len(x0), generator)

        def latents(rows: int) -> Tensor:
            drawn = draw_latents(
                len(x0), rows, config.latent_dim, stratified=True, generator=generator
            )
            return drawn[part]

        context = system.context(labels, generator)
        options: dict[str, Any] = {
            "t": t[part],
            "context": {name: value[part] for name, value in context.items()},
            "latent": latents(config.components),
            "latent_u": latents(config.draws),
        }
        if system.process.component_time is not None:
            options["latent_min"] = latents(config.components)
        return x0[part], options

    # The loss is reported per pixel.
    training = Training("student", config, run, seed, checkpoint_every, scale=POSITIONS)
    return training.distilled(module, batch)


def draw_batch(digits: Digits, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(size, 64) images and their labels (size,), drawn with replacement."""
    rows = torch.randint(len(digits.tokens), (size,), generator=generator)
    return digits.tokens[rows], digits.labels[rows]
