"""Training of teacher and student: one loop that stops and resumes exactly."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from di4c_fast.training.step import EMA

from .options import Recipe
from .rundir import RunDirectory, RunError

WARMUP = 50
FINAL_RATE = 0.05  # of the peak learning rate
MAX_GRADIENT_NORM = 1.0
MOMENTS = ("exp_avg", "exp_avg_sq")

BatchLoss = Callable[[torch.Generator], Tensor]
Model = TypeVar("Model", bound=nn.Module)


def learning_rate(iteration: int, iterations: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to FINAL_RATE of the peak."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * iteration / iterations))
    return peak * min(1.0, (iteration + 1) / WARMUP) * (FINAL_RATE + (1.0 - FINAL_RATE) * cosine)


class Training(Generic[Model]):
    """A training run that continues exactly where its last checkpoint was written.

    State: weights, their moving average, both moments of AdamW, the random generator, and the
    losses so far, whose number is the iteration. Every random draw comes from the one generator.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        batch_loss: BatchLoss,
        run: RunDirectory,
        file: str,
        *,
        iterations: int,
        peak_rate: float,
        decay: float,
        seed: int,
        checkpoint_every: int,
    ):
        self.name, self.model, self.batch_loss = name, model, batch_loss
        self.run, self.file = run, file
        self.iterations, self.peak_rate = iterations, peak_rate
        self.checkpoint_every = checkpoint_every
        self.average = EMA(model, decay, warmup=False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=peak_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []
        self.seconds = 0.0
        self._restore()

    @property
    def iteration(self) -> int:
        return len(self.losses)

    def finish(self) -> Model:
        """Train what is left; the model with its averaged weights, in eval mode."""
        total, every = self.iterations, self.checkpoint_every
        started = time.perf_counter() - self.seconds
        with tqdm(
            total=total, initial=self.iteration, desc=self.name, unit="it", dynamic_ncols=True
        ) as bar:
            while self.iteration < total:
                self._iterate()
                recent = self.losses[-50:]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
                bar.update()
                if self.iteration % every == 0 or self.iteration == total:
                    self.seconds = time.perf_counter() - started
                    self._store()
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for key, value in model.state_dict().items():
                value.copy_(self.average.shadow[key])
        return model.eval().requires_grad_(False)

    def _iterate(self) -> None:
        rate = learning_rate(self.iteration, self.iterations, self.peak_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.batch_loss(self.generator)
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(
                f"the loss of the {self.name} became {value} at iteration {self.iteration}; "
                f"try a smaller --{self.name}-lr"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.average.update()
        self.losses.append(value)

    def _store(self) -> None:
        tensors: dict[str, Tensor] = {}
        tensors |= {f"average/{name}": value for name, value in self.average.shadow.items()}
        for name, parameter in self.model.named_parameters():
            tensors[f"model/{name}"] = parameter
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        tensors["generator"] = self.generator.get_state()
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        self.run.save(self.file, tensors, {"seconds": self.seconds})

    def _restore(self) -> None:
        stored = self.run.load(self.file)
        if stored is None:
            return
        tensors, metadata = stored
        self.seconds = metadata["seconds"]
        self.losses = tensors["losses"].tolist()
        self.generator.set_state(tensors["generator"])
        state = self.average.state_dict()
        state["shadow"] = {name: tensors[f"average/{name}"] for name in state["shadow"]}
        self.average.load_state_dict({**state, "updates": self.iteration})
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model/{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.iteration)),
                    **{moment: tensors[f"{moment}/{name}"] for moment in MOMENTS},
                }


def train(
    role: str,
    model: Model,
    batch_loss: BatchLoss,
    run: RunDirectory,
    config: Recipe,
    seed: int,
    decay: float,
    checkpoint_every: int,
) -> Model:
    """The "teacher" or the "student" of a run's seed, trained or resumed, with averaged weights.

    The student draws from the next seed, so that it does not see its teacher's batches again.
    """
    return Training(
        role,
        model,
        batch_loss,
        run,
        f"seed-{seed}/{role}",
        iterations=getattr(config, f"{role}_iterations"),
        peak_rate=getattr(config, f"{role}_lr"),
        decay=decay,
        seed=seed + (role == "student"),
        checkpoint_every=checkpoint_every,
    ).finish()


def masked_cross_entropy(logits: Tensor, x0: Tensor, masked: Tensor, mask_id: int) -> Tensor:
    """Mean over examples of the mean cross-entropy of an example's masked positions, in nats.

    With t uniform this is the negative bound of masked diffusion per position, whose weight 1/t
    is here 1/(share of masked positions), which has less variance.
    """
    nll = F.cross_entropy(logits[..., :mask_id].flatten(0, 1), x0.flatten(), reduction="none")
    nll = nll.view_as(masked) * masked
    return (nll.sum(1) / masked.sum(1).clamp(min=1)).mean()


def stratified_latents(batch: int, rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """λ (batch, rows, dim), each uniform on [0, 1), one per equal part in each dimension.

    The average of a few components is then close to the average over all λ, so that the
    marginal, which the loss compares with the teacher's, has less noise than with independent λ.
    """
    offset = torch.rand(batch, rows, dim, generator=generator)
    part = torch.rand(batch, rows, dim, generator=generator).argsort(dim=1)
    return (part + offset) / rows
