"""Drop-in for the sampler of MDLM (masked diffusion language models).

    from di4c_fast.integrations.mdlm import accelerate_mdlm

    with accelerate_mdlm(model):               # or handle = ...; handle.remove()
        tokens = model.restore_model_and_sample(num_steps=1000)

`model` is the `Diffusion` module of `diffusion.py`. Its `_sample` is replaced, on which
`restore_model_and_sample`, `main.py mode=sample_eval` and the samples at validation rest;
averaged weights are stored, used and restored by the repository's own code around it. Without
replacing anything, and with everything that `sample_masked` offers (prompts, one's own times):

    tokens = sample_masked(
        as_model(model), (8, 1024), mask_id=model.mask_index, steps=256, device=model.device
    )

Nothing of the repository is imported. What is the same: arguments, sizes and settings out of
`model.config`, the noise levels that a network with `time_conditioning` is given, the final
argmax (`sampling.noise_removal`), and the law of the tokens. What differs:

* only the rows that unmask go through the output layer, a step that unmasks nothing calls no
  network, and of a batch only the sequences that unmask something (all of them if compiled);
* draws are exact. The repository divides by -log(u) in fp32, u on a grid of 2^-24, which makes
  very unlikely tokens rarer than the network says;
* randomness comes from one seed drawn from torch's default generator;
* `ddpm_cache` gives the law of `ddpm`, as there, and needs no cache.

The repository's own loop runs where positions cannot be chosen before the network has been
asked, or are not distributed so: parameterisations other than "subs", the predictor "analytic",
noise other than "loglinear". `restore_model_and_semi_ar_sample` stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..heads import Head
from ..samplers.arguments import check_counts
from ..samplers.masked import sample_masked
from ._dit import Network
from ._handle import Handle, check_attributes

__all__ = ["accelerate_mdlm", "as_model"]

_MODEL = ("backbone", "noise", "config", "mask_index", "parameterization", "time_conditioning")
_SAMPLER = (*_MODEL, "sampler", "device", "_sample")


def as_model(model: Any) -> Callable[..., Head]:
    """MDLM's denoiser as a callable (tokens (R, D), t (R,)) for `di4c_fast.samplers`.

    Logits are the network's at the noise level of t; `mask_id=model.mask_index` makes the
    distributions those of the "subs" parameterisation. The mode of the network stays as it is.

    Args:
        model: a `Diffusion` with `parameterization` "subs".

    Returns:
        A callable that gives `LinearHead(hidden, weight, bias)` of the network's last layer, or
        all logits where the network is compiled or built otherwise.

    Raises:
        TypeError: `model` lacks an attribute.
        ValueError: another parameterisation.
    """
    check_attributes(model, "model", _MODEL)
    if model.parameterization != "subs":
        raise ValueError(f"model.parameterization must be 'subs', got {model.parameterization!r}")
    network = Network(model.backbone)

    def call(tokens: Tensor, t: Tensor) -> Head:
        return network(tokens, _noise_level(model, t))

    return call


def _noise_level(model: Any, t: Tensor) -> Tensor:
    if not model.time_conditioning:
        return torch.zeros_like(t)
    return model.noise(t)[0]


def accelerate_mdlm(model: Any) -> Handle:
    """Replace the sampling loop of an MDLM model by `sample_masked`.

    Args:
        model: a `Diffusion`. Its attributes are read at every call.

    Returns:
        `Handle`: `remove()` undoes it, as does leaving a `with` block.

    Raises:
        TypeError: `model` lacks an attribute.
        ValueError, TypeError (when sampling): what `sample_masked` raises.
    """
    check_attributes(model, "model", _SAMPLER)
    return Handle(model, "_sample", _Loop(model))


class _Loop:
    """`_sample` with its arguments."""

    def __init__(self, model: Any):
        self._model, self._original = model, model._sample
        self._network: Network | None = None

    @torch.no_grad()
    def __call__(self, num_steps: int | None = None, eps: float = 1e-5) -> Tensor:
        model = self._model
        if not _takes(model):
            return self._original(num_steps=num_steps, eps=eps)
        if self._network is None or self._network.network is not model.backbone:
            self._network = Network(model.backbone)
        network = self._network
        steps = model.config.sampling.steps if num_steps is None else num_steps
        check_counts([("num_steps", steps, 1)])
        before_argmax: list[Tensor] = []

        def keep(step: int, total: int, tokens: Tensor) -> None:
            if step == total - 1:
                before_argmax.append(tokens)

        tokens = sample_masked(
            lambda tokens, t: network(tokens, _noise_level(model, t)),
            (model.config.loader.eval_batch_size, model.config.model.length),
            mask_id=model.mask_index,
            steps=steps,
            t_min=eps,
            active_only=not network.compiled,
            callback=keep,
            device=model.device,
        )
        return tokens if model.config.sampling.noise_removal else before_argmax[0]


def _takes(model: Any) -> bool:
    """Whether positions unmask at rates of the times alone, linearly."""
    return (
        model.parameterization == "subs"
        and model.sampler in ("ddpm", "ddpm_cache")
        and model.config.noise.type == "loglinear"
    )
