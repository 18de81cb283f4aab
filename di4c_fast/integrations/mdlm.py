"""Drop-in for the sampler of MDLM (masked diffusion language models).

    from di4c_fast.integrations.mdlm import accelerate_mdlm

    with accelerate_mdlm(model):               # or handle = ...; handle.remove()
        tokens = model.restore_model_and_sample(num_steps=1000)

`model` is the `Diffusion` module of `diffusion.py`. Its `_sample` is replaced, on which
`restore_model_and_sample`, `main.py mode=sample_eval` and the samples at validation rest;
averaged weights are stored, used and restored by the repository's own code around it. Without
replacing anything, and with everything that `sample_masked` offers (prompts, one's own times):

    tokens = sample_masked(as_model(model), (8, 1024), mask_id=model.mask_index, steps=256)

Beside what `di4c_fast.integrations` says of all drop-ins: the settings come out of `model.config`,
the noise levels of a network with `time_conditioning` and the final argmax
(`sampling.noise_removal`) are the repository's; `ddpm_cache` gives the law of `ddpm`, as there,
and needs no cache.

The repository's own loop runs where positions cannot be chosen before the network has been
asked, or are not distributed so: parameterisations other than "subs", the predictor "analytic",
noise other than "loglinear". `restore_model_and_semi_ar_sample` stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_int
from ..samplers.masked import sample_masked
from ._dit import Denoiser, Loop
from ._handle import Handle, check_attributes

__all__ = ["accelerate_mdlm", "as_model"]

_MODEL = ("backbone", "noise", "config", "mask_index", "parameterization", "time_conditioning")
_SAMPLER = (*_MODEL, "sampler", "device", "_sample")


def as_model(model: Any) -> Denoiser:
    """MDLM's denoiser as a module (tokens (R, D), t (R,)).

    Logits are the network's at the noise level of t; `mask_id=model.mask_index` makes the
    distributions those of the "subs" parameterisation.

    Args:
        model: a `Diffusion` with `parameterization` "subs"; a ValueError for another.
    """
    check_attributes(model, "model", _MODEL)
    if model.parameterization != "subs":
        raise ValueError(f"model.parameterization must be 'subs', got {model.parameterization!r}")

    def noise_level(t: Tensor) -> Tensor:
        return model.noise(t)[0] if model.time_conditioning else torch.zeros_like(t)

    return Denoiser(model.backbone, noise_level)


def accelerate_mdlm(model: Any) -> Handle:
    """Replace the sampling loop of an MDLM model, a `Diffusion`, by `sample_masked`."""
    check_attributes(model, "model", _SAMPLER)
    return Handle(model, "_sample", _Sampler(model, as_model, model._sample))


class _Sampler(Loop):
    """`_sample` with its arguments."""

    @torch.no_grad()
    def __call__(self, num_steps: int | None = None, eps: float = 1e-5) -> Tensor:
        model = self.model
        ours = (  # positions unmask at rates of the times alone, linearly
            model.parameterization == "subs"
            and model.sampler in ("ddpm", "ddpm_cache")
            and model.config.noise.type == "loglinear"
        )
        if not ours:
            return self.original(num_steps=num_steps, eps=eps)
        steps = model.config.sampling.steps if num_steps is None else num_steps
        check_int(steps, "num_steps", minimum=1)
        history: list[Tensor] | None = None if model.config.sampling.noise_removal else []
        tokens = sample_masked(
            self.denoiser.forward,  # no module: the mode stays as it is
            (model.config.loader.eval_batch_size, model.config.model.length),
            mask_id=model.mask_index,
            steps=steps,
            t_min=eps,
            active_only=not self.denoiser.compiled,
            history=history,
            device=model.device,
        )
        return tokens if history is None else history[steps]  # before the argmax
