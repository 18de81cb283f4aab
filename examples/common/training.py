"""Training of teacher and student: a trainer of the library, run until its last iteration."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from di4c_fast.training import EMA, Distiller, DistillModule, Trainer
from di4c_fast.training.finetune import cosine_rate
from di4c_fast.training.parallel import rank_and_size

from .options import Recipe
from .ranks import Loss, Objective, is_first, mean, part_of, shared
from .rundir import RunDirectory, RunError

WARMUP = 50
MAX_GRADIENT_NORM = 1.0
DECAYS = {"teacher": 0.995, "student": 0.99}

Batch = Callable[[torch.Generator, slice], tuple[Tensor, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Training:
    """How one model of a run's seed is trained, or goes on from its checkpoint.

    Args:
        role: "teacher" or "student". The student draws from the next seed, so that it does not see
            its teacher's batches again.
        scale: the loss is this many times the one that is reported. Gradients are clipped, and
            Adam's epsilon counts, as if it were not.
    """

    role: str
    config: Recipe
    run: RunDirectory
    seed: int
    checkpoint_every: int
    scale: float = 1.0

    def option(self, name: str) -> Any:
        return getattr(self.config, f"{self.role}_{name}")

    def with_loss(self, model: nn.Module, loss: Loss) -> nn.Module:
        """The model with averaged weights.

        Args:
            loss: the mean over those rows of a batch that belong to this process; every draw
                comes from the generator that it is given.
        """
        trainer = Trainer(model, **self._options(model))
        objective = trainer.wrapper = shared(Objective(model, loss, self.option("batch")))

        def batch(backward: Callable[..., None]) -> tuple[dict[str, Tensor], int]:
            value, weight = objective(trainer.generator)
            backward(value, weight)
            return {"loss": mean(value.detach(), weight)}, 1

        return self._trained(trainer, lambda: trainer.take(batch))

    def distilled(self, module: DistillModule, batch: Batch) -> nn.Module:
        """The module's student with averaged weights.

        Args:
            batch: from a generator, the rows (of `student_batch`) that belong to this process:
                what `Distiller.step` is given, x0 and the rest by name.
        """
        distiller = Distiller.of(shared(module), **self._options(module.student))
        assert distiller.generator is not None
        part = part_of(self.option("batch"))

        def step() -> dict[str, Tensor]:
            x0, options = batch(distiller.generator, part)
            return distiller.step(x0, return_terms=False, **options)

        return self._trained(distiller, step)

    def _options(self, model: nn.Module) -> dict[str, Any]:
        """What a trainer of the model is made with."""
        rows, size = self.option("batch"), rank_and_size()[1]
        if rows < size:
            raise RunError(
                f"--{self.role}-batch must be at least {size}, one for each process, got {rows}"
            )
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=self.option("lr"),
            betas=(0.9, 0.99),
            eps=1e-8 * self.scale,
            weight_decay=0.01,
            fused=True,
        )
        iterations = self.option("iterations")
        return {
            "optimizer": optimizer,
            "ema": EMA(model, DECAYS[self.role], warmup=False),
            "scheduler": LambdaLR(optimizer, lambda i: cosine_rate(i, iterations, WARMUP)),
            "clip_norm": MAX_GRADIENT_NORM * self.scale,
            "generator": torch.Generator().manual_seed(self.seed + (self.role == "student")),
        }

    def _trained(self, trainer: Trainer, step: Callable[[], dict[str, Tensor]]) -> nn.Module:
        """The trainer's module after the last iteration, with averaged weights."""
        role, iterations = self.role, self.option("iterations")
        file = self.run.file(f"seed-{self.seed}/{role}")
        losses: list[float] = []
        seconds = 0.0
        if file.exists():
            stored = self.run.reading(file, lambda: trainer.load(file))
            losses, seconds = stored["losses"], stored["seconds"]
        started = time.perf_counter() - seconds
        initial = len(losses)
        with tqdm(
            total=iterations, initial=initial, desc=role, unit="it", disable=not is_first()
        ) as bar:
            while len(losses) < iterations:
                value = float(step()["loss"]) / self.scale
                if not math.isfinite(value):
                    raise RunError(
                        f"the loss of the {role} became {value} at iteration {len(losses)}; "
                        f"try a smaller --{role}-lr"
                    )
                losses.append(value)
                recent = losses[-50:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
                bar.update()
                if len(losses) % self.checkpoint_every == 0 or len(losses) == iterations:
                    seconds = time.perf_counter() - started
                    extra: dict[str, Any] = {"losses": losses, "seconds": seconds}
                    self.run.written(file, lambda extra=extra: trainer.save(file, extra=extra))
        averaged = copy.deepcopy(trainer.module)
        assert trainer.ema is not None
        averaged.load_state_dict({**averaged.state_dict(), **trainer.ema.shadow})
        return averaged.eval().requires_grad_(False)


def masked_cross_entropy(logits: Tensor, x0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """Mean over examples of the mean cross-entropy of an example's masked positions, in nats.

    With t uniform this is the negative bound of masked diffusion per position, whose weight 1/t
    is here 1/(share of masked positions), which has less variance.
    """
    nll = F.cross_entropy(logits[..., :mask_id].flatten(0, 1), x0.flatten(), reduction="none")
    nll = nll.view_as(masked) * masked
    return (nll.sum(1) / masked.sum(1).clamp(min=1)).mean()
