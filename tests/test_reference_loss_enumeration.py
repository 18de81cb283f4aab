"""The reference loss: held by enumeration of all token rows, in float64.

The analytic gradient of the torch backend is held by the same tests.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from loss_cases import TIGHT
from torch import Tensor

import di4c_fast


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


def test_probabilities_of_all_rows_sum_to_one_and_match_the_table(backend, mixture):
    student, log_weights = mixture
    rows = all_rows(3, 3).expand(2, -1, -1)
    value = di4c_fast.mixture_log_prob(student, rows, log_weights=log_weights, backend=backend)
    torch.testing.assert_close(value.exp().sum(1), torch.ones(2, dtype=torch.float64), **TIGHT)
    for b in range(2):
        joint, _ = mixture_table(student[b], log_weights[b])
        torch.testing.assert_close(value[b].exp(), joint, **TIGHT)


def test_probabilities_of_all_rows_without_the_mask_sum_to_one_over_masked_positions(backend):
    g = torch.Generator().manual_seed(4)
    student = torch.randn(1, 3, 4, 4, generator=g, dtype=torch.float64)
    xt = torch.tensor([[2, 0, 2, 2]])  # position 1 is filled
    rows = all_rows(3, 3) + (all_rows(3, 3) >= 2).long()
    rows = torch.cat([rows[:, :1], torch.zeros(27, 1, dtype=torch.int64), rows[:, 1:]], 1)
    value = di4c_fast.mixture_log_prob(student, rows[None], xt=xt, mask_id=2, backend=backend)
    torch.testing.assert_close(value.exp().sum(), torch.tensor(1.0, dtype=torch.float64), **TIGHT)


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
def test_expected_gradient_vanishes_at_the_truth(backend, control_variate):
    g = torch.Generator().manual_seed(11)
    truth = 2 * torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    student = truth.clone().requires_grad_()
    expected_loss(student, truth, control_variate, backend).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), **TIGHT)
