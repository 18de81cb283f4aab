"""Drop-in for the sampler of SDTT, and for its fork by the authors of Di4C.

    from di4c_fast.integrations.sdtt import accelerate_sdtt

    with accelerate_sdtt(model):               # or handle = ...; handle.remove()
        tokens = model.sample(n_samples=8, num_steps=16, seq_len=1024, project_fn=project_fn)

`model` is a `MultiRoundSDTT`: a student or teacher of SDTT, or a student of Di4C. Its `sample` is
replaced, on which the repositories' `sample_uncond`, `sample_cond_prefix` and `main.py
mode=sample` rest. The fork's training, `di4c_loss`, is replaced by

    accelerate_training(model)                 # then trainer.fit(model, ...), as before

Without replacing anything, for sampling (fixed λ, prompts, one's own seed) and for training:

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

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_bool, check_choice
from ..heads import Head
from ..models.call import Wrapper, check_callable
from ..processes.masked import MaskedProcess
from ..samplers.arguments import check_counts
from ..samplers.masked import sample_masked
from ..training import DistillConfig, distill_step
from ._dit import Denoiser, Loop
from ._handle import Handle, check_attributes
from ._training import KNOWN, Numbers, five_numbers, schedule_of

__all__ = ["accelerate_sdtt", "accelerate_training", "as_model", "latent_dim"]

_MODEL = ("backbone", "_t_to_sigma", "time_conditioning", "mask_index")
_SAMPLER = (*_MODEL, "config", "sampling_eps", "tokenizer", "device", "sample")
_LISTS = ("distil_list", "data_list", "data_cor_list", "consis_list", "consis_cor_list")
_SETTINGS = ("latent_bsize", "alpha_t", "alpha_const", "distil_delta", "log_unif")
_TRAINING = (
    *_MODEL,
    *("teacher", "noise", "T", "device", "di4c_loss", "_sample_t_like", "list_cnt"),
    *_LISTS,
    *(f"config.{name}" for name in _SETTINGS),
)


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


def accelerate_training(module: Any) -> Handle:
    """Replace `module.di4c_loss` of the fork by `di4c_fast.training.distill_step`.

    Its arguments, the loss and the law of its draws stay: times by `_sample_t_like`, noise levels
    quantised twice, the settings of `config`, backbone and noise in train mode but for the draws
    at x_u. So does what calls it: `training_step`, logging, optimiser, average, accumulation and
    DDP are Lightning's. The five deques are filled, and their means printed, at every 50th step,
    which saves a sync per number and step.

    Other than there: times may differ within a batch (t of shape (B,)), examples below
    `distil_delta` need no pass at x_u, a teacher draws x_u and its targets in one pass (a Di4C
    teacher with the same λ), and `attention_mask`, which is not used there, is not used here.

    Args:
        module: a `MultiRoundSDTT` made for training, with `config.is_di4c`.
    """
    check_attributes(module, "module", _TRAINING, KNOWN)
    return Handle(module, "di4c_loss", _Loss(module))


class _Loss:
    """`di4c_loss` with its arguments."""

    def __init__(self, module: Any):
        self.module, self.numbers = module, Numbers()
        self._denoisers: dict[str, Denoiser] = {}

    def _model(self, name: str, network: Any, *, latent: bool) -> Wrapper:
        """A network, called with λ or without; made anew where it has been replaced."""
        known = self._denoisers.get(name)
        if known is None or known.model is not network:
            known = self._denoisers[name] = as_model(self.module, network)
        return _OwnLatent(known) if latent and not known.latent_dim else known

    def __call__(self, x0: Tensor, t: Tensor | None = None, attention_mask: Any = None) -> Tensor:
        module, config = self.module, self.module.config
        if t is None:  # one for all, as there
            t = module._sample_t_like(x0[:1], log_unif=config.log_unif).expand(len(x0))
        di4c_teacher = bool(getattr(module.teacher[0], "is_di4c", False))
        student = self._model("student", module.backbone, latent=True)
        teacher = self._model("teacher", module.teacher[0], latent=di4c_teacher)
        module.backbone.train()
        module.noise.train()
        recipe = DistillConfig(
            components=config.latent_bsize,
            teacher_step=1.0 / max(module.T, 1),
            data_weight=config.alpha_const,
            data_schedule=schedule_of(config.alpha_t),
            low_t=config.distil_delta,
            teacher_components=config.latent_bsize if di4c_teacher else 1,
        )
        process = _Process(module.mask_index, model=module)
        t = t.to(x0.device).clamp(min=process.t_min)
        output = distill_step(student, teacher, x0.long(), process=process, config=recipe, t=t)
        self.numbers.add(five_numbers(output, recipe))
        module.list_cnt += 1
        if module.list_cnt % 50 == 0:
            lists = [getattr(module, name) for name in _LISTS]
            self.numbers.fill(lists)
            if module.trainer.global_rank == 0:
                print(*(sum(numbers) / len(numbers) for numbers in lists))
        return output.loss


@dataclasses.dataclass(frozen=True)
class _Process(MaskedProcess):
    """Masks at the noise level of the model, whose times are quantised once more."""

    model: Any = dataclasses.field(kw_only=True, repr=False)

    def share(self, t: Tensor) -> Tensor:
        return self.model._t_to_sigma(t)[1].squeeze(-1)


class _OwnLatent(Wrapper):
    """A compiled network, or one without λ, where a student is called: it draws λ itself."""

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor) -> Head:
        return self.model(tokens, t)


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
