"""The reference loss: held by identities, and what it makes of the impossible.

In float64, unless rounding is the subject. The analytic gradient of the torch backend is held by
the same tests.
"""

from __future__ import annotations

import math

import pytest
import torch
from loss_cases import TIGHT, loss_and_gradients, make_problem, run_loss
from loss_heads import convert

import di4c_fast


def test_one_component_has_correlation_exactly_zero(backend):
    problem = make_problem(1, components=1, draws=3, dtype=torch.float32, scale=5.0)
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    assert torch.count_nonzero(terms.data_correlation) == 0
    assert torch.count_nonzero(terms.consistency_correlation) == 0
    rows = problem["consistency_x"]
    value = di4c_fast.correlation(problem["student"], rows, backend=backend)
    assert torch.count_nonzero(value) == 0


def test_equal_components_have_correlation_zero_and_no_correlation_gradient(backend):
    problem = make_problem(2, weighted=True, teacher_weight=0.0, consistency_weight=0.0)
    problem["student"] = problem["student"][:, :1].expand(-1, 5, -1, -1)
    problem["log_weights"] = torch.randn(2, 5, dtype=torch.float64)
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    _, *gradients = loss_and_gradients(problem, backend=backend).values()
    for value in (terms.data_correlation, terms.consistency_correlation, *gradients):
        torch.testing.assert_close(value, torch.zeros_like(value), **TIGHT)


def test_order_of_components_does_not_matter(backend):
    problem = make_problem(3, components=4, weighted=True, component_weight=0.5)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = problem | {
        "student": problem["student"][:, order],
        "log_weights": problem["log_weights"][:, order],
    }
    expected = loss_and_gradients(problem, backend=backend)
    actual = loss_and_gradients(shuffled, backend=backend)
    expected |= {name: expected[name][:, order] for name in ("student", "log_weights")}
    torch.testing.assert_close(actual, expected, **TIGHT)


def test_order_of_positions_does_not_matter(backend):
    problem = make_problem(3, mask_id=2, revealed=True, padded=True)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = dict(problem)
    for name in ("student", "teacher", "consistency"):
        shuffled[name] = problem[name][..., order, :]
    for name in ("x0", "xt", "valid", "consistency_x", "xu"):
        shuffled[name] = problem[name][..., order]
    expected = loss_and_gradients(problem, backend=backend)
    actual = loss_and_gradients(shuffled, backend=backend)
    torch.testing.assert_close(actual["loss"], expected["loss"], **TIGHT)
    torch.testing.assert_close(actual["student"], expected["student"][:, :, order], **TIGHT)


def test_student_equal_to_the_teacher_has_divergence_zero(backend):
    problem = make_problem(5, components=3, teacher_components=3, mask_id=4, component_weight=1.0)
    problem["student"] = problem["teacher"].clone()
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    zeros = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(terms.teacher_marginal, zeros, **TIGHT)
    assert (terms.component > 0.01).all()
    single = make_problem(5, components=1, draws=1, component_weight=1.0)
    single["student"] = single["teacher"].unsqueeze(1)
    single["consistency"] = single["student"]
    _, terms = run_loss(single, return_terms=True, backend=backend)
    for name in ("teacher_marginal", "component", "consistency_marginal"):
        torch.testing.assert_close(getattr(terms, name), zeros, **TIGHT)
    only_kl = {"data_weight": 0.0, "consistency_weight": 0.0}
    gradient = loss_and_gradients(single | only_kl, backend=backend)["student"]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), **TIGHT)


def test_divergences_are_not_negative(backend):
    problem = make_problem(6, batch=20, weighted=True, component_weight=1.0)
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    assert (terms.teacher_marginal >= 0).all()
    assert (terms.consistency_marginal >= 0).all()
    # Jensen: the marginal is at least as close to the teacher as its components on average.
    assert (terms.component >= terms.teacher_marginal).all()


def test_constant_added_to_log_weights_or_to_a_row_of_logits_changes_nothing(backend):
    problem = make_problem(7, weighted=True, component_weight=0.5)
    g = torch.Generator().manual_seed(0)
    shifted = problem | {
        "log_weights": problem["log_weights"] + torch.tensor([[3.0], [-200.0]]),
        "student": problem["student"] + 50 * torch.randn(2, 3, 5, 1, generator=g).double(),
    }
    expected = loss_and_gradients(problem, backend=backend)
    actual = loss_and_gradients(shifted, backend=backend)
    # Adding 200 to numbers of size 1 rounds them by 1e-14.
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    row_sums = actual["student"].sum(-1)
    torch.testing.assert_close(row_sums, torch.zeros_like(row_sums), **TIGHT)
    sums = actual["log_weights"].sum(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), **TIGHT)


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("impossible", [False, True], ids=["finite", "infinite-divergence"])
def test_component_of_weight_zero_is_as_good_as_absent(backend, impossible, control_variate):
    problem = make_problem(
        8, components=4, weighted=True, component_weight=0.5, control_variate=control_variate
    )
    problem["log_weights"][:, 2] = float("-inf")
    if impossible:
        problem["student"][:, 2, :, :3] = float("-inf")
    rest = torch.tensor([0, 1, 3])
    smaller = problem | {
        "student": problem["student"][:, rest],
        "log_weights": problem["log_weights"][:, rest],
    }
    expected = loss_and_gradients(smaller, backend=backend)
    actual = loss_and_gradients(problem, backend=backend)
    torch.testing.assert_close(actual["loss"], expected["loss"], **TIGHT)
    for name in ("student", "log_weights"):
        torch.testing.assert_close(actual[name][:, rest], expected[name], **TIGHT)
        assert torch.count_nonzero(actual[name][:, 2]) == 0


