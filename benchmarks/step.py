"""A whole distillation step: process, teacher, student twice, loss, backward."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import di4c_fast
from di4c_fast.processes import MaskedProcess
from di4c_fast.training import DistillConfig, DistillOutput, distill_step

from . import baselines
from .groups import Check, Group, Variant, library, sampler_backend, sampler_unavailable
from .models import Transformer
from .truth import relative_error

DATA_WEIGHT, TEACHER_STEP = 0.1, 1 / 1024
# Of loss terms and of the gradient of all parameters, through the whole model.
LIMITS = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 2e-2}
SPLIT_ROUNDS = 5
Mark = Callable[[str], None]  # called with the name of each phase when it ends


def no_mark(phase: str) -> None:
    """Nobody asks for the phases."""


@dataclasses.dataclass
class Inputs:
    student: Transformer
    teacher: Transformer
    x0: Tensor
    t: Tensor
    seed: int

    def gradient(self, loss: Tensor) -> Tensor:
        """Of all parameters of the student, flat, in fp32."""
        parameters = list(self.student.parameters())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        flat = [(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs]
        return torch.cat(flat)


@dataclasses.dataclass
class Given:
    """What a step would draw."""

    latent: Tensor  # (B, N, 1)
    latent_u: Tensor
    xt: Tensor  # (B, D)
    u: Tensor  # (B,)
    xu: Tensor  # (B, N, D)
    consistency_x: Tensor  # (B, N, D)


class StepGroup(Group):
    """Forward and backward of one distillation step of masked diffusion, without optimiser."""

    def variants(self) -> list[Variant]:
        return [
            Variant("plain", "plain: teacher on N copies, dense logits, autograd"),
            Variant("plain-compiled", "plain, torch.compile of the loss"),
            *library(),
        ]

    def unavailable(self, name: str) -> str | None:
        return sampler_unavailable(name, self.case)

    @property
    def mask_id(self) -> int:
        return self.case.vocabulary - 1

    def make_inputs(self, seed: int) -> Inputs:
        case = self.case
        torch.manual_seed(seed)
        sizes = (case.vocabulary, case.positions, case.width, case.layers)
        with torch.device(case.device):
            student, teacher = Transformer(*sizes, latent=True), Transformer(*sizes)
            x0 = torch.randint(self.mask_id, (case.batch, case.positions))
            t = torch.full((case.batch,), float(case.masked or 0.5))
        dtype = case.torch_dtype
        teacher.requires_grad_(False)
        return Inputs(student.to(dtype), teacher.to(dtype).eval(), x0, t, seed)

    def input_bytes(self) -> int:
        case = self.case
        parameters = 12 * case.layers * case.width**2 + 2 * case.vocabulary * case.width
        return 2 * parameters * case.torch_dtype.itemsize

    def call_bytes(self, name: str) -> int:
        """Gradients, 16 numbers per channel and layer that autograd keeps, and the logits."""
        case = self.case
        size = case.torch_dtype.itemsize
        rows = case.batch * case.components
        kept = 16 * rows * case.positions * case.width * (case.layers + 1) * size
        logits = rows * case.positions * case.vocabulary
        if name.startswith("plain"):  # teacher, draws, student, and six in fp32 for the loss
            return self.input_bytes() // 2 + kept + logits * (3 * size + 6 * 4)
        head = min(2**29, logits * 4) + case.vocabulary * case.width * 4
        return self.input_bytes() // 2 + kept + head

    # Calls ---------------------------------------------------------------------------------------

    def call(self, name: str, inputs: Inputs, mark: Mark = no_mark) -> Tensor:
        self.calls += 1
        if name.startswith("plain"):
            torch.manual_seed(self.calls)
            loss = self._plain(name, inputs, mark)
        else:
            loss = self._library(name, inputs, mark).loss
        gradient = inputs.gradient(loss)
        mark("backward")
        return gradient

    def _plain(self, name: str, inputs: Inputs, mark: Mark = no_mark, **given: Tensor) -> Tensor:
        return baselines.distill_step(
            inputs.student,
            inputs.teacher,
            inputs.x0,
            t=inputs.t,
            teacher_step=TEACHER_STEP,
            mask_id=self.mask_id,
            components=self.case.components,
            data_weight=DATA_WEIGHT,
            loss=self.compiled(name, baselines.dense_loss),
            mark=mark,
            **given,
        )

    def _library(
        self,
        name: str,
        inputs: Inputs,
        mark: Mark = no_mark,
        consistency_weight: float = 1.0,
        **given: Tensor,
    ) -> DistillOutput:
        def student(*values: Any) -> Any:
            mark("process")
            head = inputs.student.as_head(*values)
            # Only the call at x_t has a graph.
            mark("student at x_t" if torch.is_grad_enabled() else "student at x_u")
            return head

        def teacher(*values: Any) -> Any:
            mark("process")
            head = inputs.teacher.as_head(*values)
            mark("teacher")
            return head

        config = DistillConfig(
            components=self.case.components,
            teacher_step=TEACHER_STEP,
            data_weight=DATA_WEIGHT,
            data_schedule="constant",
            consistency_weight=consistency_weight,
            low_t=0.0,
            low_t_probability=0.0,
        )
        with sampler_backend(name, self.case):
            output = distill_step(
                student,
                teacher,
                inputs.x0,
                process=MaskedProcess(self.mask_id),
                config=config,
                generator=torch.Generator().manual_seed(self.calls),
                t=inputs.t,
                return_terms=True,
                **given,
            )
        mark("loss")
        return output

    # Checks --------------------------------------------------------------------------------------

    def truth(self, inputs: Inputs) -> None:
        """The truth depends on the tokens that a variant drew; see `check`."""

    def check(self, name: str, inputs: Inputs, truth: None) -> Check:
        """Loss (or its terms that no draw enters) and gradient against the dense reference."""
        case = self.case
        generator = torch.Generator(case.device).manual_seed(inputs.seed)
        sizes = (2, case.batch, case.components, 1)
        latent, latent_u = torch.rand(sizes, generator=generator, device=case.device).unbind()
        given = {"latent": latent, "latent_u": latent_u}
        backend = "torch" if name.startswith("plain") else name
        output = self._library(backend, inputs, **given)
        assert output.xu is not None
        # Rows as draws are: with one class at every masked position all components would be
        # as likely, and their differences lost in fp32 on either side.
        drawn = torch.randint(
            self.mask_id, output.xu.shape, generator=generator, device=case.device
        )
        x_k = torch.where(output.xu == self.mask_id, drawn, output.xu)
        all_given = Given(latent, latent_u, output.xt, output.u, output.xu, x_k)
        if name.startswith("plain"):
            loss = self._plain(
                name,
                inputs,
                latent=latent.flatten(0, 1),
                latent_u=latent_u.flatten(0, 1),
                xt=output.xt,
                xu=output.xu,
                consistency_x=x_k,
            )
            expected, _ = self._reference(inputs, all_given)
            actual, truth_loss = loss.detach().view(1), expected.detach().view(1)
        else:
            # Without the consistency terms, whose tokens the library draws itself, but for
            # the one that no draw enters.
            _, terms = self._reference(inputs, all_given)
            fields = ("data_correlation", "teacher_marginal", "consistency_marginal")
            actual, truth_loss = (
                torch.cat([getattr(given_terms, field) for field in fields])
                for given_terms in (output.terms, terms)
            )
            again = self._library(name, inputs, consistency_weight=0.0, **given)
            loss = again.loss
            all_given = dataclasses.replace(all_given, xt=again.xt, u=again.u)
            expected, _ = self._reference(inputs, all_given, consistency=False)
        return Check.of(
            relative_error(actual, truth_loss),
            relative_error(inputs.gradient(loss), inputs.gradient(expected)),
            LIMITS[case.dtype],
        )

    def _reference(
        self, inputs: Inputs, given: Given, consistency: bool = True
    ) -> tuple[Tensor, di4c_fast.LossTerms]:
        """Loss and terms from dense logits."""
        sizes = given.latent.shape[:2]

        def student(tokens: Tensor, t: Tensor, latent: Tensor) -> Tensor:
            times = t.repeat_interleave(sizes[1])
            logits = inputs.student(tokens.flatten(0, 1), times, latent.flatten(0, 1))
            return logits.unflatten(0, sizes)

        arguments: dict[str, Any] = {"consistency_weight": 0.0}
        with torch.no_grad():
            teacher = inputs.teacher(given.xt, inputs.t)
            if consistency:
                drawn = student(given.xu, given.u, given.latent_u)
                arguments = {
                    "consistency": drawn, "consistency_x": given.consistency_x, "xu": given.xu
                }  # fmt: skip
        copies = given.xt.unsqueeze(1).expand(-1, sizes[1], -1)
        return di4c_fast.loss(
            student(copies, inputs.t, given.latent),
            teacher,
            inputs.x0,
            xt=given.xt,
            mask_id=self.mask_id,
            data_weight=DATA_WEIGHT,
            backend="reference",
            return_terms=True,
            **arguments,
        )

    def details(self, name: str, inputs: Inputs) -> dict[str, float]:
        """Median seconds of each phase."""
        rounds = [self._phases(name, inputs) for _ in range(SPLIT_ROUNDS)]
        return {phase: statistics.median(r[phase] for r in rounds) for phase in rounds[0]}

    def _phases(self, name: str, inputs: Inputs) -> dict[str, float]:
        seconds: dict[str, float] = {}

        def now() -> float:
            if self.case.device != "cpu":
                torch.cuda.synchronize()
            return time.perf_counter()

        last = now()

        def mark(phase: str) -> None:
            nonlocal last
            present = now()
            seconds[phase] = seconds.get(phase, 0.0) + present - last
            last = present

        self.call(name, inputs, mark)
        return seconds
