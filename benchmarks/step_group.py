"""A whole distillation step: process, teacher, student twice, loss, backward."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import di4c_fast
from di4c_fast.processes import MaskedProcess
from di4c_fast.training import DistillConfig, DistillOutput, distill_step

from . import baselines
from .cases import make_case
from .groups import Check, Group, Variant
from .memory import peak_on_gpu
from .models import Transformer
from .truth import relative_error

PLAIN = Variant("plain", "plain: teacher on N copies, dense logits, autograd")
LIBRARY = Variant("di4c-fast", "di4c_fast.training.step", library=True)
DATA_WEIGHT, TEACHER_STEP = 0.1, 1 / 1024
# Of loss terms and of the gradient of all parameters, through the whole model.
LIMITS = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 2e-2}
PHASES = ("teacher", "process", "student at x_u", "student at x_t", "loss", "backward")
BUDGETS = (40, 80)  # GB for which the largest N is wanted
SPLIT_ROUNDS = 5


@dataclasses.dataclass
class Inputs:
    student: Transformer
    teacher: Transformer
    x0: Tensor
    t: Tensor
    seed: int

    def parameters(self) -> list[Tensor]:
        return list(self.student.parameters())


class StepGroup(Group):
    """Forward and backward of one distillation step of masked diffusion, without optimiser."""

    def __init__(self, case: Any):
        super().__init__(case)
        self.calls = 0

    def variants(self) -> list[Variant]:
        return [PLAIN, LIBRARY]

    def make_inputs(self, seed: int) -> Inputs:
        case = self.case
        torch.manual_seed(seed)
        sizes = (case.vocabulary, case.positions, case.width, case.layers)
        with torch.device(case.device):
            student, teacher = Transformer(*sizes, latent=True), Transformer(*sizes)
            x0 = torch.randint(case.vocabulary - 1, (case.batch, case.positions))
            t = torch.full((case.batch,), float(case.masked or 0.5))
        dtype = case.torch_dtype
        teacher.requires_grad_(False)
        return Inputs(student.to(dtype), teacher.to(dtype).eval(), x0, t, seed)

    def input_bytes(self) -> int:
        case = self.case
        parameters = 12 * case.layers * case.width**2 + 2 * case.vocabulary * case.width
        return 2 * parameters * case.torch_dtype.itemsize

    def call_bytes(self, name: str) -> int:
        return int(peak_bytes(self.case, name, self.case.components))

    def call(self, name: str, inputs: Inputs) -> Any:
        loss = self._loss(name, inputs)
        return torch.autograd.grad(loss, inputs.parameters(), allow_unused=True)

    def _loss(
        self, name: str, inputs: Inputs, mark: Callable[[str], None] = lambda phase: None
    ) -> Tensor:
        self.calls += 1
        if name == "plain":
            torch.manual_seed(self.calls)
            return self._plain(inputs, mark=mark)
        return self._library(inputs, mark=mark).loss

    def _plain(self, inputs: Inputs, **arguments: Any) -> Tensor:
        return baselines.distill_step(
            inputs.student,
            inputs.teacher,
            inputs.x0,
            t=inputs.t,
            teacher_step=TEACHER_STEP,
            mask_id=self.case.vocabulary - 1,
            components=self.case.components,
            data_weight=DATA_WEIGHT,
            **arguments,
        )

    def _library(
        self,
        inputs: Inputs,
        mark: Callable[[str], None] = lambda phase: None,
        return_terms: bool = False,
        consistency_weight: float = 1.0,
        **arguments: Any,
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
        output = distill_step(
            student,
            teacher,
            inputs.x0,
            process=MaskedProcess(self.case.vocabulary - 1),
            config=config,
            generator=torch.Generator().manual_seed(self.calls),
            t=inputs.t,
            return_terms=return_terms,
            **arguments,
        )
        mark("loss")
        return output

    # Checks --------------------------------------------------------------------------------------

    def truth(self, inputs: Inputs) -> None:
        """The truth depends on the tokens that a variant drew; see `check`."""

    def check(self, name: str, inputs: Inputs, truth: None) -> Check:
        """Loss (or its terms that no draw enters) and gradient against the dense reference."""
        case, limit = self.case, LIMITS[self.case.dtype]
        generator = torch.Generator(case.device).manual_seed(inputs.seed)
        sizes = (2, case.batch, case.components, 1)
        latent, latent_u = torch.rand(sizes, generator=generator, device=case.device).unbind()
        given = {"latent": latent, "latent_u": latent_u}
        output = self._library(inputs, return_terms=True, **given)
        assert output.xu is not None
        if name == "plain":
            x_u, mask_id = output.xu, case.vocabulary - 1
            # Rows as draws are: with one class at every masked position all components would be
            # as likely, and their differences lost in fp32 on either side.
            drawn = torch.randint(mask_id, x_u.shape, generator=generator, device=case.device)
            x_k = torch.where(x_u == mask_id, drawn, x_u)
            expected, gradient = self._reference(inputs, output, latent, latent_u, x_u, x_k)
            loss = self._plain(
                inputs,
                latent=latent.flatten(0, 1),
                latent_u=latent_u.flatten(0, 1),
                xt=output.xt,
                xu=x_u,
                consistency_x=x_k,
            )
            actual = loss.detach().double().view(1)
            expected = expected[:1]
        else:
            expected, gradient = self._reference(inputs, output, latent, latent_u, output.xu)
            assert output.terms is not None
            terms = output.terms
            actual = torch.cat(
                [terms.data_correlation, terms.teacher_marginal, terms.consistency_marginal]
            ).double()
            expected = expected[1:]
            del output
            # The gradient without the consistency terms, whose tokens the library draws itself.
            again = self._library(inputs, consistency_weight=0.0, **given)
            expected_output = self._reference(inputs, again, latent, latent_u)
            gradient, loss = expected_output[1], again.loss
        mine = torch.autograd.grad(loss, inputs.parameters(), allow_unused=True)
        loss_error = relative_error(actual, expected)
        gradient_error = relative_error(_flat(mine, inputs), gradient)
        problem = None
        if not loss_error <= limit:
            problem = f"the loss terms are off by {loss_error:.1e}, at most {limit:.0e} allowed"
        elif not gradient_error <= limit:
            problem = f"the gradient is off by {gradient_error:.1e}, at most {limit:.0e} allowed"
        return Check(problem, loss_error, gradient_error, limit)

    def _reference(
        self,
        inputs: Inputs,
        output: DistillOutput,
        latent: Tensor,
        latent_u: Tensor,
        xu: Tensor | None = None,
        consistency_x: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and its three terms without drawn tokens (1 + 3B,), gradient of all parameters.

        The loss has its consistency terms only where their rows are given.
        """
        sizes = latent.shape[:2]
        count = sizes[1]
        with torch.no_grad():
            teacher = inputs.teacher(output.xt, inputs.t)
            consistency = None
            if xu is not None:
                u = output.u.repeat_interleave(count)
                consistency = inputs.student(xu.flatten(0, 1), u, latent_u.flatten(0, 1))
                consistency = consistency.unflatten(0, sizes)
        copies = output.xt.repeat_interleave(count, 0)
        student = inputs.student(
            copies, inputs.t.repeat_interleave(count), latent.flatten(0, 1)
        ).unflatten(0, sizes)
        mask_id = self.case.vocabulary - 1
        loss, terms = di4c_fast.loss(
            student,
            teacher,
            inputs.x0,
            consistency=consistency,
            consistency_x=consistency_x,
            xt=output.xt,
            xu=xu,
            mask_id=mask_id,
            data_weight=DATA_WEIGHT,
            consistency_weight=0.0 if consistency_x is None else 1.0,
            backend="reference",
            return_terms=True,
        )
        gradient = torch.autograd.grad(loss, inputs.parameters(), allow_unused=True)
        values = [loss.detach().view(1), terms.data_correlation, terms.teacher_marginal]
        values.append(terms.consistency_marginal)
        return torch.cat([v.double() for v in values]), _flat(gradient, inputs)

    # The split and the largest N -----------------------------------------------------------------

    def details(self, name: str, inputs: Inputs) -> dict[str, Any]:
        """Median seconds of each phase, and the largest N for some memory sizes (computed)."""
        rounds = [self._phases(name, inputs) for _ in range(SPLIT_ROUNDS)]
        phases = {
            phase: sorted(r.get(phase, 0.0) for r in rounds)[SPLIT_ROUNDS // 2] for phase in PHASES
        }
        largest, how = self._largest(name, inputs)
        return {"phases": phases, "largest_components": largest, "largest_how": how}

    def _largest(self, name: str, inputs: Inputs) -> tuple[dict[str, int], str]:
        """The largest N at B = 1 whose step, both models and Adam fit: by GB, and how known."""
        if self.case.device.startswith("cuda"):
            case, counts = self.case, (2, 4)
            peaks = []
            for count in counts:
                group = StepGroup(dataclasses.replace(case, components=count))
                peaks.append(peak_on_gpu(functools.partial(group.call, name, inputs), case.device))
            how = f"measured at N = {counts[0]} and {counts[1]}, extended"
        else:
            case, counts = make_case("distill", "full", "bf16", "cpu"), (1, 2)
            peaks = [int(peak_bytes(case, name, count)) for count in counts]
            how = f"computed from counts, {case.title}"
        slope = (peaks[1] - peaks[0]) / (counts[1] - counts[0])
        models = StepGroup(case).input_bytes()
        # Adam beside the student: master weights and two moments in fp32.
        adam = models // (2 * case.torch_dtype.itemsize) * 12
        fixed = peaks[0] - counts[0] * slope + models + adam
        largest = {str(gb): largest_components(gb * 1e9, fixed, slope) for gb in BUDGETS}
        return largest, how

    def _phases(self, name: str, inputs: Inputs) -> dict[str, float]:
        gpu = self.case.device.startswith("cuda")
        seconds: dict[str, float] = {}

        def now() -> float:
            if gpu:
                torch.cuda.synchronize(self.case.device)
            return time.perf_counter()

        last = now()

        def mark(phase: str) -> None:
            nonlocal last
            present = now()
            seconds[phase] = seconds.get(phase, 0.0) + present - last
            last = present

        loss = self._loss(name, inputs, mark)
        torch.autograd.grad(loss, inputs.parameters(), allow_unused=True)
        mark("backward")
        return seconds


def _flat(gradients: Any, inputs: Inputs) -> Tensor:
    parts = [
        (torch.zeros_like(p) if g is None else g.detach()).flatten().float()
        for g, p in zip(gradients, inputs.parameters(), strict=True)
    ]
    return torch.cat(parts)


# Counting memory ---------------------------------------------------------------------------------


def activation_bytes(case: Any, rows: int) -> int:
    """What autograd keeps of a student's backbone for `rows` rows, counted on the meta device."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[Tensor] = []  # so that no storage address is used twice
    with torch.device("meta"):
        model = Transformer(2, case.positions, case.width, case.layers, latent=True)
        model = model.to(case.torch_dtype)
        tokens = torch.zeros(rows, case.positions, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model.hidden(tokens, torch.zeros(rows), torch.zeros(rows, 1))
    del hidden
    return sum(kept.values())


def peak_bytes(case: Any, name: str, components: int) -> float:
    """Peak of a step above the models, computed from counts.

    Backbone activations, plus for the plain way three copies of the logits (teacher, draws,
    student) and the six in fp32 that the dense loss takes (measured), for the library the hidden
    states' gradients and half a GiB of chunks.
    """
    rows = case.batch * components
    activations = rows * _activation_bytes_per_row(case)
    logits = rows * case.positions * case.vocabulary
    parameters = 12 * case.layers * case.width**2 + 2 * case.vocabulary * case.width
    gradients = parameters * case.torch_dtype.itemsize
    if name == "plain":
        return activations + gradients + logits * (3 * case.torch_dtype.itemsize + 6 * 4)
    hidden = 3 * rows * case.positions * case.width * case.torch_dtype.itemsize
    head = min(2**29, logits * 4) + case.vocabulary * case.width * 4
    return activations + gradients + hidden + head


_PER_ROW: dict[tuple[int, int, int, str], float] = {}


def _activation_bytes_per_row(case: Any) -> float:
    key = (case.positions, case.width, case.layers, case.dtype)
    if key not in _PER_ROW:
        _PER_ROW[key] = float(activation_bytes(case, 2) - activation_bytes(case, 1))
    return _PER_ROW[key]


def largest_components(budget: float, fixed: float, slope: float) -> int:
    """The largest N with fixed + N * slope <= budget, all in bytes."""
    if slope <= 0:
        raise ValueError(f"slope must be positive, got {slope}")
    return max(0, int((budget - fixed) // slope))