def test_component_split_in_two_halves_changes_nothing(backend):
    problem = make_problem(9, components=3, weighted=True, component_weight=0.5)
    a = problem["log_weights"]
    split = problem | {
        "student": problem["student"][:, [0, 1, 2, 2]],
        "log_weights": torch.cat([a[:, :2], (a[:, 2:] - math.log(2)).expand(-1, 2)], 1),
    }
    expected = loss_and_gradients(problem, backend=backend)
    actual = loss_and_gradients(split, backend=backend)
    torch.testing.assert_close(actual["loss"], expected["loss"], **TIGHT)
    merged = torch.cat([actual["student"][:, :2], actual["student"][:, 2:].sum(1, True)], 1)
    torch.testing.assert_close(merged, expected["student"], **TIGHT)


def test_revealed_positions_contribute_one_hot_targets(backend):
    # Draw 0 reveals class 2 at position 0, draw 1 hides it: q_u = (one-hot + softmax) / 2.
    problem = make_problem(10, batch=1, components=2, positions=1, vocabulary=4, mask_id=3)
    problem |= {"xt": torch.tensor([[3]]), "xu": torch.tensor([[[2], [3]]])}
    problem["consistency_x"] = torch.tensor([[[2], [0]]])
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    hidden = problem["consistency"][0, 1, 0, :3].softmax(-1)
    q = (torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) + hidden) / 2
    marginal = problem["student"][0, :, 0, :3].softmax(-1).mean(0)
    expected = (q * (q / marginal).log()).sum()
    torch.testing.assert_close(terms.consistency_marginal[0], expected, **TIGHT)


def test_position_without_an_allowed_class_counts_as_inactive(backend):
    problem = make_problem(11, weighted=True, component_weight=0.5)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[:, 2] = False
    problem["student"][:, :, 2] = float("-inf")
    expected = loss_and_gradients(problem | {"valid": valid}, backend=backend)
    actual = loss_and_gradients(problem, backend=backend)
    assert torch.isfinite(actual["loss"])
    torch.testing.assert_close(actual, expected, **TIGHT)


def test_impossible_target_is_infinite_without_and_left_out_with_control_variate(backend):
    problem = make_problem(12, batch=1, draws=None, teacher_weight=0.0)
    target = int(problem["x0"][0, 1])
    problem["student"][:, :, 1, target] = float("-inf")
    plain = loss_and_gradients(problem, control_variate=False, backend=backend)
    assert plain["loss"] == float("inf")
    controlled = loss_and_gradients(problem, backend=backend)
    valid = torch.ones(1, 5, dtype=torch.bool)
    valid[0, 1] = False
    expected = loss_and_gradients(problem | {"valid": valid}, backend=backend)
    torch.testing.assert_close(controlled, expected, **TIGHT)
    assert torch.isfinite(plain["student"]).all()


def test_class_excluded_by_the_student_and_wanted_by_the_teacher_is_infinitely_far(backend):
    problem = make_problem(13, batch=2, draws=None)
    problem["student"][0, :, 0, 1] = float("-inf")
    value, terms = run_loss(problem, reduction="none", return_terms=True, backend=backend)
    assert terms.teacher_marginal[0] == float("inf")
    assert value[0] == float("inf")
    assert torch.isfinite(value[1])


def test_reference_adds_up_columns_of_large_logits_without_losing_digits():
    # A common offset of 1e4 rounds fp32 logits by 5e-4. The loss of the rounded logits must not
    # carry a second error of that size: eager log_softmax has none.
    problem = make_problem(14, dtype=torch.float32)
    problem["student"] = problem["student"] + 1e4
    exact = {n: convert(v, torch.float64) for n, v in problem.items()}
    truth = run_loss(exact, backend="reference")
    # One rounding of a loss of 12 nats in fp32 is 1e-6.
    assert abs(run_loss(problem, backend="reference") - truth) < 1e-6
