"""The distillation step and its recipe name every argument that is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from distill_support import CONFIG, HIGH, MASK, PROCESS, VOCAB, X0, B, D, Recorder

from di4c_fast.training import DistillConfig, distill_step


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("components", 0, ValueError, "components must be at least 1, got 0"),
        ("components", 2.0, TypeError, "components must be an int, got float 2.0"),
        ("draws", 0, ValueError, "draws must be at least 1, got 0"),
        ("latent_dim", 0, ValueError, "latent_dim must be at least 1, got 0"),
        ("teacher_components", 0, ValueError, "teacher_components must be at least 1, got 0"),
        ("teacher_step", 0.0, ValueError, r"teacher_step must be in \(0, 1\], got 0.0"),
        ("teacher_step", math.nan, ValueError, "teacher_step must be finite"),
        (
            "component_spread",
            -0.1,
            ValueError,
            r"component_spread must be in \[0, 1\], got -0.1",
        ),
        ("low_t", 1.5, ValueError, r"low_t must be in \[0, 1\], got 1.5"),
        ("low_t_probability", -0.5, ValueError, r"low_t_probability must be in \[0, 1\], got -0.5"),
        ("data_weight", -1.0, ValueError, "data_weight must be finite and at least 0, got -1.0"),
        ("teacher_weight", math.inf, ValueError, "teacher_weight must be finite"),
        ("component_weight", "1", TypeError, "component_weight must be a number"),
        ("data_schedule", "cosine", ValueError, "data_schedule must be one of 'sigmoid', 'linear'"),
        ("backend", "cuda", ValueError, "backend must be one of"),
    ],
)
def test_a_config_names_what_is_wrong(field, value, error, message):
    with pytest.raises(error, match=message):
        DistillConfig(**{field: value})


def logits_of(*sizes):
    return lambda tokens, t, latent=None: torch.zeros(*sizes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": 1}, TypeError, "student must be callable, got int"),
        ({"teacher": None}, TypeError, "teacher must be callable, got NoneType"),
        ({"x0": X0.float()}, TypeError, "x0 must have dtype torch.int64, got torch.float32"),
        ({"x0": X0[0]}, ValueError, "x0 must have 2 dimensions"),
        ({"x0": torch.full((B, D), MASK)}, ValueError, "x0 must not hold mask_id = 5"),
        ({"process": "masked"}, TypeError, "process must be a Process, got str 'masked'"),
        ({"config": {}}, TypeError, "config must be a DistillConfig, got dict {}"),
        ({"generator": 0}, TypeError, "generator must be a torch.Generator or None"),
        ({"t": torch.ones(3)}, ValueError, r"t must have shape \(B,\) = \(4,\), got \(3,\)"),
        (
            {"t": torch.tensor([0.5, math.nan, 1, 1])},
            ValueError,
            r"t must .* got nan at index \(1,\)",
        ),
        ({"t": torch.tensor([0.5, 0.5, 0, 1])}, ValueError, r"t must .* got 0.0 at index \(2,\)"),
        ({"t": torch.ones(B).long()}, TypeError, "t must be floating point"),
        (
            {"latent": torch.rand(B, 2, 1)},
            ValueError,
            r"latent must have shape \(B, N, L\) = \(4, 3, 1\), got \(4, 2, 1\)",
        ),
        ({"latent_u": torch.rand(B, 2)}, ValueError, r"latent_u must have shape \(B, K, L\)"),
        ({"latent_teacher": torch.rand(B, 1, 1)}, ValueError, "latent_teacher needs config.teach"),
        ({"context": {"y": torch.zeros(3)}}, ValueError, r"context\['y'\] must have B = 4 as its"),
        ({"valid": torch.ones(B, D)}, TypeError, "valid must have dtype torch.bool"),
        (
            {"teacher": logits_of(B, D - 1, VOCAB)},
            ValueError,
            r"teacher must return logits of shape \(R, D, V\) .* = \(4, 5\) .* got \(4, 4, 6\)",
        ),
        (
            {"student": logits_of(B, D, VOCAB)},
            ValueError,
            r"student must return logits of shape \(R, D, V\) .* = \(12, 5\) .* got \(4, 5, 6\)",
        ),
        (
            {"student": lambda tokens, t, latent: torch.zeros(*tokens.shape, 9)},
            ValueError,
            r"student must return logits over V = 6 classes, got shape \(12, 5, 9\)",
        ),
        (
            {"student": logits_of(12, D, VOCAB), "teacher": logits_of(B, D, VOCAB + 3)},
            ValueError,
            r"student must return logits over V = 9 classes, got shape \(12, 5, 6\)",
        ),
        ({"student": lambda *a: None}, TypeError, "the output of student must be a Tensor of log"),
    ],
)
def test_a_step_names_what_is_wrong(changes, error, message):
    arguments = {
        "student": Recorder(True),
        "teacher": Recorder(False),
        "x0": X0,
        "process": PROCESS,
        "config": CONFIG,
        "t": torch.tensor(HIGH),
        **changes,
    }
    with pytest.raises(error, match=message):
        distill_step(**arguments)
