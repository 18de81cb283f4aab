"""The distillation step as a module, so that the hooks of data parallelism fire."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..checks import check_kind
from ..heads import HeadLike
from ..models.call import check_callable
from ..processes.base import Process
from .config import DistillConfig, DistillOutput
from .draws import example_generators
from .step import distill_step

__all__ = ["DistillModule"]


class DistillModule(nn.Module):
    """`distill_step` as the forward of a module, for DistributedDataParallel and `fully_shard`.

    Every call of the student and the loss happen inside, so that weights which FSDP has gathered
    (the output weight of a `LinearHead`, say) are there until the loss has read them.

        module = DistributedDataParallel(DistillModule(student, teacher, process=process))
        loss, output = module(x0)
        loss.backward()

    Args:
        student: an `nn.Module`; the only part of this module.
        teacher: callable, as for `distill_step`. It is no part: its weights are neither moved
            with the module, nor exchanged, nor sharded, unless that is done to itself.
        process, config: as for `distill_step`.
    """

    teacher: Callable[..., HeadLike]

    def __init__(
        self,
        student: nn.Module,
        teacher: Callable[..., HeadLike],
        *,
        process: Process,
        config: DistillConfig | None = None,
    ):
        super().__init__()
        check_kind(student, nn.Module, "student")
        check_callable(teacher, "teacher")
        check_kind(process, Process, "process")
        self.student, self.process = student, process
        self.config = DistillConfig() if config is None else config
        check_kind(self.config, DistillConfig, "config")
        object.__setattr__(self, "teacher", teacher)

    def forward(
        self, x0: Tensor, *, seed: int | None = None, first: int = 0, **options: Any
    ) -> tuple[Tensor, DistillOutput]:
        """The loss, a scalar with a graph, and what the step computed, without one.

        Args:
            x0: (B, D) int64, the examples of this process.
            seed: every example draws from a generator that is a function of (seed, its number in
                the global batch): any split of a batch then draws the same. None: draws come from
                `generator`.
            first: the number of the first example.
            options: as for `distill_step`, without `backward`.
        """
        if seed is not None:
            options["generator"] = example_generators(seed, first, len(x0))
        if options.get("backward") is not None:
            raise ValueError("backward must be left to the caller of a DistillModule")
        given: dict[str, Any] = {"process": self.process, "config": self.config, **options}
        output = distill_step(self.student, self.teacher, x0, **given)
        return output.loss, dataclasses.replace(output, loss=output.loss.detach())
