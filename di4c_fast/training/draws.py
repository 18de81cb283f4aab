"""Where the random numbers of a step come from: one generator for the batch, or one per example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..draw.api import sample
from ..heads import Head
from ..rng import check_generator, draw_seed, random_words

Source: TypeAlias = torch.Generator | tuple[torch.Generator, ...] | None


def check_source(generator: Any, batch: int) -> Source:
    """A generator, None, or a sequence of as many generators as there are examples."""
    if not isinstance(generator, Sequence):
        check_generator(generator)
        return generator
    for each in generator:
        check_generator(each)
    if len(generator) != batch:
        raise ValueError(
            f"generator must be one, or one for each of B = {batch} examples, got {len(generator)}"
        )
    return tuple(generator)


def example_generators(seed: int, first: int, count: int) -> tuple[torch.Generator, ...]:
    """Generators of the examples `first .. first + count - 1`, functions of (seed, example)."""
    words = random_words(seed, 0, torch.arange(first, first + count), 2)
    seeds = (words[0] + (words[1] << 31)).squeeze(-1)
    return tuple(torch.Generator().manual_seed(each) for each in seeds.tolist())


def of_positions(source: Source, group: Any) -> Source:
    """Where positions draw from: where ranks share them, each has its own source."""
    if group is None:
        return source
    rank = dist.get_rank(group)

    def own(generator: torch.Generator | None) -> torch.Generator:
        seed = int(draw_seed(generator, torch.device("cpu")))
        return example_generators(seed, rank, 1)[0]

    return tuple(map(own, source)) if isinstance(source, tuple) else own(source)


def by_example(
    source: Source, draw: Callable[[torch.Generator | None, slice], Tensor], dim: int = 0
) -> Tensor:
    """`draw(generator, examples)` for all examples at once, or for each with its own generator."""
    if not isinstance(source, tuple):
        return draw(source, slice(None))
    if not source:
        return draw(None, slice(0))
    return torch.cat([draw(own, slice(i, i + 1)) for i, own in enumerate(source)], dim)


def examples_of(head: Head, source: Source) -> list[Head]:
    """The head of each example where each draws for itself, else that of all."""
    heads = [head]
    for _ in source[1:] if isinstance(source, tuple) else ():
        heads[-1:] = heads[-1].split(1)
    return heads


def targets(
    head: Head,
    xu: Tensor,
    source: tuple[torch.Generator, ...],
    mask_id: int | None,
    valid: Tensor | None,
    backend: str,
) -> Tensor:
    """x^k (B, K, D), one token from every row of the head at x_u, as `loss` draws them itself."""
    seeds = torch.stack([draw_seed(each, xu.device) for each in source])
    keys = seeds.view(-1, 1, 1) + torch.arange(xu[0].numel(), device=xu.device).view(xu.shape[1:])
    options: dict[str, Any] = {"mask_id": mask_id, "seed": 0, "want": (), "backend": backend}
    if mask_id is None:
        return sample(head, row_keys=keys, **options).token
    open_ = xu == mask_id
    if valid is not None:
        open_ = open_ & valid.unsqueeze(1)
    rows, tokens = open_.flatten().nonzero().squeeze(-1), xu.clone()
    if rows.numel():
        drawn = sample(head.take(rows), row_keys=keys.flatten()[rows], **options)
        tokens.view(-1)[rows] = drawn.token
    return tokens
