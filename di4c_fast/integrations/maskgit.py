"""Drop-ins for MaskGIT-pytorch by valeoai, both versions, and for its fork by the authors of Di4C.

    from di4c_fast.integrations.maskgit import accelerate_di4c, accelerate_valeoai

    with accelerate_di4c(student):           # or handle = ...; handle.remove()
        images, codes, masks = student.sample(nb_sample=10, labels=labels, step=4, w=6)

Training of the fork goes on as it is written there, with our loss, after

    accelerate_training(student)             # then student.fit_di4c(teacher, num_epochs)

In a loop of one's own, `distill_loss(student, teacher, code, y, drop_label).loss` is its loss, and
the settings of `di4c_main.py` are

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

import collections
import dataclasses
import functools
import os
import random
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..checks import check_bool, check_int, check_shape, check_tensor, check_within
from ..processes.maskgit import MaskGITProcess
from ..processes.reveal import check_schedule, reveal_counts
from ..samplers.maskgit import RANDOMIZE, sample_maskgit
from ..training import DistillConfig, DistillOutput, distill_step
from ._handle import Handle, check_attributes
from ._maskgit import Denoiser
from ._training import KNOWN, Numbers, five_numbers, schedule_of

__all__ = [
    "ConfidenceSampler",
    "Handle",
    "accelerate_di4c",
    "accelerate_training",
    "accelerate_valeoai",
    "as_model",
    "distill_loss",
]

Result = tuple[Tensor, list[Tensor], list[Tensor]]

_ViT = ("vit", "ae", "codebook_size", "patch_size", "args")
_SETTINGS = ("sm_temp", "w", "randomize", "r_temp", "sched_mode", "step")
_RECIPE = (
    *("latent_bsize", "r_delta", "alpha_t", "alpha_const", "teacher_steps", "mask_value"),
    *("sched_mode", "randomize", "r_temp", "sm_temp"),
)
_LOOP = (
    "vit_folder",
    "is_master",
    "drop_label",
    "grad_cum",
    "iter",
    "global_epoch",
    "device",
    "cfg_w",
    "step",
)
_TRAINING = (
    *_ViT,
    *("latent_dim", "train_data", "optim", "scaler", "save_network", "sample", "train_di4c"),
    *(f"args.{name}" for name in (*_RECIPE, *_LOOP)),
)
_SHOWN = (1, 7, 282, 604, 724, 179, 681, 367, 635)  # classes of the images of a training run
_EQUAL_CHANCES = 1e9  # noise on confidences beside which they do not count


def as_model(trainer: Any) -> Denoiser:
    """MaskGIT's network as a module (tokens (R, D), t[, latent (R, 1)], labels=, drop=) → head.

    The context is labels (B,) int64 and drop (B,) bool, where True leaves the label out. t is not
    used. The logits (R, D, codes + 1) come from an embedding that serves as output layer, with a
    bias per position: `LinearHead(hidden, weight (codes + 1, C), bias (D, codes + 1))` where they
    are those and nothing else, which is tried once on one row; other networks give all logits.

    Args:
        trainer: a `MaskGIT` of the fork or of the first version.
    """
    check_attributes(trainer, "trainer", _ViT)
    return Denoiser(trainer.vit, trainer.patch_size, amp=True)


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


def distill_loss(
    trainer: Any, teacher: Any, code: Tensor, y: Tensor, drop_label: Tensor, **options: Any
) -> DistillOutput:
    """The loss of the fork's `train_di4c` for one batch, by `di4c_fast.training.distill_step`.

    The settings are those of `trainer.args` (latent_bsize, r_delta, alpha_t, alpha_const,
    teacher_steps, sched_mode, sm_temp, randomize, r_temp, mask_value). The student runs in the
    mode that it is in, but for the draws at x_u.

    Other than there: examples with r >= 1 - r_delta need no pass at x_u, ties of confidence go to
    the first position, and the coefficient of the confidence noise, which there is negative from
    r = 1 - 1/teacher_steps on, stays 0 from there on.

    Args:
        trainer, teacher: a `MaskGIT` of the fork each, student and teacher.
        code: (B, h, w) or (B, D) int64, codes of images.
        y, drop_label: (B,) int64 and bool, labels and which of them to leave out.
        options: of `distill_step`, such as t, generator or return_terms.

    Returns:
        `DistillOutput`, whose `loss` has a graph.
    """
    for owner, name in ((trainer, "trainer"), (teacher, "teacher")):
        check_attributes(owner, name, (*_ViT, "latent_dim"), KNOWN)
    check_attributes(trainer.args, "trainer.args", _RECIPE, KNOWN)
    check_tensor(code, "code")
    args = trainer.args
    check_int(args.mask_value, "args.mask_value", minimum=1)  # others are random tokens there
    check_within(args.sm_temp, "args.sm_temp", "(0, inf)")
    noise = {"linear": args.r_temp, "random": _EQUAL_CHANCES}.get(args.randomize, 0.0)
    process = MaskGITProcess(
        args.mask_value,
        schedule=args.sched_mode,
        gumbel_temperature=noise,
        teacher_steps=None if args.randomize == "random" else args.teacher_steps,
        temperature=1.0 / args.sm_temp,
        exclude_mask=False,
    )
    x0 = code.flatten(1)
    options.setdefault("t", 1.0 - torch.rand(len(x0), device=x0.device))
    return distill_step(
        as_model(trainer),
        as_model(teacher),
        x0,
        process=process,
        config=_recipe(trainer),
        context={"labels": y, "drop": drop_label},
        **options,
    )


def _recipe(trainer: Any) -> DistillConfig:
    args = trainer.args
    return DistillConfig(
        components=args.latent_bsize,
        teacher_step=args.r_delta,
        data_weight=args.alpha_const,
        data_schedule=schedule_of(args.alpha_t),
        component_weight=1.0 / args.r_delta,
        low_t=args.r_delta,
        latent_dim=trainer.latent_dim,
    )


def accelerate_training(trainer: Any) -> Handle:
    """Replace `trainer.train_di4c` of the fork by the same loop around `distill_loss`.

    Its arguments, the images it makes, the checkpoints it saves, what it prints, GradScaler,
    clipping and the optimiser stay, and so does `fit_di4c`, which calls it. As there, the gradients
    of all but the last of `args.grad_cum` batches are dropped before the last one's backward pass.
    The loss is read once an epoch and the printed numbers every 50 steps, without a sync per step.

    Args:
        trainer: a `MaskGIT` of the fork, the student, made for training.
    """
    check_attributes(trainer, "trainer", _TRAINING, KNOWN)
    return Handle(trainer, "train_di4c", functools.partial(_train, trainer))


def _train(trainer: Any, teacher: Any, log_iter: int = 10_000) -> float:
    """One epoch; the mean of its losses."""
    args, scaler = trainer.args, trainer.scaler
    for folder in ("images/", "checkpoints/"):
        os.makedirs(args.vit_folder + folder, exist_ok=True)
    trainer.vit.train()
    total, numbers = torch.zeros((), device=args.device), Numbers()
    lists: list[collections.deque[float]] = [collections.deque() for _ in range(5)]
    for x, y in _progress(trainer):
        x, y = x.to(args.device), y.to(args.device)
        drop = torch.rand(y.shape, device=y.device) < args.drop_label
        with torch.no_grad():
            _, _, (_, _, code) = trainer.ae.encode(2 * x - 1)
        code = code.reshape(len(x), -1)
        output = distill_loss(trainer, teacher, code, y, drop, return_terms=args.is_master)
        last = args.iter % args.grad_cum == args.grad_cum - 1
        if last:
            trainer.optim.zero_grad()
        scaler.scale(output.loss).backward()
        if last:
            scaler.unscale_(trainer.optim)
            nn.utils.clip_grad_norm_(trainer.vit.parameters(), 1.0)
            scaler.step(trainer.optim)
            scaler.update()
        total += output.loss.detach()
        if args.is_master:
            numbers.add(five_numbers(output, _recipe(trainer)))
            _report(trainer, teacher, log_iter, numbers, lists)
        args.iter += 1
    return float(total) / len(trainer.train_data)


def _progress(trainer: Any) -> Any:
    if not trainer.args.is_master:
        return trainer.train_data
    from tqdm import tqdm  # the repository's own dependency

    return tqdm(trainer.train_data, leave=False)


def _report(
    trainer: Any,
    teacher: Any,
    log_iter: int,
    numbers: Numbers,
    lists: Sequence[collections.deque[float]],
) -> None:
    """What the first process prints, saves and samples after the step `args.iter`."""
    args = trainer.args
    if args.iter % 50 == 0:
        numbers.fill(lists)
        print(*(sum(values) / len(values) for values in lists))
    if args.iter % log_iter == 0:
        names = [f"{args.iter}iter", "current"] if args.iter > 0 else ["current"]
        for name in names:
            trainer.save_network(
                model=trainer.vit,
                path=f"{args.vit_folder}checkpoints/{name}.pth",
                iter=args.iter,
                optimizer=trainer.optim,
                global_epoch=args.global_epoch,
            )
    if args.iter % 1000 == 0:
        from torchvision.utils import make_grid, save_image  # the repository's own dependency

        labels = torch.tensor([*_SHOWN, random.randint(0, 999)], device=args.device)
        names = ["sm_temp", "r_temp", "randomize", "sched_mode", "step"]
        settings = {name: getattr(args, name) for name in names}
        with torch.no_grad():
            images, _, _ = trainer.sample(
                nb_sample=len(labels), labels=labels, w=args.cfg_w, teacher=teacher, **settings
            )
        grid = make_grid(images, nrow=5, padding=2, normalize=True)
        save_image(grid, f"{args.vit_folder}images/{args.iter}iter.jpg")


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
            Denoiser(network, trainer.input_size, amp=False),
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
        guidance_model=None if teacher is None else Denoiser(teacher.vit, model.side, amp=True),
        steps=len(counts),
        schedule=counts,
        latent_dim=trainer.latent_dim if getattr(trainer.args, "is_student", False) else 0,
    )


def _sample(
    model: Denoiser,
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
