"""Data parallelism on 2 and 3 gloo processes: the numbers of one process."""

from __future__ import annotations

import functools

import pytest
import torch
from parallel_support import PROCESSES, assert_near, launch, make, run, state

CASES = [
    *({"process": process, "head": i % 2 == 0} for i, process in enumerate(PROCESSES)),
    {"accumulate": 2, "at_once": 2},
    {"optimizer": functools.partial(torch.optim.SGD, momentum=0.9), "terms": False},
]


def train(kind, case, rank=0, size=1):
    options = dict(case)
    step = {"components_at_once": options.pop("at_once", None)}
    step["return_terms"] = options.pop("terms", True)
    distiller = make(kind, **options)
    metrics = run(distiller, 0, 2, rank, size, **step)
    assert distiller.examples == 12
    return metrics, state(distiller)


def exchanges(rank, size):
    """How often DDP has exchanged gradients in two optimiser steps of three batches each."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    distiller, calls = make("ddp", accumulate=3), []

    def counted(_, bucket):
        calls.append(bucket.is_last())
        return allreduce_hook(None, bucket)

    distiller.wrapper.register_comm_hook(None, counted)
    run(distiller, 0, 6, rank, size)
    assert distiller.iterations == 2
    return sum(calls)


def all_cases(rank, size):
    return {"exchanges": exchanges(rank, size)} | {
        (kind, i): train(kind, case, rank, size)
        for kind in ("ddp", "fsdp")
        for i, case in enumerate(CASES)
        if size == 2 or i % 3 == 0
    }


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    found = launch(all_cases, request.param, tmp_path_factory.mktemp("ranks"))
    for one in found:
        assert isinstance(one, dict), one
    return found


@functools.cache
def one_process(i):
    return train("plain", CASES[i])


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_do_what_one_process_does(ranks, kind, case):
    if (kind, case) not in ranks[0]:
        pytest.skip("on two ranks only")
    metrics, expected = one_process(case)
    for found in ranks:
        their_metrics, theirs = found[kind, case]
        assert_near(theirs, expected)
        for one, other in zip(their_metrics, metrics, strict=True):
            assert_near(one, other)


def test_gradients_are_exchanged_once_for_an_optimiser_step(ranks):
    assert [found["exchanges"] for found in ranks] == [2] * len(ranks)
