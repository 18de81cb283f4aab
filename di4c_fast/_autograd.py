"""First derivatives only, and an error rather than a silent zero for a second one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Undifferentiable(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor):
        raise RuntimeError(
            "the losses of di4c_fast can be differentiated once; a second derivative (a gradient "
            'penalty, a Hessian) needs backend="reference"'
        )


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `backward` of an autograd function that has no derivative of its own.

    torch's `once_differentiable` raises only if the upstream gradient has a graph, which that of a
    plain loss has not: its second derivative would come out as zero.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *upstream: Tensor) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return gradients
        return tuple(
            None if g is None else _Undifferentiable.apply(g.detach().requires_grad_())
            for g in gradients
        )

    return wrapped
