"""Drop-in for the denoising step of DiffusionGemma (`DiffusionGemmaForBlockDiffusion`).

    import di4c_fast.integrations.diffusion_gemma as fast

    with fast.accelerate(model):                 # or handle = ...; handle.remove()
        output = model.generate(**inputs, max_new_tokens=256)

Tokens, argmax and entropies of a canvas come from one pass over its logits, where the step of
transformers forms a softmax in fp32, draws with `torch.multinomial`, and computes the entropy
twice. The loop, the caches, renoising and self-conditioning are the model's own. Beside what
`di4c_fast.integrations` says of all drop-ins:

* entropies are computed in fp32, in transformers in the dtype of the logits;
* draws follow the same law with other random numbers, and repeat under `torch.manual_seed`;
* a static cache compiles the acceptance of transformers' sampler, which then is not called.

Known to work with transformers 5.24.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..checks import check_choice
from ..draw.api import sample
from ..samplers.canvas import accepted
from ._handle import Handle, check_attributes

__all__ = ["accelerate"]


def accelerate(model: Any, *, backend: str = "auto") -> Handle:
    """Replace `model._denoising_step`.

    Args:
        model: `DiffusionGemmaForBlockDiffusion`.
        backend: as for `di4c_fast.sample`.

    Raises:
        TypeError, ValueError: the model lacks an attribute that the step uses, or there is no such
            backend; the message names it.
    """
    check_choice(backend, "backend", backends.names())
    check_attributes(model, "model", ("_denoising_step", "_prepare_sampler", "config", "model"))
    return Handle(model, "_denoising_step", functools.partial(_denoising_step, model, backend))


def _denoising_step(
    model: Any,
    backend: str,
    *,
    decoder_forward: Any,
    current_canvas: Tensor,
    argmax_canvas: Tensor,
    input_ids: Tensor,
    decoder_position_ids: Tensor,
    self_conditioning_logits: Tensor | None,
    mask_mapping: Any,
    cache: Any,
    finished_denoising: Tensor,
    cur_step: int,
    sampler: Any,
    logits_processor: Any,
    diffusion_stopping_criteria: Any,
    **model_kwargs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_denoising_step` of transformers with its arguments; canvases are (B, D), logits (B, D, V).

    cur_step: how many steps are left, this one included.
    """
    step = torch.tensor(cur_step, device=current_canvas.device, dtype=torch.int32)
    torch.compiler.cudagraph_mark_step_begin()
    logits = logits_processor(
        input_ids,
        decoder_forward(
            decoder_input_ids=current_canvas,
            self_conditioning_logits=self_conditioning_logits,
            decoder_attention_mask=mask_mapping,
            cache=cache,
            decoder_position_ids=decoder_position_ids,
            **model_kwargs,
        ).logits,
        cur_step=step,
    )
    draw = sample(logits, want=("argmax", "entropy"), backend=backend)
    argmax, entropy = draw.argmax, draw.entropy
    assert argmax is not None
    assert entropy is not None
    if type(sampler).__name__ == "EntropyBoundSampler":
        sampler.accepted_token_mask = accepted(entropy, sampler.entropy_bound)
        canvas = torch.where(sampler.accepted_token_mask, draw.token, current_canvas)
    else:
        canvas = sampler.accept_canvas(current_canvas, draw.token, logits, step).clone()
    canvas = sampler.renoise_canvas(canvas, step).clone()
    if diffusion_stopping_criteria is not None:
        if bool(finished_denoising.any()):
            assert self_conditioning_logits is not None  # no first step begins with one that is
            finished = finished_denoising.unsqueeze(-1)
            argmax = torch.where(finished, argmax_canvas, argmax)
            canvas = torch.where(finished, current_canvas, canvas)
            logits = torch.where(finished.unsqueeze(-1), self_conditioning_logits, logits)
        finished_denoising |= _finished(diffusion_stopping_criteria, argmax, entropy, logits)
    dtype = model.model.decoder.embed_tokens.weight.dtype
    return canvas, argmax, logits.to(dtype), finished_denoising


def _finished(criteria: Any, argmax: Tensor, entropy: Tensor, logits: Tensor) -> Tensor:
    """(B,) what the stopping criteria say; those of transformers without another softmax."""
    if type(criteria).__name__ != "StableAndConfidentStoppingCriteria":
        return criteria(argmax, logits)
    confident = entropy.mean(-1) < criteria.confidence_threshold
    # With one class, whose entropy is 0, they say what is stable.
    certain = entropy.new_zeros(*entropy.shape, 1)
    return criteria(argmax, certain) & confident
