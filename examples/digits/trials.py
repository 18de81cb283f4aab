"""What other settings of the masked student give: one record of several run directories.

`python -m examples.digits.trials DIR ... --about TEXT --out FILE` reads runs that
`python -m examples.digits --run-dir DIR ...` has finished, and writes what their options change,
what the run measured, and how far the student's marginals are from its teacher's, by time.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

import di4c_fast
from di4c_fast.models import draw_latents

from ..common.rundir import RunDirectory, write_file
from . import data
from .config import Config
from .data import Digits
from .systems import System, system_of
from .train import distill_student, train_teacher

TIMES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05)
IMAGES = 128
LATENTS = 64
ROWS = 8  # images at once


@torch.no_grad()
def diagnose(
    system: System, teacher: nn.Module, student: nn.Module, digits: Digits
) -> dict[str, dict[str, float]]:
    """By time, nats per masked pixel of the same images and masks for every run.

    "kl" of the student's marginals from the teacher's laws, both entropies, and the negative
    log-likelihood of the image by teacher, student's marginals and student's joint law.
    """
    generator = torch.Generator().manual_seed(0)
    x0 = digits.tokens[torch.randperm(len(digits.tokens), generator=generator)[:IMAGES]]
    found: dict[str, dict[str, float]] = {}
    for time in TIMES:
        t = torch.full((len(x0),), time)
        xt = system.process.corrupt(x0, t, generator=generator)
        latent = draw_latents(
            len(x0), LATENTS, system.config.latent_dim, stratified=True, generator=generator
        )
        sums = sum(
            _nats(system, teacher, student, *(value[i : i + ROWS] for value in (x0, xt, t, latent)))
            for i in range(0, len(x0), ROWS)
        )
        assert isinstance(sums, Tensor)
        names = ("kl", "teacher_entropy", "student_entropy")
        names += ("teacher_nats", "student_nats", "joint_nats")
        values = (sums / system.counted(xt).sum()).tolist()
        found[str(time)] = {name: round(v, 4) for name, v in zip(names, values, strict=True)}
    return found


def _nats(
    system: System,
    teacher: nn.Module,
    student: nn.Module,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    latent: Tensor,
) -> Tensor:
    """Sums over the masked pixels of a few images, in the order of `diagnose`."""
    n = latent.shape[1]
    rows = repeat(xt, "b d -> (b n) d", n=n), repeat(t, "b -> (b n)", n=n)
    logits = rearrange(student(*rows, latent.flatten(0, 1)), "(b n) d v -> b n d v", n=n)
    laws = logits[..., : system.columns].log_softmax(-1)
    marginal = laws.logsumexp(1) - math.log(n)
    law = teacher(xt, t)[..., : system.columns].log_softmax(-1)
    joint = di4c_fast.mixture_log_prob(logits, x0, xt=xt, mask_id=system.config.mask_id)
    masked = system.counted(xt)
    pixels = (
        (law.exp() * (law - marginal)).sum(-1),
        -(law.exp() * law).sum(-1),
        -(marginal.exp() * marginal).sum(-1),
        -law.gather(-1, x0[..., None])[..., 0],
        -marginal.gather(-1, x0[..., None])[..., 0],
    )
    return torch.stack([*((pixel * masked).sum() for pixel in pixels), -joint.sum()])


def record(path: pathlib.Path) -> dict[str, Any]:
    """One run, its first seed."""
    stored = json.loads((path / "run.json").read_text())["config"]
    config = Config(**{**stored, "steps": tuple(stored["steps"])})
    results = json.loads((path / "results.json").read_text())
    run, digits = RunDirectory(path, config), data.load(config.levels)
    seed = min(int(name) for name in results["seeds"])
    teacher = train_teacher(config, digits, run, seed)
    student = distill_student(config, digits, teacher, run, seed)
    usual = Config().to_json()
    kept = ("frechet", "pair_tv")
    return {
        "name": path.name,
        "changes": {k: v for k, v in config.to_json().items() if v != usual[k]},
        "seed": seed,
        **{
            model: {
                steps: {name: score[name] for name in kept} for steps, score in by_steps.items()
            }
            for model, by_steps in results["seeds"][str(seed)].items()
        },
        "diagnostics": diagnose(system_of(config), teacher, student, digits),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.digits.trials", description=__doc__)
    parser.add_argument("runs", type=pathlib.Path, nargs="+", metavar="DIR")
    parser.add_argument("--about", default="", help="what the names of the folders mean")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE")
    arguments = parser.parse_args(argv)
    trials = [record(path) for path in arguments.runs]
    text = json.dumps({"about": arguments.about, "trials": trials}, indent=1)
    write_file(arguments.out, (text + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
