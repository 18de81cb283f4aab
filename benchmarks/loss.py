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
from di4c_fast.testing import relative_l2

from . import baselines
from .floors import Work, loss_floor
from .groups import BACKENDS, FUSED, Check, Group, Noise, Variant, library

DATA_WEIGHT = 0.1
REVEALED = 0.05  # share of the masked positions that a consistency draw has revealed

DENSE = Variant("dense", "eager, one gather per target")
LOSS_VARIANTS = [
    DENSE,
    Variant("vectorised", "eager, vectorised"),
    Variant("dense-compiled", "torch.compile of one gather per target"),
    Variant("vectorised-compiled", "torch.compile of the vectorised one"),
    *library(),
]
IN_PLACE = library("-in-place", ", gradient in place", FUSED)
CE_VARIANTS = [
    Variant("eager", "F.linear, F.cross_entropy"),
    Variant("eager-compiled", "torch.compile of F.linear, F.cross_entropy"),
    Variant("linear-cross-entropy", "torch F.linear_cross_entropy, chunked"),
    Variant("liger", "Liger fused linear cross-entropy"),
    Variant("cut-cross-entropy", "Cut Cross Entropy"),
    *library(),
]

Problem = dict[str, Any]  # arguments of `di4c_fast.loss`
Truth = tuple[Tensor, tuple[Tensor, ...]]  # the loss, and its gradients

# Relative error of loss and gradient above which a variant counts as wrong. fp32 sums of some
# thousand terms reach 1e-6 to 1e-5. Half precision rounds the gradient it returns (2^-9 for bf16),
# and with a linear head the logits as well, which shifts every probability by some 2^-9 |z|.
LIMITS = {
    "logits": {"fp32": 1e-4, "bf16": 1e-2, "fp16": 2e-3},
    "linear": {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2},
    "logistic": {"fp32": 5e-4, "bf16": 2e-2, "fp16": 5e-3},
}


@dataclasses.dataclass
class Inputs:
    problem: Problem
    leaves: list[Tensor]  # the student's tensors that want a gradient


