"""Training of teacher and student on the digits, for any system."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from di4c_fast.heads import as_head
from di4c_fast.models import draw_latents
from di4c_fast.training import distill_step

from ..common.ranks import generators_of
from ..common.rundir import RunDirectory
from ..common.training import masked_cross_entropy, train
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

    return train("teacher", model, run, config, seed, checkpoint_every, loss)


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
    model = system.student(teacher)
    recipe, own_pass = system.recipe(), system.process.component_time is not None

    def loss(generator: torch.Generator, part: slice) -> Tensor:
        x0, labels = draw_batch(digits, config.student_batch, generator)
        t = system.student_times(len(x0), generator)

        def latents(rows: int) -> Tensor:
            drawn = draw_latents(
                len(x0), rows, config.latent_dim, stratified=True, generator=generator
            )
            return drawn[part]

        context = system.context(labels, generator)
        output = distill_step(
            model,
            teacher,
            x0[part],
            process=system.process,
            config=recipe,
            t=t[part],
            latent=latents(config.components),
            latent_u=latents(config.draws),
            latent_min=latents(config.components) if own_pass else None,
            context={name: value[part] for name, value in context.items()},
            generator=generators_of(generator, part),
            return_terms=False,
        )
        return output.loss

    # The loss is reported per pixel.
    return train("student", model, run, config, seed, checkpoint_every, loss, scale=POSITIONS)


def draw_batch(digits: Digits, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(size, 64) images and their labels (size,), drawn with replacement."""
    rows = torch.randint(len(digits.tokens), (size,), generator=generator)
    return digits.tokens[rows], digits.labels[rows]
