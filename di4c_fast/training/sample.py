"""`python -m di4c_fast.training.sample DIR`: texts from a student that `finetune` made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ..samplers import sample_masked
from .command import run_command
from .pretrained import Pretrained, load_student, to_device


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m di4c_fast.training.sample",
        description="Draw texts from a student, or fill in the masks of one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("student", help="the folder that python -m di4c_fast.training wrote")
    parser.add_argument(
        "--text", help="a text whose mask tokens are filled in; None draws whole texts"
    )
    parser.add_argument("--length", type=int, default=32, help="tokens of whole texts")
    parser.add_argument("--count", type=int, default=4, help="how many")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    student = to_device(load_student(arguments.student), arguments.device)
    prompt = prompt_of(student, arguments.text, arguments.length)
    limit = student.positions
    if limit is not None and len(prompt) > limit:
        raise ValueError(f"the text has {len(prompt)} tokens, and the model takes {limit}")
    tokens = sample_masked(
        student.model,
        (arguments.count, len(prompt)),
        mask_id=student.mask_id,
        steps=arguments.steps,
        latent_dim=student.latent_dim,
        prompt=prompt.to(arguments.device),
        seed=arguments.seed,
    )
    for row in tokens.tolist():
        tokenizer = student.tokenizer
        words = None if tokenizer is None else tokenizer.decode(row, skip_special_tokens=True)
        print(" ".join(map(str, row)) if words is None else words)


def prompt_of(student: Pretrained, text: str | None, length: int) -> torch.Tensor:
    """(D,) int64: the text's tokens, or masks between the tokenizer's special tokens."""
    tokenizer = student.tokenizer
    if tokenizer is None:
        if text is not None:
            raise ValueError("the student has no tokenizer, so that it takes no text")
        return torch.full((length,), student.mask_id)
    given = " ".join([tokenizer.mask_token] * length) if text is None else text
    ids = tokenizer(given)["input_ids"]
    if student.mask_id not in ids:
        raise ValueError(f"the text has no mask to fill in: write {tokenizer.mask_token}")
    return torch.tensor(ids, dtype=torch.int64)


if __name__ == "__main__":
    sys.exit(main())
