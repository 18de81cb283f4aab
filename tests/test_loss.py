"""The public loss: reductions, weights, terms, masks, token rows, extremes, backends.

Every test runs on the dense reference and on the torch backend.
"""

from __future__ import annotations

import itertools
import math
import textwrap

import pytest
import torch
from loss_cases import TERMS, TIGHT, loss_and_gradients, make_problem, naive_loss, run_loss
from loss_heads import FULL, convert
from torch import Tensor

import di4c_fast
from di4c_fast import LossTerms, backends

TERM_WEIGHTS = dict(TERMS)


def documented_code() -> str:
    """The block of the docstring under "Equivalent PyTorch"."""
    text = di4c_fast.loss.__doc__
    assert text is not None
    block = text.split("Equivalent PyTorch", 1)[1].split("\n\n", 1)[1].split("\n    Shapes:", 1)[0]
    return textwrap.dedent(block)


@pytest.mark.parametrize("components", [1, 4])
def test_loss_equals_the_code_in_its_docstring(backend, components):
    problem = make_problem(1, batch=1, components=components, draws=components)
    weights = {"data_weight": 0.7, "teacher_weight": 1.3, "consistency_weight": 0.4}
    scope = {"torch": torch, "math": math, "N": components, **problem, **weights}
    exec(documented_code(), scope)
    torch.testing.assert_close(run_loss(problem, backend=backend, **weights), scope["loss"])


@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
def test_token_rows_equal_the_code_in_the_docstring(backend, function):
    problem = make_problem(2, weighted=True)
    x = problem["consistency_x"]
    scope = {"student": problem["student"], "log_weights": problem["log_weights"], "x": x, "N": 3}
    text = di4c_fast.mixture_log_prob.__doc__
    assert text is not None
    block = text.split("without masks:\n\n", 1)[1].split("\n\n    Args", 1)[0]
    *lines, last = textwrap.dedent(block).splitlines()
    exec("\n".join([*lines, "expected = " + last]), scope)
    expected = scope["expected"]
    if function is di4c_fast.correlation:
        log_prob = problem["student"].log_softmax(-1)
        a = problem["log_weights"].log_softmax(-1)[:, :, None, None]
        expected = (a + log_prob).logsumexp(1).gather(-1, x.transpose(1, 2)).sum(1) - expected
    value = function(problem["student"], x, log_weights=problem["log_weights"], backend=backend)
    torch.testing.assert_close(value, expected, **TIGHT)


# Reductions, weights, terms


def test_sum_and_mean_reduce_the_losses_of_the_examples(backend):
    problem = make_problem(3, batch=4, **FULL)
    each, total, mean = (
        loss_and_gradients(problem, reduction=reduction, backend=backend)
        for reduction in ("none", "sum", "mean")
    )
    assert each["loss"].shape == (4,)
    torch.testing.assert_close(total["loss"], each["loss"].sum(), **TIGHT)
    torch.testing.assert_close(mean["loss"], each["loss"].mean(), **TIGHT)
    torch.testing.assert_close(run_loss(problem, backend=backend), mean["loss"], **TIGHT)
    for name in ("student", "log_weights"):
        torch.testing.assert_close(total[name], each[name], **TIGHT)
        torch.testing.assert_close(mean[name] * 4, each[name], **TIGHT)


def test_examples_are_independent_and_follow_their_own_upstream_gradient(backend):
    problem = make_problem(4, batch=3, **FULL)
    upstream = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    student = problem["student"].clone().requires_grad_()
    together = run_loss(problem | {"student": student}, reduction="none", backend=backend)
    together.backward(upstream)
    for b in range(3):
        alone = {n: v[b : b + 1] if isinstance(v, Tensor) else v for n, v in problem.items()}
        expected = loss_and_gradients(alone, backend=backend)
        torch.testing.assert_close(together[b].detach(), expected["loss"], **TIGHT)
        torch.testing.assert_close(student.grad[b], upstream[b] * expected["student"][0], **TIGHT)
    assert torch.count_nonzero(student.grad[2]) == 0


