"""Checkpoints of several processes: the same number goes on exactly, another one to rounding.

With DDP a file, which rank 0 writes; with FSDP2 a folder, of which every rank writes a part.
"""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from parallel_support import assert_near, launch, make, refused, run, state

from di4c_fast.training.checkpoint import hold

KINDS = ("ddp", "fsdp")


def write(rank, size, folder):
    """Two steps, a checkpoint, two more; and what comes back from it here."""
    found = {}
    for kind in KINDS:
        torch.manual_seed(rank)  # dropout
        whole = make(kind, dropout=0.2)
        run(whole, 0, 2, rank, size)
        path = folder / kind
        whole.save(path, extra={"batch": 1})
        whole.save(path, extra={"batch": 2})
        metrics = run(whole, 2, 4, rank, size)
        torch.manual_seed(99 + rank)
        resumed = make(kind, dropout=0.2, seed=5)
        assert resumed.load(path) == {"batch": 2}
        found[kind] = metrics, state(whole), run(resumed, 2, 4, rank, size), state(resumed)
        # Without dropout, which is each rank's own, for another number of ranks.
        plain = make(kind)
        empty = folder / f"{kind} new"
        plain.save(empty)
        run(plain, 0, 2, rank, size)
        plain.save(folder / f"{kind} plain")
        run(plain, 2, 4, rank, size)
        fresh = make(kind, seed=5)
        fresh.load(empty)
        assert not fresh.optimizer.state
        run(fresh, 0, 4, rank, size)
        found[kind] += state(plain), state(fresh)

        found[kind] += (refused(lambda one=plain, to=folder / f"{kind} held": one.save(to)),)

    half = make("ddp", accumulate=2, seed=5)
    half.load(folder / "half")
    run(half, 1, 4, rank, size)
    found["half"] = state(half)
    waits = make("ddp", accumulate=2)
    run(waits, 0, 1, rank, size)
    waiting = refused(lambda: waits.save(folder / "waits"))
    run(waits, 1, 2, rank, size)
    if rank == 0:
        kept = shutil.ignore_patterns("*.lock")  # which this run holds
        shutil.copytree(folder / "fsdp plain", folder / "damaged", ignore=kept)
        next(folder.glob("damaged/*/__1_0.distcp")).unlink()
    torch.distributed.barrier()
    other = make("fsdp", optimizer=torch.optim.SGD)
    before = state(other)
    found["refused"] = {
        "waits": waiting,
        "half": refused(lambda: make("fsdp", accumulate=2).load(folder / "half")),
        "missing": refused(lambda: other.load(folder / "missing")),
        "other": refused(lambda: other.load(folder / "fsdp plain")),
        "damaged": refused(lambda: other.load(folder / "damaged")),
        "width": refused(lambda: make("fsdp", width=9).load(folder / "fsdp plain")),
        "file": refused(lambda: other.save(folder / "a file")),
        "folder": refused(lambda: waits.save(folder / "fsdp")),
        "one rank": refused(lambda: other.save(folder / ("a file" if rank else "folder"))),
    }
    assert_near(state(other), before)
    return found


def go_on(rank, size, folder, kinds=KINDS):
    """From the checkpoints of both kinds."""
    found = {}
    for kind in kinds:
        for other in KINDS:
            distiller = make(kind, seed=5)
            distiller.load(folder / f"{other} plain")
            run(distiller, 2, 4, rank, size)
            found[kind, other] = state(distiller)
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "a file").touch()
    half = make("plain", accumulate=2)
    run(half, 0, 1)
    half.save(folder / "half")
    del half
    (folder / "fsdp held").mkdir()
    held = hold(folder / "ddp held"), hold(folder / "fsdp held" / "checkpoint.json")
    ranks = launch(write, 2, folder / "ranks", folder)
    del held
    for found in ranks:
        assert isinstance(found, dict), found
    return folder, ranks


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_ranks_go_on_bit_for_bit(written, kind):
    for found in written[1]:
        metrics, expected, their_metrics, ours, plain, fresh, _ = found[kind]
        for one, other in ((ours, expected), (fresh, plain)):
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert torch.equal(value, other[name]), name
        assert their_metrics == metrics


