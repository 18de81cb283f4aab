"""The command line: `python -m examples.text --help`."""

from __future__ import annotations

import argparse
import functools
import operator
import sys
import time
from collections.abc import Mapping, Sequence

from torch import nn

from di4c_fast.samplers import sample_masked

from ..common import report
from ..common.command import add_recipe, base_parser, parse_recipe, run_command, write_all
from ..common.plots import step_words
from ..common.ranks import is_first
from ..common.rundir import RunDirectory
from ..common.sampling import MODELS, sample_seeds
from . import data, likelihood
from .config import Config
from .metrics import MEASURES, Judge
from .plots import SHOWN, draw_picture
from .train import distill_student, process_of, train_teacher


def build_parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "python -m examples.text",
        "Train a masked-diffusion teacher on the English text that ships with Python, character "
        "by character, distil it with di4c_fast into a mixture student, sample both with few "
        "steps, and print how likely and how diverse the samples are beside held-out text. "
        "Interrupted, the same command resumes.",
        "runs/text",
        "text.png",
    )
    add_recipe(parser, Config)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    config = parse_recipe(parser, arguments, Config)
    return run_command(arguments.threads, lambda: run_example(config, arguments))


def run_example(config: Config, arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    text = data.load()
    run = RunDirectory(arguments.run_dir, config, text=text.fingerprint)

    def train_models(seed: int) -> dict[str, nn.Module]:
        teacher = train_teacher(config, text, run, seed, arguments.checkpoint_every)
        student = distill_student(config, text, teacher, run, seed, arguments.checkpoint_every)
        return {"teacher": teacher, "student": student}

    if not is_first():
        for seed in arguments.seeds:
            train_models(seed)
        return
    sizes = [sum(map(len, topics)) for topics in (text.train, text.held_out)]
    print(
        f"{sizes[0]} characters to train on, {sizes[1]} held out ({len(text.held_out)} topics), "
        f"alphabet of {len(text.alphabet)}; run in {run.path}"
    )
    judge = Judge(text, config.length, config.judge_order)
    real, windows = judge.real(config.samples)
    print(f"judge: {real.bits:.3f} bits per character of held-out text", flush=True)

    likelihoods: list[likelihood.Likelihoods] = []

    def models_of(seed: int) -> Mapping[str, nn.Module]:
        models = train_models(seed)
        likelihoods.append(likelihood.one_step(config, text, models, run, seed))
        return models

    draw = functools.partial(sample_masked, mask_id=process_of(text, config).mask_id)
    scores, samples = sample_seeds(config, arguments.seeds, run, judge, models_of, draw, unit="seq")

    passages = []
    note = f"{windows} windows of held-out text"
    for seed, one in scores.items():
        print(f"\n{report.table(seed, MEASURES, one, samples[seed], real, note)}")
        passages.append(sample_texts(text, seed, samples[seed]))
    every = list(scores.values())
    print(f"\n{verdict(every)}")
    print(f"\n{likelihood.table(likelihoods)}")

    results = report.results(
        config,
        arguments.threads,
        MEASURES,
        scores,
        samples,
        text={
            "fingerprint": text.fingerprint,
            "characters": len(text.alphabet),
            "train": sizes[0],
            "held_out": sizes[1],
            "held_out_topics": list(text.names),
        },
        real={**report.rounded(MEASURES, real), "windows": windows},
    )
    for seed, found in zip(arguments.seeds, likelihoods, strict=True):
        results["seeds"][str(seed)]["one_step"] = likelihood.to_json(found)
    first = samples[arguments.seeds[0]]
    write_all(
        (run.path, arguments.report),
        results,
        "text.png",
        lambda path: draw_picture(path, text, first, every, likelihoods, real),
        samples="\n".join(passages),
    )
    print(f"{time.perf_counter() - started:.0f} s")


def verdict(scores: Sequence[report.Scores]) -> str:
    """Student minus teacher, over all seeds."""
    title = "student - teacher, bits below 0 the student is better"
    return report.verdict(title, MEASURES, scores, operator.sub, lambda m: f"+.{m.digits}f")


def sample_texts(text: data.Text, seed: int, samples: report.Drawn) -> str:
    """The first samples of each model and step count, to read."""
    lines = [f"seed {seed}; teacher and student start from the same random numbers"]
    for steps in samples["teacher"]:
        for name in MODELS:
            lines.append(f"\n{name}, {step_words(steps)}")
            rows = samples[name][steps].tokens[:SHOWN].tolist()
            lines += [f"  |{text.decode(row)}|" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
