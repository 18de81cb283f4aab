"""`python -m di4c_fast.training MODEL --data FILE --out DIR`: a few-step student of a pretrained
masked language model.

MODEL is a folder or a name on the hub of Hugging Face. Interrupted, the same command goes on.
`python -m di4c_fast.training.sample DIR` draws from the student.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

import torch

from .checkpoint import replacing
from .command import run_command
from .corpus import read_corpus
from .finetune import Recipe, finetune
from .pretrained import load_masked_lm, save_student, to_device

KEPT = "; the last checkpoint is still there, and the same command goes on from it"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m di4c_fast.training",
        description=(
            "Distil a pretrained masked language model of Hugging Face into a few-step student. "
            "Interrupted, the same command goes on from its last checkpoint. "
            "See docs/your-model.md for the knobs and how to read the numbers."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="a folder that save_pretrained wrote, or a name on the hub")
    parser.add_argument(
        "--data",
        required=True,
        type=pathlib.Path,
        metavar="FILE",
        help="UTF-8 text, an example a line, or *.safetensors with 'tokens' (S, D) and perhaps "
        "'valid' (S, D)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("student"),
        metavar="DIR",
        help="the student and its checkpoint",
    )
    parser.add_argument("--length", type=int, help="cut texts after so many tokens")
    parser.add_argument("--mask-id", type=int, help="where the tokenizer names no mask token")
    parser.add_argument(
        "--no-tokenizer", action="store_true", help="load none; data must be token ids"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="run the models in bfloat16")
    parser.add_argument(
        "--checkpoint-every", type=int, default=50, metavar="N", help="steps between checkpoints"
    )
    group = parser.add_argument_group("recipe", "a folder belongs to one choice of these")
    for field in dataclasses.fields(Recipe):
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            metavar=field.name.split("_")[-1].upper(),
            help=field.metadata["help"],
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Recipe)}
    try:
        recipe = Recipe(**values)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    if arguments.checkpoint_every < 1:
        parser.error(f"--checkpoint-every must be at least 1, got {arguments.checkpoint_every}")
    return run_command(lambda: run(arguments, recipe), kept=KEPT)


def run(arguments: argparse.Namespace, recipe: Recipe) -> None:
    teacher = load_masked_lm(
        arguments.model, mask_id=arguments.mask_id, tokenizer=not arguments.no_tokenizer
    )
    corpus = read_corpus(arguments.data, teacher, length=arguments.length)
    learned = int(corpus.valid.sum())
    print(
        f"{len(corpus)} examples of up to {corpus.tokens.shape[1]} tokens, {learned} to learn; "
        f"run in {arguments.out}"
    )
    student, history = finetune(
        to_device(teacher, arguments.device),
        corpus,
        recipe,
        arguments.out / "checkpoint.safetensors",
        checkpoint_every=arguments.checkpoint_every,
        bf16=arguments.bf16,
        report=lambda line: print(line, flush=True),
    )
    save_student(student, arguments.out)
    with replacing(arguments.out / "history.json") as temporary:
        temporary.write_text(json.dumps(history, indent=1) + "\n")
    print(f"the student is in {arguments.out}: python -m di4c_fast.training.sample {arguments.out}")


if __name__ == "__main__":
    sys.exit(main())
