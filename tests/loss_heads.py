"""Heads for the tests of the loss, and the comparison of a backend with the truth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import naive_loss, run_loss
from torch import Tensor

from di4c_fast import Head, LinearHead, LogisticHead, backends
from di4c_fast.testing import assert_close_to_reference
from tools.own_head import OwnHead

FULL = {"mask_id": 3, "revealed": True, "padded": True, "weighted": True, "component_weight": 0.5}
WIDTH = 6
BINS = 8

# What is allowed beside twice eager's error, where eager happens to be exact: a few roundings of
# the largest numbers there are, losses of some 10 nats and gradients of some tenths, and two
# roundings of the loss itself.
ROUNDING = 1.2e-7
ATOL = {
    torch.float32: {"loss": 4e-6, "gradient": 4e-7},
    # The loss is computed in float32 from the same rounded logits; gradients are rounded once.
    torch.bfloat16: {"loss": 4e-6, "gradient": 1e-5},
    torch.float16: {"loss": 4e-6, "gradient": 1e-6},
}
# fp32 against a truth in fp64 where no eager twin is at hand: a few roundings of numbers of size
# 10, and what their differences make of it.
CLOSE = {"rtol": 2e-5, "atol": 5e-6}


def available(*names: str) -> list[Any]:
    """Parameters of a test: the backends, skipped with the reason where they cannot run here."""
    device = torch.device("cpu")
    reasons = {name: backends.unavailable(name, device) for name in names}
    return [
        pytest.param(name, marks=pytest.mark.skip(reason=reason) if reason else [])
        for name, reason in reasons.items()
    ]


FAST = available("torch", "triton", "cpu")
EVERY = available("reference", "torch", "triton", "cpu")


class Tanh(OwnHead):
    """A head of somebody else: bounded logits, a scale per row and a bias for all rows."""

    by_row = 2

    def __init__(self, hidden: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None = None):
        if hidden.shape[:-1] != scale.shape or weight.shape[1] != hidden.shape[-1]:
            raise ValueError("shapes disagree")
        super().__init__(hidden, scale, weight, bias)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.first.shape[:-1], len(self.parts[2])))

    def logits(self) -> Tensor:
        hidden, scale, weight, bias = self.parts
        logits = scale.unsqueeze(-1) * torch.tanh(hidden @ weight.T)
        return logits if bias is None else logits + bias


HEADS: dict[str, Callable[..., Head | Tensor]] = {
    "tensor": lambda logits: logits,
    "linear": LinearHead,
    "linear, bias": LinearHead,
    "linear, bias per position": LinearHead,
    "linear, capped": functools.partial(LinearHead, softcap=1.5),
    "logistic": lambda mu, log_scale: LogisticHead(mu, log_scale, BINS),
    "logistic, min": lambda mu, log_scale: LogisticHead(mu, log_scale, BINS, clamp="min"),
    "logistic, exact": lambda mu, log_scale: LogisticHead(mu, log_scale, BINS, eps=0.0),
    "user": Tanh,
    "user, no bias": Tanh,
}


def head_tensors(kind: str, leading: tuple[int, ...], vocabulary: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g, dtype=torch.float64)

    if kind == "tensor":
        return {"logits": 1.5 * normal(*leading, vocabulary)}
    if kind.startswith("logistic"):
        return {"mu": normal(*leading) / 2, "log_scale": 1 + normal(*leading) / 2}
    tensors = {"hidden": normal(*leading, WIDTH)}
    if kind.startswith("user"):
        tensors["scale"] = normal(*leading)
    tensors["weight"] = normal(vocabulary, WIDTH) / 2
    if kind in ("linear, bias", "user"):
        tensors["bias"] = normal(vocabulary)
    if kind in ("linear, bias per position", "linear, capped"):
        tensors["bias"] = normal(leading[-1], vocabulary)
    return tensors


def convert(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def single(problem: dict[str, Any]) -> dict[str, Any]:
    return {name: convert(value, torch.float32) for name, value in problem.items()}


def assert_within_bound(
    problem: dict[str, Any],
    backend: str,
    kind: str = "tensor",
    dtype: torch.dtype = torch.float32,
    tensors: dict[str, Tensor] | None = None,
    reduction: str = "mean",
    budget_bytes: int | None = None,
    scales: dict[str, float] | None = None,
) -> None:
    """Loss and every gradient of a backend are as good as those of eager PyTorch.

    With reduction "none" the examples have upstream gradients of both signs. `scales` multiply
    what is allowed beside eager's error, by name.
    """
    batch, components, positions, vocabulary = problem["student"].shape
    if tensors is None:
        tensors = head_tensors(kind, (batch, components, positions), vocabulary)
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    rest = {n: convert(v, torch.float32) for n, v in problem.items() if n != "student"}
    upstream = torch.arange(1.0, batch + 1) * torch.tensor([1.0, -1.0]).repeat(batch)[:batch]

    def run(how: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = {n: convert(t, dtype or t.dtype).clone() for n, t in rounded.items()}
        if "log_weights" in rest:
            leaves["log_weights"] = convert(rest["log_weights"], dtype or torch.float32).clone()
        for leaf in leaves.values():
            leaf.requires_grad_()
        head = HEADS[kind](*(leaves[name] for name in rounded))
        if budget_bytes is not None and isinstance(head, Head):
            head.budget_bytes = budget_bytes
        call = {n: convert(v, dtype or torch.float32) for n, v in rest.items()}
        call |= {"student": head} | {n: v for n, v in leaves.items() if n == "log_weights"}
        if how == "eager":
            if isinstance(head, Head):
                call["student"] = head.logits()
            value = naive_loss(call)
            value = value.mean() if reduction == "mean" else value
        else:
            value = run_loss(call, backend=how, reduction=reduction)
        (value if reduction == "mean" else (value * upstream.to(value.dtype)).sum()).backward()
        return {"loss": value.detach()} | {n: leaf.grad for n, leaf in leaves.items()}

    ours, eager = run(backend, None), run("eager", None)
    truth = run("reference", torch.float64)
    for name, value in ours.items():
        atol = ATOL[dtype if name in rounded else torch.float32]
        largest = 2 * ROUNDING * float(truth["loss"].abs().max())
        allowed = max(atol["loss"], largest) if name == "loss" else atol["gradient"]
        if name == "mu":  # the slopes of the bins, up to e^(2 - log_scale), times a rounded sum
            slopes = torch.exp(2.0 - tensors["log_scale"].double()).max()
            allowed = max(allowed, ROUNDING * float(slopes))
        if name == "log_weights":  # a small difference of terms as large as the loss
            allowed = max(allowed, largest)
        allowed *= (scales or {}).get(name, 1.0)
        assert_close_to_reference(
            value, eager[name], truth[name], atol=allowed, name=f"{kind}: {name}"
        )
