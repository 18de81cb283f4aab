"""The reference loss: held by finite differences, by enumeration, by a plain loss, by identities.

Everything is in float64, where rounding leaves about 1e-15 of the largest summand; TIGHT is a
thousand times that for sums of a few dozen terms, and far below what any wrong factor makes.
The analytic gradient of the torch backend is held by the same tests.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from loss_cases import loss_and_gradients, make_problem, naive_loss, naive_terms, run_loss
from torch import Tensor

import di4c_fast
from di4c_fast import LinearHead, LogisticHead

BACKENDS = ("reference", "torch")
TIGHT = {"rtol": 1e-12, "atol": 1e-12}

PROBLEMS = {
    "plain": {},
    "one component": {"components": 1, "draws": 1},
    "no consistency": {"draws": None},
    "many components, few positions": {"components": 9, "positions": 2, "draws": 9},
    "teacher of three components": {"teacher_components": 3},
    "component weights": {"weighted": True, "component_weight": 0.4},
    "mask": {"mask_id": 6},
    "mask in the middle, revealed": {"mask_id": 3, "revealed": True, "weighted": True},
    "mask first, padded": {"mask_id": 0, "revealed": True, "padded": True},
    "padded, no mask": {"padded": True, "component_weight": 1.0},
    "no control variate": {
        "mask_id": 6,
        "revealed": True,
        "weighted": True,
        "control_variate": False,
        "component_weight": 0.3,
    },
    "weights per example": {
        "batch": 3,
        "mask_id": 2,
        "revealed": True,
        "weighted": True,
        "data_weight": torch.tensor([0.3, 0.0, 2.0]),
        "teacher_weight": torch.tensor([1.0, 0.5, 0.0]),
        "consistency_weight": torch.tensor([0.7, 1.0, 0.2]),
        "component_weight": torch.tensor([0.0, 3.0, 0.1]),
    },
}


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return make_problem(seed=len(request.param), **PROBLEMS[request.param])


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_equals_the_plain_loss_on_positions_and_classes_cut_out(problem, backend):
    value = run_loss(problem, reduction="none", backend=backend)
    torch.testing.assert_close(value, naive_loss(problem), **TIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_equal_the_plain_terms(problem, backend):
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    for example in range(len(problem["x0"])):
        for name, expected in naive_terms(problem, example).items():
            actual = getattr(terms, name)[example]
            torch.testing.assert_close(actual, expected, **TIGHT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_autograd_through_the_plain_loss(problem, backend):
    actual = loss_and_gradients(problem, reduction="sum", backend=backend)
    leaves = {
        name: problem[name].clone().requires_grad_()
        for name in ("student", "log_weights")
        if name in problem
    }
    naive_loss(problem | leaves).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(actual[name], leaf.grad, **TIGHT)


# Finite differences


def tiny(**settings) -> dict:
    sizes = {"batch": 2, "components": 2, "positions": 3, "vocabulary": 4, "scale": 1.0}
    return make_problem(5, **(sizes | settings))


CHECKED = {
    "everything": {
        "mask_id": 1,
        "revealed": True,
        "weighted": True,
        "component_weight": torch.tensor([0.5, 0.2]),
        "data_weight": torch.tensor([0.3, 1.5]),
    },
    "padded": {"padded": True, "weighted": True, "teacher_components": 2},
    "no control variate": {
        "mask_id": 3,
        "revealed": True,
        "weighted": True,
        "control_variate": False,
        "component_weight": 0.7,
    },
}


@pytest.mark.parametrize("excluded", [False, True], ids=["all-finite", "minus-inf-columns"])
@pytest.mark.parametrize("case", CHECKED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences(backend, case, excluded):
    problem = tiny(**CHECKED[case])
    student = problem["student"].clone().requires_grad_()
    log_weights = problem["log_weights"].clone().requires_grad_()
    columns = torch.zeros_like(student, dtype=torch.bool)
    if excluded:
        # One class that no component allows, one that a single component excludes; the targets
        # and the teacher stay away from the first, so that the loss is finite.
        gone, partly = (2, 0) if problem.get("mask_id") != 2 else (3, 0)
        columns[..., gone] = True
        columns[:, 0, :, partly] = True
        for name in ("x0", "consistency_x", "xu"):
            if name in problem:
                problem[name] = torch.where(problem[name] == gone, partly, problem[name])
        for name in ("teacher", "consistency"):
            problem[name] = problem[name].clone()
            problem[name][..., gone] = float("-inf")
        if problem.get("component_weight", 0.0) is not None:
            problem["teacher"][..., partly] = float("-inf")

    def function(student: Tensor, log_weights: Tensor) -> Tensor:
        masked = student.masked_fill(columns, float("-inf"))
        return run_loss(
            problem | {"student": masked, "log_weights": log_weights},
            reduction="none",
            backend=backend,
        )

    assert torch.isfinite(function(student, log_weights)).all()
    assert torch.autograd.gradcheck(function, (student, log_weights))


@pytest.mark.parametrize("bias_shape", [None, (4,), (3, 4)], ids=["no-bias", "V", "DV"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_head_gradients_equal_finite_differences(backend, bias_shape):
    problem = tiny(mask_id=2, revealed=True)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 2, 3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, generator=g, dtype=torch.float64, requires_grad=True)
    inputs = [hidden, weight]
    if bias_shape is not None:
        inputs.append(torch.randn(bias_shape, generator=g, dtype=torch.float64).requires_grad_())

    def function(*tensors: Tensor) -> Tensor:
        return run_loss(
            problem | {"student": LinearHead(*tensors), "component_weight": 0.5}, backend=backend
        )

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("clamp", ["left", "min"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logistic_head_gradients_equal_finite_differences(backend, clamp):
    problem = tiny(mask_id=None)
    g = torch.Generator().manual_seed(0)
    mu = (torch.rand(2, 2, 3, generator=g, dtype=torch.float64) - 0.5).requires_grad_()
    log_scale = torch.randn(2, 2, 3, generator=g, dtype=torch.float64).requires_grad_()

    def function(mu: Tensor, log_scale: Tensor) -> Tensor:
        head = LogisticHead(mu, log_scale, 4, clamp=clamp)
        return run_loss(problem | {"student": head, "component_weight": 0.5}, backend=backend)

    assert torch.autograd.gradcheck(function, (mu, log_scale))


@pytest.mark.parametrize("score", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_row_gradients_equal_finite_differences(backend, score):
    problem = tiny(mask_id=1, weighted=True)
    rows = problem["consistency_x"]

    def function(student: Tensor, log_weights: Tensor) -> Tensor:
        masks = {"xt": problem["xt"], "mask_id": 1, "backend": backend}
        return score(student, rows, log_weights=log_weights, **masks)

    student, log_weights = problem["student"], problem["log_weights"]
    assert torch.autograd.gradcheck(
        function, (student.clone().requires_grad_(), log_weights.clone().requires_grad_())
    )


# Enumeration of all token rows


def all_rows(positions: int, vocabulary: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(vocabulary), repeat=positions)))


def mixture_table(student: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Probability of every row of all_rows, and the product of its marginals, one example."""
    prob = student.softmax(-1)  # [N, D, V]
    weights = log_weights.softmax(-1)
    positions = prob.shape[1]
    letters = "abcdefgh"[:positions]
    formula = ",".join(["n", *("n" + c for c in letters)]) + "->" + letters
    joint = torch.einsum(formula, weights, *prob.unbind(1)).flatten()
    marginals = torch.einsum("n,ndv->dv", weights, prob)
    product = torch.einsum(",".join(letters) + "->" + letters, *marginals.unbind(0)).flatten()
    return joint, product


