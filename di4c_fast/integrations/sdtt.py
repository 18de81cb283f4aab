"""Drop-in for the sampler of SDTT, and for its fork by the authors of Di4C.

    from di4c_fast.integrations.sdtt import accelerate_sdtt

    with accelerate_sdtt(model):               # or handle = ...; handle.remove()
        tokens = model.sample(n_samples=8, num_steps=16, seq_len=1024, project_fn=project_fn)

`model` is a `MultiRoundSDTT`: a student or teacher of SDTT, or a student of Di4C. Its `sample` is
replaced, on which the repositories' `sample_uncond`, `sample_cond_prefix` and `main.py
mode=sample` rest. Without replacing anything, and with everything that `sample_masked` offers
(fixed λ, prompts, one's own seed):

    tokens = sample_masked(
        as_model(student), (8, 1024), mask_id=student.mask_index, steps=4,
        latent_dim=latent_dim(student), t_min=student.sampling_eps, device=student.device,
    )

Nothing of the repositories is imported. What is the same: arguments, times, noise levels, fixed
tokens and projections, an argmax at the end if masks remain, a fresh λ per call and sequence for
students of Di4C, and the law of the tokens. What differs:

* only the rows that unmask go through the output layer, a step that unmasks nothing calls no
  network, and of a batch only the sequences that unmask something (all of them if compiled);
* draws are exact. The repositories divide by -log(u) in fp32, u on a grid of 2^-24, which makes
  very unlikely tokens rarer than the network says;
* randomness, λ included, comes from one seed drawn from torch's default generator.

As there, the mode of the network stays as it is: without `model.eval()` dropout is at work.
`sampler="analytic"` has the law of "ancestral" for these models, at noise level 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_bool, check_choice
from ..heads import Head
from ..models.call import check_callable
from ..samplers.arguments import check_counts
from ..samplers.masked import sample_masked
from ._dit import Network
from ._handle import Handle, check_attributes

__all__ = ["accelerate_sdtt", "as_model", "latent_dim"]

_MODEL = ("backbone", "_t_to_sigma", "time_conditioning", "mask_index")
_SAMPLER = (*_MODEL, "config", "sampling_eps", "tokenizer", "device", "sample")


def as_model(model: Any) -> Callable[..., Head]:
    """SDTT's denoiser as a callable (tokens (R, D), t (R,)[, latent (R, 1)]).

    For `di4c_fast.samplers`, with `mask_id=model.mask_index` and `latent_dim=latent_dim(model)`.
    A student of Di4C that gets no latent draws λ itself. The mode of the network stays as it is.

    Args:
        model: a `MultiRoundSDTT` of either repository.

    Returns:
        A callable that gives `LinearHead(hidden, weight, bias)` of the network's last layer, or
        all logits where the network is compiled or built otherwise.

    Raises:
        TypeError: `model` lacks an attribute.
    """
    check_attributes(model, "model", _MODEL)
    network = Network(model.backbone)

    def call(tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Head:
        return network(tokens, _noise_level(model, t), latent)

    return call


def latent_dim(model: Any) -> int:
    """L: 1 for a student of Di4C, 0 for other models and for compiled students.

    A compiled student draws its λ itself.
    """
    check_attributes(model, "model", _MODEL)
    return Network(model.backbone).latent_dim


def _noise_level(model: Any, t: Tensor) -> Tensor:
    if not model.time_conditioning:
        return torch.zeros_like(t)
    return model._t_to_sigma(t)[0].squeeze(-1)


def accelerate_sdtt(model: Any) -> Handle:
    """Replace `model.sample` of SDTT, or of the fork, by `sample_masked`.

    Args:
        model: a `MultiRoundSDTT`. Its attributes are read at every call.

    Returns:
        `Handle`: `remove()` undoes it, as does leaving a `with` block.

    Raises:
        TypeError: `model` lacks an attribute.
        ValueError, TypeError (when sampling): unknown `sampler`, `cache_preds`, and what
            `sample_masked` raises.
    """
    check_attributes(model, "model", _SAMPLER)
    return Handle(model, "sample", _Sampler(model))


class _Sampler:
    """`sample` with its arguments."""

    def __init__(self, model: Any):
        self._model = model
        self._network: Network | None = None

    @torch.no_grad()
    def __call__(
        self,
        n_samples: int = 8,
        num_steps: int = 256,
        seq_len: int | None = 1024,
        sampler: str = "ancestral",
        cache_preds: bool = False,
        verbose: bool = False,
        add_bos: bool = False,
        add_eos: bool = False,
        project_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        model = self._model
        check_choice(sampler, "sampler", ("ancestral", "analytic"))
        check_bool(cache_preds, "cache_preds")
        if cache_preds:
            raise ValueError("cache_preds must be False: the repository has no cache either")
        check_counts([("num_steps", num_steps, 1)])
        length = model.config.model.length if seq_len is None else seq_len
        check_counts([("n_samples", n_samples, 0), ("seq_len", length, 1)])
        if self._network is None or self._network.network is not model.backbone:
            self._network = Network(model.backbone)
        network, t_min = self._network, float(model.sampling_eps)
        conditional = sampler == "ancestral"

        def denoiser(tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Head:
            sigma = _noise_level(model, t)
            if not conditional:  # as there; the final argmax is the ancestral one
                sigma = torch.where(t > t_min, 0.0, sigma)
            return network(tokens, sigma, latent)

        ends = _ends(model, length, add_bos, add_eos)
        if project_fn is not None:
            check_callable(project_fn, "project_fn")
            project_fn, ends = _Projection(project_fn, ends, num_steps, model.mask_index), None
        bar = _progress(num_steps) if verbose else None
        try:
            return sample_masked(
                denoiser,
                (n_samples, length),
                mask_id=model.mask_index,
                steps=num_steps,
                t_min=t_min,
                latent_dim=network.latent_dim,
                prompt=ends,
                project_fn=project_fn,
                active_only=not network.compiled,
                callback=None if bar is None else lambda step, total, tokens: bar.update(1),
                device=model.device,
            )
        finally:
            if bar is not None:
                bar.close()


def _ends(model: Any, length: int, add_bos: bool, add_eos: bool) -> Tensor | None:
    """The fixed first and last tokens (D,), masks between them; None without any."""
    if not (add_bos or add_eos):
        return None
    ends = torch.full((length,), model.mask_index, dtype=torch.int64, device=model.device)
    if add_bos:
        ends[0] = model.tokenizer.bos_token_id
    if add_eos:
        ends[-1] = model.tokenizer.eos_token_id
    return ends


class _Projection:
    """`project_fn` as the repositories call it.

    At the start, where the fixed ends come behind it; after each of the S steps; and after the
    argmax only if there was something left for it to do.
    """

    def __init__(
        self,
        project_fn: Callable[[Tensor], Tensor],
        ends: Tensor | None,
        steps: int,
        mask_id: int,
    ):
        self._project_fn, self._ends = project_fn, ends
        self._steps, self._mask_id = steps, mask_id
        self._calls = 0
        self._done = False

    def __call__(self, tokens: Tensor) -> Tensor:
        call, self._calls = self._calls, self._calls + 1
        if self._done:
            return tokens
        tokens = self._project_fn(tokens)
        if call == 0 and self._ends is not None:
            tokens = torch.where(self._ends == self._mask_id, tokens, self._ends)
        if call == self._steps:
            self._done = not bool((tokens == self._mask_id).any())
        return tokens


def _progress(steps: int) -> Any:
    from tqdm import tqdm  # the repositories' own dependency

    return tqdm(total=steps + 1, desc="sampling")
