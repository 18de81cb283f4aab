"""Transition matrices of the Gaussian process, and draws from rows of them."""

from __future__ import annotations

import math

import pytest
import torch
from process_cases import SMALL, rng
from process_cases import VOCAB as V
from scipy import linalg, stats
from torch import Tensor

from di4c_fast.processes import GaussianProcess, transitions
from di4c_fast.processes.transitions import (
    GaussianTransitions,
    draw_by_weights,
    draw_from_cdf,
    fine_uniform,
)
from di4c_fast.testing import P_VALUE, assert_draws_match

# Rate and transition matrices


def literal_rate(classes: int, rate_sigma: float, target_sigma: float) -> Tensor:
    """Moves inwards first, then moves back by detailed balance, pair by pair."""
    weight = [
        math.exp(-((i - classes / 2) ** 2) / (2 * target_sigma**2)) for i in range(1, classes + 1)
    ]
    rate = torch.zeros(classes, classes, dtype=torch.float64)
    for low in range(classes):
        for high in range(low + 1, classes):
            size = math.exp(-((high - low - 1) ** 2) / rate_sigma**2)
            if low + high < classes:
                rate[low, high] = size
                rate[high, low] = size * weight[low] / weight[high]
            else:
                rate[high, low] = size
                rate[low, high] = size * weight[high] / weight[low]
    return rate - torch.diag(rate.sum(1))


@pytest.mark.parametrize("classes", [2, 5, 8, 17])
def test_rate_follows_its_definition_and_keeps_the_target(classes):
    made = GaussianTransitions(classes, rate_sigma=1.7, target_sigma=3.0)
    # Rates of size 1 and sums of at most 17 of them in float64: some ten roundings.
    torch.testing.assert_close(made.rate, literal_rate(classes, 1.7, 3.0), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(
        made.target @ made.rate, torch.zeros(classes, dtype=torch.float64), rtol=0, atol=1e-14
    )
    flow = made.target.unsqueeze(1) * made.rate
    torch.testing.assert_close(flow, flow.T, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("classes", "sigma"), [(2, 512.0), (5, 1.0), (17, 20.0), (256, 512.0)])
def test_transitions_match_the_matrix_exponential(classes, sigma):
    made = GaussianTransitions(classes, target_sigma=sigma)
    t = torch.tensor([1e-3, 0.01, 0.3, 1.0])
    ours = made.batched(0.0, t)
    truth = torch.stack(
        [
            torch.from_numpy(linalg.expm((made.rate * made.elapsed(torch.zeros(()), x)).numpy()))
            for x in t.unbind()
        ]
    )
    assert ours.dtype == torch.float64
    # Rounding of a few float64 products; torch.matrix_exp is off by 3e-11 at short times.
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-13)
    assert bool((ours >= 0).all())
    torch.testing.assert_close(ours.sum(-1), torch.ones(4, classes).double(), rtol=0, atol=1e-14)


def test_transitions_compose_over_time():
    made = GaussianTransitions(17, rate_sigma=1.0, target_sigma=10.0)
    s, t = torch.tensor([0.01, 0.2, 0.6]), torch.tensor([0.3, 0.2005, 1.0])
    two = made.batched(0.0, s) @ made.batched(s, t)
    torch.testing.assert_close(two, made.batched(0.0, t), rtol=0, atol=1e-13)


def test_no_time_means_no_move():
    t = torch.tensor([0.4])
    torch.testing.assert_close(
        SMALL.transitions.batched(t, t)[0], torch.eye(V).double(), rtol=0, atol=1e-14
    )


def test_columns_are_the_transpose():
    made, t = GaussianTransitions(17, target_sigma=4.0), torch.tensor([0.01, 0.7])
    columns = made.batched(0.0, t, columns=True)
    # The factors of a product change places: a few roundings of probabilities.
    assert columns.is_contiguous()
    torch.testing.assert_close(columns.mT, made.batched(0.0, t), rtol=0, atol=1e-15)