@pytest.fixture(params=[False, True], ids=["all-classes", "minus-inf-columns"])
def mixture(request):
    """Student (2, 3, 3, 3) and log-weights (2, 3) for enumeration."""
    g = torch.Generator().manual_seed(2)
    student = 2 * torch.randn(2, 3, 3, 3, generator=g, dtype=torch.float64)
    if request.param:
        student[:, :, 0, 2] = float("-inf")
        student[0, 1, 1, 0] = float("-inf")
    return student, torch.randn(2, 3, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_of_all_rows_sum_to_one_and_match_the_table(backend, mixture):
    student, log_weights = mixture
    rows = all_rows(3, 3).expand(2, -1, -1)
    value = di4c_fast.mixture_log_prob(student, rows, log_weights=log_weights, backend=backend)
    torch.testing.assert_close(value.exp().sum(1), torch.ones(2, dtype=torch.float64), **TIGHT)
    for b in range(2):
        joint, _ = mixture_table(student[b], log_weights[b])
        torch.testing.assert_close(value[b].exp(), joint, **TIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_of_all_rows_without_the_mask_sum_to_one_over_masked_positions(backend):
    g = torch.Generator().manual_seed(4)
    student = torch.randn(1, 3, 4, 4, generator=g, dtype=torch.float64)
    xt = torch.tensor([[2, 0, 2, 2]])  # position 1 is filled
    rows = all_rows(3, 3) + (all_rows(3, 3) >= 2).long()
    rows = torch.cat([rows[:, :1], torch.zeros(27, 1, dtype=torch.int64), rows[:, 1:]], 1)
    value = di4c_fast.mixture_log_prob(student, rows[None], xt=xt, mask_id=2, backend=backend)
    torch.testing.assert_close(value.exp().sum(), torch.tensor(1.0, dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expected_correlation_is_minus_the_total_correlation(backend, mixture):
    student, log_weights = mixture
    rows = all_rows(3, 3).expand(2, -1, -1)
    value = di4c_fast.correlation(student, rows, log_weights=log_weights, backend=backend)
    for b in range(2):
        joint, product = mixture_table(student[b], log_weights[b])
        possible = joint > 0
        torch.testing.assert_close(value[b][possible], (product / joint)[possible].log(), **TIGHT)
        expected = (joint[possible] * value[b][possible]).sum()
        total_correlation = (
            torch.xlogy(joint, joint)[possible].sum() - torch.xlogy(joint, product)[possible].sum()
        )
        torch.testing.assert_close(expected, -total_correlation, **TIGHT)
        assert expected < -1e-3  # the components of the example differ


def expected_loss(student: Tensor, truth: Tensor, control_variate: bool, backend: str) -> Tensor:
    """Expectation of the loss over x0 and the draws from a uniform mixture `truth` (N, D, V)."""
    uniform = torch.zeros(truth.shape[0], dtype=truth.dtype)
    probability, _ = mixture_table(truth, uniform)
    rows = all_rows(*truth.shape[1:])
    count = len(rows)
    value = di4c_fast.loss(
        student.expand(count, *student.shape),
        truth.expand(count, *truth.shape),
        rows,
        data_weight=probability,
        teacher_weight=probability,
        control_variate=control_variate,
        reduction="sum",
        backend=backend,
    )
    return value


@pytest.mark.parametrize("backend", BACKENDS)
def test_expected_loss_is_the_divergence_of_the_joints_up_to_constants(backend):
    # Without control variate E[-log p(x)] = KL(q || p) + H(q). With it, the marginal terms turn
    # this into KL(q || p) - TC(q), TC the total correlation of the truth q.
    g = torch.Generator().manual_seed(9)
    student = torch.randn(4, 3, 3, generator=g, dtype=torch.float64)
    truth = 2 * torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    q, q_product = mixture_table(truth, torch.zeros(2, dtype=torch.float64))
    p, _ = mixture_table(student, torch.zeros(4, dtype=torch.float64))
    divergence = (q * (q / p).log()).sum()
    entropy = -(q * q.log()).sum()
    total_correlation = (q * (q / q_product).log()).sum()
    plain = expected_loss(student, truth, False, backend)
    controlled = expected_loss(student, truth, True, backend)
    torch.testing.assert_close(plain, divergence + entropy, **TIGHT)
    torch.testing.assert_close(controlled, divergence - total_correlation, **TIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_control_variate_leaves_the_expected_gradient_alone(backend):
    g = torch.Generator().manual_seed(10)
    student = torch.randn(4, 3, 3, generator=g, dtype=torch.float64)
    truth = 2 * torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    gradients = []
    for control_variate in (False, True):
        leaf = student.clone().requires_grad_()
        expected_loss(leaf, truth, control_variate, backend).backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], **TIGHT)


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_expected_gradient_vanishes_at_the_truth(backend, control_variate):
    g = torch.Generator().manual_seed(11)
    truth = 2 * torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    student = truth.clone().requires_grad_()
    expected_loss(student, truth, control_variate, backend).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), **TIGHT)


# Identities


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_component_has_correlation_exactly_zero(backend):
    problem = make_problem(1, components=1, draws=3, dtype=torch.float32, scale=5.0)
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    assert torch.count_nonzero(terms.data_correlation) == 0
    assert torch.count_nonzero(terms.consistency_correlation) == 0
    rows = problem["consistency_x"]
    value = di4c_fast.correlation(problem["student"], rows, backend=backend)
    assert torch.count_nonzero(value) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_components_have_correlation_zero_and_no_correlation_gradient(backend):
    problem = make_problem(2, weighted=True, teacher_weight=0.0, consistency_weight=0.0)
    problem["student"] = problem["student"][:, :1].expand(-1, 5, -1, -1)
    problem["log_weights"] = torch.randn(2, 5, dtype=torch.float64)
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    zeros = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(terms.data_correlation, zeros, **TIGHT)
    torch.testing.assert_close(terms.consistency_correlation, zeros, **TIGHT)
    gradients = loss_and_gradients(problem, backend=backend)
    for name in ("student", "log_weights"):
        torch.testing.assert_close(gradients[name], torch.zeros_like(gradients[name]), **TIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_components_does_not_matter(backend):
    problem = make_problem(3, components=4, weighted=True, component_weight=0.5)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = problem | {
        "student": problem["student"][:, order],
        "log_weights": problem["log_weights"][:, order],
    }
    expected = loss_and_gradients(problem, backend=backend)
    actual = loss_and_gradients(shuffled, backend=backend)
    torch.testing.assert_close(actual["loss"], expected["loss"], **TIGHT)
    for name in ("student", "log_weights"):
        torch.testing.assert_close(actual[name], expected[name][:, order], **TIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_examples_of_a_batch_are_independent(backend):
    problem = make_problem(4, batch=3, mask_id=1, revealed=True, padded=True, weighted=True)
    together = run_loss(problem, reduction="none", backend=backend)
    for b in range(3):
        alone = {
            name: value[b : b + 1] if isinstance(value, Tensor) else value
            for name, value in problem.items()
        }
        torch.testing.assert_close(
            run_loss(alone, reduction="none", backend=backend), together[b : b + 1], **TIGHT
        )


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_divergences_are_not_negative(backend):
    problem = make_problem(6, batch=20, weighted=True, component_weight=1.0)
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    assert (terms.teacher_marginal >= 0).all()
    assert (terms.consistency_marginal >= 0).all()
    # Jensen: the marginal is at least as close to the teacher as its components on average.
    assert (terms.component >= terms.teacher_marginal).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_added_to_log_weights_or_to_a_row_of_logits_changes_nothing(backend):
    problem = make_problem(7, weighted=True, component_weight=0.5)
    g = torch.Generator().manual_seed(0)
    shifted = problem | {
        "log_weights": problem["log_weights"] + torch.tensor([[3.0], [-200.0]]),
        "student": problem["student"] + 50 * torch.randn(2, 3, 5, 1, generator=g).double(),
    }
    expected = loss_and_gradients(problem, backend=backend)
    actual = loss_and_gradients(shifted, backend=backend)
    for name, value in expected.items():
        # Adding 200 to numbers of size 1 rounds them by 1e-14.
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-11)
    row_sums = actual["student"].sum(-1)
    torch.testing.assert_close(row_sums, torch.zeros_like(row_sums), **TIGHT)
    sums = actual["log_weights"].sum(-1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), **TIGHT)


@pytest.mark.parametrize("control_variate", [False, True])
@pytest.mark.parametrize("impossible", [False, True], ids=["finite", "infinite-divergence"])
@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_position_without_an_allowed_class_counts_as_inactive(backend):
    problem = make_problem(11, weighted=True, component_weight=0.5)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[:, 2] = False
    problem["student"][:, :, 2] = float("-inf")
    expected = loss_and_gradients(problem | {"valid": valid}, backend=backend)
    actual = loss_and_gradients(problem, backend=backend)
    assert torch.isfinite(actual["loss"])
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **TIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
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
    torch.testing.assert_close(controlled["loss"], expected["loss"], **TIGHT)
    torch.testing.assert_close(controlled["student"], expected["student"], **TIGHT)
    assert torch.isfinite(plain["student"]).all()


@pytest.mark.parametrize("backend", BACKENDS)
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
    truth = run_loss(
        {n: v.double() if v.is_floating_point() else v for n, v in problem.items()},
        backend="reference",
    )
    assert abs(run_loss(problem, backend="reference") - truth) < 1e-6


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_infinite_component_term_of_weight_zero_leaves_gradients_finite(backend):
    student = torch.randn(
        1, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    student[0, 0, 1, 2] = float("-inf")  # the teacher wants what component 0 cannot give
    student.requires_grad_()
    log_weights = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    value, terms = di4c_fast.loss(
        student,
        torch.zeros(1, 3, 4, dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.int64),
        log_weights=log_weights,
        component_weight=0.0,
        backend=backend,
        return_terms=True,
    )
    value.backward()
    assert torch.isinf(terms.component).all()
    assert torch.isfinite(value)
    assert torch.isfinite(student.grad).all()
    assert torch.isfinite(log_weights.grad).all()
