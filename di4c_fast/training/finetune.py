"""A pretrained masked language model distilled into a few-step student, from its first step on.

    teacher = load_masked_lm("bert-base-uncased")
    corpus = read_corpus("lines.txt", teacher, length=64)
    student, history = finetune(
        teacher, corpus, Recipe(steps=500), "run/checkpoint.safetensors"
    )

`python -m di4c_fast.training` is this as a command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ..checks import check_int, check_within
from ..models.latent import draw_latents
from ..processes import MaskedProcess
from .checkpoint import differences
from .config import DistillConfig
from .corpus import Corpus
from .distiller import Distiller
from .ema import EMA
from .pretrained import Pretrained, student_of

__all__ = ["Recipe", "cosine_rate", "finetune"]

WARMUP = 20
SHOWN = ("data_correlation", "consistency_correlation", "teacher_marginal", "consistency_marginal")


def option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a student is made; docs/your-model.md says what each knob does.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    steps: int = option(500, "optimiser steps")
    batch: int = option(8, "examples of a step")
    components: int = option(8, "N, latent draws of the student per example")
    draws: int = option(2, "K, consistency draws per example")
    layer: int = option(0, "λ joins after so many layers, which are frozen; 0: half of them")
    latent_dim: int = option(1, "L, size of λ")
    latent_scale: float = option(20.0, "factor on λ before its sinusoids")
    lr: float = option(3e-4, "peak learning rate")
    latent_lr: float = option(2e-3, "the same of the embedding of λ")
    teacher_step: float = option(0.1, "longest step of the teacher in time, of 1")
    data_weight: float = option(2.0, "weight of the data correlation term")
    teacher_weight: float = option(3.0, "weight of the distance to the teacher's marginals")
    consistency_weight: float = option(1.0, "weight of the consistency terms")
    time_power: float = option(1.0, "training times are u^power, u uniform; <1 favours noise")
    ema_decay: float = option(0.98, "of the average of the weights")
    seed: int = option(0, "of every draw")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "components", "draws", "latent_dim"):
            check_int(getattr(self, name), name, minimum=1)
        for name in ("layer", "seed"):
            check_int(getattr(self, name), name, minimum=0)
        for name in ("lr", "latent_lr", "latent_scale", "time_power"):
            check_within(getattr(self, name), name, "(0, inf)")
        check_within(self.ema_decay, "ema_decay", "[0, 1)")
        self.distillation()

    def distillation(self) -> DistillConfig:
        """The part that the step needs."""
        return DistillConfig(
            components=self.components,
            draws=self.draws,
            teacher_step=self.teacher_step,
            data_weight=self.data_weight,
            data_schedule="constant",
            teacher_weight=self.teacher_weight,
            consistency_weight=self.consistency_weight,
            low_t=0.0,
            low_t_probability=0.0,
            latent_dim=self.latent_dim,
        )


def finetune(
    teacher: Pretrained,
    corpus: Corpus,
    recipe: Recipe,
    file: str | os.PathLike[str],
    *,
    checkpoint_every: int = 50,
    bf16: bool = False,
    report: Callable[[str], None] = print,
) -> tuple[Pretrained, list[dict[str, float]]]:
    """Train the student of a teacher, or go on where `file`, its checkpoint, stands.

    Args:
        file: the checkpoint; its folder is made.
        checkpoint_every: steps between checkpoints.
        bf16: run the models under autocast in bfloat16.
        report: is given a line of progress now and then.

    Returns:
        The student with averaged weights, frozen, and one record for each part of the training
        between two checkpoints: step, seconds so far, and the means of loss and terms, in nats per
        example.

    Raises:
        ValueError: the checkpoint is damaged, or of another recipe, model or data.
        RuntimeError: another process trains there, or the loss is no longer finite.
        OSError: a checkpoint could not be written; the one before is still there.
    """
    file = pathlib.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    student = student_of(
        teacher,
        layer=recipe.layer or None,
        latent_dim=recipe.latent_dim,
        scale=recipe.latent_scale,
    )
    distiller = _distiller(student, teacher, corpus, recipe)
    device = next(student.model.parameters()).device
    belongs = {"recipe": dataclasses.asdict(recipe), "data": corpus.fingerprint, "bf16": bf16}
    history: list[dict[str, float]] = []
    if file.exists():
        stored = distiller.load(file)
        other = differences(stored["belongs"], belongs)
        if other:
            raise ValueError(
                f"{file} is of another run: {'; '.join(other)}. Repeat that run's options, "
                "or choose another folder"
            )
        history = stored["history"]
        report(f"resumed at step {distiller.iterations} from {file}")
    before = history[-1]["seconds"] if history else 0.0
    started = told = time.perf_counter()
    first, last = distiller.iterations, distiller.iterations
    sums: dict[str, Tensor] = {}
    while distiller.iterations < recipe.steps:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
            metrics = _step(distiller, corpus, recipe, device)
        sums = {name: sums.get(name, 0.0) + metrics[name].double() for name in ("loss", *SHOWN)}
        step, now = distiller.iterations, time.perf_counter()
        ended = step % checkpoint_every == 0 or step == recipe.steps
        if ended or now - told > 30.0 or step == first + 3:
            means = {name: float(total) / (step - last) for name, total in sums.items()}
            if not math.isfinite(means["loss"]):
                raise RuntimeError(
                    f"the loss became {means['loss']} before step {step}: try a smaller lr"
                )
            rate = (now - started) / (step - first)
            report(_line(step, recipe.steps, means, rate))
            told = now
        if ended:
            seconds = before + now - started
            history.append({"step": step, "seconds": round(seconds, 1), **means})
            distiller.save(file, extra={"belongs": belongs, "history": history})
            sums, last = {}, step
    assert distiller.ema is not None
    student.model.load_state_dict({**student.model.state_dict(), **distiller.ema.shadow})
    student.model.requires_grad_(False)
    return student, history


def cosine_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 5%."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * cosine)


def _distiller(
    student: Pretrained, teacher: Pretrained, corpus: Corpus, recipe: Recipe
) -> Distiller:
    latent: Any = student.model.latent
    own = list(latent.parameters())
    rest = [p for p in student.masked_lm.parameters() if p.requires_grad]
    groups = [
        {"params": rest, "lr": recipe.lr},
        {"params": own, "lr": recipe.latent_lr},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    most = int(corpus.valid.sum(1).max())
    positions = float(corpus.valid.sum(1).double().mean())
    return Distiller(
        student.model,
        teacher.model,
        optimizer,
        # Below, less than one token of an example is masked.
        process=MaskedProcess(teacher.mask_id, t_min=1.0 / (most + 1)),
        config=recipe.distillation(),
        ema=EMA(student.model, recipe.ema_decay),
        scheduler=LambdaLR(optimizer, lambda i: cosine_rate(i, recipe.steps, WARMUP)),
        clip_norm=positions,  # the loss is a sum over so many
        generator=torch.Generator().manual_seed(recipe.seed),
    )


def _step(
    distiller: Distiller, corpus: Corpus, recipe: Recipe, device: torch.device
) -> dict[str, Tensor]:
    generator, process = distiller.generator, distiller.process
    assert isinstance(process, MaskedProcess)
    rows = torch.randint(len(corpus), (recipe.batch,), generator=generator)
    part = corpus.take(rows)
    t = process.sample_times(recipe.batch, stratified=True, generator=generator)
    t = t.pow(recipe.time_power).clamp(min=process.t_min)

    def latents(count: int) -> Tensor:
        size = (recipe.batch, count, recipe.latent_dim)
        return draw_latents(*size, stratified=True, generator=generator, device=device)

    return distiller.step(
        part.tokens.to(device),
        t=t.to(device),
        latent=latents(recipe.components),
        latent_u=latents(recipe.draws),
        valid=part.valid.to(device),
        context={name: value.to(device) for name, value in part.context.items()},
    )


def _line(step: int, steps: int, means: dict[str, float], rate: float) -> str:
    left = rate * (steps - step)
    minutes = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    return (
        f"step {step} of {steps}, loss {means['loss']:.3f}, correlation "
        f"{means['data_correlation']:.3f}, marginal {means['teacher_marginal']:.3f} nats, "
        f"{rate:.2f} s a step, {minutes} left"
    )
