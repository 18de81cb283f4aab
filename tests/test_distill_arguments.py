"""The step, its recipe, the distiller and the average name every argument that is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from distill_support import (
    CONFIG,
    HIGH,
    MASK,
    PROCESS,
    VOCAB,
    X0,
    B,
    D,
    Recorder,
    UniformNoise,
    models,
)
from torch import nn
from wrong_arguments import Wrong, wrong

from di4c_fast.training import EMA, DistillConfig, Distiller, distill_step

NOISE = UniformNoise()
OUTSIDE = "must be in [0, 1], got"


@wrong(
    [
        ({"components": 0}, "components must be at least 1, got 0"),
        ({"components": 2.0}, TypeError, "components must be an int, got float 2.0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"teacher_components": 0}, "teacher_components must be at least 1, got 0"),
        ({"teacher_step": 0.0}, "teacher_step must be in (0, 1], got 0.0"),
        ({"teacher_step": math.nan}, "teacher_step must be finite"),
        ({"component_spread": -0.1}, f"component_spread {OUTSIDE} -0.1"),
        ({"low_t": 1.5}, f"low_t {OUTSIDE} 1.5"),
        ({"low_t_probability": -0.5}, f"low_t_probability {OUTSIDE} -0.5"),
        ({"data_weight": -1.0}, "data_weight must be finite and at least 0, got -1.0"),
        ({"teacher_weight": math.inf}, "teacher_weight must be finite"),
        ({"component_weight": "1"}, TypeError, "component_weight must be a number"),
        ({"data_schedule": "cosine"}, "data_schedule must be one of 'sigmoid', 'linear'"),
        ({"backend": "cuda"}, "backend must be one of"),
    ]
)
def test_a_config_names_what_is_wrong(wrong: Wrong):
    with wrong.raises():
        DistillConfig(**wrong.what)


class NoComponentTime:
    loss_mask_id = None
    sample_times = corrupt = step_time = teacher_step = staticmethod(lambda *a, **k: None)


BEFORE_ANY_WORK = [
    ({"student": 1}, TypeError, "student must be callable, got int"),
    ({"teacher": None}, TypeError, "teacher must be callable, got NoneType"),
    ({"x0": X0.float()}, TypeError, "x0 must have dtype torch.int64, got torch.float32"),
    ({"x0": X0[0]}, "x0 must have 2 dimensions"),
    ({"x0": torch.full((B, D), MASK)}, "x0 must not hold mask_id = 5"),
    ({"process": "masked"}, TypeError, "process must be a Process, got str 'masked'"),
    ({"process": NoComponentTime()}, TypeError, "process must be a Process, got NoComponentTime"),
    ({"config": {}}, TypeError, "config must be a DistillConfig, got dict {}"),
    ({"generator": 0}, TypeError, "generator must be a torch.Generator or None"),
    ({"backward": 1}, TypeError, "backward must be callable, got int"),
    ({"t": torch.ones(3)}, "t must have shape (B,) = (4,), got (3,)"),
    ({"t": torch.tensor([0.5, math.nan, 1, 1])}, "t must ... nan at index (1,)"),
    ({"t": torch.tensor([0.5, 0.5, 0, 1])}, "t must ... 0.0 at index (2,)"),
    ({"t": torch.ones(B).long()}, TypeError, "t must be floating point"),
    ({"latent": torch.rand(B, 2, 1)}, "latent ... = (4, 3, 1), got (4, 2, 1)"),
    ({"latent_u": torch.rand(B, 2)}, "latent_u must have shape (B, K, L)"),
    ({"latent_teacher": torch.rand(B, 1, 1)}, "latent_teacher needs config.teach"),
    (
        {"latent_min": torch.rand(B, 3, 1)},
        "latent_min needs a process with a component_time, got MaskedProcess",
    ),
    (
        {"process": NOISE, "latent_min": torch.rand(B, 2, 1)},
        "latent_min must have shape (B, N, L) = (4, 3, 1), got (4, 2, 1)",
    ),
    ({"x_min": X0}, "x_min must have shape (B, N, D) = (4, 3, 5), got (4, 5)"),
    ({"t_min": torch.ones(B, 3)}, "t_min needs a process with a component_time, got"),
    ({"xt": X0[:2]}, "xt must have shape (B, D) = (4, 5), got (2, 5)"),
    ({"xu": X0}, "xu must have shape (B, K, D) = (4, 2, 5), got (4, 5)"),
    ({"consistency_x": X0.float()}, TypeError, "consistency_x must have dtype torch.int64"),
    ({"u": torch.ones(B)}, "u must hold times with 0 <= u < t"),
    ({"process": UniformNoise(0.0)}, "component_time must be in (0, 1], got 0.0"),
    ({"process": UniformNoise(1.5)}, "component_time must be in (0, 1], got 1.5"),
    ({"process": UniformNoise("low")}, TypeError, "process.component_time must be a number, got s"),
    ({"context": {"y": torch.zeros(3)}}, "context['y'] must have B = 4 as its"),
    ({"valid": torch.ones(B, D)}, TypeError, "valid must have dtype torch.bool"),
]


@wrong(BEFORE_ANY_WORK)
def test_a_step_names_what_is_wrong_before_any_work(wrong: Wrong):
    student, teacher = models()
    given = {"process": PROCESS, "config": CONFIG, "t": torch.tensor(HIGH)}
    given = {"student": student, "teacher": teacher, "x0": X0, **given, **wrong.what}
    with wrong.raises():
        distill_step(**given)
    assert student.calls == teacher.calls == []


def logits_of(*sizes):
    return lambda tokens, t, latent=None: torch.zeros(*sizes)


@wrong(
    [
        (
            {"teacher": logits_of(B, D - 1, VOCAB)},
            "teacher must return logits of shape (R, D, V) ... = (4, 5) ... got (4, 4, 6)",
        ),
        (
            {"student": logits_of(B, D, VOCAB)},
            "student must return logits of shape (R, D, V) ... = (12, 5) ... got (4, 5, 6)",
        ),
        (
            {"student": lambda tokens, t, latent: torch.zeros(*tokens.shape, 9)},
            "student must return logits over V = 6 classes, got shape (12, 5, 9)",
        ),
        (
            {"student": logits_of(12, D, VOCAB), "teacher": logits_of(B, D, VOCAB + 3)},
            "student must return logits over V = 9 classes, got shape (12, 5, 6)",
        ),
        ({"student": lambda *a: None}, TypeError, "the output of student must be a Tensor of log"),
    ]
)
def test_a_step_names_what_a_model_returns_wrongly(wrong: Wrong):
    given = dict(zip(("student", "teacher"), models(), strict=True))
    with wrong.raises():
        distill_step(**{**given, **wrong.what}, x0=X0, process=PROCESS, config=CONFIG)


def other_optimizer():
    return torch.optim.SGD(Recorder(True).parameters(), lr=0.1)


SCHEDULERS = torch.optim.lr_scheduler


@wrong(
    [
        (("student", lambda s, o: s.forward), TypeError, "student must be a Module, got method"),
        (("teacher", lambda s, o: 3), TypeError, "teacher must be callable, got int"),
        (("optimizer", lambda s, o: "adam"), TypeError, "optimizer must be an Optimizer, got str"),
        (
            ("optimizer", lambda s, o: other_optimizer()),
            "optimizer must hold parameters of the student only, got 12 of 12 that are not",
        ),
        (("process", lambda s, o: "masked"), TypeError, "process must be a Process, got str 'mas"),
        (("config", lambda s, o: {}), TypeError, "config must be a DistillConfig, got dict"),
        (("ema", lambda s, o: 0.999), TypeError, "ema must be an EMA, got float"),
        (("ema", lambda s, o: EMA(Recorder(True))), "ema must average the student, got"),
        (("scheduler", lambda s, o: 0.5), TypeError, "scheduler must be a LRScheduler"),
        (
            ("scheduler", lambda s, o: SCHEDULERS.ReduceLROnPlateau(o)),
            "scheduler must step without a metric",
        ),
        (
            ("scheduler", lambda s, o: SCHEDULERS.ExponentialLR(other_optimizer(), 0.5)),
            "scheduler must be that of optimizer",
        ),
        (("clip_norm", lambda s, o: 0.0), "clip_norm must be in (0, inf), got 0.0"),
        (("clip_norm", lambda s, o: math.nan), "clip_norm must be finite"),
        (("clip_norm", lambda s, o: "1"), TypeError, "clip_norm must be a number, got str '1'"),
        (("accumulate", lambda s, o: 0), "accumulate must be at least 1, got 0"),
        (("accumulate", lambda s, o: 2.0), TypeError, "accumulate must be an int, got float 2.0"),
        (("skip_nonfinite", lambda s, o: 1), TypeError, "skip_nonfinite must be True or False"),
        (("generator", lambda s, o: 0), TypeError, "generator must be a torch.Generator or None"),
        (("scaler", lambda s, o: 2.0**16), TypeError, "scaler must be a GradScaler, got float"),
    ]
)
def test_a_distiller_names_what_is_wrong(wrong: Wrong):
    student, teacher = models()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    given = {"student": student, "teacher": teacher, "optimizer": optimizer, "process": PROCESS}
    name, value = wrong.what
    with wrong.raises():
        Distiller(**{**given, name: value(student, optimizer)})


def test_a_scaler_skips_by_itself():
    student, teacher = models()
    options = {"scaler": torch.amp.GradScaler("cpu"), "skip_nonfinite": False}
    with pytest.raises(ValueError, match="skip_nonfinite must be True with a scaler"):
        Distiller(
            student, teacher, torch.optim.SGD(student.parameters()), process=PROCESS, **options
        )


def test_a_student_with_sparse_gradients_is_refused():
    student, teacher = models()
    student.extra = nn.Embedding(MASK + 1, 2, sparse=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="dense gradients, got 'extra'"):
        Distiller(student, teacher, optimizer, process=PROCESS)


def test_the_step_of_a_distiller_names_what_is_wrong():
    student, teacher = models()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller(student, teacher, optimizer, process=PROCESS, config=CONFIG)
    with pytest.raises(TypeError, match=r"x0 must have dtype torch\.int64"):
        distiller.step(X0.float())
    with pytest.raises(ValueError, match=r"t must have shape \(B,\) = \(4,\)"):
        distiller.step(X0, t=torch.tensor(HIGH)[:2])
    distiller.teacher = lambda tokens, t: torch.zeros(*tokens.shape, VOCAB + 1)
    with pytest.raises(ValueError, match="student must return logits over V = 7 classes"):
        distiller.step(X0)
    assert distiller.iterations == 0
