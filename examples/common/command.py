"""The command line that the examples share."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from di4c_fast.training.command import run_command as stop_in_one_line

from .options import Recipe
from .ranks import is_first, process_group
from .rundir import RunError, write_file

SomeRecipe = TypeVar("SomeRecipe", bound=Recipe)


def base_parser(prog: str, description: str, run_dir: str, picture: str) -> argparse.ArgumentParser:
    """A parser with the options that do not change what a run computes, but for the seeds.

    Args:
        run_dir: default of `--run-dir`.
        picture: name of the picture that a run writes.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--run-dir", type=pathlib.Path, default=pathlib.Path(run_dir), help="checkpoints"
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
        help=f"write results.json and {picture} here too",
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
    return parser


def add_recipe(parser: argparse.ArgumentParser, recipe: type[Recipe]) -> None:
    """One option for each field of the recipe."""
    group = parser.add_argument_group("recipe", "a run directory belongs to one choice of these")
    for field in dataclasses.fields(recipe):
        default: Any = field.default
        several = isinstance(default, tuple)
        group.add_argument(
            _option(field.name),
            dest=field.name,
            type=int if several else type(default),
            nargs="+" if several else None,
            default=list(default) if several else default,
            metavar=field.name.split("_")[-1].upper(),
            help=field.metadata["help"],
        )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_recipe(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, recipe: type[SomeRecipe]
) -> SomeRecipe:
    """The recipe, after a check of all options; an error ends the program and says which."""
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(recipe)}
    values = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    try:
        config = recipe(**values)
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


def run_command(threads: int, run: Callable[[], None]) -> int:
    """Call `run` in the group of its processes; the exit status. Rank 0 says what stops it."""
    torch.set_num_threads(threads)

    def in_group() -> None:
        with process_group():
            try:
                run()
            except RunError:
                if is_first():
                    raise
                sys.exit(2)

    return stop_in_one_line(in_group, (RunError,))


def write_all(
    folders: Iterable[pathlib.Path | None],
    results: dict[str, Any],
    picture: str,
    draw_picture: Callable[[pathlib.Path], None],
    **texts: str,
) -> None:
    """Results, picture and texts (by name, without .txt) into the folders that are not None."""
    for folder in folders:
        if folder is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        for name, text in texts.items():
            write_file(folder / f"{name}.txt", text.encode())
        draw_picture(folder / picture)
        names = ("results.json", picture, *(f"{name}.txt" for name in texts))
        print(f"\nwritten: {', '.join(str(folder / name) for name in names)}")
