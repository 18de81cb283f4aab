"""What the tests of the training drop-ins share: draws that are given, and one dense formula."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from di4c_fast.loss.api import loss
from di4c_fast.models.call import evaluation_mode
from di4c_fast.training import DistillOutput, distill_step

DRAWN = ("u", "xt", "xu", "latent", "latent_u", "t_min", "x_min", "latent_min")


@dataclasses.dataclass
class Steps:
    """Stands in for `distill_step` of an integration: keeps what it was given and what came.

    With `consistency_x` (B, K, D) the draws from the student are those, but for tokens that x_u
    shows; with `given`, all other draws are those of that output.
    """

    mask_id: int | None = None
    consistency_x: Tensor | None = None
    given: DistillOutput | None = None

    def __call__(self, student, teacher, x0, **options: Any) -> DistillOutput:
        self.student, self.teacher, self.x0, self.options = student, teacher, x0, options
        if self.given is not None:
            values = {name: getattr(self.given, name) for name in DRAWN}
            options |= {name: value for name, value in values.items() if value is not None}
            options["t"] = self.given.t
            shown = self.given.xu
            if self.consistency_x is not None and shown is not None:
                drawn = self.consistency_x
                if self.mask_id is not None:
                    drawn = torch.where(shown == self.mask_id, drawn, shown)
                options["consistency_x"] = self.drawn = drawn
        self.output = distill_step(student, teacher, x0, **options)
        return self.output


def dense_loss(steps: Steps, weights: dict[str, Tensor], **options: Any) -> Tensor:
    """The loss (B,) of `di4c_fast.reference` on all logits of the tokens and λ of a step."""
    out, context = steps.output, steps.options.get("context") or {}
    batch, rows, _ = out.latent.shape

    def repeated(value: Tensor) -> Tensor:
        return value.repeat_interleave(rows, 0)

    more = {name: repeated(value) for name, value in context.items()}
    t, u = repeated(out.t), repeated(out.u)
    student = steps.student(repeated(out.xt), t, out.latent.flatten(0, 1), **more)
    modules = (steps.student, steps.teacher)
    with torch.no_grad(), evaluation_mode(*(m for m in modules if isinstance(m, nn.Module))):
        teacher = steps.teacher(out.xt, out.t, **context)
        if out.xu is not None:
            there = steps.student(out.xu.flatten(0, 1), u, out.latent_u.flatten(0, 1), **more)
            options |= {"consistency": unflattened(there, batch), "consistency_x": steps.drawn}
    if steps.mask_id is not None:
        xu = out.xt.unsqueeze(1).expand(-1, rows, -1) if out.xu is None else out.xu
        options |= {"mask_id": steps.mask_id, "xt": out.xt}
        options |= {} if out.xu is None else {"xu": xu}
    return loss(
        unflattened(student, batch),
        dense(teacher),
        steps.x0,
        backend="reference",
        reduction="none",
        **weights,
        **options,
    )


def dense(head: Any) -> Tensor:
    return head if isinstance(head, Tensor) else head.logits()


def unflattened(head: Any, batch: int) -> Tensor:
    return dense(head).unflatten(0, (batch, -1))


def gradients(module: nn.Module, value: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(value, list(module.parameters()), allow_unused=True))


def assert_same_gradients(ours: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            scale = float(other.abs().max())
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * scale + 1e-7)
