"""Ranks that die or disagree end in an error on every rank, never in a hang."""

from __future__ import annotations

import os

import pytest
import torch
from parallel_support import launch, make, refused, run


def disagree(rank, size, case):
    if case == "dies" and rank == size - 1:
        distiller = make("ddp")
        run(distiller, 0, 1, rank, size)
        os._exit(1)
    if case == "fails":
        distiller = make("fsdp")
        return refused(lambda: run(distiller, 0, 1 if rank else 2, rank, size) and 1 / (1 - rank))
    if case == "dies":
        distiller = make("ddp")
        return refused(lambda: run(distiller, 0, 3, rank, size))
    if case == "width":
        return refused(lambda: make("fsdp", width=8 + rank))
    if case == "seed":
        distiller = make("ddp", seed=rank)
        return refused(lambda: run(distiller, 0, 1, rank, size))
    if case == "clip":
        return refused(lambda: make("ddp", clip_norm=1.0 + rank))
    if case == "plain":
        return refused(lambda: make("plain"))
    distiller = make("fsdp" if case == "empty" else "ddp")
    sizes = {"length": (2, 5 - rank), "empty": (rank, 5)}[case]
    return refused(lambda: distiller.step(torch.zeros(sizes, dtype=torch.int64)))


def every_disagreement(rank, size):
    return {
        case: disagree(rank, size, case)
        for case in ("width", "seed", "clip", "plain", "length", "empty")
    }


@pytest.fixture(scope="module")
def disagreements(tmp_path_factory):
    return launch(every_disagreement, 2, tmp_path_factory.mktemp("disagree"))


@pytest.mark.parametrize(
    ("case", "message"),
    {
        "width": "student.mix.weight is (8, 8) float64 there and (9, 8) float64 here",
        "seed": "generator must have the same state on all ranks, got [",
        "clip": "clip_norm is 1.0 there and 2.0 here",
        "plain": "module must be in DistributedDataParallel or after fully_shard",
        "length": "x0 must have the same D on all ranks, got [5, 4]",
        "empty": "x0 must have examples on every rank of a sharded student, got [0, 1]",
    }.items(),
)
def test_a_disagreement_is_an_error_on_every_rank(disagreements, case, message):
    for found in disagreements:
        assert isinstance(found, dict), found
        assert message in found[case]


@pytest.mark.parametrize("case", ["dies", "fails"])
def test_a_rank_that_stops_ends_the_others_within_the_timeout(tmp_path, case):
    found = launch(disagree, 2, tmp_path, case)
    assert "Error" in found[0]
    assert (found[1] is None) == (case == "dies")
