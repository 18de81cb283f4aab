"""Drop-ins for the `generate` functions of LLaDA and of Fast-dLLM's LLaDA.

    from di4c_fast.integrations.llada import generate      # in place of LLaDA's
    out = generate(model, input_ids, attention_mask, steps=128, gen_length=128, block_length=32)

    with di4c_fast.integrations.llada.accelerate(module):
        module.generate(model, input_ids, ...)             # a repository's own module and calls

Beside what `di4c_fast.integrations` says of all drop-ins:

* the output layer runs for the masked positions of the current block alone; sequences without any
  are left out of the call;
* confidences are computed in fp32. `confidence_dtype=torch.bfloat16` gives those of LLaDA in
  bfloat16, many of which tie, `torch.float64` those of Fast-dLLM, both at the price of whole rows;
* equal confidences keep the lowest position; masks inside the prompt are filled with the first
  block instead of at the expense of the answer; CFG works without an attention mask.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..checks import check_choice, check_int64, check_rank, check_shape, check_tensor, describe
from ..heads import Head
from ..models.call import check_callable
from ..models.linear_output import call_for_head
from ..samplers.arguments import check_counts
from ..samplers.confidence import sample_confidence
from ._fast_dllm import CachedModel
from ._handle import Handle

__all__ = [
    "EOS_ID",
    "EOT_ID",
    "accelerate",
    "cached_denoiser",
    "denoiser",
    "generate",
    "generate_fast_dllm",
]

MASK_ID, EOS_ID, EOT_ID = 126336, 126081, 126348
COMMON = ("model", "prompt", "steps", "gen_length", "block_length", "temperature", "remasking")
CACHED = {"generate_with_prefix_cache": "suffix", "generate_with_dual_cache": "block"}
REMASKING = ("low_confidence", "random")


def denoiser(model: Any) -> Callable[..., Head]:
    """LLaDA's model as a callable (tokens, t, attention_mask=None), which ignores t.

    Args:
        model: `LLaDAModelLM`, or any callable (tokens, attention_mask=...) that returns an object
            with logits (R, D, V); also without `attention_mask` if none is given.
    """
    check_callable(model, "model")
    scale = _scale_of(model)

    def call(tokens: Tensor, t: Tensor, attention_mask: Tensor | None = None) -> Head:
        arguments = {} if attention_mask is None else {"attention_mask": attention_mask}
        return call_for_head(model, tokens, scale=scale, **arguments)

    return call


def cached_denoiser(model: Any) -> CachedModel:
    """Fast-dLLM's `LLaDAModelLM` for `sample_confidence(..., window="suffix")` or "block".

    Called as (tokens, t, window=..., attention_mask=None), see `di4c_fast.samplers.caches`. It
    serves one run at a time.
    """
    return CachedModel(model, scale=_scale_of(model))


def _scale_of(model: Any) -> float:
    config: Any = getattr(model, "config", None)
    return 1.0 / math.sqrt(config.d_model) if getattr(config, "scale_logits", False) else 1.0


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    attention_mask: Tensor | None = None,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = MASK_ID,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    **options: Any,
) -> Tensor:
    """LLaDA's `generate`: the prompt (B, P) with `gen_length` tokens behind it.

    Args:
        model ... confidence_eos_eot_inf: as in LLaDA. With `confidence_eos_eot_inf` and a
            temperature, only EoT is deferred, as there.
        options: more of `sample_confidence`: confidence_dtype, eos_id, threshold, factor, seed,
            generator, callback, history ... With a threshold or factor, `steps` is not used.
            exclude_mask is False unless it is given, as in LLaDA; True waits for the device at no
            step.

    Returns:
        (B, P + gen_length) int64. `gen_length` must be a multiple of `block_length`, and `steps`
        of the number of blocks.
    """
    deferred: tuple[int, ...] = ()
    if confidence_eos_eot_inf and remasking == "low_confidence":
        # At a temperature the repository changes a copy of the logits for EOS, without effect.
        deferred = (EOS_ID, EOT_ID) if temperature == 0 else (EOT_ID,)
    options |= {"rule": remasking, "mask_id": mask_id, "temperature": temperature}
    return _generate(
        model,
        denoiser(model),
        prompt,
        attention_mask,
        {"steps": steps, "gen_length": gen_length, "block_length": block_length},
        guidance_scale=cfg_scale,
        banned_ids=(EOS_ID,) if logits_eos_inf else (),
        deferred_ids=deferred,
        **options,
    )


@torch.no_grad()
def generate_fast_dllm(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = MASK_ID,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    attention_mask: Tensor | None = None,
    window: str = "all",
    **options: Any,
) -> tuple[Tensor, int]:
    """Fast-dLLM's `generate` for LLaDA: the tokens and the number of model calls.

    Arguments as there and in `generate`; with a threshold or a factor `steps` is not used.
    `prompt` may hold several sequences: each goes through its blocks on its own. Where the
    repository would never end, because the model insists on the mask, this ends with masks left.

    Args:
        attention_mask: (B, P), 0 where a prompt is padded on its left; only for Fast-dLLM's
            `LLaDAModelLM`, which ignores a mask that it is given.
        window: "suffix" for `generate_with_prefix_cache`, "block" for `generate_with_dual_cache`:
            the model must be Fast-dLLM's `LLaDAModelLM`, and all sequences are in the same block. A
            block that its first call fills takes one call, there one more that does nothing.
    """
    calls = 0
    callback = options.pop("callback", None)

    def count(*step: Any) -> None:
        nonlocal calls
        calls += 1
        if callback is not None:
            callback(*step)

    plain = window == "all" and attention_mask is None
    call = denoiser(model) if plain else cached_denoiser(model)
    sizes = {"steps": steps, "gen_length": gen_length, "block_length": block_length}
    options |= {"rule": remasking, "mask_id": mask_id, "temperature": temperature}
    options |= {"threshold": threshold, "factor": factor, "window": window, "callback": count}
    return _generate(model, call, prompt, attention_mask, sizes, **options), calls


def _generate(
    model: Any,
    call: Callable[..., Head],
    prompt: Tensor,
    attention_mask: Tensor | None,
    sizes: dict[str, int],
    **options: Any,
) -> Tensor:
    check_int64(prompt, "prompt")
    check_rank(prompt, "prompt", exactly=2)
    check_choice(options["rule"], "remasking", REMASKING)
    check_counts([(name, size, 1) for name, size in sizes.items()])
    steps, gen_length, block_length = sizes.values()
    if gen_length % block_length:
        raise ValueError(
            f"gen_length must be a multiple of block_length, {block_length}, got {gen_length}"
        )
    device = getattr(model, "device", None)
    prompt = prompt.to(prompt.device if device is None else device)
    context = {}
    if attention_mask is not None:
        check_tensor(attention_mask, "attention_mask")
        check_shape(attention_mask, "attention_mask", "B, P", prompt.shape)
        seen = functional.pad(attention_mask.to(prompt.device), (0, gen_length), value=1)
        context["attention_mask"] = seen
    if options.get("threshold") is None and options.get("factor") is None:
        options["steps"] = steps
    batch, length = prompt.shape
    return sample_confidence(
        call,
        (batch, length + gen_length),
        block_length=block_length,
        prompt=prompt,
        context=context,
        **{"steps": None, "exclude_mask": False, **options},
    )


def accelerate(module: Any, **options: Any) -> Handle:
    """Replace the functions of an imported `generate.py` of LLaDA or of Fast-dLLM.

    Args:
        module: the module (or any object) with a function `generate`; one that takes `threshold`
            and no `attention_mask` is Fast-dLLM's, whose `generate_with_prefix_cache` and
            `generate_with_dual_cache` are replaced, too, where they are. Names that were imported
            out of the module before stay as they were.
        options: keywords for every call: exclude_mask, confidence_dtype, seed, eos_id, ...
    """
    found = getattr(module, "generate", None)
    if not callable(found):
        raise TypeError(f"module must have a function generate, got {describe(module)}")
    handle = Handle()
    if {*COMMON, "mask_id", "cfg_scale"} <= _names(found):
        handle.replace(module, "generate", functools.partial(generate, **options))
        return handle
    windows = {"generate": "all"} | {name: w for name, w in CACHED.items() if hasattr(module, name)}
    for name in windows:
        names = _names(getattr(module, name))
        if not {*COMMON, "mask_id", "threshold"} <= names:
            raise TypeError(
                f"module.{name} must have the arguments of LLaDA's or of Fast-dLLM's, "
                f"got {', '.join(sorted(names))}"
            )
    for name, window in windows.items():
        ours = functools.partial(generate_fast_dllm, window=window, **options)
        handle.replace(module, name, ours)
    return handle


def _names(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)
