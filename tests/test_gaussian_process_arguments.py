"""Wrong arguments of the Gaussian process are named, with what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_cases import SMALL, V

from di4c_fast.processes import GaussianProcess


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"rate_sigma": 0.0}, "rate_sigma must be greater than 0, got 0.0"),
        ({"rate_sigma": math.nan}, "rate_sigma must be finite, got nan"),
        ({"target_sigma": -1.0}, "target_sigma must be greater than 0, got -1.0"),
        ({"target_sigma": 20.0}, r"target_sigma must be at least num_classes / 12 = 21.33"),
        ({"time_base": 0.0}, "time_base must be greater than 0, got 0.0"),
        ({"time_exponential": 1.0}, "time_exponential must be greater than 1, got 1.0"),
        ({"t_min": 0.0}, r"t_min must be in \(0, 1\), got 0.0"),
        ({"min_step": 1.0}, r"min_step must be in \(0, 1\), got 1.0"),
        ({"t_min": 0.5, "min_step": 0.5}, "t_min \\+ min_step must be below 1"),
        ({"eps": 0.0}, r"eps must be in \(0, 1\), got 0.0"),
    ],
)
def test_values_of_the_process_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        GaussianProcess(**{"num_classes": 256, **change})


@pytest.mark.parametrize(
    "name", ["num_classes", "rate_sigma", "target_sigma", "time_base", "time_exponential", "eps"]
)
def test_kinds_of_the_process_are_checked(name):
    with pytest.raises(TypeError, match=f"{name} must be an? .*, got str 'a'"):
        GaussianProcess(**{"num_classes": 256, name: "a"})


X, T = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0.5, 0.6])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.float(), T), TypeError, "x0 must have dtype torch.int64"),
        ((X[0], T), ValueError, "x0 must have 2 dimensions"),
        ((X + V, T), ValueError, r"x0 must hold token ids in \[0, 5\), got 5"),
        ((X - 1, T), ValueError, r"x0 must hold token ids in \[0, 5\), got -1"),
        ((X, T[:1]), ValueError, r"t must have shape \(B,\) = \(2,\), got \(1,\)"),
        ((X, T * 0), ValueError, r"t must hold times in \(0, 1\], got 0.0"),
        ((X, T * 2), ValueError, r"t must hold times in \(0, 1\], got 1.2"),
        ((X, T * math.nan), ValueError, r"t must hold times in \(0, 1\], got nan"),
        ((X, T.long()), TypeError, "t must be floating point"),
        ((X, T.to("meta")), ValueError, "t must be on the device of the tokens"),
    ],
)
def test_corruption_checks_its_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SMALL.corrupt(*arguments)


def test_corruption_checks_its_generator():
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator"):
        SMALL.corrupt(X, T, generator=3)


@pytest.mark.parametrize(
    ("valid", "error", "message"),
    [
        (X, TypeError, "valid must have dtype torch.bool"),
        (X[:, :2].bool(), ValueError, r"valid must have shape \(B, D\) = \(2, 3\), got \(2, 2\)"),
        ("all", TypeError, "valid must be a Tensor"),
        (X.bool().to("meta"), ValueError, "valid must be on the device of x0"),
    ],
)
def test_corruption_checks_valid(valid, error, message):
    with pytest.raises(error, match=message):
        SMALL.corrupt(X, T, valid=valid)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "batch must not be negative"),
        ((2.0,), TypeError, "batch must be an int"),
    ],
)
def test_times_check_the_batch(arguments, error, message):
    with pytest.raises(error, match=message):
        SMALL.sample_times(*arguments)


@pytest.mark.parametrize("name", ["low_t", "low_t_probability"])
def test_times_check_their_shares(name):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got 1.5"):
        SMALL.sample_times(2, **{name: 1.5})


@pytest.mark.parametrize(
    ("t", "step", "message"),
    [
        (T, 0.0, r"step must be in \(0, 1\], got 0.0"),
        (T, 1.5, r"step must be in \(0, 1\], got 1.5"),
        (torch.tensor([0.5, 0.01]), 0.1, "t must be greater than t_min = 0.01"),
        (T.sum(), 0.1, "t must have shape"),
    ],
)
def test_step_times_check_their_arguments(t, step, message):
    with pytest.raises(ValueError, match=message):
        SMALL.step_time(t, step)


LOGITS = torch.zeros(2, 3, V)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"xt": X.float()}, TypeError, "xt must have dtype torch.int64"),
        ({"xt": X + V}, ValueError, r"xt must hold token ids in \[0, 5\)"),
        ({"xt": X[0]}, ValueError, "xt must have 2 dimensions"),
        ({"t": T[:1]}, ValueError, r"t must have shape \(B,\)"),
        ({"u": T[:1]}, ValueError, r"u must have shape \(B,\)"),
        ({"u": 0.1}, TypeError, "u must be a Tensor"),
        ({"u": T}, ValueError, "u must hold times with 0 <= u < t"),
        ({"u": T - 1}, ValueError, "u must hold times with 0 <= u < t"),
        ({"u": T.to("meta")}, ValueError, "u must be on the device of xt"),
        ({"draws": 0}, ValueError, "draws must be at least 1, got 0"),
        ({"draws": 1.0}, TypeError, "draws must be an int"),
        ({"teacher_head": LOGITS[:1]}, ValueError, r"teacher_head must have shape \(B, D, V\)"),
        ({"teacher_head": LOGITS[..., :4]}, ValueError, "teacher_head must have shape"),
        ({"teacher_head": LOGITS.long()}, TypeError, "teacher_head must be floating point"),
        ({"teacher_head": LOGITS.to("meta")}, ValueError, "teacher_head must be on the device"),
        ({"teacher_head": LOGITS * math.nan}, ValueError, "teacher_head must hold numbers"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None"),
    ],
)
def test_teacher_steps_check_their_arguments(change, error, message):
    arguments = {"xt": X, "t": T, "u": T / 2, "teacher_head": LOGITS, "draws": 2, **change}
    with pytest.raises(error, match=message):
        SMALL.teacher_step(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": X + V}, ValueError, r"x0 must hold token ids in \[0, 5\)"),
        ({"xt": X[:1]}, ValueError, "xt must have shape"),
        ({"s": 0.9}, ValueError, "times must be 0 <= s < t <= 1, got s = 0.9 and t = 0.8"),
        ({"t": 1.5}, ValueError, "times must be 0 <= s < t <= 1"),
        ({"s": "a"}, TypeError, "s must be a number"),
        ({"row_keys": X[:1]}, ValueError, "row_keys must have shape"),
    ],
)
def test_posterior_steps_check_their_arguments(change, error, message):
    with pytest.raises(error, match=message):
        SMALL.posterior_step(**{"x0": X, "xt": X, "t": 0.8, "s": 0.3, "seed": 1, **change})


def test_initial_law_is_checked():
    with pytest.raises(ValueError, match="law must be one of 'target', 'uniform', got 'normal'"):
        SMALL.initial(0, 0, torch.arange(3), "normal")
