"""The command line: `python -m examples.digits --help`."""

from __future__ import annotations

import argparse
import json
import operator
import pathlib
import sys
import time
from collections.abc import Sequence

from torch import nn

from ..common import report
from ..common.command import add_recipe, base_parser, parse_recipe, run_command, write_all
from ..common.ranks import is_first
from ..common.rundir import RunDirectory, RunError
from ..common.sampling import sample_seeds
from . import data, speed
from .config import Config
from .metrics import MEASURES, ClassJudge
from .plots import draw_picture
from .systems import RECIPES, system_of
from .train import distill_student, train_teacher

TEACHERS = {
    "masked": "a masked-diffusion teacher",
    "maskgit": "a MaskGIT teacher with class labels",
    "gaussian": "a discretised-Gaussian teacher",
}


def build_parser(system: str) -> argparse.ArgumentParser:
    """The options of one system; each has its own recipe and defaults."""
    parser = base_parser(
        "python -m examples.digits",
        f"Train {TEACHERS[system]} on scikit-learn's handwritten digits, "
        "distil it with di4c_fast into a mixture student, sample both with few steps, and print "
        "how far the samples are from the real digits. Interrupted, the same command resumes.",
        "runs/digits" if system == Config.system else f"runs/digits-{system}",
        "digits.png",
    )
    parser.add_argument(
        "--system",
        choices=list(RECIPES),
        default=system,
        help="the noise process and its sampler; --system NAME --help shows the options of each",
    )
    if system == Config.system:
        parser.add_argument(
            "--no-speed", action="store_true", help="leave out the comparison of the loss backends"
        )
    add_recipe(parser, RECIPES[system])
    return parser


def chosen_system(argv: Sequence[str] | None) -> str:
    """The name after --system, before the other options are known; the full parser checks it."""
    first = argparse.ArgumentParser(prog="python -m examples.digits", add_help=False)
    first.add_argument("--system", default=Config.system)
    name: str = first.parse_known_args(argv)[0].system
    return name if name in RECIPES else Config.system


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status."""
    system = chosen_system(argv)
    parser = build_parser(system)
    arguments = parser.parse_args(argv)
    config = parse_recipe(parser, arguments, RECIPES[system])
    return run_command(arguments.threads, lambda: run_example(config, arguments))


def refuse_other_system(path: pathlib.Path, system: str) -> None:
    """A run directory of another system is named as such, rather than by its many options."""
    try:
        there = json.loads((path / "run.json").read_text())["config"].get("system", Config.system)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # no run, or a damaged one: `RunDirectory` says so
    if there != system:
        raise RunError(
            f"{path} belongs to a run of --system {there}, not {system}; "
            "repeat that run's options, or choose another --run-dir"
        )


def run_example(config: Config, arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    refuse_other_system(arguments.run_dir, config.system)
    run = RunDirectory(arguments.run_dir, config)
    digits = data.load(config.levels)

    def models_of(seed: int) -> dict[str, nn.Module]:
        teacher = train_teacher(config, digits, run, seed, arguments.checkpoint_every)
        student = distill_student(config, digits, teacher, run, seed, arguments.checkpoint_every)
        return {"teacher": teacher, "student": student}

    if not is_first():
        for seed in arguments.seeds:
            models_of(seed)
        return
    print(f"{len(digits.tokens)} real digits, 64 pixels, {config.levels} levels; run in {run.path}")
    system = system_of(config)
    judge = system.judge(digits)
    floor = judge.noise_floor(config.samples)
    within = "; distances within classes" if isinstance(judge, ClassJudge) else ""
    accuracy = judge.features.accuracy
    print(f"classifier: {accuracy:.1%} of the held-out digits right{within}", flush=True)

    scores, samples = sample_seeds(config, arguments.seeds, run, judge, models_of, system.draw)
    comparisons = None
    if config.system == Config.system and not arguments.no_speed:
        comparisons = speed.compare(config.student_batch, config.components, config.levels)

    note = "noise floor: as many real digits, drawn again"
    for seed, one in scores.items():
        print(f"\n{report.table(seed, MEASURES, one, samples[seed], floor, note)}")
    title, every = "student / teacher, below 1 the student is better", list(scores.values())
    print(f"\n{report.verdict(title, MEASURES, every, operator.truediv, lambda _: '.2f')}")
    if comparisons is not None:
        print(f"\n{speed.table(comparisons)}")

    more = {
        "classifier_accuracy": round(accuracy, 4),
        "noise_floor": report.rounded(MEASURES, floor),
    }
    results = report.results(
        config,
        arguments.threads,
        MEASURES,
        scores,
        samples,
        **more,
        **({"distances": "within classes"} if isinstance(judge, ClassJudge) else {}),
        loss=comparisons and [one.to_json() for one in comparisons],
    )
    first = samples[arguments.seeds[0]]
    write_all(
        (run.path, arguments.report),
        results,
        "digits.png",
        lambda path: draw_picture(path, config, digits.tokens[:36], first, every, floor),
    )
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