def test_several_ranks_with_ddp_go_on_in_the_middle_of_an_accumulation(written):
    one = make("plain", accumulate=2)
    run(one, 0, 4)
    for found in written[1]:
        assert_near(found["half"], state(one))


def test_one_process_without_a_group_goes_on_to_rounding(written):
    folder, ranks = written
    for (_, other), ours in go_on(0, 1, folder, ["plain"]).items():
        assert_near(ours, ranks[0][other][4])
    with pytest.raises(ValueError, match=r"is damaged, .*__1_0\.distcp"):
        make("plain").load(folder / "damaged")


@pytest.mark.parametrize("size", [1, 3])
def test_another_number_of_ranks_goes_on_to_rounding_ddp_from_fsdp_and_back(written, size):
    folder, ranks = written
    for found in launch(go_on, size, folder / f"ranks of {size}", folder):
        assert isinstance(found, dict), found
        for (_, other), ours in found.items():
            assert_near(ours, ranks[0][other][4])


@pytest.mark.parametrize(
    ("case", "messages"),
    {
        "waits": ["save() of several processes between optimiser steps only, got 1 batches"] * 2,
        "half": ["float64 there and not so here; gradient/"] * 2,
        "missing": ["there is no checkpoint"] * 2,
        "other": ["belongs to another run: optimizer is Adam there and SGD here"] * 2,
        "damaged": ["damaged is damaged, as rank 0 found: FileNotFoundError: [Errno 2]"] * 2,
        "width": ["student.mix.weight is (8, 8) float64 there and (9, 8) float64 here"] * 2,
        "file": ["path must be a folder, got the file"] * 2,
        "folder": [
            "path must be a file to write, got the folder",
            "rank 0 failed: ValueError: path must be a file to write, got the folder",
        ],
        "one rank": ["rank 1 failed: ValueError: path must be a", "path must be a folder, got the"],
    }.items(),
)
def test_what_cannot_be_saved_or_loaded_is_an_error_on_every_rank(written, case, messages):
    for found, message in zip(written[1], messages, strict=True):
        assert message in found["refused"][case]


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_cannot_save_to_one_path(written, kind):
    first, second = (found[kind][-1] for found in written[1])
    message = f"RuntimeError: .* is in use by process {os.getpid()} on .*: wait until it ends"
    assert re.search(message, first)
    assert re.search("rank 0 failed: " + message, second)


def test_only_the_last_checkpoint_is_kept(written):
    folder, _ = written
    record = json.loads((folder / "fsdp" / "checkpoint.json").read_text())
    assert sorted(os.listdir(folder / "fsdp")) == sorted(["checkpoint.json", record["folder"]])
    names = [f"{kind}{more}" for kind in KINDS for more in ("", " new", " plain")]
    assert {path.name for path in folder.iterdir()} >= {*names}
    assert not [path for path in folder.rglob("*") if path.suffix in (".lock", ".tmp")]


def interrupted(rank, size, folder):
    """A kill at the moments of a save; what a later run finds."""
    distiller = make("fsdp")
    distiller.save(folder / "run", extra="first")
    run(distiller, 0, 1, rank, size)
    import torch.distributed.checkpoint as dcp

    from di4c_fast.training import parallel

    messages, save, replacing = [], dcp.save, parallel.replacing

    def fail(*_, **__):
        raise KeyboardInterrupt

    for where, name, original in ((dcp, "save", save), (parallel, "replacing", replacing)):
        setattr(where, name, fail)
        try:
            distiller.save(folder / "run", extra="second")
        except BaseException as error:
            messages.append(type(error).__name__)
        setattr(where, name, original)
        if rank == 0 and where is parallel:
            break
    return messages, make("fsdp", seed=5).load(folder / "run") if size == 1 else None


def test_an_interrupted_save_leaves_the_former_checkpoint(tmp_path):
    ((messages, extra),) = launch(interrupted, 1, tmp_path, tmp_path)
    assert messages == ["KeyboardInterrupt", "KeyboardInterrupt"]
    assert extra == "first"