@pytest.mark.parametrize("control_variate", [True, False])
def test_terms_are_unweighted_detached_and_add_up_to_the_loss(backend, control_variate):
    weights = {
        "data_weight": torch.tensor([0.3, 2.0]),
        "teacher_weight": torch.tensor([1.0, 0.2]),
        "consistency_weight": torch.tensor([0.0, 0.8]),
        "component_weight": torch.tensor([3.0, 0.0]),
    }
    problem = make_problem(5, **FULL, control_variate=control_variate)
    problem["student"].requires_grad_()
    value, terms = run_loss(
        problem, reduction="none", return_terms=True, backend=backend, **weights
    )
    assert isinstance(terms, LossTerms)
    assert tuple(TERM_WEIGHTS) == LossTerms._fields
    for term in terms:
        assert term.shape == (2,)
        assert term.dtype == torch.float64
        assert not term.requires_grad
    total = sum(getattr(terms, term) * weights[w] for term, w in TERM_WEIGHTS.items())
    torch.testing.assert_close(value.detach(), total, **TIGHT)
    assert (terms.teacher_marginal > 0).all() == control_variate


@pytest.mark.parametrize("zero", [0.0, torch.zeros(2)], ids=["number", "tensor"])
def test_terms_are_computed_even_where_their_weight_is_zero(backend, zero):
    problem = make_problem(6, **FULL)
    _, expected = run_loss(problem, return_terms=True, backend=backend)
    weights = dict.fromkeys(TERM_WEIGHTS.values(), zero)
    value, terms = run_loss(problem, return_terms=True, backend=backend, **weights)
    assert value == 0
    torch.testing.assert_close(terms, expected, **TIGHT)


def test_terms_of_weight_zero_are_right_where_probabilities_underflow(backend):
    problem = make_problem(7, dtype=torch.float32, consistency_weight=0.0, teacher_weight=0.0)
    problem["student"][..., 0] -= 130.0
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    exact = {n: convert(v, torch.float64) for n, v in problem.items()}
    _, truth = run_loss(exact, return_terms=True, backend="reference")
    for ours, term in zip(terms, truth, strict=True):
        # Summands of 130 nats are rounded by 1e-5; probabilities that underflow lose half of them.
        torch.testing.assert_close(ours.double(), term, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(set(TERM_WEIGHTS.values())))
def test_weights_are_numbers_or_tensors(backend, name):
    problem = make_problem(8, **FULL)
    one, three, as_tensor, as_scalar = (
        loss_and_gradients(problem | {name: weight}, backend=backend)
        for weight in (1.0, 3.0, torch.tensor([3.0, 3.0]), torch.tensor(3))
    )
    torch.testing.assert_close(as_tensor, three, **TIGHT)
    torch.testing.assert_close(as_scalar, three, **TIGHT)
    assert not torch.equal(one["loss"], three["loss"])


@pytest.mark.parametrize("whole", [False, True], ids=["one component", "all components"])
@pytest.mark.parametrize("zero", [0.0, torch.zeros(2)], ids=["number", "tensor"])
def test_infinite_term_of_weight_zero_is_left_out(backend, zero, whole):
    # The student excludes class 1, which the teacher and the draws want.
    problem = make_problem(9, draws=None, weighted=True)
    problem["x0"] = torch.full_like(problem["x0"], 2)
    problem["student"][:, slice(None if whole else 1), :, 1] = float("-inf")
    value, terms = run_loss(
        problem, teacher_weight=zero, component_weight=zero, return_terms=True, backend=backend
    )
    assert terms.teacher_marginal.isinf().all() == whole
    assert terms.component.isinf().all()
    torch.testing.assert_close(value, terms.data_correlation.mean(), **TIGHT)
    gradients = loss_and_gradients(
        problem, teacher_weight=zero, component_weight=zero, backend=backend
    )
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert torch.count_nonzero(gradients["student"][:, 0, :, 1]) == 0


def test_without_control_variate_the_marginal_terms_drop_out(backend):
    problem = make_problem(10, **FULL, control_variate=False)
    value, terms = run_loss(problem, return_terms=True, reduction="none", backend=backend)
    assert torch.count_nonzero(terms.teacher_marginal) == 0
    assert torch.count_nonzero(terms.consistency_marginal) == 0
    masks = {"xt": problem["xt"], "mask_id": 3, "valid": problem["valid"]}
    likelihood = di4c_fast.mixture_log_prob(
        problem["student"], problem["x0"], log_weights=problem["log_weights"], **masks
    )
    torch.testing.assert_close(terms.data_correlation, -likelihood, **TIGHT)
    torch.testing.assert_close(value, naive_loss(problem), **TIGHT)


