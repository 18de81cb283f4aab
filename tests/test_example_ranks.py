"""The examples on several processes: the models of one, files of rank 0, one error for all."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from example_support import DIGITS, TEXT, stored
from parallel_support import launch, refused

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("sacrebleu")
pytest.importorskip("tqdm")

import examples.digits.data
import examples.text.data
from examples.common.rundir import RunDirectory
from examples.digits import train as digits
from examples.text import train as text

TINY = {**DIGITS, "text": TEXT}
MODELS = ("teacher", "student")
CALLS = 3  # batches before one process stops: the second iteration of the teacher is saved


def train_both(name, path, config=None):
    config = config or TINY[name]
    if name == "text":
        data = examples.text.data.load()
        run, module = RunDirectory(path, config, text=data.fingerprint), text
    else:
        data = examples.digits.data.load(config.levels)
        run, module = RunDirectory(path, config), digits
    teacher = module.train_teacher(config, data, run, 5, 2)
    module.distill_student(config, data, teacher, run, 5, 2)


def every_example(rank, size, folder):
    for name in TINY:
        train_both(name, folder / name)
    small = dataclasses.replace(TINY["masked"], student_batch=1)
    other = dataclasses.replace(TINY["masked"], width=12)
    found = {
        "batch": refused(lambda: train_both("masked", folder / "small", small)),
        "other": refused(lambda: train_both("masked", folder / "masked", other)),
    }
    # The last process leaves in the middle; the others end, and the next run goes on.
    draw, calls = digits.draw_batch, []

    def stopping(*arguments):
        calls.append(1)
        if rank == size - 1 and len(calls) > CALLS:
            raise KeyboardInterrupt
        return draw(*arguments)

    digits.draw_batch = stopping
    try:
        train_both("masked", folder / "stopped")
    except BaseException as error:
        found["stopped"] = type(error).__name__
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return launch(every_example, 2, folder / "store", folder), folder


def assert_same_models(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    for model in MODELS:
        file = f"seed-5/{model}.safetensors"
        (tensors, losses), (others, expected) = stored(ours / file), stored(theirs / file)
        assert losses == pytest.approx(expected, rel=1e-4)
        # Of several processes a file holds the default generator of each.
        for each in (tensors, others):
            (name,) = each.keys() & {"random/cpu", "ranks/cpu"}
            del each[name]
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                # Adam divides by the root of squares: where gradients are roundings, so is a step.
                near = {"rtol": 2e-3, "atol": 2e-4}
                torch.testing.assert_close(tensor, others[name], **near, msg=name)


@pytest.mark.parametrize("name", TINY)
def test_two_processes_train_the_models_of_one(ranks, name, tmp_path):
    found, folder = ranks
    assert all(isinstance(one, dict) for one in found), found
    train_both(name, tmp_path)
    assert_same_models(folder / name, tmp_path)
    files = {path.name for path in folder.rglob("*") if path.suffix in (".tmp", ".lock")}
    assert not files


def test_what_is_wrong_is_an_error_of_every_process(ranks):
    for one in ranks[0]:
        assert "--student-batch must be at least 2, one for each process, got 1" in one["batch"]
        assert "RunError" in one["other"]
        assert "width is 8 there and 12 here" in one["other"]


def test_a_process_that_leaves_ends_the_others_and_the_run_goes_on(ranks):
    found, folder = ranks
    assert [one["stopped"] for one in found] == ["RuntimeError", "KeyboardInterrupt"]
    train_both("masked", folder / "stopped")
    assert_same_models(folder / "stopped", folder / "masked")


def command(name: str, run: pathlib.Path, processes: int) -> subprocess.Popen:
    """A tiny run of an example, started as a user starts it."""
    program = [sys.executable, "-m"]
    if processes > 1:
        program += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    options = ["--run-dir", str(run), "--threads", "1", "--checkpoint-every", "2", "--seeds", "5"]
    for field in dataclasses.fields(TINY[name]):
        value = getattr(TINY[name], field.name)
        values = value if isinstance(value, tuple) else (value,)
        options += ["--" + field.name.replace("_", "-"), *map(str, values)]
    more = ["--no-speed"] if name == "masked" else []
    package = "examples.text" if name == "text" else "examples.digits"
    root, output = pathlib.Path(__file__).parent.parent, (run.parent / "output").open("a")
    return subprocess.Popen([*program, package, *options, *more], cwd=root, stderr=output)


def children(process: subprocess.Popen) -> list[int]:
    listed = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in listed.read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ["masked", "text"])
def test_torchrun_trains_ends_when_a_rank_is_killed_and_resumes(name, tmp_path):
    killed = command(name, tmp_path / "two", 2)
    deadline = time.monotonic() + 180
    while not (tmp_path / "two" / "seed-5" / "teacher.safetensors").exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.01)
    ranks = children(killed)
    os.kill(ranks[-1], signal.SIGKILL)
    assert killed.wait(120) != 0
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not (tmp_path / "two" / "results.json").exists()
    assert command(name, tmp_path / "two", 2).wait(180) == 0
    assert command(name, tmp_path / "one", 1).wait(180) == 0
    assert_same_models(tmp_path / "two", tmp_path / "one")
    names = [sorted(p.name for p in (tmp_path / run).rglob("*")) for run in ("one", "two")]
    assert names[0] == names[1]
