"""The trainer that takes distillation steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_kind
from ..heads import HeadLike
from ..models.call import check_callable
from ..processes.base import Process
from .checkpoint import identity
from .config import DistillConfig, DistillOutput
from .step import distill_step
from .trainer import Backward, Metrics, Trainer

__all__ = ["Distiller"]


class Distiller(Trainer):
    """Trains a student: one optimiser step for every `accumulate` calls of `step`.

        distiller = Distiller(student, teacher, optimizer, process=process, config=config)
        for x0 in batches:
            metrics = distiller.step(x0)
        distiller.save("run.safetensors")

    Args:
        student: an `nn.Module`, called as `distill_step` calls it, in the mode it is in.
        teacher: callable, as for `distill_step`. It is not part of checkpoints. One that is no
            `nn.Module` has no eval mode: its dropout is the caller's to switch off.
        optimizer: over parameters of the student, all or some.
        process, config: as for `distill_step`.
        options: ema, scheduler, clip_norm, accumulate, skip_nonfinite, generator (source of the
            draws of `distill_step`); these, the attributes and the errors as for `Trainer`.
    """

    format = "di4c_fast.Distiller/1"
    role = "student"

    def __init__(
        self,
        student: nn.Module,
        teacher: Callable[..., HeadLike],
        optimizer: torch.optim.Optimizer,
        *,
        process: Process,
        config: DistillConfig | None = None,
        **options: Any,
    ):
        config = DistillConfig() if config is None else config
        check_callable(teacher, "teacher")
        check_kind(process, Process, "process")
        check_kind(config, DistillConfig, "config")
        super().__init__(student, optimizer, **options)
        self.student, self.teacher = student, teacher
        self.process, self.config = process, config

    def step(self, x0: Tensor, **options: Any) -> Metrics:
        """Loss and gradients of one batch; the optimiser steps with every `accumulate`-th.

        An empty batch counts as one whose gradient is 0: momentum and weight decay still act.
        Errors are those of `distill_step` and of `Trainer.take`.

        Args:
            x0: (B, D) int64.
            options: all that `distill_step` takes and that is not named here: valid, context,
                return_terms, components_at_once, times, tokens and latents. Each part of the loss
                goes backward as soon as it exists, so that one graph is alive at a time.

        Returns:
            Detached scalars on the student's device, which nothing here waits for: "loss"; the
            five terms of `LossTerms` by name, unweighted, each the mean over those examples of
            the batch that it counts for (0 if none): consistency terms over t >= low_t, the
            component term over t < low_t, where codes that average over the whole batch give
            smaller numbers; and what `Trainer.take` adds.
        """

        def batch(backward: Backward) -> tuple[Metrics, int]:
            output = distill_step(
                self.student,
                self.teacher,
                x0,
                process=self.process,
                config=self.config,
                generator=self.generator,
                backward=backward,
                **options,
            )
            return {"loss": output.loss, **self._term_means(output)}, len(x0)

        return self.take(batch)

    def _term_means(self, output: DistillOutput) -> Metrics:
        if output.terms is None:
            return {}
        terms, batch, low = output.terms._asdict(), output.low.numel(), int(output.low.sum())
        # Where no pass was needed, the consistency terms are 0.
        counts = dict.fromkeys(("consistency_correlation", "consistency_marginal"), batch - low)
        if self.process.component_time is None:
            counts["component"] = low
            terms["component"] = terms["component"].where(output.t < self.config.low_t, 0.0)
        return {k: term.sum() / max(counts.get(k, batch), 1) for k, term in terms.items()}

    def _identity(self) -> dict[str, Any]:
        ours = {"config": identity(self.config), "process": identity(self.process)}
        return ours | super()._identity()