# Masks


def test_filled_and_padded_positions_have_exactly_zero_gradient(backend):
    problem = make_problem(11, **FULL)
    counted = (problem["xt"] == 3) & problem["valid"]
    rows = loss_and_gradients(problem, backend=backend)["student"].transpose(1, 2)  # (B, D, N, V)
    assert torch.count_nonzero(rows[~counted]) == 0
    assert torch.count_nonzero(rows[..., 3]) == 0
    assert (rows[counted].abs().sum((1, 2)) > 0).all()


def test_what_stands_at_positions_that_do_not_count_does_not_matter(backend):
    problem = make_problem(12, **FULL)
    counted = (problem["xt"] == 3) & problem["valid"]
    other = dict(problem)
    for name in ("student", "teacher", "consistency"):
        at = counted if name == "teacher" else counted.unsqueeze(1)
        junk = torch.full_like(problem[name], 1e30)
        other[name] = torch.where(at.unsqueeze(-1), problem[name], junk)
    other["x0"] = torch.where(counted, problem["x0"], 0).masked_fill(~problem["valid"], -100)
    other["xt"] = problem["xt"].masked_fill(~problem["valid"], -100)
    expected = loss_and_gradients(problem, backend=backend)
    torch.testing.assert_close(loss_and_gradients(other, backend=backend), expected, rtol=0, atol=0)
    masks = {name: other[name] for name in ("xt", "mask_id", "valid", "log_weights")}
    rows = di4c_fast.mixture_log_prob(problem["student"], other["x0"], backend=backend, **masks)
    assert torch.isfinite(rows).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "settings",
    [
        {"batch": 0},
        {"batch": 0, "mask_id": 3, "weighted": True},
        {"positions": 0},
    ],
    ids=["empty batch", "empty batch with masks", "no positions"],
)
def test_empty_batches_give_zero_and_empty_gradients(backend, settings, reduction):
    problem = make_problem(16, **settings, component_weight=1.0)
    size = len(problem["x0"])
    for drawn in (problem, problem | {"consistency_x": None}):
        result = loss_and_gradients(drawn, reduction=reduction, backend=backend)
        assert result["loss"].shape == ((size,) if reduction == "none" else ())
        assert torch.count_nonzero(result["loss"]) == 0
        assert result["student"].shape == problem["student"].shape


