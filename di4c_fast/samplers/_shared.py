"""What the samplers share: arguments, seeds, latents, prompts and projections.

Shapes: B sequences, D positions, L latent dimensions, P prompt tokens, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import rng
from ..checks import (
    check_floating,
    check_int64,
    check_number,
    check_same_device,
    check_tensor,
    describe,
)
from ..models.call import check_callable
from ..rng import check_generator

# Step numbers of the counter-based generator that no sampling step uses.
PLAN, REPLAN = 2**32 - 1, 2**31


def check_counts(counts: Sequence[tuple[str, Any, int]]) -> None:
    """Each of (name, value, minimum) is an int of at least its minimum."""
    for name, value, minimum in counts:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {describe(value)}")
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_sizes(shape: Any, **minima: tuple[Any, int]) -> tuple[int, int]:
    """`shape` as (B, D), and the counts given by name as (value, minimum)."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or len(shape) != 2:
        raise TypeError(f"shape must be (B, D), got {describe(shape)}")
    counts = [("shape[0]", shape[0], 0), ("shape[1]", shape[1], 1)]
    check_counts(counts + [(name, *value) for name, value in minima.items()])
    return shape[0], shape[1]


def check_vocab_size(vocab_size: Any, mask_id: int) -> None:
    """V, if it is given: at least two classes, the mask among them."""
    if vocab_size is None:
        return
    check_counts([("vocab_size", vocab_size, 2)])
    if mask_id >= vocab_size:
        raise ValueError(f"mask_id must be in [0, vocab_size) = [0, {vocab_size}), got {mask_id}")


def check_filters(temperature: Any, top_k: Any, top_p: Any) -> None:
    """The draw's options, so that they fail before the first call of the model."""
    check_number(temperature, "temperature", minimum=0.0)
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k must be an int or None, got {describe(top_k)}")
        check_counts([("top_k", top_k, 1)])
    if top_p is not None:
        check_number(top_p, "top_p")
        if not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")


def check_hooks(callback: Any, history: Any, project_fn: Any = None) -> None:
    for name, hook in (("project_fn", project_fn), ("callback", callback)):
        if hook is not None:
            check_callable(hook, name)
    if history is not None and not isinstance(history, list):
        raise TypeError(f"history must be a list to fill or None, got {describe(history)}")


def device_of(device: Any, prompt: Any, model: Any) -> torch.device:
    """Where to sample: as asked, else with the prompt, else with the model, else on the CPU."""
    if device is not None:
        try:
            # With the index that tensors there have: "cuda" is none that a tensor names.
            return torch.empty(0, device=device).device
        except (AssertionError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device must be one that torch can use here, got {device!r}: {reason}"
            ) from error
    if isinstance(prompt, Tensor):
        return prompt.device
    if isinstance(model, nn.Module):
        for parameter in model.parameters():
            return parameter.device
    return torch.device("cpu")


def seed_of(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed as it was passed, or drawn from the generator."""
    check_generator(generator)
    if seed is None:
        source = None if generator is None else generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=source))
    if generator is not None:
        raise ValueError("seed and generator exclude each other: pass one of them")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or None, got {describe(seed)}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    return seed


def fill_prompt(tokens: Tensor, prompt: Any, vocab_size: int | None) -> int:
    """Write the prompt (B, P) or (P,) into the tokens (B, D); the largest id in it."""
    check_int64(prompt, "prompt")
    batch, positions = tokens.shape
    if prompt.ndim not in (1, 2) or (prompt.ndim == 2 and prompt.shape[0] != batch):
        raise ValueError(
            f"prompt must have shape (B, P) or (P,) with B = {batch}, got {tuple(prompt.shape)}"
        )
    length = prompt.shape[-1]
    if length > positions:
        raise ValueError(
            f"prompt must not be longer than the sequence, D = {positions}, got {length} tokens"
        )
    check_same_device(prompt, "prompt", tokens, "the samples")
    if prompt.numel() == 0:
        return 0
    low, high = torch.stack(prompt.aminmax()).tolist()
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        bound = "V" if vocab_size is None else str(vocab_size)
        raise ValueError(
            f"prompt must hold token ids in [0, {bound}), got {low if low < 0 else high}"
        )
    tokens[:, :length] = prompt
    return high


def latents_of(
    latent: Any,
    latent_dim: int,
    calls: int,
    batch: int,
    *,
    seed: int,
    first_sequence: int,
    device: torch.device,
    letter: str = "S",
) -> Tensor | None:
    """λ of every model call: None without λ, (B, L) as passed, or (calls, B, L).

    Drawn on the CPU as a function of (seed, call, number of the sequence). `letter` names the
    number of calls in messages.
    """
    if latent is not None:
        _check_latent(latent, latent_dim, calls, batch, device, letter)
        return latent
    if not latent_dim:
        return None
    call = torch.arange(calls).repeat_interleave(batch)
    keys = (torch.arange(batch) + first_sequence).repeat(calls)
    return rng.uniform(seed, call, keys, latent_dim).view(calls, batch, latent_dim).to(device)


def _check_latent(
    latent: Any, latent_dim: int, calls: int, batch: int, device: torch.device, letter: str
) -> None:
    check_tensor(latent, "latent")
    check_floating(latent, "latent")
    if latent_dim < 1:
        raise ValueError(f"latent needs latent_dim >= 1, got {latent_dim}")
    allowed = [(batch, latent_dim), (calls, batch, latent_dim)]
    if tuple(latent.shape) not in allowed:
        raise ValueError(
            f"latent must have shape (B, L) = {allowed[0]} or ({letter}, B, L) = {allowed[1]}, "
            f"got {tuple(latent.shape)}"
        )
    if latent.device != device:
        raise ValueError(f"latent must be on {device}, got {latent.device}")


def project(project_fn: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    # A copy, since many projections write into their argument.
    projected = project_fn(tokens.clone())
    check_int64(projected, "the output of project_fn")
    if projected.shape != tokens.shape:
        raise ValueError(
            f"project_fn must return tokens of shape (B, D) = {tuple(tokens.shape)}, "
            f"got {tuple(projected.shape)}"
        )
    check_same_device(projected, "the output of project_fn", tokens, "its input")
    return projected
