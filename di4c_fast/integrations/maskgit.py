"""Drop-ins for MaskGIT-pytorch by valeoai, both versions, and for its fork by the authors of Di4C.

    from di4c_fast.integrations.maskgit import accelerate_di4c, accelerate_valeoai

    with accelerate_di4c(student):           # or handle = ...; handle.remove()
        images, codes, masks = student.sample(nb_sample=10, labels=labels, step=4, w=6)

Nothing of the repositories is imported: the trainers are used by the names of their attributes.
What is the same: arguments, the tuple that comes back, the law of the tokens (with
`exclude_mask=False`). What differs:

* randomness comes from one seed drawn from torch's default generator, none from NumPy;
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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_bool, check_number, check_tensor
from ..models.call import evaluation_mode
from ..processes.reveal import check_schedule, reveal_counts
from ..samplers.maskgit import sample_maskgit
from ._handle import Handle, check_attributes

__all__ = ["ConfidenceSampler", "Handle", "accelerate_di4c", "accelerate_valeoai"]

Result = tuple[Tensor, list[Tensor], list[Tensor]]


def accelerate_di4c(trainer: Any, *, exclude_mask: bool = True) -> Handle:
    """Replace `trainer.sample` of the authors' MaskGIT fork by `di4c_fast.samplers`.

    Args:
        trainer: a `MaskGIT` of `Trainer/vit.py`, teacher or student (`args.is_student`). Its
            attributes `vit`, `ae`, `codebook_size`, `patch_size`, `latent_dim`, `args` are read
            at every call.
        exclude_mask: see the module's head.

    Returns:
        `Handle`.

    Raises:
        TypeError: `trainer` lacks one of the attributes.
        ValueError (when sampling): `sm_temp` not positive, `args.mask_value` negative (random
            tokens in place of masks), and what `sample_maskgit` raises.
    """
    check_attributes(
        trainer,
        "trainer",
        ("vit", "ae", "codebook_size", "patch_size", "latent_dim", "args", "sample"),
    )
    check_bool(exclude_mask, "exclude_mask")
    return Handle(trainer, "sample", _ViTSampler(trainer, "di4c", exclude_mask))


def accelerate_valeoai(trainer: Any, *, exclude_mask: bool = True) -> Handle:
    """Replace the confidence sampler of valeoai's MaskGIT-pytorch by `di4c_fast.samplers`.

    Args:
        trainer: a `MaskGIT` of either version: `trainer.sampler`, a `ConfidenceSampler`, is
            replaced by `ConfidenceSampler` of this module with the same settings; a trainer of
            the first version has its `sample` replaced.
        exclude_mask: see the module's head.

    Returns:
        `Handle`.

    Raises:
        TypeError: `trainer` lacks an attribute, or its sampler is not the confidence sampler.
        ValueError (when sampling): as in `accelerate_di4c`.
    """
    check_bool(exclude_mask, "exclude_mask")
    if getattr(trainer, "sampler", None) is None:
        check_attributes(
            trainer, "trainer", ("vit", "ae", "codebook_size", "patch_size", "args", "sample")
        )
        return Handle(trainer, "sample", _ViTSampler(trainer, "valeoai_v1", exclude_mask))
    check_attributes(trainer, "trainer", ("vit", "ae", "input_size", "args", "sampler"))
    settings = ("sm_temp", "w", "randomize", "r_temp", "sched_mode", "step")
    missing = [name for name in settings if not hasattr(trainer.sampler, name)]
    if missing:
        raise TypeError(
            "trainer.sampler must be a ConfidenceSampler, with the attributes "
            f"{', '.join(settings)}, got {type(trainer.sampler).__name__} without "
            f"{', '.join(missing)}"
        )
    values = {name: getattr(trainer.sampler, name) for name in settings}
    return Handle(trainer, "sampler", ConfidenceSampler(**values, exclude_mask=exclude_mask))


class ConfidenceSampler:
    """The `ConfidenceSampler` of today's valeoai repository, with the same arguments.

    Usable directly as `trainer.sampler = ConfidenceSampler(step=12)`; filled positions are drawn
    anew at every step, as there.
    """

    def __init__(
        self,
        sm_temp: float = 1.0,
        w: float = 3.0,
        randomize: str = "linear",
        r_temp: float = 4.5,
        sched_mode: str = "arccos",
        step: int = 12,
        *,
        exclude_mask: bool = True,
    ):
        self.sm_temp = sm_temp
        self.w = w
        self.randomize = randomize
        self.r_temp = r_temp
        self.sched_mode = sched_mode
        self.step = step
        self.exclude_mask = exclude_mask

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

        def model(tokens: Tensor, t: Tensor, labels: Tensor, drop: Tensor) -> Tensor:
            codes = tokens.view(-1, trainer.input_size, trainer.input_size)
            return network(codes, labels, drop)

        images, codes, masks = _sample(
            model,
            network,
            trainer.ae,
            side=trainer.input_size,
            codebook_size=args.codebook_size,
            mask_value=args.mask_value,
            device=args.device,
            init_code=init_code,
            nb_sample=nb_sample,
            labels=labels,
            sm_temp=self.sm_temp,
            guidance=self.w,
            randomize=self.randomize,
            gumbel_temperature=self.r_temp,
            steps=self.step,
            schedule=self.sched_mode,
            schedule_style="valeoai",
            resample=True,
            exclude_mask=self.exclude_mask,
        )
        return images.clamp(-1, 1), codes, masks


class _ViTSampler:
    """`sample` of the first version and of the fork, in which λ and a teacher came in."""

    def __init__(self, trainer: Any, style: str, exclude_mask: bool):
        self._trainer, self._style, self._exclude_mask = trainer, style, exclude_mask

    @torch.no_grad()
    def __call__(
        self,
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
        trainer = self._trainer
        side, args = trainer.patch_size, trainer.args
        student = bool(getattr(args, "is_student", False))

        device = torch.device(args.device)

        def network_call(network: Any, *inputs: Tensor, **more: Tensor) -> Tensor:
            tokens, labels, drop = inputs
            # Half precision on a GPU, as in the original.
            autocast = device.type == "cuda"
            with torch.autocast("cuda") if autocast else contextlib.nullcontext():
                return network(tokens.view(-1, side, side), labels, drop, **more)

        def model(
            tokens: Tensor, t: Tensor, latent: Tensor | None = None, **conditions: Tensor
        ) -> Tensor:
            more = {} if latent is None else {"z": latent}
            return network_call(trainer.vit, tokens, *conditions.values(), **more)

        def teacher_model(tokens: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
            return network_call(teacher.vit, tokens, *conditions.values())

        if isinstance(sched_mode, str):
            check_schedule(sched_mode, step, self._style)
            counts = reveal_counts(step, side * side, sched_mode, self._style)
        else:
            counts = [int(count) for count in sched_mode]
        return _sample(
            model,
            trainer.vit,
            trainer.ae,
            side=side,
            codebook_size=trainer.codebook_size,
            mask_value=args.mask_value,
            device=device,
            init_code=init_code,
            nb_sample=nb_sample,
            labels=labels,
            sm_temp=sm_temp,
            guidance=w,
            guidance_model=None if teacher is None else teacher_model,
            guidance_network=None if teacher is None else teacher.vit,
            randomize=randomize,
            gumbel_temperature=r_temp,
            steps=len(counts),
            schedule=counts,
            latent_dim=trainer.latent_dim if student else 0,
            exclude_mask=self._exclude_mask,
        )


def _sample(
    model: Any,
    network: Any,
    autoencoder: Any,
    *,
    side: int,
    codebook_size: int,
    mask_value: int,
    device: Any,
    init_code: Tensor | None,
    nb_sample: int,
    labels: Tensor | None,
    sm_temp: float,
    randomize: str,
    guidance_network: Any = None,
    **arguments: Any,
) -> Result:
    """Tokens by `sample_maskgit`, in the shapes of the repositories, and their images."""
    check_number(sm_temp, "sm_temp")
    if sm_temp <= 0:
        raise ValueError(f"sm_temp must be positive, got {sm_temp}")
    if mask_value < 0:
        raise ValueError(
            f"args.mask_value must not be negative: random tokens in place of masks are not "
            f"supported, got {mask_value}"
        )
    if labels is None:
        classes = getattr(network, "module", network).nclass
        labels = torch.randint(classes, (nb_sample,), device=device)
    check_tensor(labels, "labels")
    if tuple(labels.shape) != (nb_sample,):
        raise ValueError(
            f"labels must have shape (nb_sample,) = ({nb_sample},), got {tuple(labels.shape)}"
        )
    prompt = None
    if init_code is not None:
        check_tensor(init_code, "init_code")
        if init_code.numel() != nb_sample * side * side:
            raise ValueError(
                f"init_code must have shape (nb_sample, {side}, {side}) with nb_sample = "
                f"{nb_sample}, got {tuple(init_code.shape)}"
            )
        prompt = init_code.reshape(nb_sample, side * side).long()
        # The repositories know a masked position by this id, whatever fills the others.
        prompt = torch.where(prompt == codebook_size, mask_value, prompt)
    keep = torch.zeros(nb_sample, dtype=torch.bool, device=labels.device)
    history: list[Tensor] = []
    with evaluation_mode(network, guidance_network):
        tokens = sample_maskgit(
            model,
            (nb_sample, side * side),
            mask_id=mask_value,
            prompt=prompt,
            context={"labels": labels, "drop": keep},
            unconditional={"labels": labels, "drop": ~keep},
            randomize=randomize if randomize in ("linear", "warm_up", "random") else "none",  # type: ignore[arg-type]
            temperature=1.0 / sm_temp,
            history=history,
            device=labels.device,
            **arguments,
        )
        images = autoencoder.decode_code(
            tokens.view(nb_sample, side, side).clamp(0, codebook_size - 1)
        )
    codes = [codes.view(nb_sample, side, side) for codes in history[1:]]
    return images, codes, [(code == mask_value).float() for code in codes]
