"""The trainer that takes distillation steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checks import check_int64, check_kind, check_rank
from ..heads import HeadLike
from ..models.call import check_callable
from ..processes.base import Process
from ..rng import draw_seed
from . import parallel
from .checkpoint import identity, outline
from .config import DistillConfig, DistillOutput
from .module import DistillModule
from .step import distill_step, outside_autocast
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

    @classmethod
    def of(cls, module: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Distiller:
        """A distiller whose step is a `DistillModule`, in one process or in many.

            student = ...                                     # the same weights on every rank
            module = DistributedDataParallel(DistillModule(student, teacher, process=process))
            distiller = Distiller.of(module, optimizer, ema=EMA(student), generator=generator)

        Every rank calls `step` with its own examples. What the optimiser steps with is the
        gradient of the mean over the examples of all ranks, however many each has; it is
        exchanged once per optimiser step. Metrics are means over all ranks' examples. An example
        draws from (a seed taken from `generator`, its number in the global batch, ranks in order),
        so that any number of processes, one without torch.distributed included, does the same up
        to rounding, but for dropout, which draws from each process's default generator.

        All ranks call `save`, between optimiser steps, and `load`. In DistributedDataParallel
        `save` writes a file, as in one process; after `fully_shard` a folder, through
        torch.distributed.checkpoint. Any number of ranks, one process without torch.distributed
        included, can go on from either, as many as wrote it exactly.

        Args:
            module: a `DistillModule`; with torch.distributed, in DistributedDataParallel or after
                `fully_shard` of it (then the optimiser and an EMA are made after that).
            optimizer, options: as for `Distiller`, without process and config. `generator` has
                the same state on every rank.

        Raises:
            ValueError: on every rank, where the ranks do not train the same: weights, options,
                recipe; in `step`, where the sizes D or the generators differ. A rank that fails
                alone ends the others with an error of their next exchange, after the timeout of
                `torch.distributed.init_process_group`. Go on from a checkpoint then.
        """
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        check_kind(inner, DistillModule, "module")
        assert isinstance(inner, DistillModule)
        given: dict[str, Any] = {"process": inner.process, "config": inner.config, **options}
        distiller = cls(inner.student, inner.teacher, optimizer, **given)
        if parallel.rank_and_size()[1] > 1 and not parallel.is_wrapped(module):
            raise ValueError(
                "module must be in DistributedDataParallel or after fully_shard where there are "
                f"several ranks, got {type(module).__name__}"
            )
        distiller.wrapper = module
        weights = outline(dict(inner.student.named_parameters()))
        parallel.check_same({"student": weights, **distiller._identity()})
        return distiller

    def step(self, x0: Tensor, **options: Any) -> Metrics:
        """Loss and gradients of one batch; the optimiser steps with every `accumulate`-th.

        An empty batch counts as one whose gradient is 0: momentum and weight decay still act.
        Errors are those of `distill_step` and of `Trainer.take`.

        Args:
            x0: (B, D) int64.
            options: all that `distill_step` takes and that is not named here: valid, context,
                return_terms, components_at_once, position_group, times, tokens and latents. Each
                part of the loss goes backward as soon as it exists, so that one graph is alive at
                a time. Ranks of a position_group are given the same examples, which count once.

        Returns:
            Detached scalars on the student's device, which nothing here waits for: "loss"; the
            five terms of `LossTerms` by name, unweighted, each the mean over those examples of
            the batch that it counts for (0 if none): consistency terms over t >= low_t, the
            component term over t < low_t, where codes that average over the whole batch give
            smaller numbers; and what `Trainer.take` adds. After `of`: those over the examples of
            all ranks, in fp64; a component pass then shares one graph with the rest of the loss.
        """
        if self.wrapper is not None:
            return self.take(lambda backward: self._global_batch(backward, x0, options))

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
            terms = self._term_sums(output).items()
            means = {name: total / max(count, 1) for name, (total, count) in terms}
            return {"loss": output.loss, **means}, len(x0)

        return self.take(batch)

    def _global_batch(
        self, backward: Backward, x0: Tensor, options: dict[str, Any]
    ) -> tuple[Metrics, int]:
        """The part of this process in the batch of all."""
        assert self.wrapper is not None
        check_int64(x0, "x0")
        check_rank(x0, "x0", exactly=2)
        seed = int(draw_seed(self.generator, torch.device("cpu")))
        terms, empty = options.get("return_terms", True), not parallel.has_shards(self.student)
        group = options.get("position_group")
        place = parallel.place_of(x0, seed, terms, group, empty=empty)
        loss, output = self.wrapper(x0, seed=place.seed, first=place.first, **options)
        with outside_autocast(loss):
            # The ranks' gradients are averaged; the batch counts examples.
            ranks = parallel.rank_and_size()[1]
            backward(loss, len(x0) * ranks / max(place.total, 1))
        sums = {"loss": (output.loss * len(x0), len(x0)), **self._term_sums(output)}
        return parallel.reduced(sums), place.total

    def _term_sums(self, output: DistillOutput) -> dict[str, tuple[Tensor, int]]:
        """The sum of each term, and the number of examples that it counts for."""
        if output.terms is None:
            return {}
        terms, batch, low = output.terms._asdict(), output.low.numel(), int(output.low.sum())
        # Where no pass was needed, the consistency terms are 0.
        counts = dict.fromkeys(("consistency_correlation", "consistency_marginal"), batch - low)
        if self.process.component_time is None:
            counts["component"] = low
            terms["component"] = terms["component"].where(output.t < self.config.low_t, 0.0)
        return {name: (term.sum(), counts.get(name, batch)) for name, term in terms.items()}

    def _identity(self) -> dict[str, Any]:
        ours = {"config": identity(self.config), "process": identity(self.process)}
        return ours | super()._identity()
