"""What samplers are given: the options that they share, and checks of arguments.

Shapes: B sequences, D positions, P prompt tokens, L of λ.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack as Unpack

from ..checks import check_bool, check_int, check_int64, check_same_device, describe
from ..heads import HeadLike
from ..models.call import Context
from ..rng import check_generator

P = ParamSpec("P")
Model = Callable[..., HeadLike]


class Options(TypedDict, total=False):
    """Options of every sampler; what they mean stands in `di4c_fast.samplers`."""

    latent_dim: int
    latent: Tensor | None
    context: Context | None
    seed: int | None
    generator: torch.Generator | None
    first_sequence: int
    callback: Callable[[int, int, Tensor], None] | None
    history: list[Tensor] | None
    device: torch.device | str | None


class DrawOptions(Options, total=False):
    """The same where tokens are drawn at a temperature."""

    temperature: float
    top_k: int | None
    top_p: float | None


class MaskOptions(Options, total=False):
    """Options of every sampler that starts from masks."""

    vocab_size: int | None
    prompt: Tensor | None


class MaskDrawOptions(MaskOptions, DrawOptions, total=False):
    """Both."""


def sampler(
    options: type, temperature: float = 1.0
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """A function without gradients whose `**options` stand in its signature by their names."""
    known = {"latent_dim": 0, "first_sequence": 0, "temperature": temperature}

    def wrap(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        own, keyword = inspect.signature(function), inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter(
                name, keyword, default=known.get(name), annotation=kind.__forward_arg__
            )
            for name, kind in options.__annotations__.items()
        ]
        named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        signature = own.replace(parameters=[*named, *shared])
        defaults = {p.name: p.default for p in shared}

        @functools.wraps(function)
        @torch.no_grad()
        def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            for name in kwargs:
                if name not in signature.parameters:
                    raise TypeError(f"{function.__name__} has no argument {name!r}")
            return function(*args, **(defaults | kwargs))

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return wrap


def check_counts(counts: Sequence[tuple[str, Any, int]]) -> None:
    """Each of (name, value, minimum) is an int of at least its minimum."""
    for name, value, minimum in counts:
        check_int(value, name, minimum=minimum)


def check_size(shape: Any) -> tuple[int, int]:
    """`shape` as (B, D)."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 2:
        raise TypeError(f"shape must be (B, D), got {describe(shape)}")
    check_counts([("shape[0]", shape[0], 0), ("shape[1]", shape[1], 1)])
    return shape[0], shape[1]


def device_of(device: Any, given: Sequence[Any], model: Any) -> torch.device:
    """Where to sample: as asked, else with the tokens given, else with the model, else the CPU."""
    if device is None:
        tensors = [value for value in given if isinstance(value, Tensor)]
        tensors += list(model.parameters()) if isinstance(model, nn.Module) else []
        return tensors[0].device if tensors else torch.device("cpu")
    try:
        # With the index that tensors there have: "cuda" is none that a tensor names.
        found = torch.zeros(1, device=device)
        found.item()  # which "meta" has none of
        return found.device
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be one that torch can use here, got {device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error


def seed_of(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed as it was passed, or drawn from the generator."""
    check_generator(generator)
    if seed is None:
        source = None if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=source))
    if generator is not None:
        raise ValueError("seed and generator exclude each other: pass one of them")
    if check_int(seed, "seed") not in range(2**63):
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    return seed


def fill_prompt(tokens: Tensor, prompt: Any, mask_id: int) -> int:
    """Write the prompt (B, P) or (P,) into the tokens (B, D); the largest known id in it."""
    if prompt is None:
        return 0
    check_int64(prompt, "prompt")
    batch, positions = tokens.shape
    length = prompt.shape[-1] if prompt.ndim else 0
    if prompt.ndim == 0 or prompt.shape[:-1] not in ((), (batch,)) or length > positions:
        raise ValueError(
            f"prompt must have shape (B, P) or (P,) with B = {batch} and P <= D = {positions}, "
            f"got {tuple(prompt.shape)}"
        )
    check_same_device(prompt, "prompt", tokens, "the samples")
    if prompt.numel() == 0:
        return 0
    known = prompt.masked_fill(prompt == mask_id, 0) if mask_id >= 0 else prompt
    low, high = torch.stack(known.aminmax()).tolist()
    if low < 0:
        raise ValueError(f"prompt must hold ids of at least 0, got {low}")
    tokens[:, :length] = prompt
    return high


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        check_bool(value, name)
