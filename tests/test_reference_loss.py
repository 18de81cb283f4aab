"""The reference loss: held by a plain loss and by finite differences, in float64.

The analytic gradient of the torch backend is held by the same tests.
"""

from __future__ import annotations

import pytest
import torch
from loss_cases import (
    TIGHT,
    loss_and_gradients,
    make_problem,
    naive_loss,
    naive_terms,
    run_loss,
)
from loss_heads import BINS, HEADS, head_tensors
from torch import Tensor

import di4c_fast

BOTH = {"revealed": True, "weighted": True}
PROBLEMS = {
    "plain": {},
    "one component": {"components": 1, "draws": 1},
    "no consistency": {"draws": None},
    "many components, few positions": {"components": 9, "positions": 2, "draws": 9},
    "teacher of three components": {"teacher_components": 3},
    "component weights": {"weighted": True, "component_weight": 0.4},
    "mask": {"mask_id": 6},
    "mask in the middle, revealed": {"mask_id": 3, **BOTH},
    "mask first, padded": {"mask_id": 0, "revealed": True, "padded": True},
    "mask, all positions count": {"mask_id": 3, "xt": None},
    "padded, no mask": {"padded": True, "component_weight": 1.0},
    "no control variate": {"mask_id": 6, **BOTH, "control_variate": False, "component_weight": 0.3},
    "weights per example": {
        "batch": 3,
        "mask_id": 2,
        **BOTH,
        "data_weight": torch.tensor([0.3, 0.0, 2.0]),
        "teacher_weight": torch.tensor([1.0, 0.5, 0.0]),
        "consistency_weight": torch.tensor([0.7, 1.0, 0.2]),
        "component_weight": torch.tensor([0.0, 3.0, 0.1]),
    },
}


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return make_problem(seed=len(request.param), **PROBLEMS[request.param])


def test_loss_equals_the_plain_loss_on_positions_and_classes_cut_out(problem, backend):
    value = run_loss(problem, reduction="none", backend=backend)
    torch.testing.assert_close(value, naive_loss(problem), **TIGHT)


def test_terms_equal_the_plain_terms(problem, backend):
    _, terms = run_loss(problem, return_terms=True, backend=backend)
    for example in range(len(problem["x0"])):
        for name, expected in naive_terms(problem, example).items():
            actual = getattr(terms, name)[example]
            torch.testing.assert_close(actual, expected, **TIGHT, msg=lambda m, n=name: f"{n}: {m}")


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
        **BOTH,
        "component_weight": torch.tensor([0.5, 0.2]),
        "data_weight": torch.tensor([0.3, 1.5]),
    },
    "padded": {"padded": True, "weighted": True, "teacher_components": 2},
    "no control variate": {"mask_id": 3, **BOTH, "control_variate": False, "component_weight": 0.7},
}


@pytest.mark.parametrize("excluded", [False, True], ids=["all-finite", "minus-inf-columns"])
@pytest.mark.parametrize("case", CHECKED)
def test_gradients_equal_finite_differences(backend, case, excluded):
    problem = tiny(**CHECKED[case])
    student = problem["student"].clone().requires_grad_()
    log_weights = problem["log_weights"].clone().requires_grad_()
    columns = torch.zeros_like(student, dtype=torch.bool)
    if excluded:
        # One class that no component allows, one that a single component excludes; the targets
        # and the teacher stay away from the first, so that the loss is finite.
        gone, partly = 2, 0
        columns[..., gone] = True
        columns[:, 0, :, partly] = True
        for name in ("x0", "consistency_x", "xu"):
            if name in problem:
                problem[name] = torch.where(problem[name] == gone, partly, problem[name])
        for name in ("teacher", "consistency"):
            problem[name] = problem[name].clone()
            problem[name][..., gone] = float("-inf")
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


@pytest.mark.parametrize("kind", [kind for kind in HEADS if kind != "tensor"])
def test_head_gradients_equal_finite_differences(backend, kind):
    masks = {} if kind.startswith("logistic") else {"mask_id": 2, "revealed": True}
    problem = tiny(vocabulary=BINS, component_weight=0.5, **masks)
    inputs = [t.requires_grad_() for t in head_tensors(kind, (2, 2, 3), BINS).values()]

    def function(*tensors: Tensor) -> Tensor:
        return run_loss(problem | {"student": HEADS[kind](*tensors)}, backend=backend)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("score", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
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
