"""Processes that `torchrun` starts: each computes its part of every batch, rank 0 writes.

Every process draws the whole batch from the same generator and takes its rows; what `Distiller`
draws is a function of the example's number. So any number of processes trains the same models,
up to rounding.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from di4c_fast.training.parallel import rank_and_size, reduced

Loss = Callable[[torch.Generator, slice], Tensor]


def is_first() -> bool:
    """Whether this process draws samples, writes and prints."""
    return rank_and_size()[0] == 0


@contextlib.contextmanager
def process_group(backend: str | None = "gloo") -> Iterator[None]:
    """The group of all processes, where `torchrun` has started several; None: by device."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    dist.init_process_group(backend)
    yield
    gc.collect()  # a DDP wrapper that outlives its group can wait for gloo's thread for ever
    dist.destroy_process_group()


def part_of(batch: int) -> slice:
    """The rows of a batch that this process computes."""
    rank, size = rank_and_size()
    return slice(batch * rank // size, batch * (rank + 1) // size)


class Objective(nn.Module):
    """A teacher's loss as the forward of a module, so that gradients can be exchanged.

    Args:
        loss: (generator, rows of this process) to the mean over these rows.
        batch: rows of all processes.
    """

    def __init__(self, model: nn.Module, loss: Loss, batch: int):
        super().__init__()
        self.model, self.batch = model, batch
        self._loss = loss

    def forward(self, generator: torch.Generator) -> tuple[Tensor, float]:
        """The loss of the rows of this process, and their weight in the mean of the processes."""
        part = part_of(self.batch)
        rows = part.stop - part.start
        return self._loss(generator, part), rows * rank_and_size()[1] / self.batch


def shared(module: nn.Module) -> nn.Module:
    """The module, its gradients those of the mean over the rows of all processes."""
    return module if rank_and_size()[1] == 1 else DistributedDataParallel(module)


def mean(values: Tensor, weight: float) -> Tensor:
    """The mean over all rows from the mean over those of each process."""
    return reduced({"": (values.double() * weight, 1)})[""]
