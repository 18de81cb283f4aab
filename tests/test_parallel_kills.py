"""A kill -9 at any moment of a save of several ranks leaves the old checkpoint or the new one."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import sys

import pytest
import torch
from parallel_support import launch, make, run, state

from di4c_fast.training.parallel import gathered

STEPS = 8
# How often a save opens, makes, renames or removes something, at the least, by rank.
MOMENTS = {"ddp": [8], "fsdp": [17, 2]}
RESUMED = 5


def last_of(distiller, path) -> int:
    """The step after which the checkpoint was written, 0 where there is none yet."""
    with contextlib.suppress(FileNotFoundError):
        step = distiller.load(path)
        assert step == distiller.iterations
        return step
    return 0


def kill_at(moment: int, path, pids: list[int]) -> None:
    """Kill these processes when this one has done so much with files of that path."""
    count = itertools.count()

    def hook(name, arguments):
        touched = name == "open" or name.startswith(("os.", "shutil."))
        if touched and str(path) in str(arguments) and next(count) == moment:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    sys.addaudithook(hook)


def train(rank, size, path, kind, killed=(), moment=0):
    """Go on to the last step with a save after each, or until the kill in the first of them."""
    torch.manual_seed(rank)  # dropout
    distiller, pids = make(kind, dropout=0.2), gathered(os.getpid())
    for step in range(last_of(distiller, path), STEPS):
        run(distiller, step, step + 1, rank, size)
        if killed and rank == killed[-1]:
            kill_at(moment, path, [pids[each] for each in killed])
        distiller.save(path, extra=step + 1)
    return state(distiller)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MOMENTS)
def test_killed_saves_leave_a_checkpoint_and_their_run_ends_as_one_without_them(kind, tmp_path):
    path, last = tmp_path / "killed", 0
    kills = [  # the last of the ranks kills
        (killed, moment)
        for killed in ([0], [1], [1, 0])
        if killed[-1] < len(MOMENTS[kind])
        for moment in range(MOMENTS[kind][killed[-1]])
    ]
    for killed, moment in random.Random(kind).sample(kills, RESUMED):
        found = launch(train, 2, tmp_path / f"{killed} {moment}", path, kind, killed, moment)
        assert all(found[rank] is None for rank in killed)
        assert all("Error" in one for one in found if one is not None)
        step = last_of(make("plain", dropout=0.2), path)
        assert step in (last, last + 1)
        last = step
    ours = launch(train, 2, tmp_path / "last", path, kind)
    whole = launch(train, 2, tmp_path / "whole", tmp_path / "run", kind)
    for one, other in zip(ours, whole, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]), name
    assert not [left for left in tmp_path.rglob("*") if left.suffix in (".tmp", ".lock")]
    assert len([*tmp_path.glob("killed/*.tensors")]) == (kind == "fsdp")
