"""What a distiller does when a step fails, or would do harm."""

from __future__ import annotations

import math

import pytest
import torch
from distill_support import CONFIG, MASK, PROCESS, X0, Recorder, rng
from torch import nn

from di4c_fast.training import EMA, Distiller


def make(optimizer, accumulate: int = 1, schedule=None, average: bool = False) -> Distiller:
    student = Recorder(True)
    optimizer = optimizer(student.parameters())
    return Distiller(
        student,
        Recorder(False, seed=1),
        optimizer,
        process=PROCESS,
        config=CONFIG,
        accumulate=accumulate,
        scheduler=None if schedule is None else schedule(optimizer),
        ema=EMA(student, 0.9) if average else None,
        generator=rng(),
    )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


class FailsOnce(torch.optim.SGD):
    failed = False

    def step(self, closure=None):
        if not self.failed:
            self.failed = True
            raise MemoryError("once")
        return super().step(closure)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_goes_on_after_an_optimiser_that_failed_once(accumulate):
    distiller = make(lambda p: FailsOnce(p, lr=0.1), accumulate)
    for _ in range(accumulate - 1):
        distiller.step(X0)
    with pytest.raises(MemoryError, match="once"):
        distiller.step(X0)
    assert (distiller.pending, distiller.iterations) == (0, 0)
    assert all(p.grad is None for p in distiller.student.parameters())
    before = distiller.student.out.weight.detach().clone()
    for _ in range(accumulate):
        metrics = distiller.step(X0)
    assert "grad_norm" in metrics
    assert (distiller.pending, distiller.iterations) == (0, 1)
    assert not torch.equal(distiller.student.out.weight, before)


def test_a_schedule_that_has_ended_is_reported_at_every_step():
    def schedule(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3)

    distiller = make(sgd, schedule=schedule)
    for _ in range(3):
        distiller.step(X0)
    for count in (4, 5):
        with pytest.raises(ValueError, match="steps"):
            distiller.step(X0)
        assert (distiller.pending, distiller.iterations) == (0, count)


@pytest.mark.parametrize("call", ["step", "load", "save"])
def test_nothing_is_done_while_the_student_holds_the_average(call, tmp_path):
    distiller = make(sgd, average=True)
    distiller.step(X0)
    distiller.save(tmp_path / "a")
    argument = X0 if call == "step" else tmp_path / "a"
    with distiller.ema.applied():
        held = distiller.student.out.weight.detach().clone()
        with pytest.raises(RuntimeError, match=rf"{call}\(\) inside EMA\.applied\(\)"):
            getattr(distiller, call)(argument)
        assert torch.equal(distiller.student.out.weight, held)
    distiller.step(X0)
    assert distiller.iterations == 2


FUSED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_first_step_that_is_skipped_leaves_a_fused_optimiser_as_new(name):
    distiller, fresh = make(FUSED[name]), make(FUSED[name])
    # Memory that an optimiser would take uninitialised is not zero.
    filled = [torch.full_like(p, math.nan) for p in distiller.student.parameters()]
    del filled
    hook = distiller.student.out.bias.register_hook(lambda gradient: gradient * math.inf)
    metrics = distiller.step(X0)
    hook.remove()
    assert float(metrics["skipped"]) == 1.0
    for seed in (5, 6):
        for each in (distiller, fresh):
            each.generator.manual_seed(seed)
            each.step(X0)
    for ours, expected in zip(
        distiller.student.parameters(), fresh.student.parameters(), strict=True
    ):
        assert torch.equal(ours, expected)


def test_a_student_with_sparse_gradients_is_refused():
    student = Recorder(True)
    student.extra = nn.Embedding(MASK + 1, 2, sparse=True)
    with pytest.raises(ValueError, match="dense gradients, got 'extra'"):
        Distiller(student, Recorder(False), sgd(student.parameters()), process=PROCESS)
