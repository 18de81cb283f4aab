"""Drop-ins for MaskGIT-pytorch by valeoai, both versions, and for its fork by the authors of Di4C.

    from di4c_fast.integrations.maskgit import accelerate_di4c, accelerate_valeoai

    with accelerate_di4c(student):           # or handle = ...; handle.remove()
        images, codes, masks = student.sample(nb_sample=10, labels=labels, step=4, w=6)

Training in place of `student.fit_di4c(teacher, ...)`, with the settings of `di4c_main.py`:

    config = DistillConfig(
        components=32, teacher_step=0.05, low_t=0.05, low_t_probability=0.05, component_weight=20.0
    )
    process = MaskGITProcess(1024, exclude_mask=False)
    distiller = Distiller(
        as_model(student), as_model(teacher), optimizer, process=process, config=config
    )
    distiller.step(codes.flatten(1), context={"labels": labels, "drop": drop})

Beside what `di4c_fast.integrations` says of all drop-ins (the law of the tokens is that of the
repositories with `exclude_mask=False`):

* the mask token is not drawn, unless `exclude_mask=False`, which clamps it to the last code as
  the repositories do;
* exactly as many positions as scheduled are revealed, also where confidences tie; one step works;
* `codes` holds the tokens after each step, with the mask where nothing is revealed yet, instead
  of draws for all positions, which are never made;
* given codes (`init_code`) stay as they are, the caller's tensor too, and the schedule of today's
  version counts the unknown positions of a row only;
* each network comes back in the mode, training or not, in which it was;
* without `labels`, they are drawn uniformly from the classes of the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..checks import check_bool, check_int, check_shape, check_tensor, check_within
from ..models.call import Wrapper
from ..processes.reveal import check_schedule, reveal_counts
from ..samplers.maskgit import RANDOMIZE, sample_maskgit
from ._handle import Handle, check_attributes

__all__ = ["ConfidenceSampler", "Handle", "accelerate_di4c", "accelerate_valeoai", "as_model"]

Result = tuple[Tensor, list[Tensor], list[Tensor]]

_ViT = ("vit", "ae", "codebook_size", "patch_size", "args")
_SETTINGS = ("sm_temp", "w", "randomize", "r_temp", "sched_mode", "step")


class _Denoiser(Wrapper):
    """A network called with codes (R, h, w), labels and which of them to drop."""

    def __init__(self, network: Any, side: int, amp: bool):
        super().__init__(network)
        self.side, self.amp = side, amp

    def forward(
        self,
        tokens: Tensor,
        t: Tensor,
        latent: Tensor | None = None,
        *,
        labels: Tensor,
        drop: Tensor,
    ) -> Tensor:
        codes = rearrange(tokens, "r (h w) -> r h w", h=self.side)
        more = {} if latent is None else {"z": latent}
        amp = self.amp and tokens.is_cuda  # as in the original
        with torch.autocast("cuda") if amp else contextlib.nullcontext():
            return self.model(codes, labels, drop, **more)


def as_model(trainer: Any) -> _Denoiser:
    """MaskGIT's network as a module (tokens (R, D), t[, latent (R, 1)], labels=, drop=) → logits.

    The context is labels (B,) int64 and drop (B,) bool, where True leaves the label out. t is not
    used. All logits: (R, D, codes + 1), from an embedding that serves as output layer, with a bias
    per position; `LinearHead` takes one (D, V).

    Args:
        trainer: a `MaskGIT` of the fork or of the first version.
    """
    check_attributes(trainer, "trainer", _ViT)
    return _Denoiser(trainer.vit, trainer.patch_size, amp=True)


def accelerate_di4c(trainer: Any, *, exclude_mask: bool = True) -> Handle:
    """Replace `trainer.sample` of the authors' MaskGIT fork by `di4c_fast.samplers`.

    Args:
        trainer: a `MaskGIT` of `Trainer/vit.py`, teacher or student (`args.is_student`).
        exclude_mask: see the module's head.

    Raises:
        ValueError (when sampling): `sm_temp` not positive, `args.mask_value` negative (random
            tokens in place of masks).
    """
    check_attributes(trainer, "trainer", (*_ViT, "latent_dim", "sample"))
    check_bool(exclude_mask, "exclude_mask")
    sample = functools.partial(_vit_sample, trainer, "di4c", exclude_mask)
    return Handle(trainer, "sample", sample)


def accelerate_valeoai(trainer: Any, *, exclude_mask: bool = True) -> Handle:
    """Replace the confidence sampler of valeoai's MaskGIT-pytorch by `di4c_fast.samplers`.

    Args:
        trainer: a `MaskGIT` of either version: `trainer.sampler`, a `ConfidenceSampler`, is
            replaced by `ConfidenceSampler` of this module with the same settings; a trainer of
            the first version has its `sample` replaced.
        exclude_mask: see the module's head.

    Raises: as `accelerate_di4c`; a TypeError where the sampler is not the confidence sampler.
    """
    check_bool(exclude_mask, "exclude_mask")
    if getattr(trainer, "sampler", None) is None:
        check_attributes(trainer, "trainer", (*_ViT, "sample"))
        sample = functools.partial(_vit_sample, trainer, "valeoai_v1", exclude_mask)
        return Handle(trainer, "sample", sample)
    check_attributes(trainer, "trainer", ("vit", "ae", "input_size", "args", "sampler"))
    check_attributes(trainer.sampler, "trainer.sampler, a ConfidenceSampler,", _SETTINGS)
    settings = {name: getattr(trainer.sampler, name) for name in _SETTINGS}
    return Handle(trainer, "sampler", ConfidenceSampler(**settings, exclude_mask=exclude_mask))


@dataclasses.dataclass(eq=False)
class ConfidenceSampler:
    """The `ConfidenceSampler` of today's valeoai repository, with the same arguments.

    Usable directly as `trainer.sampler = ConfidenceSampler(step=12)`; filled positions are drawn
    anew at every step, as there.
    """

    sm_temp: float = 1.0
    w: float = 3.0
    randomize: str = "linear"
    r_temp: float = 4.5
    sched_mode: str = "arccos"
    step: int = 12
    exclude_mask: bool = dataclasses.field(default=True, kw_only=True)

    def __str__(self) -> str:
        return (
            f"Scheduler: {self.sched_mode}, Steps: {self.step}, SoftMax temp: {self.sm_temp}, "
            f"CFG w: {self.w}, Randomize temp: {self.r_temp}"
        )

    @torch.no_grad()
    def __call__(
        self,
        trainer: Any,
        init_code: Tensor | None = None,
        nb_sample: int = 50,
        labels: Tensor | None = None,
        verbose: bool = True,
    ) -> Result:
        """Images in [-1, 1], the tokens (B, h, w) after each step, and the masks as float."""
        args = trainer.args
        network = trainer.ema if args.use_ema else trainer.vit
        images, codes, masks = _sample(
            _Denoiser(network, trainer.input_size, amp=False),
            trainer,
            args.codebook_size,
            (nb_sample, init_code, labels),
            self,
            steps=self.step,
            schedule=self.sched_mode,
            schedule_style="valeoai",
            resample=True,
        )
        return images.clamp(-1, 1), codes, masks


@torch.no_grad()
def _vit_sample(
    trainer: Any,
    style: str,
    exclude_mask: bool,
    init_code: Tensor | None = None,
    nb_sample: int = 50,
    labels: Tensor | None = None,
    sm_temp: float = 1,
    w: float = 3,
    randomize: str = "linear",
    r_temp: float = 4.5,
    sched_mode: str | Sequence[int] = "arccos",
    step: int = 12,
    teacher: Any = None,
) -> Result:
    """`sample` of the first version and of the fork, in which λ and a teacher came in."""
    model = as_model(trainer)
    if isinstance(sched_mode, str):
        check_schedule(sched_mode, step, style)
        counts = reveal_counts(step, model.side**2, sched_mode, style)
    else:
        counts = [int(count) for count in sched_mode]
    return _sample(
        model,
        trainer,
        trainer.codebook_size,
        (nb_sample, init_code, labels),
        ConfidenceSampler(sm_temp, w, randomize, r_temp, exclude_mask=exclude_mask),
        guidance_model=None if teacher is None else _Denoiser(teacher.vit, model.side, amp=True),
        steps=len(counts),
        schedule=counts,
        latent_dim=trainer.latent_dim if getattr(trainer.args, "is_student", False) else 0,
    )


def _sample(
    model: _Denoiser,
    trainer: Any,
    codebook_size: int,
    given: tuple[int, Tensor | None, Tensor | None],
    settings: ConfidenceSampler,
    **arguments: Any,
) -> Result:
    """Tokens by `sample_maskgit`, in the shapes of the repositories, and their images."""
    batch, init_code, labels = given
    mask_value, side = trainer.args.mask_value, model.side
    check_within(settings.sm_temp, "sm_temp", "(0, inf)")
    check_int(mask_value, "args.mask_value", minimum=0)
    if labels is None:
        classes = getattr(model.model, "module", model.model).nclass
        labels = torch.randint(classes, (batch,), device=trainer.args.device)
    check_tensor(labels, "labels")
    check_shape(labels, "labels", "nb_sample,", (batch,))
    prompt = None
    if init_code is not None:
        check_tensor(init_code, "init_code")
        if init_code.numel() != batch * side * side:
            raise ValueError(
                f"init_code must have shape (nb_sample, {side}, {side}) with nb_sample = "
                f"{batch}, got {tuple(init_code.shape)}"
            )
        prompt = init_code.reshape(batch, side * side).long()
        # The repositories know a masked position by this id, whatever fills the others.
        prompt = torch.where(prompt == codebook_size, mask_value, prompt)
    keep = torch.zeros(batch, dtype=torch.bool, device=labels.device)
    history: list[Tensor] = []
    sample_maskgit(
        model,
        (batch, side * side),
        mask_id=mask_value,
        prompt=prompt,
        context={"labels": labels, "drop": keep},
        unconditional={"labels": labels, "drop": ~keep},
        guidance=settings.w,
        randomize=settings.randomize if settings.randomize in RANDOMIZE else "none",  # type: ignore[arg-type]
        gumbel_temperature=settings.r_temp,
        temperature=1.0 / settings.sm_temp,
        exclude_mask=settings.exclude_mask,
        history=history,
        device=labels.device,
        **arguments,
    )
    codes = [rearrange(tokens, "b (h w) -> b h w", h=side) for tokens in history[1:]]
    images = trainer.ae.decode_code(codes[-1].clamp(0, codebook_size - 1))
    return images, codes, [(code == mask_value).float() for code in codes]
