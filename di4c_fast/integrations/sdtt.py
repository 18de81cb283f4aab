"""Drop-in for the sampler of SDTT, and for its fork by the authors of Di4C.

    from di4c_fast.integrations.sdtt import accelerate_sdtt

    with accelerate_sdtt(model):               # or handle = ...; handle.remove()
        tokens = model.sample(n_samples=8, num_steps=16, seq_len=1024, project_fn=project_fn)

`model` is a `MultiRoundSDTT`: a student or teacher of SDTT, or a student of Di4C. Its `sample` is
replaced, on which the repositories' `sample_uncond`, `sample_cond_prefix` and `main.py
mode=sample` rest. Without replacing anything, for sampling (fixed λ, prompts, one's own seed) and
for training:

    student, teacher = as_model(model), as_model(model, model.teacher[0])
    tokens = sample_masked(
        student, (8, 1024), mask_id=model.mask_index, steps=4,
        latent_dim=latent_dim(model), t_min=model.sampling_eps,
    )
    distiller = Distiller(student, teacher, optimizer, process=MaskedProcess(model.mask_index))

Beside what `di4c_fast.integrations` says of all drop-ins: times, noise levels, fixed tokens and
projections, an argmax at the end if masks remain and a fresh λ per call and sequence for students
of Di4C are the repositories'.

As there, the mode of the network stays as it is in `model.sample`: without `model.eval()` dropout
is at work. `sampler="analytic"` has the law of "ancestral" for these models, at noise level 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_bool, check_choice
from ..heads import Head
from ..models.call import check_callable
from ..samplers.arguments import check_counts
from ..samplers.masked import sample_masked
from ._dit import Denoiser, Loop
from ._handle import Handle, check_attributes

__all__ = ["accelerate_sdtt", "as_model", "latent_dim"]

_MODEL = ("backbone", "_t_to_sigma", "time_conditioning", "mask_index")
_SAMPLER = (*_MODEL, "config", "sampling_eps", "tokenizer", "device", "sample")


def as_model(model: Any, network: Any = None) -> Denoiser:
    """SDTT's denoiser as a module (tokens (R, D), t (R,)[, latent (R, 1)]).

    Samplers take it with `mask_id=model.mask_index` and `latent_dim=latent_dim(model)`. A student
    of Di4C that gets no latent draws λ itself.

    Args:
        model: a `MultiRoundSDTT` of either repository.
        network: None for `model.backbone`; or another one, such as the teacher
            `model.teacher[0]`, at the noise levels of `model`.
    """
    check_attributes(model, "model", _MODEL)
    network = model.backbone if network is None else network
    check_callable(network, "network")

    def noise_level(t: Tensor) -> Tensor:
        if not model.time_conditioning:
            return torch.zeros_like(t)
        return model._t_to_sigma(t)[0].squeeze(-1)

    return Denoiser(network, noise_level)


def latent_dim(model: Any) -> int:
    """L: 1 for a student of Di4C, 0 for others and for compiled ones, which draw λ themselves."""
    return as_model(model).latent_dim


def accelerate_sdtt(model: Any) -> Handle:
    """Replace `model.sample` of SDTT, or of the fork, by `sample_masked`.

    Sampling with an unknown `sampler` or with `cache_preds` raises a ValueError.
    """
    check_attributes(model, "model", _SAMPLER)
    return Handle(model, "sample", _Sampler(model, as_model))


class _Sampler(Loop):
    """`sample` with its arguments."""

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
        from tqdm import tqdm  # the repositories' own dependency

        model, denoiser = self.model, self.denoiser
        check_choice(sampler, "sampler", ("ancestral", "analytic"))
        check_bool(cache_preds, "cache_preds")
        if cache_preds:
            raise ValueError("cache_preds must be False: the repository has no cache either")
        length = model.config.model.length if seq_len is None else seq_len
        sizes = [("num_steps", num_steps, 1), ("n_samples", n_samples, 0), ("seq_len", length, 1)]
        check_counts(sizes)
        t_min = float(model.sampling_eps)

        def call(tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Head:
            sigma = denoiser.noise_level(t)
            if sampler == "analytic":  # as there; the final argmax is the ancestral one
                sigma = torch.where(t > t_min, 0.0, sigma)
            return denoiser.at(tokens, sigma, latent)

        ends = _ends(model, length, add_bos, add_eos)
        if project_fn is not None:
            check_callable(project_fn, "project_fn")
            project_fn, ends = _projection(project_fn, ends, num_steps, model.mask_index), None
        with tqdm(total=num_steps + 1, desc="sampling", disable=not verbose) as bar:
            return sample_masked(
                call,
                (n_samples, length),
                mask_id=model.mask_index,
                steps=num_steps,
                t_min=t_min,
                latent_dim=denoiser.latent_dim,
                prompt=ends,
                project_fn=project_fn,
                active_only=not denoiser.compiled,
                callback=lambda step, total, tokens: bar.update(1),
                device=model.device,
            )


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


def _projection(
    project_fn: Callable[[Tensor], Tensor], ends: Tensor | None, steps: int, mask_id: int
) -> Callable[[Tensor], Tensor]:
    """`project_fn` as the repositories call it.

    At the start, where the fixed ends come behind it; after each of the S steps; and after the
    argmax only if there was something left for it to do.
    """
    calls, done = itertools.count(), False

    def project(tokens: Tensor) -> Tensor:
        nonlocal done
        if done:
            return tokens
        tokens, call = project_fn(tokens), next(calls)
        if call == 0 and ends is not None:
            tokens = torch.where(ends == mask_id, tokens, ends)
        if call == steps:
            done = not bool((tokens == mask_id).any())
        return tokens

    return project
