"""Training of teacher and student on the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from di4c_fast.models import draw_latents
from di4c_fast.processes import MaskedProcess
from di4c_fast.training import DistillConfig, DistillModule

from ..common.model import start_from
from ..common.ranks import part_of
from ..common.rundir import RunDirectory
from ..common.training import Training, masked_cross_entropy
from .blocks import BlockModel, cut
from .config import Config
from .data import Text, draw_windows
from .model import TextDenoiser


def draw_batch(text: Text, size: int, length: int, generator: torch.Generator) -> Tensor:
    """(size, length) windows of the training text, drawn with replacement."""
    return draw_windows(text.train, size, length, generator)


def process_of(text: Text, config: Config) -> MaskedProcess:
    """The mask token comes after the characters.

    Times end where one character is masked on average: below, most examples carry no loss.
    """
    return MaskedProcess(len(text.alphabet), t_min=1.0 / config.length)


def train_teacher(
    config: Config, text: Text, run: RunDirectory, seed: int, checkpoint_every: int = 100
) -> nn.Module:
    """The teacher, trained or resumed, with averaged weights."""
    torch.manual_seed(seed)
    model = TextDenoiser(len(text.alphabet), config)
    process = process_of(text, config)

    def loss(generator: torch.Generator, part: slice) -> Tensor:
        x0 = draw_batch(text, config.teacher_batch, config.length, generator)
        t = process.sample_times(len(x0), stratified=True, generator=generator)
        xt = process.corrupt(x0, t, generator=generator)[part]
        logits = model(xt, t[part])
        return masked_cross_entropy(logits, x0[part], xt == process.mask_id, process.mask_id)

    return Training("teacher", config, run, seed, checkpoint_every).with_loss(model, loss)


def distill_student(
    config: Config,
    text: Text,
    teacher: nn.Module,
    run: RunDirectory,
    seed: int,
    checkpoint_every: int = 100,
) -> nn.Module:
    """The teacher's Di4C student, trained or resumed, with averaged weights."""
    torch.manual_seed(seed + 1)
    new = TextDenoiser(len(text.alphabet), config, config.latent_dim)
    process = process_of(text, config)
    recipe = DistillConfig(
        components=config.components,
        draws=config.draws,
        teacher_step=config.teacher_step,
        data_weight=config.data_weight,
        data_schedule="constant",
        teacher_weight=config.teacher_weight,
        low_t=0.0,
        low_t_probability=0.0,
        latent_dim=config.latent_dim * config.block // config.length,
    )

    rows, blocks = config.student_batch, config.length // config.block
    part = part_of(rows)
    models = (
        BlockModel(model, part.stop - part.start, blocks)
        for model in (start_from(teacher, new), teacher)
    )

    def batch(generator: torch.Generator, part: slice) -> tuple[Tensor, dict[str, Any]]:
        x0 = draw_batch(text, rows, config.length, generator)
        t = process.sample_times(rows, stratified=True, generator=generator)
        t = t.pow(config.time_power).clamp(min=process.t_min)
        shift = int(torch.randint(config.block, (1,), generator=generator))
        examples = slice(part.start * blocks, part.stop * blocks)

        def latents(count: int) -> Tensor:
            size = (rows * blocks, count, recipe.latent_dim)
            return draw_latents(*size, stratified=True, generator=generator)[examples]

        t = t[part].repeat_interleave(blocks)
        options = {"latent": latents(config.components), "latent_u": latents(config.draws)}
        context = {"shift": torch.full(t.shape, shift)}
        return cut(x0[part], blocks, shift), {"t": t, "context": context, **options}

    module = DistillModule(*models, process=process, config=recipe)
    # The loss is reported per character.
    training = Training("student", config, run, seed, checkpoint_every, scale=config.block)
    student: Any = training.distilled(module, batch)
    return student.model
