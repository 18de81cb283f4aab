"""Logistic heads of the loss, whose bins the passes compute from two numbers per row."""

from __future__ import annotations

import pytest
import torch
from loss_cases import make_problem, run_loss
from loss_heads import CLOSE, FAST, FULL, assert_within_bound, head_tensors, single
from torch import Tensor

import di4c_fast
from di4c_fast import LogisticHead


@pytest.mark.parametrize("backend", FAST)
def test_strided_logistic_heads(backend):
    g = torch.Generator().manual_seed(0)
    problem = single(make_problem(20, batch=2, components=3, vocabulary=8, draws=None))
    base = torch.randn(2, 5, 3, 2, generator=g)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaf = base.to(dtype).clone().requires_grad_()
        mu, log_scale = leaf.unbind(-1)
        head = LogisticHead(mu.transpose(1, 2), 1 + log_scale.transpose(1, 2), 8)
        value = run_loss(problem | {"student": head}, backend=backend)
        value.backward()
        return [value.detach().double(), leaf.grad.double()]

    for actual, expected in zip(
        run(backend, torch.float32), run("reference", torch.float64), strict=True
    ):
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["logistic", "logistic, min", "logistic, exact"])
@pytest.mark.parametrize(("components", "narrower"), [(3, 3.0), (3, 5.0), (35, 4.0)])
def test_narrow_bins_are_within_the_bound(components, narrower, kind, backend):
    # e^-l passes the range of a float; from a width of 87 on e^-w does so, too. The gradient of mu
    # is e^(2 - log_scale), here up to 1000, times a sum that rounds to 1e-7.
    problem = make_problem(24, components=components, vocabulary=8, **FULL)
    tensors = head_tensors(kind, problem["student"].shape[:3], 8)
    tensors["log_scale"] -= narrower
    assert_within_bound(problem, backend, kind, tensors=tensors, scales={"mu": 1e3})


@pytest.mark.parametrize("backend", FAST)
def test_small_bins_of_two_components_add_up(backend):
    # Their exponentials, e^-61 and e^-60, are numbers of fp32; e^-l is none, of which e^-r is made.
    mu, log_scale = torch.tensor([[-0.6259, -0.4069], [-3.507, -2.8533]]).view(2, 1, 2, 1)
    teacher = torch.full((1, 1, 16), -3e3)
    teacher[..., 0] = 0.0

    def divergence(backend: str, dtype: torch.dtype) -> Tensor:
        head = LogisticHead(mu.to(dtype), log_scale.to(dtype), 16)
        problem = {"student": head, "teacher": teacher.to(dtype), "x0": torch.tensor([[2]])}
        return run_loss(problem, backend=backend, return_terms=True)[1].teacher_marginal

    truth = divergence("reference", torch.float64)
    # Distances of 92 and 61 from the edges, and the constants of the rows, round to 2^-24 each.
    torch.testing.assert_close(
        divergence(backend, torch.float32).double(), truth, rtol=0.0, atol=92 * 2.0**-22
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("clamp", ["left", "min"])
def test_all_heads_may_be_bins(clamp, backend):
    problem = make_problem(25, components=3, teacher_components=2, vocabulary=8, **FULL)
    numbers = {
        name: head_tensors("logistic", problem[name].shape[:-1], 8)
        for name in ("student", "teacher", "consistency")
    }

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        call = problem if dtype == torch.float64 else single(problem)
        leaves = [t.to(dtype).requires_grad_() for t in numbers["student"].values()]
        heads = {
            name: LogisticHead(*(t.detach().to(dtype) for t in pair.values()), 8, clamp=clamp)
            for name, pair in numbers.items()
        }
        heads["student"] = LogisticHead(*leaves, 8, clamp=clamp)
        value = run_loss(call | heads, backend=backend)
        value.backward()
        return [value.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    for actual, expected in zip(
        run(backend, torch.float32), run("reference", torch.float64), strict=True
    ):
        torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("clamp", ["left", "min"])
@pytest.mark.parametrize("mu", [-27.0, 0.3, 27.0])
def test_exact_bins_are_finite_and_accurate_far_from_their_mean(backend, clamp, mu):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(8, (1, 3), generator=g)
    base = mu + torch.rand(1, 2, 3, generator=g)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [base.to(dtype).clone().requires_grad_(), torch.ones(1, 2, 3, dtype=dtype)]
        leaves[1].requires_grad_()
        head = LogisticHead(*leaves, 8, eps=0.0, clamp=clamp)
        value = di4c_fast.mixture_log_prob(head, x, backend=backend)
        value.sum().backward()
        return [value.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    ours, truth = run(backend, torch.float32), run("reference", torch.float64)
    eager = run("reference", torch.float32)
    for actual, expected, other in zip(ours, truth, eager, strict=True):
        assert torch.isfinite(actual).all()
        # Logits near 60 round to 4e-6; their differences decide the gradient.
        bound = 2 * (other - expected).abs().max() + 2e-5 * expected.abs().max() + 5e-6
        assert (actual - expected).abs().max() <= bound
