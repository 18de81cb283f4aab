"""What the tests of the examples share: tiny recipes, interruptions, what a checkpoint holds."""

from __future__ import annotations

import json
import pathlib

import torch
from safetensors import safe_open

from examples.digits.systems import RECIPES
from examples.text.config import Config as TextConfig

_SMALL = {
    "width": 8,
    "layers": 1,
    "teacher_iterations": 5,
    "teacher_batch": 4,
    "student_iterations": 5,
    "student_batch": 2,
    "components": 3,
    "draws": 2,
    "samples": 40,
    "steps": (1, 3),
}
DIGITS = {name: recipe(levels=3, **_SMALL) for name, recipe in RECIPES.items()}
TEXT = TextConfig(length=16, block=8, stretch=4, judge_order=3, **_SMALL)


class Stop(Exception):
    """Stands for an interruption."""


def stop_at(call: int, function):
    """`function` that is interrupted at its call number `call`."""
    calls = iter(range(call))

    def stopping(*args, **kwargs):
        if next(calls, None) is None:
            raise Stop
        return function(*args, **kwargs)

    return stopping


def stored(file: pathlib.Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Tensors and losses of a trainer's checkpoint."""
    with safe_open(str(file), "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        values = json.loads(opened.metadata()["values"])["values"]
    return tensors, values["extra"]["losses"]
