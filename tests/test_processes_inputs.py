"""Wrong arguments of the noise processes.

Every case starts from a right call of two rows of three tokens, V = 5, mask 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from process_cases import MASK, PROCESSES, VOCAB
from wrong_arguments import Wrong, wrong

from di4c_fast.processes import GaussianProcess, MaskedProcess, MaskGITProcess

T, V = TypeError, ValueError
Case = tuple[str, dict[str, Any], type[Exception], str]
X, TIMES = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0.5, 0.6])
LOGITS = torch.zeros(2, 3, VOCAB)
RIGHT: dict[str, dict[str, Any]] = {
    "sample_times": {"batch": 2},
    "corrupt": {"x0": X, "t": TIMES},
    "step_time": {"t": TIMES, "step": 0.1},
    "teacher_step": {
        "xt": X + MASK, "t": TIMES, "u": TIMES / 2, "teacher_head": LOGITS, "draws": 2,
    },
    "posterior_step": {"x0": X, "xt": X, "t": 0.8, "s": 0.3, "seed": 1},
    "initial": {"seed": 0, "step": 0, "row_keys": torch.arange(3)},
}  # fmt: skip
MAKE: dict[str, tuple[type, str, int]] = {
    "masked": (MaskedProcess, "mask_id", MASK),
    "maskgit": (MaskGITProcess, "mask_id", MASK),
    "gaussian": (GaussianProcess, "num_classes", 256),
}

TENSORS: list[Case] = [  # of `corrupt` and, with xt for x0, of `teacher_step`
    ("corrupt", {"x0": X.float()}, T, "x0 must have dtype torch.int64, got torch.float32"),
    ("corrupt", {"x0": X[0]}, V, "x0 must have 2 dimensions, got shape (3,)"),
    ("corrupt", {"x0": [[0]]}, T, "x0 must be a Tensor, got list [[0]]"),
    ("corrupt", {"t": TIMES[:1]}, V, "t must have shape (B,) = (2,), got (1,)"),
    ("corrupt", {"t": TIMES.long()}, T, "t must be floating point"),
    ("corrupt", {"t": 0.5}, T, "t must be a Tensor, got float 0.5"),
    ("corrupt", {"t": TIMES * math.nan}, V, "t must hold times in (0, 1], got nan at"),
    ("corrupt", {"t": TIMES * 0}, V, "t must hold times in (0, 1], got 0.0"),
    ("corrupt", {"t": TIMES * 2}, V, "t must hold times in (0, 1], got 1.2"),
    ("corrupt", {"t": TIMES.to("meta")}, V, "t must be on the device of the tokens"),
    ("corrupt", {"valid": X}, T, "valid must have dtype torch.bool"),
    ("corrupt", {"valid": X[:, :2].bool()}, V, "valid must have shape (B, D) = (2, 3), got (2, 2)"),
    ("corrupt", {"valid": "all"}, T, "valid must be a Tensor"),
    ("corrupt", {"valid": X.bool().to("meta")}, V, "valid must be on the device of x"),
    ("corrupt", {"generator": 3}, T, "generator must be a torch.Generator or None, got int 3"),
]
SHARED: list[Case] = [
    ("sample_times", {"batch": -1}, V, "batch must be at least 0, got -1"),
    ("sample_times", {"batch": 2.0}, T, "batch must be an int, got float 2.0"),
    ("sample_times", {"low_t": 1.5}, V, "low_t must be in [0, 1], got 1.5"),
    ("sample_times", {"low_t_probability": 1.5}, V, "low_t_probability must be in [0, 1], got 1.5"),
    ("sample_times", {"low_t_probability": -0.1}, V, "low_t_probability must be in [0, 1], got -"),
    ("sample_times", {"low_t": "a"}, T, "low_t must be a number, got str 'a'"),
    ("sample_times", {"stratified": "yes"}, T, "stratified must be True or False, got str 'yes'"),
    ("sample_times", {"generator": 3}, T, "generator must be a torch.Generator or None, got int 3"),
    *TENSORS,
    *(
        ("teacher_step", {k.replace("x0", "xt"): v for k, v in changes.items()}, kind,
         message.replace("x0", "xt"))
        for _, changes, kind, message in TENSORS
    ),
    ("step_time", {"step": 0.0}, V, "step must be in (0, 1], got 0.0"),
    ("step_time", {"step": 1.5}, V, "step must be in (0, 1], got 1.5"),
    ("step_time", {"step": math.nan}, V, "step must be finite"),
    ("step_time", {"step": None}, T, "step must be a number"),
    ("step_time", {"t": TIMES.sum()}, V, "t must have shape"),
    ("step_time", {"t": TIMES * 2}, V, "t must hold times in (0, 1]"),
    ("step_time", {"t": 0.5}, T, "t must be a Tensor"),
    ("step_time", {"generator": 3}, T, "generator must be a torch.Generator or None, got int 3"),
    ("teacher_step", {"u": TIMES[:1]}, V, "u must have shape (B,)"),
    ("teacher_step", {"u": 0.1}, T, "u must be a Tensor"),
    ("teacher_step", {"u": TIMES}, V, "u must hold times with 0 <= u < t"),
    ("teacher_step", {"u": TIMES - 1}, V, "u must hold times with 0 <= u < t"),
    ("teacher_step", {"u": TIMES * math.nan}, V, "u must hold times with 0 <= u < t"),
    ("teacher_step", {"u": TIMES.to("meta")}, V, "u must be on the device of xt"),
    ("teacher_step", {"draws": 0}, V, "draws must be at least 1, got 0"),
    ("teacher_step", {"draws": 1.0}, T, "draws must be an int"),
    ("teacher_step", {"teacher_head": torch.zeros(2, 4, 5)}, V, "teacher_head must have shape"),
    ("teacher_step", {"teacher_head": torch.zeros(2, 3)}, V, "teacher_head must have shape"),
    ("teacher_step", {"teacher_head": torch.zeros(2, 0, 3, 5)}, V, "teacher_head must have shape"),
    ("teacher_step", {"teacher_head": LOGITS[:1]}, V, "must have shape (B, D, V) or (B, M, D, V)"),
    ("teacher_step", {"teacher_head": LOGITS.long()}, T, "teacher_head must be floating point"),
    ("teacher_step", {"teacher_head": LOGITS.to("meta")}, V, "teacher_head must be on the device"),
    ("teacher_step", {"teacher_head": "logits"}, T, "teacher_head must be a Tensor of logits or a"),
]  # fmt: skip
MASKS: list[Case] = [
    ("init", {"mask_id": 1.0}, T, "mask_id must be an int, got float 1.0"),
    ("init", {"mask_id": -1}, V, "mask_id must be at least 0, got -1"),
    ("init", {"t_min": 0.0}, V, "t_min must be in (0, 1), got 0.0"),
    ("init", {"t_min": math.nan}, V, "t_min must be finite"),
    ("corrupt", {"x0": X + MASK}, V, "x0 must not hold mask_id = 4"),
    ("corrupt", {"x0": X - 1}, V, "x0 must hold ids of at least 0, got -1 at index (0, 0)"),
    ("teacher_step", {"teacher_head": LOGITS[..., :4]}, V, "mask_id must be in [0, V) = [0, 4)"),
]
OWN: dict[str, list[Case]] = {
    "masked": [
        *MASKS,
        ("init", {"levels": 0}, V, "levels must be at least 1, got 0"),
        ("init", {"levels": 2.5}, T, "levels must be an int, got float 2.5"),
    ],
    "maskgit": [
        *MASKS,
        ("init", {"schedule": "cubic"}, V, "schedule must be one of 'arccos'"),
        ("init", {"gumbel_temperature": -1.0}, V, "gumbel_temperature must be finite and at"),
        ("init", {"teacher_steps": 1}, V, "teacher_steps must be at least 2, got 1"),
        ("init", {"teacher_steps": 8.0}, T, "teacher_steps must be an int, got float 8.0"),
        ("init", {"temperature": -1.0}, V, "temperature must be finite and at least 0"),
        ("init", {"exclude_mask": 1}, T, "exclude_mask must be True or False"),
    ],
    "gaussian": [
        ("init", {"num_classes": 1}, V, "num_classes must be at least 2, got 1"),
        ("init", {"rate_sigma": 0.0}, V, "rate_sigma must be in (0, inf), got 0.0"),
        ("init", {"rate_sigma": math.nan}, V, "rate_sigma must be finite, got nan"),
        ("init", {"target_sigma": -1.0}, V, "target_sigma must be in [21.3..., inf), got -1.0"),
        ("init", {"target_sigma": 20.0}, V, "target_sigma must be in [21.3..., inf), got 20.0"),
        ("init", {"time_base": 0.0}, V, "time_base must be in (0, inf), got 0.0"),
        ("init", {"time_exponential": 1.0}, V, "time_exponential must be in (1, inf), got 1.0"),
        ("init", {"t_min": 0.0}, V, "t_min must be in (0, 1), got 0.0"),
        ("init", {"min_step": 1.0}, V, "min_step must be in (0, 0.99), got 1.0"),
        ("init", {"t_min": 0.5, "min_step": 0.5}, V, "min_step must be in (0, 0.5), got 0.5"),
        ("init", {"eps": 0.0}, V, "eps must be in (0, 1), got 0.0"),
        ("init", {"num_classes": "a"}, T, "num_classes must be an int, got str 'a'"),
        *(
            ("init", {name: "a"}, T, f"{name} must be a number, got str 'a'")
            for name in ("rate_sigma", "target_sigma", "time_base", "time_exponential", "eps")
        ),
        ("corrupt", {"x0": X + VOCAB}, V, "x0 must hold token ids in [0, 5), got 5"),
        ("corrupt", {"x0": X - 1}, V, "x0 must hold token ids in [0, 5), got -1"),
        ("step_time", {"t": torch.tensor([0.5, 0.01])}, V, "t must be greater than t_min = 0.01"),
        ("teacher_step", {"xt": X + VOCAB}, V, "xt must hold token ids in [0, 5)"),
        ("teacher_step", {"teacher_head": LOGITS[..., :4]}, V, "V = num_classes = 5, got V = 4"),
        ("teacher_step", {"teacher_head": LOGITS * math.nan}, V, "teacher_head must hold numbers"),
        ("posterior_step", {"x0": X + VOCAB}, V, "x0 must hold token ids in [0, 5)"),
        ("posterior_step", {"xt": X[:1]}, V, "xt must have shape"),
        ("posterior_step", {"s": 0.9}, V, "s must be in [0, 0.8), got 0.9"),
        ("posterior_step", {"t": 1.5}, V, "t must be in (0, 1], got 1.5"),
        ("posterior_step", {"s": "a"}, T, "s must be a number"),
        ("posterior_step", {"row_keys": X[:1]}, V, "row_keys must have shape"),
        ("initial", {"law": "normal"}, V, "law must be one of 'target', 'uniform', got 'normal'"),
    ],
}


CASES = [
    ((name, method, changes), kind, message)
    for name in OWN
    for method, changes, kind, message in [*SHARED, *OWN[name]]
]


@wrong(CASES)
def test_wrong_arguments_are_named(wrong: Wrong):
    name, method, changes = wrong.what
    kind, first, value = MAKE[name]
    with wrong.raises():
        if method == "init":
            kind(**({first: value} | changes))
        else:
            getattr(PROCESSES[name], method)(**(RIGHT[method] | changes))