@pytest.mark.parametrize("control_variate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batch_without_an_active_position_gives_exactly_zero(backend, dtype, control_variate):
    problem = make_problem(17, **FULL, dtype=dtype, control_variate=control_variate)
    problem["valid"] = torch.zeros_like(problem["valid"])
    value, terms = run_loss(problem, return_terms=True, backend=backend)
    assert value == 0
    for term in terms:
        assert torch.count_nonzero(term) == 0
    for reduction in ("mean", "none"):
        gradients = loss_and_gradients(problem, reduction=reduction, backend=backend)
        assert torch.count_nonzero(gradients["student"]) == 0
        assert torch.count_nonzero(gradients["log_weights"]) == 0
    drawn = problem | {"consistency_x": None}
    assert run_loss(drawn, backend=backend) == 0


def test_one_example_without_an_active_position_is_zero_beside_others(backend):
    problem = make_problem(18, batch=3, **FULL)
    problem["valid"][1] = False
    each = run_loss(problem, reduction="none", backend=backend)
    assert each[1] == 0
    gradients = loss_and_gradients(problem, backend=backend)
    assert torch.count_nonzero(gradients["log_weights"][1]) == 0
    torch.testing.assert_close(each[[0, 2]], naive_loss(problem)[[0, 2]], **TIGHT)


@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
def test_token_rows_without_an_active_position_are_exactly_zero(backend, function):
    problem = make_problem(18, weighted=True, dtype=torch.float32)
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[0] = False
    a = problem["log_weights"].clone().requires_grad_()
    student = problem["student"].clone().requires_grad_()
    value = function(student, problem["consistency_x"], valid=valid, log_weights=a, backend=backend)
    assert torch.count_nonzero(value[0]) == 0
    assert torch.count_nonzero(value[1]) == 2
    value.sum().backward()
    assert torch.count_nonzero(student.grad[0]) == 0
    assert torch.count_nonzero(a.grad[0]) == 0


# Token rows


@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
def test_token_rows_come_one_or_many_per_example(backend, function):
    problem = make_problem(19, draws=3)
    many = problem["consistency_x"]
    student = problem["student"]
    value = function(student, many, backend=backend)
    assert value.shape == (2, 3)
    one = function(student, many[:, 1], backend=backend)
    assert one.shape == (2,)
    torch.testing.assert_close(one, value[:, 1], **TIGHT)
    assert function(student, many[:, :0], backend=backend).shape == (2, 0)


def test_impossible_rows_have_log_probability_minus_infinity(backend):
    problem = make_problem(20)
    x = problem["x0"]
    student = problem["student"].clone()
    student[0, :, 1, x[0, 1]] = float("-inf")
    student[1, 0, 1, x[1, 1]] = float("-inf")
    value = di4c_fast.mixture_log_prob(student, x, backend=backend)
    assert value[0] == float("-inf")
    assert torch.isfinite(value[1])


def test_token_rows_have_the_dtype_of_the_loss(backend):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        problem = make_problem(21, dtype=dtype)
        value = di4c_fast.correlation(problem["student"], problem["x0"], backend=backend)
        assert value.dtype == torch.promote_types(dtype, torch.float32)


# Extremes


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_very_large_logits_give_finite_losses_and_gradients(backend, size):
    problem = make_problem(44, dtype=torch.float32, mask_id=3, scale=1.0)
    for name in ("student", "teacher", "consistency"):
        problem[name] = problem[name] * size
    problem["teacher"] = problem["student"][:, 0]
    problem["consistency"] = problem["student"][:, :2]
    problem["x0"] = problem["student"][:, 0].index_fill(-1, torch.tensor(3), -math.inf).argmax(-1)
    problem["consistency_x"] = problem["x0"].unsqueeze(1).expand(-1, 2, -1)
    result = loss_and_gradients(problem, backend=backend)
    for value in result.values():
        assert torch.isfinite(value).all()


def test_certain_student_and_teacher_that_agree_have_loss_zero(backend):
    problem = make_problem(45, dtype=torch.float32, teacher_components=3)
    logits = torch.full_like(problem["student"], -math.inf)
    index = problem["x0"].view(2, 1, 5, 1).expand(-1, 3, -1, -1)
    logits.scatter_(-1, index, 7.0)
    problem |= {"student": logits, "teacher": logits, "consistency": logits[:, :2]}
    problem["consistency_x"] = problem["x0"].unsqueeze(1).expand(-1, 2, -1)
    result = loss_and_gradients(problem, component_weight=1.0, backend=backend)
    # Three thirds are one up to 1e-7, once per position.
    assert abs(result["loss"]) < 3e-6
    assert result["student"].abs().max() < 1e-6


def test_loss_has_a_minimum_where_the_student_is_the_teacher_mixture(backend):
    # Plain gradient descent on logits and log-weights from a random start, data drawn from a
    # mixture: the joint distribution is found, dependence included.
    truth = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)  # two equal bits
    rows = torch.tensor(list(itertools.product(range(2), repeat=2)))
    g = torch.Generator().manual_seed(0)
    student = torch.randn(1, 2, 2, 2, generator=g, dtype=torch.float64).requires_grad_()
    log_weights = torch.randn(1, 2, generator=g, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([student, log_weights], lr=0.1)
    for _ in range(150):
        optimiser.zero_grad()
        di4c_fast.loss(
            student.expand(4, -1, -1, -1),
            torch.zeros(4, 2, 2, dtype=torch.float64),
            rows,
            log_weights=log_weights.expand(4, -1),
            data_weight=truth.flatten(),
            teacher_weight=truth.flatten(),
            reduction="sum",
            backend=backend,
        ).backward()
        optimiser.step()
    joint = di4c_fast.mixture_log_prob(student, rows[None], log_weights=log_weights).exp()
    torch.testing.assert_close(joint.detach().view(2, 2), truth, rtol=0, atol=0.02)


# Backends


def test_auto_is_the_best_backend_that_runs_on_the_cpu():
    cpu = torch.device("cpu")
    found = backends.resolve("auto", cpu, torch.float32)
    assert found == ("torch" if backends.unavailable("cpu", cpu) else "cpu")
    assert backends.resolve("auto", cpu, torch.float64) == "torch"
