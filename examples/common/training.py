"""Training of teacher and student: a trainer of the library, run until its last iteration."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from di4c_fast.training import EMA, Trainer
from di4c_fast.training.finetune import cosine_rate
from di4c_fast.training.parallel import rank_and_size

from .options import Recipe
from .ranks import Loss, Objective, is_first, mean, shared
from .rundir import RunDirectory, RunError

WARMUP = 50
MAX_GRADIENT_NORM = 1.0
DECAYS = {"teacher": 0.995, "student": 0.99}

Model = TypeVar("Model", bound=nn.Module)


def train(
    role: str,
    model: Model,
    run: RunDirectory,
    config: Recipe,
    seed: int,
    checkpoint_every: int,
    loss: Loss,
    scale: float = 1.0,
) -> Model:
    """The "teacher" or the "student" of a run's seed, trained or resumed, with averaged weights.

    The student draws from the next seed, so that it does not see its teacher's batches again.

    Args:
        loss: the mean over those rows of a batch that belong to this process; every draw comes
            from the generator that it is given.
        scale: `loss` is this many times the one that is reported. Gradients are clipped, and Adam's
            epsilon counts, as if it were not.
    """
    iterations = getattr(config, f"{role}_iterations")
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=getattr(config, f"{role}_lr"),
        betas=(0.9, 0.99),
        eps=1e-8 * scale,
        weight_decay=0.01,
        fused=True,
    )
    trainer = Trainer(
        model,
        optimizer=optimizer,
        ema=EMA(model, DECAYS[role], warmup=False),
        scheduler=LambdaLR(optimizer, lambda i: cosine_rate(i, iterations, WARMUP)),
        clip_norm=MAX_GRADIENT_NORM * scale,
        generator=torch.Generator().manual_seed(seed + (role == "student")),
    )
    rows, size = getattr(config, f"{role}_batch"), rank_and_size()[1]
    if rows < size:
        raise RunError(f"--{role}-batch must be at least {size}, one for each process, got {rows}")
    objective = shared(Objective(model, loss, rows))

    def batch(backward: Callable[..., None]) -> tuple[dict[str, Tensor], int]:
        value, weight = objective(trainer.generator)
        backward(value, weight)
        return {"loss": mean(value.detach(), weight)}, 1

    file = run.file(f"seed-{seed}/{role}")
    losses: list[float] = []
    seconds = 0.0
    if file.exists():
        stored = run.reading(file, lambda: trainer.load(file))
        losses, seconds = stored["losses"], stored["seconds"]
    started = time.perf_counter() - seconds
    initial = len(losses)
    with tqdm(
        total=iterations, initial=initial, desc=role, unit="it", disable=not is_first()
    ) as bar:
        while len(losses) < iterations:
            value = float(trainer.take(batch)["loss"]) / scale
            if not math.isfinite(value):
                raise RunError(
                    f"the loss of the {role} became {value} at iteration {len(losses)}; "
                    f"try a smaller --{role}-lr"
                )
            losses.append(value)
            recent = losses[-50:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
            bar.update()
            if len(losses) % checkpoint_every == 0 or len(losses) == iterations:
                seconds = time.perf_counter() - started
                extra: dict[str, Any] = {"losses": losses, "seconds": seconds}
                run.written(file, lambda extra=extra: trainer.save(file, extra=extra))
    averaged = copy.deepcopy(model)
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
