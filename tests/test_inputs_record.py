"""What right arguments of the loss become: the record that every backend receives."""

from __future__ import annotations

import math

import pytest
import torch
from input_cases import B, D, K, N, V, right
from loss_cases import make_problem

from di4c_fast.loss.problem import prepare_inputs, prepare_log_weights
from di4c_fast.rng import draw_seed


def record(problem: dict, **settings):
    defaults = dict.fromkeys(("consistency", "consistency_x", "xt", "xu", "mask_id", "valid"))
    defaults |= {"log_weights": None, "generator": None, "control_variate": True}
    defaults |= {"return_terms": False, "component_weight": 0.0}
    defaults |= dict.fromkeys(("data_weight", "teacher_weight", "consistency_weight"), 1.0)
    arguments = defaults | problem | settings
    return prepare_inputs(
        arguments.pop("student"), arguments.pop("teacher"), arguments.pop("x0"), **arguments
    )


def test_record_replaces_its_tensors_in_the_order_it_lists_them():
    inputs = record(right(consistency_x=None))
    tensors = inputs.tensors()
    again = inputs.with_tensors(tensors)
    assert all(a is b for a, b in zip(again.tensors(), tensors, strict=True))
    doubled = inputs.with_tensors([None if t is None else t + t for t in tensors])
    assert torch.equal(doubled.student.logits(), 2 * inputs.student.logits())
    assert torch.equal(doubled.log_weights, 2 * inputs.log_weights)
    assert torch.equal(doubled.x0, 2 * inputs.x0)
    assert doubled.mask_id == inputs.mask_id


def test_record_knows_its_sizes_and_which_weights_are_the_number_zero():
    inputs = record(right(), data_weight=0, teacher_weight=torch.zeros(B))
    assert (inputs.batch, inputs.components, inputs.positions, inputs.vocabulary) == (B, N, D, V)
    assert (inputs.draws, inputs.teacher_components) == (K, 1)
    assert inputs.static_zero == {"data_weight", "component_weight"}
    assert record(make_problem(teacher_components=4)).teacher_components == 4
    assert record(make_problem(draws=None)).draws == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arithmetic_is_in_float32_unless_the_student_is_in_float64(dtype):
    inputs = record(make_problem(dtype=dtype, weighted=True))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert inputs.dtype == inputs.log_weights.dtype == inputs.data_weight.dtype == expected


def test_log_weights_are_normalised_and_uniform_by_default():
    student = record(make_problem(dtype=torch.float32)).student
    given = torch.tensor([[1.0, 2.0, -math.inf], [0.0, 0.0, 0.0]])
    normalised = prepare_log_weights(given, student)
    torch.testing.assert_close(normalised.exp().sum(1), torch.ones(B))
    assert normalised[0, 2] == -math.inf
    torch.testing.assert_close(prepare_log_weights(None, student), normalised[1:].expand(B, N))


def test_teacher_and_consistency_are_cut_off_from_the_graph():
    problem = right()
    for name in ("teacher", "consistency"):
        problem[name] = problem[name].clone().requires_grad_()
    inputs = record(problem)
    assert not inputs.teacher.requires_grad
    assert inputs.consistency is not None
    assert not inputs.consistency.requires_grad


def test_seed_comes_from_the_generator_or_the_default_one():
    device = torch.device("cpu")
    generator = torch.Generator().manual_seed(3)
    first, second = draw_seed(generator, device), draw_seed(generator, device)
    assert first != second
    assert first == draw_seed(torch.Generator().manual_seed(3), device)
    torch.manual_seed(5)
    default = draw_seed(None, device)
    torch.manual_seed(5)
    assert default == draw_seed(None, device)
    assert default.dtype == torch.int64
    assert default.shape == ()