def test_short_times_keep_their_relative_accuracy():
    made = GaussianTransitions(17)
    t = torch.tensor(0.5, dtype=torch.float64)
    # The difference of the two times, 1e-9, has eight digits in float64, and no more.
    passed = made.elapsed(t - 1e-9, t)
    expected = made.time_base * 10.0 * math.log(100.0) * float(t - (t - 1e-9))
    assert float(passed) == pytest.approx(expected, rel=1e-8)


def test_matrices_between_two_numbers_are_made_once():
    made = GaussianTransitions(V)
    first = made.between(0.1, 0.3, dtype=torch.float32)
    assert made.between(0.1, 0.3, dtype=torch.float32) is first
    assert made.between(0.1, 0.3) is not first
    assert made.between(0.1, 0.3 + 1e-16 * 8) is not made.between(0.1, 0.3)
    batched = made.batched(torch.tensor([0.1]).double(), torch.tensor([0.3]).double())
    assert torch.equal(first, batched[0].float())


def test_cache_keeps_the_matrices_used_last(monkeypatch):
    monkeypatch.setattr(transitions, "_CACHE_BYTES", 2 * V * V * 8)
    made = GaussianTransitions(V)
    a, b = made.between(0.0, 0.1), made.between(0.0, 0.2)
    assert made.between(0.0, 0.1) is a
    made.between(0.0, 0.3)
    assert made.between(0.0, 0.1) is a
    assert made.between(0.0, 0.2) is not b


def test_matrices_made_in_inference_mode_serve_outside_of_it():
    made = GaussianTransitions(V)
    with torch.inference_mode():
        made.between(0.0, 0.5)
        made.batched(0.0, torch.tensor([0.5]))
    weight = torch.ones(V, dtype=torch.float64, requires_grad=True)
    (made.between(0.0, 0.5) @ weight).sum().backward()
    assert weight.grad is not None


def test_equal_processes_share_their_matrices():
    assert GaussianProcess(7).transitions is GaussianProcess(7, t_min=0.5).transitions
    assert GaussianProcess(7).transitions is not GaussianProcess(7, rate_sigma=1.0).transitions


# Draws from rows


def test_draws_by_weights_follow_them():
    weights = torch.tensor([[0.0, 3.0, 1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 1e-3]])
    u = fine_uniform(5, 0, torch.arange(2), 60_000)
    tokens = draw_by_weights(weights, u)
    for row, weight in zip(tokens, weights, strict=True):
        assert_draws_match(row, weight)


def test_classes_of_weight_zero_are_never_drawn_at_the_ends():
    weights = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0]])
    u = torch.tensor([[2.0**-53, 1.0 - 2.0**-53]], dtype=torch.float64)
    assert draw_by_weights(weights, u).tolist() == [[1, 3]]
    cdf = weights.double().cumsum(-1)
    drawn = draw_from_cdf(cdf, torch.zeros(2, dtype=torch.int64), u[0])
    assert drawn.tolist() == [1, 3]


@pytest.mark.parametrize("classes", [1, 2, 3, 8, 17])
def test_draws_from_a_table_are_those_of_a_copied_row(classes):
    weights = torch.rand(6, classes, generator=rng()) + 0.01
    rows = torch.randint(0, 6, (40, 9), generator=rng(1))
    u = fine_uniform(1, 0, torch.arange(40), 9)
    expected = draw_by_weights(weights[rows].flatten(0, 1), u.reshape(-1, 1)).view(rows.shape)
    assert torch.equal(draw_from_cdf(weights.double().cumsum(-1), rows, u), expected)


def test_fine_uniforms_depend_on_seed_step_key_and_column_alone():
    keys = torch.tensor([3, 9])
    u = fine_uniform(7, 2, keys, 5)
    assert u.dtype == torch.float64
    assert torch.equal(fine_uniform(7, 2, keys.flip(0), 3), u.flip(0)[:, :3])
    assert not bool((fine_uniform(8, 2, keys, 5) == u).any())
    assert not bool((fine_uniform(7, 3, keys, 5) == u).any())
    many = fine_uniform(0, 0, torch.arange(2000), 10)
    assert stats.kstest(many.flatten().numpy(), "uniform").pvalue > P_VALUE
