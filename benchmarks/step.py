"""A whole distillation step: process, teacher, student twice, loss, backward."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from di4c_fast import backends
from di4c_fast.processes import GaussianProcess, MaskedProcess, MaskGITProcess
from di4c_fast.testing import relative_l2
from di4c_fast.training import DistillConfig, DistillOutput, distill_step

from . import baselines
from .cases import Case
from .groups import FUSED, Check, Group, Noise, Variant, library
from .models import Transformer
from .parts import parts_of

DATA_WEIGHT = 0.1
# Of the loss and of the gradient of all parameters, through the whole model.
LIMITS = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 2e-2}


@dataclasses.dataclass
class Inputs:
    student: Transformer
    teacher: Transformer
    x0: Tensor
    t: Tensor
    seed: int

    def gradient(self, loss: Tensor) -> Tensor:
        """Of all parameters of the student, flat, in fp32; a loss without a graph has left it."""
        if loss.requires_grad:
            loss.backward()
        parameters = list(self.student.parameters())
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return torch.cat(flat).float()


class StepGroup(Group):
    """Forward and backward of one distillation step of a system of the paper, without optimiser.

    Pixels without the pass at the smallest time, which is a step of its own with N = 1. "many" is
    the masked step with N components, √N of them at a time and, to make up for the gradients that
    lie beside a group, three quarters of that, and with √N components, each with √N draws: the
    loss keeps a number for each component, draw and position. It goes backward as a distiller does.
    """

    def __init__(self, case: Case):
        super().__init__(case)
        self.masks = False  # known to the loss
        self.draws = math.isqrt(case.components) if case.kind == "many" else None
        self.process: Any
        self.advance: Callable[..., Tensor] | None = None
        if case.shape == "distill-image":
            self.process = MaskGITProcess(self.mask_id, exclude_mask=False)
            self.advance = functools.partial(baselines.reveal_step, mask_id=self.mask_id)
            self.teacher_step = 0.05
        elif case.shape == "distill-pixel":
            widths = {"rate_sigma": 6 * case.vocabulary / 256, "target_sigma": 2 * case.vocabulary}
            self.process = GaussianProcess(case.vocabulary, **widths)
            matrices = self.process.transitions.batched
            self.advance = functools.partial(baselines.posterior_step, transitions=matrices)
            self.teacher_step = 0.01
        else:
            self.process, self.masks = MaskedProcess(self.mask_id), True
            self.teacher_step = 1 / 1024

    def variants(self) -> list[Variant]:
        few = math.isqrt(self.case.components)
        if self.case.kind == "many":
            return [
                *library("-few", f", N={few}", FUSED),
                *library("-in-turn", f", {few} at a time", FUSED),
                *library("-in-memory", f", {3 * few // 4} at a time", FUSED),
                *library("", ", all at once", FUSED),
            ]
        return [
            Variant("plain", "plain: teacher on N copies, dense logits, autograd"),
            Variant("plain-compiled", "plain, torch.compile of the loss"),
            *library(),
        ]

    def how(self, name: str) -> tuple[int, int | None]:
        """The components of a variant, and how many of them the student sees at a time."""
        components, few = self.case.components, math.isqrt(self.case.components)
        if name.endswith("-few"):
            return few, None
        at_once = {"turn": few, "memory": 3 * few // 4}
        return components, at_once.get(name.split("-")[-1])

    @property
    def mask_id(self) -> int:
        return self.case.vocabulary - 1

    def make_inputs(self, seed: int) -> Inputs:
        case = self.case
        torch.manual_seed(seed)
        sizes = (case.vocabulary, case.positions, case.width, case.layers)
        bins = case.head == "logistic"
        # Logits of all N in the memory of those of √N.
        budget = case.logits_bytes // self.draws if self.draws else None
        with torch.device(case.device):
            student = Transformer(*sizes, latent=True, bins=bins, budget_bytes=budget)
            teacher = Transformer(*sizes, bins=bins, budget_bytes=budget)
            x0 = torch.randint(self.mask_id, (case.batch, case.positions))
            t = torch.full((case.batch,), float(case.masked or 0.5))
        dtype = case.torch_dtype
        teacher.requires_grad_(False)
        return Inputs(student.to(dtype), teacher.to(dtype).eval(), x0, t, seed)

    def input_bytes(self) -> int:
        return 2 * self.case.model_bytes

    def call_bytes(self, name: str) -> int:
        """Gradients, 16 numbers per channel and layer that autograd keeps, and the logits."""
        case = self.case
        size = case.torch_dtype.itemsize
        rows = case.batch * self.how(name)[0]
        kept = 16 * rows * case.positions * case.width * (case.layers + 1) * size
        logits = rows * case.positions * case.vocabulary
        if name.startswith("plain"):  # teacher, draws, student, and six in fp32 for the loss
            return self.input_bytes() // 2 + kept + logits * (3 * size + 6 * 4)
        head = min(2**29, logits * 4) + case.vocabulary * case.width * 4
        return self.input_bytes() // 2 + kept + head

    # Calls ---------------------------------------------------------------------------------------

    def call(self, name: str, inputs: Inputs) -> Tensor:
        self.calls += 1
        if name.startswith("plain"):
            torch.manual_seed(self.calls)
            return inputs.gradient(self._plain(name, inputs))
        return inputs.gradient(self._library(name, inputs).loss)

    def _plain(self, name: str, inputs: Inputs, **given: Tensor) -> Tensor:
        if "xt" not in given:
            given["xt"] = self.process.corrupt(inputs.x0, inputs.t)
        u = inputs.t - min(self.teacher_step, float(self.case.masked or 0.5) / 2)
        given = {"u": u, **given}
        return baselines.distill_step(
            inputs.student,
            inputs.teacher,
            inputs.x0,
            t=inputs.t,
            mask_id=self.mask_id,
            components=self.how(name)[0],
            data_weight=DATA_WEIGHT,
            advance=self.advance,
            loss=self.compiled(name, baselines.dense_loss),
            **given,
        )

    def _library(self, name: str, inputs: Inputs, **given: Tensor) -> DistillOutput:
        components, at_once = self.how(name)
        config = DistillConfig(
            components=components,
            draws=self.draws,
            teacher_step=self.teacher_step,
            data_weight=DATA_WEIGHT,
            data_schedule="constant",
            component_weight=0.0,
            low_t=0.0,
            low_t_probability=0.0,
        )
        with backends.preferred(name.split("-")[0]):  # samplers take the best otherwise
            return distill_step(
                inputs.student.as_head,
                inputs.teacher.as_head,
                inputs.x0,
                process=self.process,
                config=config,
                generator=torch.Generator().manual_seed(self.calls),
                t=inputs.t,
                components_at_once=at_once,
                backward=Tensor.backward if self.draws and torch.is_grad_enabled() else None,
                **given,
            )

    # Checks --------------------------------------------------------------------------------------

    def check(self, name: str, inputs: Inputs, truth: None) -> Check:
        """Loss and gradient of the library against those of the plain step, for the same draws."""
        case = self.case
        plain = name.startswith("plain")
        ours, theirs = ("torch", name) if plain else (name, f"plain-{name}")
        noise = Noise(case, inputs.seed)
        components = self.how(name)[0]
        counts = {"latent": components, "latent_u": self.draws or components}
        latents = {key: noise.uniform(case.batch, count, 1) for key, count in counts.items()}
        with torch.no_grad():
            output = self._library(ours, inputs, **latents)
        assert output.xu is not None
        # Rows as draws are: with one class at every masked position all components would be
        # as likely, and their differences lost in fp32 on either side.
        drawn = noise.tokens(*output.xu.shape)
        if self.masks:
            drawn = torch.where(output.xu == self.mask_id, drawn, output.xu)
        flat = {key: value.flatten(0, 1) for key, value in latents.items()}
        given = {"xt": output.xt, "xu": output.xu, "u": output.u, "consistency_x": drawn}
        loss = self._library(ours, inputs, **given, **latents).loss
        expected = self._plain(theirs, inputs, **given, **flat)
        error = relative_l2(loss.detach(), expected.detach())
        error_of_gradient = relative_l2(inputs.gradient(loss), inputs.gradient(expected))
        return Check.of(error, error_of_gradient, LIMITS[case.dtype])

    def details(self, name: str, inputs: Inputs) -> dict[str, float]:
        if self.case.kind == "many":
            return {}  # a student that runs within the backward pass is no part of its own
        named = [
            (inputs.teacher, "hidden", "teacher"),
            (inputs.student, "hidden", "student, twice"),
            (inputs, "gradient", "backward"),
        ]
        return parts_of(lambda: self.call(name, inputs), named, self.case.device)
