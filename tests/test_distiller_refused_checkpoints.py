"""Checkpoints that a distiller refuses: damaged files, missing files, files of another run."""

from __future__ import annotations

import pytest
import torch
from distill_support import MASK, D, Recorder, UniformNoise
from distiller_support import (
    adamw,
    assert_same,
    everything,
    make_full,
    milestones,
    run,
    warm_up_then_cosine,
)
from safetensors.torch import load_file, save_file
from torch import nn

from di4c_fast.processes import MaskedProcess
from di4c_fast.training import DistillConfig
from di4c_fast.training.checkpoint import read_checkpoint, write_checkpoint


def refused(distiller, file, message, error=ValueError) -> None:
    """Loading fails by the message and changes neither the file nor the object."""
    content = file.read_bytes() if file.is_file() else None
    before = everything(distiller)
    with pytest.raises(error, match=message):
        distiller.load(file)
    assert_same(everything(distiller), before)
    if content is not None:
        assert file.read_bytes() == content


# Files that are damaged or missing


def torn(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-9] ^= 16
    file.write_bytes(content)


def emptied(file):
    file.write_bytes(b"")


def foreign(file):
    save_file({"weight": torch.ones(2)}, file)


def text(file):
    file.write_text("not a checkpoint at all, but long enough to hold a header")


def without_record(file):
    save_file(load_file(file), file, metadata={"format": "di4c_fast.Distiller/1"})


def rewritten(change):
    """A file with a record that is whole but holds something else."""

    def write(file):
        tensors, values = read_checkpoint(file, "di4c_fast.Distiller/1")
        change(tensors, values)
        write_checkpoint(file, "di4c_fast.Distiller/1", tensors, values)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (torn, "is not a complete safetensors file"),
        (emptied, "is not a complete safetensors file"),
        (text, "is not a complete safetensors file"),
        (flipped, "is damaged: .*not what was written"),
        (foreign, r"is not a checkpoint of di4c_fast.Distiller/1: its format is None"),
        (without_record, "is damaged: KeyError"),
        (rewritten(lambda t, v: v.pop("counters")), "is damaged: its record lacks 'counters'"),
        (rewritten(lambda t, v: t.pop("random/cpu")), "is damaged: its record lacks 'random/cpu'"),
        (rewritten(lambda t, v: v["states"].pop("ema")), "is damaged: its record lacks 'ema'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, damage, message):
    distiller = make_full(schedule=milestones)
    run(distiller, 0, 3)
    distiller.save(tmp_path / "a")
    damage(tmp_path / "a")
    refused(distiller, tmp_path / "a", message)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    refused(make_full(), tmp_path / "a", "there is no checkpoint", FileNotFoundError)
    refused(make_full(), tmp_path, "path must be a checkpoint file, got the folder")


# Files of another run


class Wider(Recorder):
    def __init__(self):
        super().__init__(True)
        self.mix = nn.Linear(8, 8, bias=False).double()
        self.extra = nn.Linear(1, 1).double()
        self.position = nn.Parameter(torch.randn(D + 1, 8).double())


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer)


def three_parts(optimizer):
    schedules = torch.optim.lr_scheduler
    parts = [schedules.ConstantLR(optimizer) for _ in range(3)]
    return schedules.SequentialLR(optimizer, parts, milestones=[2, 4])


