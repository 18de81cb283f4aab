"""What the three have in common: options, data, a teacher, the student as a module."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor

from di4c_fast.training import DistillModule, DistillOutput

from ..common.rundir import RunDirectory
from ..digits.config import Config
from ..digits.data import load
from ..digits.systems import system_of
from ..digits.train import train_teacher

SMALL = Config(width=32, layers=1, teacher_iterations=400, components=8, draws=8)


def options(name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--run-dir", type=pathlib.Path, default=pathlib.Path("runs", name))
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=8, help="examples of each process")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    return parser.parse_args(argv)


def make(folder: pathlib.Path) -> tuple[DistillModule, Tensor]:
    """The student, which starts at a teacher that is trained first, and the data (1797, 64)."""
    config = SMALL
    digits, system = load(config.levels), system_of(config)
    teacher = train_teacher(config, digits, RunDirectory(folder / "teacher", config), seed=0)
    torch.manual_seed(1)
    student = system.student(teacher)
    module = DistillModule(student, teacher, process=system.process, config=system.recipe())
    return module, digits.tokens


def measured(output: DistillOutput) -> dict[str, Tensor]:
    """The loss and the five terms, means over the batch."""
    assert output.terms is not None
    terms = {name: term.mean() for name, term in output.terms._asdict().items()}
    return {"loss": output.loss, **terms}
