"""The command line: `python -m examples.digits --help`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import data, report, speed
from .config import Config
from .metrics import Judge, Score
from .plots import draw_picture
from .rundir import RunDirectory, RunError
from .sampling import Samples, sample_all, score_all
from .train import distill_student, train_teacher


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description="Train a masked-diffusion teacher on scikit-learn's handwritten digits, "
        "distil it with di4c_fast into a mixture student, sample both with few steps, and print "
        "how far the samples are from the real digits. Interrupted, the same command resumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--run-dir", type=pathlib.Path, default=pathlib.Path("runs/digits"), help="checkpoints"
    )
    parser.add_argument(
        "--seed",
        "--seeds",
        dest="seeds",
        metavar="SEED",
        type=int,
        nargs="+",
        default=[0],
        help="one run per seed",
    )
    parser.add_argument(
        "--report",
        type=pathlib.Path,
        metavar="DIR",
        help="write results.json and digits.png here too",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="threads of torch; another number may round differently",
    )
    parser.add_argument(
        "--checkpoint-every", type=int, default=100, help="iterations between checkpoints"
    )
    parser.add_argument(
        "--no-speed", action="store_true", help="leave out the comparison of the loss backends"
    )
    recipe = parser.add_argument_group("recipe", "a run directory belongs to one choice of these")
    for field in dataclasses.fields(Config):
        default: Any = field.default
        several = isinstance(default, tuple)
        recipe.add_argument(
            _option(field.name),
            dest=field.name,
            type=int if several else type(default),
            nargs="+" if several else None,
            default=list(default) if several else default,
            metavar="STEPS" if several else field.name.split("_")[-1].upper(),
            help=field.metadata["help"],
        )
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_config(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> Config:
    """The recipe, checked; an error ends the program and names the option."""
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Config)}
    values["steps"] = tuple(values["steps"])
    try:
        config = Config(**values)
    except (TypeError, ValueError) as error:
        name, rest = str(error).split(" ", 1)
        parser.error(f"argument {_option(name)}: {rest}")
    for name in ("threads", "checkpoint_every"):
        if getattr(arguments, name) < 1:
            parser.error(
                f"argument {_option(name)}: must be at least 1, got {getattr(arguments, name)}"
            )
    seeds = arguments.seeds
    wrong = [seed for seed in seeds if not 0 <= seed < 2**31]
    if wrong or len(set(seeds)) < len(seeds):
        parser.error(f"argument --seeds: must be different numbers in [0, 2^31), got {seeds}")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    config = parse_config(parser, arguments)
    torch.set_num_threads(arguments.threads)
    try:
        run_example(config, arguments)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


def run_example(config: Config, arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    run = RunDirectory(arguments.run_dir, config)
    digits = data.load(config.levels)
    print(f"{len(digits.tokens)} real digits, 64 pixels, {config.levels} levels; run in {run.path}")
    judge = Judge(digits)
    floor = judge.noise_floor(config.samples)
    print(f"classifier: {judge.features.accuracy:.1%} of the held-out digits right", flush=True)

    scores: list[dict[str, dict[int, Score]]] = []
    samples: list[dict[str, dict[int, Samples]]] = []
    for seed in arguments.seeds:
        every = arguments.checkpoint_every
        teacher = train_teacher(config, digits, run, seed, every)
        student = distill_student(config, digits, teacher, run, seed, every)
        models = {"teacher": teacher, "student": student}
        samples.append(sample_all(config, models, run, seed))
        scores.append(score_all(judge, samples[-1]))
    comparisons = None
    if not arguments.no_speed:
        comparisons = speed.compare(config.student_batch, config.components, config.levels)

    for seed, one, drawn in zip(arguments.seeds, scores, samples, strict=True):
        print(f"\n{report.table(seed, one, drawn, floor)}")
    print(f"\n{report.verdict(scores)}")
    if comparisons is not None:
        print(f"\n{report.speed_table(comparisons)}")

    results = report.results(
        config, arguments.seeds, arguments.threads, judge, floor, scores, samples, comparisons
    )
    for folder in (run.path, arguments.report):
        if folder is None:
            continue
        report.write_json(folder / "results.json", results)
        picture = folder / "digits.png"
        draw_picture(picture, config, digits.tokens[:36], samples[0], scores, floor)
        print(f"\nwritten: {folder / 'results.json'}, {picture}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