def frozen_out(parameters):
    return torch.optim.Adam(list(parameters)[:-1], lr=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": Wider()},
            r"another run: student.position is \(5, 8\) float64 there and \(6, 8\) float64"
            r" here; .*student.extra.weight is absent there and \(1, 1\) float64 here;"
            r".*student.mix.bias is \(8,\) float64 there and absent here",
        ),
        (
            {"student": Recorder(True).float()},
            r"position is \(5, 8\) float64 there and \(5, 8\) float32 here; .*; and \d+ more",
        ),
        (
            {"config": DistillConfig(components=2)},
            "belongs to another run: config.components is 3 there and 2 here; config.draws is 2",
        ),
        ({"process": MaskedProcess(MASK, levels=8)}, "process.levels is None there and 8 here"),
        (
            {"process": UniformNoise(None)},
            "process.class is MaskedProcess there and UniformNoise here",
        ),
        ({"optimizer": adamw}, "optimizer is Adam there and AdamW here"),
        (
            {"optimizer": lambda p: torch.optim.Adam(p, fused=True)},
            "fused is False there and True here",
        ),
        ({"optimizer": frozen_out}, "parameters.0.11 is out.bias there and absent here"),
        ({"schedule": None}, "scheduler is SequentialLR there and None here"),
        ({"schedule": constant}, "scheduler is SequentialLR there and ConstantLR here"),
        ({"schedule": three_parts}, "schedule._milestones.1 is absent there and a value here"),
        ({"average": None}, r"ema is {'decay': 0.9, 'warmup': True} there and None here"),
        ({"average": 0.5}, "ema.decay is 0.9 there and 0.5 here"),
        ({"clip_norm": None}, "clip_norm is 5.0 there and None here"),
        ({"accumulate": 4}, "accumulate is 2 there and 4 here"),
        ({"skip_nonfinite": False}, "skip_nonfinite is True there and False here"),
        ({"generator": None}, "generator is cpu there and None here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes, message):
    written = make_full(schedule=warm_up_then_cosine)
    run(written, 0, 3)
    written.save(tmp_path / "a")
    refused(make_full(**{"schedule": warm_up_then_cosine, **changes}), tmp_path / "a", message)


def test_a_checkpoint_without_the_state_of_the_generator_is_refused(tmp_path):
    make_full(generator=None).save(tmp_path / "a")
    refused(make_full(), tmp_path / "a", "generator is None there and cpu here")


# Files that are whole and of this run, but hold what does not fit


def first_moment(change):
    """Change the optimiser's entry of the first parameter."""

    def write(tensors, values):
        name = next(name for name in tensors if name.startswith("optimizer/state/0/exp_avg"))
        change(tensors, name)

    return rewritten(write)


def set_zeros(name):
    return rewritten(lambda t, v: t.update({name: torch.zeros(2)}))


def set_counter(name, value):
    return rewritten(lambda t, v: v["counters"].__setitem__(name, value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_counter("pending", 99), "pending is 99, which is no count here"),
        (set_counter("iterations", -1), "iterations is -1, which is no count here"),
        (set_counter("examples", 1.5), "examples is 1.5, which is no count here"),
        (
            first_moment(lambda t, name: t.update({name: torch.zeros(7)})),
            r"optimizer's exp_avg 0 is \(7,\) float32, which does not fit a parameter of \(5, 8",
        ),
        (
            rewritten(
                lambda t, v: v["states"]["optimizer"]["dict"][0][1]["dict"][1][1]["dict"].pop()
            ),
            "the optimizer's exp_avg_sq 1 is a value, which does not fit a parameter of",
        ),
        (
            rewritten(lambda t, v: t.update({"random/cpu": torch.zeros(3, dtype=torch.uint8)})),
            r"random.cpu is \(3,\) uint8 there and \(5056,\) uint8 here",
        ),
        (
            set_zeros("gradient/out.bias"),
            r"gradient.out.bias is \(2,\) float32 there and \(6,\) float64 here",
        ),
        (set_zeros("gradient/other"), r"gradient.other is \(2,\) float32 there and absent here"),
        (
            set_zeros("ema/shadow/out.bias"),
            r"average.out.bias is \(2,\) float32 there and \(6,\) float64 here",
        ),
        (set_zeros("skipped"), r"skipped is \(2,\) float32 there and \(\) float32 here"),
    ],
)
def test_content_that_does_not_fit_is_refused(tmp_path, damage, message):
    distiller = make_full()
    run(distiller, 0, 3)
    assert distiller.pending == 1
    distiller.save(tmp_path / "a")
    damage(tmp_path / "a")
    refused(distiller, tmp_path / "a", message)