class LossGroup(Group):
    """Forward and backward of the loss at one shape."""

    @property
    def copies(self) -> dict[str, float]:
        # Bins are computed and differentiated before the loss begins.
        plain = 11.5 if self.case.head == "logistic" else 6.5
        return {"dense": plain, "vectorised": plain, "eager": 3.0, "liger": 0.25, "cut": 0.25}

    def variants(self) -> list[Variant]:
        if self.case.cross_entropy:
            return CE_VARIANTS
        if self.case.note.startswith("D=") and self.case.shape != "scaling":
            return library()  # the memory series
        if self.case.note:
            return [DENSE, *library()]
        left_out = "dense-compiled" if self.case.device == "cpu" else ""  # the slower of the two
        variants = [variant for variant in LOSS_VARIANTS if variant.name != left_out]
        return [*variants, *(IN_PLACE if self.case.head == "logits" else [])]

    # Inputs --------------------------------------------------------------------------------------

    def make_inputs(self, seed: int) -> Inputs:
        case, noise = self.case, Noise(self.case, seed)

        def head(*shape: int, like: Head | None = None) -> Head:
            if case.head == "logits":
                return TensorHead(noise.normal(*shape, case.vocabulary, scale=2.0))
            if case.head == "logistic":
                mu = (noise.uniform(*shape) * 2 - 1).to(case.torch_dtype)
                return LogisticHead(mu, noise.normal(*shape, scale=0.5), case.vocabulary)
            if isinstance(like, LinearHead):
                weight = like.weight.detach()
            else:
                scale = 2.0 / math.sqrt(case.width)
                weight = noise.normal(case.vocabulary, case.width, scale=scale)
            return LinearHead(noise.normal(*shape, case.width), weight)

        sizes = (case.batch, case.components, case.positions)
        masks = case.masked is not None
        student = head(*sizes)
        leaves = [t.requires_grad_() for t in student.tensors() if t is not None]
        x0 = noise.tokens(case.batch, case.positions, masks=masks)
        problem: Problem = {"student": student, "x0": x0}
        if case.cross_entropy:
            # The teacher has weight 0 and is never read: one number, seen at every position.
            teacher = x0.new_zeros((), dtype=case.torch_dtype).expand(
                1, case.positions, case.vocabulary
            )
            problem |= {"teacher": teacher, "teacher_weight": 0.0}
            return Inputs(problem | {"control_variate": False, "reduction": "sum"}, leaves)
        problem |= {"teacher": head(*sizes[::2]), "consistency": head(*sizes, like=student)}
        draws = noise.tokens(*sizes, masks=masks)
        problem |= {"consistency_x": draws, "data_weight": DATA_WEIGHT}
        if masks:
            mask_id = case.vocabulary - 1
            masked = noise.uniform(*sizes[::2]).argsort(-1).argsort(-1) < case.active_positions
            revealed = noise.uniform(*sizes) < REVEALED
            xu = torch.where(masked.unsqueeze(1) & ~revealed, mask_id, x0.unsqueeze(1))
            problem |= {"mask_id": mask_id, "xt": torch.where(masked, mask_id, x0), "xu": xu}
            problem["consistency_x"] = torch.where(xu == mask_id, draws, xu)
        return Inputs(problem, leaves)

    def fresh(self, name: str, inputs: Inputs) -> Inputs:
        if not name.endswith("-in-place"):
            return inputs
        leaves = [leaf.detach().clone().requires_grad_() for leaf in inputs.leaves]
        student = inputs.problem["student"].with_tensors(leaves)
        return Inputs({**inputs.problem, "student": student}, leaves)

    def input_bytes(self) -> int:
        case = self.case
        size = case.torch_dtype.itemsize
        rows = case.batch * case.positions * (2 * case.components + 1)
        if case.cross_entropy:
            rows = case.positions
        per_row = {"logits": case.vocabulary, "linear": case.width, "logistic": 2}[case.head]
        weights = 2 * case.vocabulary * case.width if case.head == "linear" else 0
        return size * (rows * per_row + weights)

    # Calls ---------------------------------------------------------------------------------------

    def call(self, name: str, inputs: Inputs) -> Sequence[Tensor]:
        problem = {k: v for k, v in inputs.problem.items() if k != "consistency_x"}
        return self.evaluate(name, Inputs(problem, inputs.leaves))[1]

    def evaluate(self, name: str, inputs: Inputs) -> Truth:
        """Loss and gradients; without consistency tokens in the problem they are drawn.

        `name` may also be "reference", which is not timed: it is there to be right.
        """
        problem, backend = inputs.problem, name.removesuffix("-in-place")
        if backend in (*BACKENDS, "reference"):
            student = problem["student"]
            if backend != name:
                student = TensorHead(student.logits(), in_place_gradient=True)
            loss = di4c_fast.loss(**{**problem, "student": student}, backend=backend)
        elif self.case.cross_entropy:
            loss = self._cross_entropy(name, problem["student"], problem["x0"].flatten())
        else:
            plain = baselines.dense_loss if "dense" in name else baselines.vectorised_loss
            dense = {k: v.logits() if isinstance(v, Head) else v for k, v in problem.items()}
            loss = self.compiled(name, plain)(**dense)
        return loss.detach(), torch.autograd.grad(loss, inputs.leaves)

    def _cross_entropy(self, name: str, head: LinearHead, targets: Tensor) -> Tensor:
        hidden, weight = head.hidden.flatten(0, 2), head.weight
        if name in ("eager", "eager-compiled"):
            return self.compiled(name, baselines.cross_entropy)(hidden, weight, targets)
        function: Callable[..., Any]
        arguments: dict[str, Any] = {"reduction": "sum"}
        if name == "linear-cross-entropy":
            function = F.linear_cross_entropy
            if hasattr(torch.nn, "LinearCrossEntropyOptions"):
                # Without options it is the dense formulation.
                arguments["options"] = torch.nn.LinearCrossEntropyOptions()
        elif name == "liger":
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            function = liger_fused_linear_cross_entropy
        else:
            from cut_cross_entropy import linear_cross_entropy as function
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(hidden, weight, targets, **arguments)
        return result[0] if isinstance(result, tuple) else result

    # Checks --------------------------------------------------------------------------------------

    def truth(self, inputs: Inputs) -> Truth:
        """In float64 by the plain passes, which tests hold to a dense reference."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
        student = inputs.problem["student"]
        others = student.tensors()[len(leaves) :]
        student = student.with_tensors([*leaves, *others])
        return self.evaluate("torch", Inputs({**inputs.problem, "student": student}, leaves))

    def check(self, name: str, inputs: Inputs, truth: Truth) -> Check:
        """Relative errors of the loss and of the worst gradient."""
        loss, gradients = self.evaluate(name, self.fresh(name, inputs))
        errors = [relative_l2(*pair) for pair in zip(gradients, truth[1], strict=True)]
        # max() would drop a NaN that does not come first.
        gradient_error = math.nan if any(math.isnan(e) for e in errors) else max(errors)
        limit = LIMITS[self.case.head][self.case.dtype]
        return Check.of(relative_l2(loss, truth[0]), gradient_error, limit)

    def work(self) -> Work | None:
        return loss_floor(self.case)
