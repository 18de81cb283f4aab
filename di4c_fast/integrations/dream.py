"""Drop-in for the `diffusion_generate` of Dream, and of Fast-dLLM's Dream with and without blocks.

    import di4c_fast.integrations.dream as fast

    with fast.accelerate(model):                 # or handle = ...; handle.remove()
        output = model.diffusion_generate(input_ids, attention_mask=..., alg="entropy", ...)

Only the loop behind `diffusion_generate` is replaced: configuration, lengths and warnings are
the model's own. Beside what `di4c_fast.integrations` says of all drop-ins:

* the output layer runs for the masked positions alone, `alg="origin"` computes only those whose
  turn it is;
* the history has an entry for a step that fills nothing, too;
* confidences are computed in fp32; `confidence_dtype=torch.bfloat16` gives those of a model in
  bfloat16, many of which tie, at the price of sorting whole rows;
* sequences with different numbers of masked positions are each filled at their own rate (in the
  repository by the mean, which overwrites prompts); equal confidences keep the lowest position.

In blocks (Fast-dLLM's `generation_utils_block`, with its `block_length` and `dual_cache`) the first
step of a block fills its first position alone, from the call on all positions; every other `alg`
than confidence_threshold decides by entropy, as there. A block needs 2 steps: with one, that loop
leaves the rest masked. Batches and prompts padded on the left work, where it knows one sequence.

Calls with `generation_tokens_hook_func` or `generation_logits_hook_func` run the model's own loop:
the hooks are promised all logits.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..checks import check_choice, check_int, describe
from ..heads import Head
from ..models.call import check_callable
from ..models.linear_output import call_for_head
from ..samplers.confidence import sample_confidence
from ._fast_dllm import CachedModel
from ._handle import Handle

__all__ = ["DreamOutput", "accelerate", "cached_denoiser", "denoiser"]

HOOKS = ("generation_tokens_hook_func", "generation_logits_hook_func")
ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy", "confidence_threshold")


@dataclasses.dataclass
class DreamOutput:
    """What comes back where the model's own module has no `DreamModelOutput`."""

    sequences: Tensor
    history: list[Tensor] | None = None


def denoiser(model: Any) -> Callable[..., Head]:
    """Dream's model as a callable (tokens, t, attention_mask, tok_idx), which ignores t.

    Its logits belong to the next position: use it with `sample_confidence(..., shift=True)`.

    Args:
        model: `DreamModel`, or any callable (tokens, attention_mask, tok_idx) that returns an
            object with logits (R, D, V).
    """
    check_callable(model, "model")

    def call(
        tokens: Tensor,
        t: Tensor,
        attention_mask: Tensor | str = "full",
        tok_idx: Tensor | None = None,
    ) -> Head:
        return call_for_head(model, tokens, attention_mask, tok_idx)

    return call


def cached_denoiser(model: Any) -> Callable[..., Head]:
    """Fast-dLLM's `DreamModel` for `sample_confidence` with window="suffix" or "block", shift=True.

    Called as (tokens, t, window=..., attention_mask=None), see `di4c_fast.samplers.caches`. It
    serves one run at a time.
    """
    return CachedModel(model)


def accelerate(model: Any, **options: Any) -> Handle:
    """Replace the sampling loop of `model.diffusion_generate`.

    Args:
        model: `DreamModel` (any with its `_sample` method) of Dream or of Fast-dLLM.
        options: keywords of `sample_confidence` for every call: confidence_dtype, seed, ...
            exclude_mask is False unless it is given, as in Dream, but for `origin`; True waits
            for the device at no step.
    """
    if not callable(getattr(model, "_sample", None)):
        raise TypeError(f"model must have Dream's method _sample, got {describe(model)}")
    return Handle(model, "_sample", functools.partial(_sample, model, model._sample, options))


