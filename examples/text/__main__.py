"""The command line: `python -m examples.text --help`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from ..common.command import add_recipe, base_parser, parse_recipe, run_command
from ..common.rundir import RunDirectory, write_file, write_json
from ..common.sampling import Samples, Sizes, sample_all, score_all
from . import data, report
from .config import Config
from .likelihood import one_step
from .metrics import Judge, Score
from .plots import draw_picture
from .train import distill_student, train_teacher


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
    sizes = [sum(map(len, topics)) for topics in (text.train, text.held_out)]
    print(
        f"{sizes[0]} characters to train on, {sizes[1]} held out ({len(text.held_out)} topics), "
        f"alphabet of {len(text.alphabet)}; run in {run.path}"
    )
    judge = Judge(text, config.length, config.judge_order)
    real, windows = judge.real(config.samples)
    print(f"judge: {real.bits:.3f} bits per character of held-out text", flush=True)

    wanted = Sizes(
        config.samples, config.steps, config.latent_dim, config.length, len(text.alphabet)
    )
    scores: list[dict[str, dict[int, Score]]] = []
    likelihoods: list[report.Likelihoods] = []
    samples: list[dict[str, dict[int, Samples]]] = []
    for seed in arguments.seeds:
        every = arguments.checkpoint_every
        teacher = train_teacher(config, text, run, seed, every)
        student = distill_student(config, text, teacher, run, seed, every)
        models = {"teacher": teacher, "student": student}
        likelihoods.append(one_step(config, text, models, run, seed))
        samples.append(sample_all(wanted, models, run, seed, unit="seq"))
        scores.append(score_all(judge, samples[-1]))

    passages = []
    for seed, one, drawn in zip(arguments.seeds, scores, samples, strict=True):
        print(f"\n{report.table(seed, one, drawn, real, windows)}")
        passages.append(report.sample_texts(text, seed, drawn))
    print(f"\n{report.verdict(scores)}")
    print(f"\n{report.one_step_table(likelihoods)}")

    results = report.results(
        config,
        text,
        arguments.seeds,
        arguments.threads,
        real,
        windows,
        scores,
        samples,
        likelihoods,
    )
    for folder in (run.path, arguments.report):
        if folder is None:
            continue
        write_json(folder / "results.json", results)
        write_file(folder / "samples.txt", "\n".join(passages).encode())
        draw_picture(folder / "text.png", config, text, samples[0], scores, likelihoods, real)
        names = ", ".join(str(folder / name) for name in ("results.json", "text.png"))
        print(f"\nwritten: {names}, samples.txt")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
