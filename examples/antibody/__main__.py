"""The command line: `python -m examples.antibody --help`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import operator
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from di4c_fast.samplers import sample_masked
from di4c_fast.training.finetune import finetune
from di4c_fast.training.pretrained import Pretrained

from ..common import report
from ..common.command import add_recipe, base_parser, parse_recipe, run_command, write_all
from ..common.plots import step_words
from ..common.rundir import RunDirectory, RunError
from ..common.sampling import MODELS, sample_seeds
from . import likelihood
from . import teacher as antiberty
from .config import Config
from .data import MASK, TRAINED, drawn_once, empty_loops, loops_of
from .metrics import MEASURES, Judge
from .plots import draw_picture

TRAINING_SEED = 1000
TIMED, REPEATS = 8, 2


def build_parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "python -m examples.antibody",
        "Distil AntiBERTy, a pretrained masked language model of antibodies, into a mixture "
        "student that fills in heavy-chain CDR3 loops in few steps, and print how likely and how "
        "varied its loops are beside the teacher's. The first use downloads 97 MB. Interrupted, "
        "the same command resumes.",
        "runs/antibody",
        "antibody.png",
    )
    parser.add_argument(
        "--teacher",
        type=pathlib.Path,
        default=pathlib.Path("runs/antiberty"),
        help="folder of the pretrained model; made where it does not exist",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="models in bfloat16: twice as fast on processors with instructions for it",
    )
    add_recipe(parser, Config)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    config = parse_recipe(parser, arguments, Config)

    def run() -> None:
        half = torch.autocast("cpu", torch.bfloat16)
        with half if arguments.bf16 else contextlib.nullcontext():
            run_example(config, arguments)

    return run_command(arguments.threads, run)


def run_example(config: Config, arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    precision = "bf16" if arguments.bf16 else "fp32"
    run = RunDirectory(arguments.run_dir, config, precision=precision)
    teacher = antiberty.load(arguments.teacher)
    empty = empty_loops(config.loops, TRAINED, TRAINING_SEED)
    corpus = drawn_once(teacher, empty, TRAINING_SEED, run, "loops/train")
    judge = Judge(teacher, config, run)
    floor, real = judge.floor()
    print(
        f"{len(corpus)} loops of the teacher to train on, {len(judge.empty)} chains of other V "
        f"segments to fill in; run in {run.path}",
        flush=True,
    )
    likelihoods: list[likelihood.Likelihoods] = []
    trainings: list[dict[str, float]] = []
    speeds: dict[str, dict[int, float]] = {}

    def models_of(seed: int) -> Mapping[str, nn.Module]:
        student, history = train(teacher, corpus, config, run, seed, arguments)
        trainings.extend(history[-1:])
        models = {"teacher": teacher.model, "student": student.model}
        some = slice(config.judged // 2)
        held_out = dataclasses.replace(judge.empty.take(some), tokens=real[some])
        stored = run.load(f"seed-{seed}/one-step")
        if stored is None:
            found = likelihood.one_step(*models.values(), config.latent_dim, held_out, seed)
            rows = [dataclasses.astuple(one) for one in found.values()]
            nats = {"nats": torch.tensor(rows, dtype=torch.float64)}
            run.save(f"seed-{seed}/one-step", nats, {})
        else:
            rows = stored[0]["nats"].tolist()
            pairs = zip(likelihood.HIDDEN, rows, strict=True)
            found = {share: likelihood.OneStep(*row) for share, row in pairs}
        likelihoods.append(found)
        print(likelihood.table(likelihoods[-1:]), flush=True)
        if not speeds:
            speeds.update(speed(config, models, draw))
        return models

    def draw(
        model: nn.Module, shape: tuple[int, int], first_sequence: int, **options: int
    ) -> Tensor:
        chains = judge.empty.take(slice(first_sequence, first_sequence + shape[0]))
        return sample_masked(
            model,
            shape,
            mask_id=MASK,
            prompt=chains.tokens,
            context=chains.context,
            first_sequence=first_sequence,
            **options,
        )

    scores, samples = sample_seeds(config, arguments.seeds, run, judge, models_of, draw, "loop")
    for seed, one in scores.items():
        note = "the teacher's loops, one residue at a time (noise floor)"
        print(f"\n{report.table(seed, MEASURES, one, samples[seed], floor, note)}")
    every, first = list(scores.values()), samples[arguments.seeds[0]]
    title = "student - teacher"
    print(f"\n{report.verdict(title, MEASURES, every, operator.sub, lambda m: f'+.{m.digits}f')}")
    print(f"\n{likelihood.table(likelihoods)}")
    results = report.results(
        config,
        arguments.threads,
        MEASURES,
        scores,
        samples,
        precision=precision,
        teacher=antiberty.PACKAGE,
        one_at_a_time=report.rounded(MEASURES, floor),
        cpu_milliseconds_per_loop=speeds,
    )
    for seed, found, training in zip(arguments.seeds, likelihoods, trainings, strict=True):
        results["seeds"][str(seed)]["one_step"] = {k: v.to_json() for k, v in found.items()}
        results["seeds"][str(seed)]["training"] = {k: round(v, 4) for k, v in training.items()}
    valid = judge.empty.valid
    shown = {
        (name, steps): loops_of(one.tokens, valid)
        for name in MODELS
        for steps, one in first[name].items()
    }
    shown["teacher", 0] = loops_of(real, valid)
    write_all(
        (run.path, arguments.report),
        results,
        "antibody.png",
        lambda path: draw_picture(path, shown, every, speeds, floor),
        samples=texts(shown),
    )
    print(f"{time.perf_counter() - started:.0f} s")


def train(
    teacher: Pretrained,
    corpus: object,
    config: Config,
    run: RunDirectory,
    seed: int,
    arguments: argparse.Namespace,
) -> tuple[Pretrained, list[dict[str, float]]]:
    """The student of a seed, trained or resumed."""
    file = run.file(f"seed-{seed}/student")
    options = {"checkpoint_every": arguments.checkpoint_every, "bf16": arguments.bf16}
    try:
        return run.reading(
            file, lambda: finetune(teacher, corpus, config.recipe(seed), file, **options)
        )
    except RuntimeError as error:
        raise RunError(str(error)) from error


def speed(
    config: Config, models: Mapping[str, nn.Module], draw: Callable[..., Tensor]
) -> dict[str, dict[int, float]]:
    """Milliseconds of a processor per loop, the least of a few rounds in turn."""
    found: dict[str, dict[int, float]] = {name: {} for name in models}
    shape = (min(TIMED, config.samples), config.positions)
    for _ in range(REPEATS):
        for steps in config.steps:
            for name, model in models.items():
                dim = config.latent_dim if name == "student" else 0
                begun = time.process_time()
                draw(model, shape, steps=steps, latent_dim=dim, seed=0, first_sequence=0)
                spent = round((time.process_time() - begun) / shape[0] * 1e3, 3)
                found[name][steps] = min(spent, found[name].get(steps, spent))
    return found


def texts(loops: Mapping[tuple[str, int], list[str]]) -> str:
    """The first loops of each model and step count, to read."""
    lines = []
    for (name, steps), some in loops.items():
        lines.append(f"{name}, {step_words(steps) if steps else 'one residue at a time'}")
        lines += [f"  {loop}" for loop in some[:12]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