@torch.no_grad()
def _sample(
    model: Any,
    original: Callable[..., Any],
    options: dict[str, Any],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation_config: Any,
    **more: Any,
) -> Any:
    """Dream's `_sample` with its arguments, behind the first three."""
    config = generation_config
    if not all(_does_nothing(more.get(hook)) for hook in HOOKS):
        own = {"attention_mask": attention_mask, "generation_config": config}
        return original(input_ids, **own, **more)
    options = {"exclude_mask": False, **options}
    check_choice(config.alg, "alg", ALGORITHMS)
    if config.alg == "origin":
        options["exclude_mask"] = True
    by_threshold = config.alg == "confidence_threshold"
    how: dict[str, Any] = {
        "rule": "maskgit_plus" if by_threshold else config.alg,
        "schedule": "even" if by_threshold else "ancestral",
        "steps": config.steps,
    }
    length = config.max_length
    call, context = denoiser(model), _attention(attention_mask, length)
    if "dual_cache" in more:
        call, context = cached_denoiser(model), _padding(attention_mask, length)
        how |= _block_options(more, length - input_ids.shape[1], config.steps, by_threshold)
    changes: dict[int, Tensor] = {}
    start: list[Tensor] = []
    tokens = sample_confidence(
        call,
        (input_ids.shape[0], length),
        mask_id=int(config.mask_token_id),
        t_min=config.eps,
        threshold=more.get("threshold", 0.9) if by_threshold else None,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=None if config.top_p is None or config.top_p >= 1 else config.top_p,
        confidence_temperature=0.0 if by_threshold else config.alg_temp or 0.0,
        shift=True,
        prompt=input_ids,
        context=context,
        callback=lambda step, total, state: changes.update({step: state}),
        history=start,
        **how,
        **options,
    )
    if not config.return_dict_in_generate:
        return tokens
    history = None
    if config.output_history:
        last = max(changes, default=0) if by_threshold else config.steps
        history, state = [], start[0]
        for step in range(1, max(last, 1) + 1):
            state = changes.get(step, state)
            history.append(state)
    names = getattr(getattr(original, "__func__", None), "__globals__", {})
    return names.get("DreamModelOutput", DreamOutput)(sequences=tokens, history=history)


def _does_nothing(hook: Any) -> bool:
    """None, or the default that `diffusion_generate` makes up where no hook was given."""
    name = getattr(hook, "__qualname__", "")
    return hook is None or name.endswith("diffusion_generate.<locals>.<lambda>")


def _block_options(
    more: dict[str, Any], length: int, steps: int, by_threshold: bool
) -> dict[str, Any]:
    """Of `sample_confidence`, for the loop in blocks."""
    block_length = more.get("block_length") or length
    check_int(block_length, "block_length", minimum=1)
    if length % block_length:
        raise ValueError(
            f"block_length must divide the {length} tokens to generate, got {block_length}"
        )
    if steps % (length // block_length):
        raise ValueError(
            f"steps must be a multiple of the number of blocks, {length // block_length}, "
            f"got {steps}"
        )
    how = {"block_length": block_length, "window": "block" if more["dual_cache"] else "suffix"}
    how |= {"steps": None} if by_threshold else {"rule": "entropy"}
    return {**how, "lead": True}


def _padding(attention_mask: Tensor | None, length: int) -> dict[str, Tensor]:
    """(B, D) bool, the tokens that are real; nothing if all are."""
    if attention_mask is None or not bool((attention_mask == 0).any()):
        return {}
    missing = length - attention_mask.shape[1]
    real = torch.nn.functional.pad(attention_mask != 0, (0, missing), value=True)
    return {"attention_mask": real}


def _attention(attention_mask: Tensor | None, length: int) -> dict[str, Tensor]:
    """What the model takes for padded prompts: pairs of real tokens, and their positions."""
    real = _padding(attention_mask, length).get("attention_mask")
    if real is None:
        return {}
    positions = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)
    pairs = rearrange(real, "b d -> b 1 1 d") & rearrange(real, "b d -> b 1 d 1")
    return {"attention_mask": pairs, "tok_idx": positions}
