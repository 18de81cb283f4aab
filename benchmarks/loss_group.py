"""The loss, forward and backward: all ways to compute it at one shape."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import di4c_fast
from di4c_fast import Head, LinearHead, LogisticHead, TensorHead

from . import baselines
from .floors import Work, loss_floor, loss_plan
from .groups import Check, Group, Variant
from .truth import Problem, Truth, relative_error, solve

DATA_WEIGHT = 0.1
REVEALED = 0.05  # share of the masked positions that a consistency draw has revealed

DENSE = Variant("dense", "eager, one gather per target")
VECTORISED = Variant("vectorised", "eager, vectorised")
DENSE_COMPILED = Variant("dense-compiled", "torch.compile of one gather per target")
VECTORISED_COMPILED = Variant("vectorised-compiled", "torch.compile of the vectorised one")
STREAMING = Variant("torch", "di4c_fast torch", library=True)
CPU = Variant("cpu", "di4c_fast cpu", library=True)
TRITON = Variant("triton", "di4c_fast triton", library=True)
IN_PLACE = Variant(
    "triton-in-place", "di4c_fast triton, gradient in place", library=True, timed=False
)
EAGER_CE = Variant("eager", "F.linear, F.cross_entropy")
EAGER_CE_COMPILED = Variant("eager-compiled", "torch.compile of F.linear, F.cross_entropy")
LINEAR_CE = Variant("linear-cross-entropy", "torch F.linear_cross_entropy, chunked")
LIGER = Variant("liger", "Liger fused linear cross-entropy")
CCE = Variant("cut-cross-entropy", "Cut Cross Entropy")

LOSS_VARIANTS = [
    DENSE,
    VECTORISED,
    DENSE_COMPILED,
    VECTORISED_COMPILED,
    STREAMING,
    CPU,
    TRITON,
]
CE_VARIANTS = [EAGER_CE, EAGER_CE_COMPILED, LINEAR_CE, LIGER, CCE, STREAMING, CPU, TRITON]

# Relative error of loss and gradient above which a variant counts as wrong. fp32 sums of some
# thousand terms reach 1e-6 to 1e-5. Half precision rounds the gradient it returns (2^-9 for bf16),
# and with a linear head the logits as well, which shifts every probability by some 2^-9 |z|.
LIMITS = {
    "logits": {"fp32": 1e-4, "bf16": 1e-2, "fp16": 2e-3},
    "linear": {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2},
    "logistic": {"fp32": 5e-4, "bf16": 2e-2, "fp16": 5e-3},
}
# Peak of the dense formulations above the inputs, in fp32 copies of the student's logits.
DENSE_COPIES = {"dense": 6.5, "vectorised": 6.5}


@dataclasses.dataclass
class Inputs:
    problem: Problem
    leaves: list[Tensor]  # the student's tensors that want a gradient


class LossGroup(Group):
    """Forward and backward of the loss at one shape."""

    def __init__(self, case: Any):
        super().__init__(case)
        self.compiled: dict[str, Callable[..., Tensor]] = {}

    def variants(self) -> list[Variant]:
        if self.case.cross_entropy:
            return CE_VARIANTS
        if self.case.note:  # sweeps
            return [DENSE, STREAMING, CPU, TRITON]
        if self.case.head == "logits":
            return [*LOSS_VARIANTS, IN_PLACE]
        return LOSS_VARIANTS

    def unavailable(self, name: str) -> str | None:
        return super().unavailable("triton" if name == "triton-in-place" else name)

    def reset(self) -> None:
        super().reset()
        self.compiled.clear()

    # Inputs --------------------------------------------------------------------------------------

    def make_inputs(self, seed: int) -> Inputs:
        case = self.case
        device, dtype = torch.device(case.device), case.torch_dtype
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
            return values.mul_(scale)

        def head(*shape: int, like: Head | None = None) -> Head:
            if case.head == "logits":
                return TensorHead(normal(*shape, case.vocabulary, scale=2.0))
            if case.head == "logistic":
                mu = torch.rand(*shape, generator=generator, device=device) * 2 - 1
                log_scale = normal(*shape, scale=0.5)
                return LogisticHead(mu.to(dtype), log_scale, case.vocabulary)
            if isinstance(like, LinearHead):
                weight = like.weight.detach()
            else:
                weight = normal(case.vocabulary, case.width, scale=2.0 / math.sqrt(case.width))
            return LinearHead(normal(*shape, case.width), weight)

        sizes = (case.batch, case.components, case.positions)
        tokens = case.vocabulary if case.masked is None else case.vocabulary - 1

        def random_tokens(*shape: int) -> Tensor:
            return torch.randint(tokens, shape, generator=generator, device=device)

        student = head(*sizes)
        leaves = [t.requires_grad_() for t in student.tensors() if t is not None]
        student = student.with_tensors([*leaves, *student.tensors()[len(leaves) :]])
        x0 = random_tokens(case.batch, case.positions)
        if case.cross_entropy:
            problem = Problem(student, None, None, x0, None, None, None, None, 1.0)
            return Inputs(problem, leaves)
        xt, xu, mask_id = None, None, None
        draws = random_tokens(*sizes)
        if case.masked is not None:
            mask_id = case.vocabulary - 1
            order = torch.rand(case.batch, case.positions, generator=generator, device=device)
            masked = order.argsort(-1).argsort(-1) < case.active_positions
            xt = torch.where(masked, mask_id, x0)
            revealed = torch.rand(*sizes, generator=generator, device=device) < REVEALED
            xu = torch.where(masked.unsqueeze(1) & ~revealed, mask_id, x0.unsqueeze(1))
            draws = torch.where(xu == mask_id, draws, xu)
        problem = Problem(
            student=student,
            teacher=head(case.batch, case.positions),
            consistency=head(*sizes, like=student),
            x0=x0,
            consistency_x=draws,
            xt=xt,
            xu=xu,
            mask_id=mask_id,
            data_weight=DATA_WEIGHT,
        )
        return Inputs(problem, leaves)

    def input_bytes(self) -> int:
        case = self.case
        size = case.torch_dtype.itemsize
        rows = case.batch * case.positions * (2 * case.components + 1)
        if case.cross_entropy:
            rows = case.positions
        per_row = {"logits": case.vocabulary, "linear": case.width, "logistic": 2}[case.head]
        weights = 2 * case.vocabulary * case.width if case.head == "linear" else 0
        return size * (rows * per_row + weights)

    def call_bytes(self, name: str) -> int:
        case = self.case
        dense = case.batch * case.components * case.positions * case.vocabulary * 4
        gradients = self.input_bytes() // 2
        base = name.removesuffix("-compiled")
        if case.cross_entropy:
            return gradients + (3 * dense if base == "eager" else dense // 4)
        if base in DENSE_COPIES:
            # The bins are computed and differentiated before the loss begins.
            bins = 5 if case.head == "logistic" else 0
            return gradients + int((DENSE_COPIES[base] + bins) * dense)
        return gradients + (dense // 2 if case.head == "logits" else 1 << 30)

    # Calls ---------------------------------------------------------------------------------------

    def call(self, name: str, inputs: Inputs) -> Sequence[Tensor]:
        return self.evaluate(name, inputs, given=False)[1]

    def evaluate(self, name: str, inputs: Inputs, given: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and gradients; with `given` consistency tokens, else with drawn ones.

        `name` may also be "reference", which is not timed: it is there to be right.
        """
        problem = inputs.problem
        if problem.cross_entropy:
            loss = self._cross_entropy(name, problem)
        elif name in ("reference", "torch", "cpu", "triton", "triton-in-place"):
            loss = _library(name, problem, given)
        else:
            loss = self._eager(name, problem, given)
        return loss.detach(), torch.autograd.grad(loss, inputs.leaves)

    def _eager(self, name: str, problem: Problem, given: bool) -> Tensor:
        function: Callable[..., Tensor] = baselines.dense_loss
        if name.startswith("vectorised"):
            function = baselines.vectorised_loss
        if name.endswith("-compiled"):
            function = self._compile(name, function)
        assert problem.teacher is not None
        assert problem.consistency is not None
        return function(
            problem.student.logits(),
            problem.teacher.logits(),
            problem.x0,
            consistency=problem.consistency.logits(),
            consistency_x=problem.consistency_x if given else None,
            xt=problem.xt,
            xu=problem.xu,
            mask_id=problem.mask_id,
            data_weight=problem.data_weight,
        )

    def _compile(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name not in self.compiled:
            self.compiled[name] = torch.compile(function, dynamic=False)
        return self.compiled[name]

    def _cross_entropy(self, name: str, problem: Problem) -> Tensor:
        head = problem.student
        assert isinstance(head, LinearHead)
        if name in ("reference", "torch", "cpu", "triton"):
            # The teacher has weight 0 and is never read: one number, seen at every position.
            size = (1, head.shape[2], head.shape[3])
            teacher = head.hidden.detach().new_zeros(()).expand(size)
            return di4c_fast.loss(
                head,
                teacher,
                problem.x0,
                teacher_weight=0.0,
                control_variate=False,
                reduction="sum",
                backend=name,
            )
        hidden, targets = head.hidden.flatten(0, 2), problem.x0.flatten()
        if name in ("eager", "eager-compiled"):
            function: Callable[..., Tensor] = baselines.cross_entropy
            if name.endswith("-compiled"):
                function = self._compile(name, function)
            return function(hidden, head.weight, targets)
        return _peer_cross_entropy(name, hidden, head.weight, targets)

    # Checks --------------------------------------------------------------------------------------

    def truth(self, inputs: Inputs) -> Truth:
        gpu = self.case.device.startswith("cuda")
        return solve(inputs.problem, chunk_bytes=(1 << 30) if gpu else (32 << 20))

    def check(self, name: str, inputs: Inputs, truth: Truth) -> Check:
        if name == "triton-in-place":
            inputs = _copied(inputs)  # the call overwrites them
        loss, gradients = self.evaluate(name, inputs, given=True)
        return judge(loss, gradients, truth, LIMITS[self.case.head][self.case.dtype], self.case)

    def work(self) -> Work | None:
        return loss_floor(self.case)

    def plan_work(self) -> Work | None:
        return loss_plan(self.case)


def judge(
    loss: Tensor, gradients: Sequence[Tensor], truth: Truth, limit: float, case: Any
) -> Check:
    """Relative errors of the loss and of the worst gradient, against a limit."""
    loss_error = abs(float(loss.double()) - truth.loss) / max(abs(truth.loss), 1e-12)
    rows = list(gradients)
    errors = []
    if truth.weight is not None:
        errors.append(relative_error(rows.pop(1), truth.weight))
    example, position = truth.positions // case.positions, truth.positions % case.positions
    for gradient, expected in zip(rows, truth.rows, strict=True):
        errors.append(relative_error(gradient[example, :, position], expected))
    # max() would drop a NaN that does not come first.
    gradient_error = math.nan if any(math.isnan(e) for e in errors) else max(errors)
    problem = None
    if not loss_error <= limit:
        problem = f"the loss is off by {loss_error:.1e}, at most {limit:.0e} allowed"
    elif not gradient_error <= limit:
        problem = f"the gradient is off by {gradient_error:.1e}, at most {limit:.0e} allowed"
    return Check(problem, loss_error, gradient_error, limit)


def _library(name: str, problem: Problem, given: bool) -> Tensor:
    student, backend = problem.student, name
    if name == "triton-in-place":
        backend = "triton"
        assert isinstance(student, TensorHead)
        student = TensorHead(student.logits())
        student.in_place_gradient = True
    assert problem.teacher is not None
    return di4c_fast.loss(
        student,
        problem.teacher,
        problem.x0,
        consistency=problem.consistency,
        consistency_x=problem.consistency_x if given else None,
        xt=problem.xt,
        xu=problem.xu,
        mask_id=problem.mask_id,
        data_weight=problem.data_weight,
        backend=backend,
    )


def _copied(inputs: Inputs) -> Inputs:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in inputs.leaves]
    student = inputs.problem.student.with_tensors(leaves)
    return Inputs(dataclasses.replace(inputs.problem, student=student), leaves)


def _peer_cross_entropy(name: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if name == "linear-cross-entropy":
        arguments: dict[str, Any] = {"reduction": "sum"}
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            # Without options it is the dense formulation.
            arguments["options"] = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "liger":
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            result = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
            return result[0] if isinstance(result, tuple) else result
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, targets, reduction="sum")
