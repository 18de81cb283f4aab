"""Wrong calls of the loss: the arguments that are spoilt, the kind of error and its message.

Every case starts from a right call and spoils one argument.
"""

from __future__ import annotations

import math

import torch
from loss_cases import make_problem

from di4c_fast import LinearHead

B, N, K, D, V, MASK = 2, 3, 2, 5, 7, 6
FLOATING = "floating point (float64, float32, bfloat16 or float16)"
NAN, INF = math.nan, math.inf


def right(**settings) -> dict:
    return make_problem(0, mask_id=MASK, revealed=True, padded=True, weighted=True) | settings


def changed(name: str, index, value) -> torch.Tensor:
    """An argument of the right call with one element replaced."""
    tensor = right()[name].clone()
    tensor[index] = value
    return tensor


def meta(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="meta")


def tokens(*shape: int, **settings) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int64, **settings)


def logits(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


masked = right()["xt"] == MASK
counted = masked & right()["valid"]
AT = tuple(int(i) for i in counted.nonzero()[0])  # a position that counts
SHOWN = tuple(
    int(i) for i in ((right()["xu"] != MASK) & counted[:, None]).nonzero()[0]
)  # a position that counts and a draw reveals
WAS = int(right()["xu"][SHOWN])

# What is wrong: the changed arguments, the kind of error, its message (a part of it).
CASES = {
    # student
    "student: not a tensor": (
        {"student": None},
        TypeError,
        "student must be a Tensor of logits or a Head, got NoneType None",
    ),
    "student: list": (
        {"student": [[1.0]]},
        TypeError,
        "student must be a Tensor of logits or a Head, got list [[1.0]]",
    ),
    "student: integers": (
        {"student": tokens(B, N, D, V)},
        TypeError,
        f"student must be {FLOATING}, got torch.int64",
    ),
    "student: bool": (
        {"student": logits(B, N, D, V).bool()},
        TypeError,
        f"student must be {FLOATING}, got torch.bool",
    ),
    "student: complex": (
        {"student": logits(B, N, D, V, dtype=torch.complex64)},
        TypeError,
        f"student must be {FLOATING}, got torch.complex64",
    ),
    "student: fp8": (
        {"student": logits(B, N, D, V, dtype=torch.float32).to(torch.float8_e5m2)},
        TypeError,
        f"student must be {FLOATING}, got torch.float8_e5m2",
    ),
    "student: rank 3": (
        {"student": logits(B, D, V)},
        ValueError,
        f"student must have shape (B, N, D, V), got {(B, D, V)}",
    ),
    "student: rank 5": (
        {"student": logits(1, B, N, D, V)},
        ValueError,
        f"student must have shape (B, N, D, V), got {(1, B, N, D, V)}",
    ),
    "student: head of rank 3": (
        {"student": LinearHead(logits(N, D, 4), logits(V, 4))},
        ValueError,
        f"student must have shape (B, N, D, V), got {(N, D, V)}",
    ),
    "student: no components": (
        {"student": logits(B, 0, D, V)},
        ValueError,
        f"student must have N >= 1 components, got shape {(B, 0, D, V)}",
    ),
    "student: no classes": (
        {"student": logits(B, N, D, 0)},
        ValueError,
        f"student must have V >= 1 classes, got shape {(B, N, D, 0)}",
    ),
    # teacher
    "teacher: not a tensor": (
        {"teacher": 1.0},
        TypeError,
        "teacher must be a Tensor of logits or a Head, got float 1.0",
    ),
    "teacher: integers": (
        {"teacher": tokens(B, D, V)},
        TypeError,
        f"teacher must be {FLOATING}, got torch.int64",
    ),
    "teacher: rank 2": (
        {"teacher": logits(B, D)},
        ValueError,
        f"teacher must have shape (B, D, V) = {(B, D, V)} or (B, M, D, V) with M >= 1, "
        f"got {(B, D)}",
    ),
    "teacher: batch": (
        {"teacher": logits(B + 1, D, V)},
        ValueError,
        f"got {(B + 1, D, V)}",
    ),
    "teacher: positions": ({"teacher": logits(B, D + 1, V)}, ValueError, f"got {(B, D + 1, V)}"),
    "teacher: classes": ({"teacher": logits(B, D, V - 1)}, ValueError, f"got {(B, D, V - 1)}"),
    "teacher: no components": (
        {"teacher": logits(B, 0, D, V)},
        ValueError,
        f"with M >= 1, got {(B, 0, D, V)}",
    ),
    "teacher: device": (
        {"teacher": meta(B, D, V)},
        ValueError,
        "teacher must be on the device of student (cpu), got meta",
    ),
    # tokens
    "x0: not a tensor": ({"x0": [[0]]}, TypeError, "x0 must be a Tensor, got list [[0]]"),
    "x0: int32": (
        {"x0": tokens(B, D).int()},
        TypeError,
        "x0 must have dtype torch.int64, got torch.int32",
    ),
    "x0: floats": (
        {"x0": logits(B, D)},
        TypeError,
        "x0 must have dtype torch.int64, got torch.float64",
    ),
    "x0: rank": (
        {"x0": tokens(D)},
        ValueError,
        f"x0 must have shape (B, D) = {(B, D)}, got {(D,)}",
    ),
    "x0: positions": (
        {"x0": tokens(B, D - 1)},
        ValueError,
        f"x0 must have shape (B, D) = {(B, D)}, got {(B, D - 1)}",
    ),
    "x0: device": (
        {"x0": meta(B, D, dtype=torch.int64)},
        ValueError,
        "x0 must be on the device of student (cpu), got meta",
    ),
    "x0: too large": (
        {"x0": changed("x0", (1, 2), V)},
        ValueError,
        f"x0 must hold token ids in [0, {V}), got {V} at index (1, 2)",
    ),
    "x0: negative": (
        {"x0": changed("x0", (0, 4), -100)},
        ValueError,
        f"x0 must hold token ids in [0, {V}), got -100 at index (0, 4)",
    ),
    "x0: mask where it counts": (
        {"x0": changed("x0", AT, MASK)},
        ValueError,
        f"x0 must not hold mask_id = {MASK} at positions that count, got {MASK} at index {AT}",
    ),
    "xt: not a tensor": ({"xt": "x"}, TypeError, "xt must be a Tensor, got str 'x'"),
    "xt: dtype": (
        {"xt": tokens(B, D).short()},
        TypeError,
        "xt must have dtype torch.int64, got torch.int16",
    ),
    "xt: shape": (
        {"xt": tokens(B, D + 1)},
        ValueError,
        f"xt must have shape (B, D) = {(B, D)}, got {(B, D + 1)}",
    ),
    "xt: device": (
        {"xt": meta(B, D, dtype=torch.int64)},
        ValueError,
        "xt must be on the device of student (cpu), got meta",
    ),
    "xt: range": (
        {"xt": changed("xt", (1, 1), V), "valid": None},
        ValueError,
        f"xt must hold token ids in [0, {V}), got {V} at index (1, 1)",
    ),
    "xt: without mask_id": (
        {"mask_id": None, "xu": None},
        ValueError,
        "xt needs mask_id: without it there are no masked positions",
    ),
    "xu: not a tensor": ({"xu": 3}, TypeError, "xu must be a Tensor, got int 3"),
    "xu: dtype": (
        {"xu": tokens(B, K, D).int()},
        TypeError,
        "xu must have dtype torch.int64, got torch.int32",
    ),
    "xu: rank": (
        {"xu": tokens(B, D)},
        ValueError,
        f"xu must have shape (B, K, D) = {(B, K, D)}, got {(B, D)}",
    ),
    "xu: draws": (
        {"xu": tokens(B, K + 1, D)},
        ValueError,
        f"xu must have shape (B, K, D) = {(B, K, D)}, got {(B, K + 1, D)}",
    ),
    "xu: device": (
        {"xu": meta(B, K, D, dtype=torch.int64)},
        ValueError,
        "xu must be on the device of student (cpu), got meta",
    ),
    "xu: range": (
        {"xu": changed("xu", (1, 0, 3), -1)},
        ValueError,
        f"xu must hold token ids in [0, {V}), got -1 at index (1, 0, 3)",
    ),
    "xu: without mask_id": (
        {"mask_id": None, "xt": None},
        ValueError,
        "xu needs mask_id: without it no position is revealed",
    ),
    "xu: without consistency": (
        {"consistency": None, "consistency_x": None},
        ValueError,
        "xu needs consistency",
    ),
    # mask_id
    "mask_id: float": (
        {"mask_id": 6.0},
        TypeError,
        "mask_id must be an int or None, got float 6.0",
    ),
    "mask_id: bool": (
        {"mask_id": True},
        TypeError,
        "mask_id must be an int or None, got bool True",
    ),
    "mask_id: tensor": (
        {"mask_id": torch.tensor(6)},
        TypeError,
        "mask_id must be an int or None, got Tensor of shape (), torch.int64, cpu",
    ),
    "mask_id: too large": (
        {"mask_id": V},
        ValueError,
        f"mask_id must be in [0, V) = [0, {V}), got {V}",
    ),
    "mask_id: negative": (
        {"mask_id": -1},
        ValueError,
        f"mask_id must be in [0, V) = [0, {V}), got -1",
    ),
    # valid
    "valid: not a tensor": ({"valid": True}, TypeError, "valid must be a Tensor, got bool True"),
    "valid: dtype": (
        {"valid": tokens(B, D)},
        TypeError,
        "valid must have dtype torch.bool, got torch.int64",
    ),
    "valid: shape": (
        {"valid": torch.ones(D, dtype=torch.bool)},
        ValueError,
        f"valid must have shape (B, D) = {(B, D)}, got {(D,)}",
    ),
    "valid: device": (
        {"valid": meta(B, D, dtype=torch.bool)},
        ValueError,
        "valid must be on the device of student (cpu), got meta",
    ),
    # consistency
    "consistency: not a tensor": (
        {"consistency": "u"},
        TypeError,
        "consistency must be a Tensor of logits or a Head, got str 'u'",
    ),
    "consistency: integers": (
        {"consistency": tokens(B, K, D, V)},
        TypeError,
        f"consistency must be {FLOATING}, got torch.int64",
    ),
    "consistency: rank": (
        {"consistency": logits(B, D, V)},
        ValueError,
        f"consistency must have shape (B, K, D, V) with K >= 1 and (B, D, V) = {(B, D, V)}, "
        f"got {(B, D, V)}",
    ),
    "consistency: classes": (
        {"consistency": logits(B, K, D, V + 1)},
        ValueError,
        f"got {(B, K, D, V + 1)}",
    ),
    "consistency: no draws": (
        {"consistency": logits(B, 0, D, V)},
        ValueError,
        f"with K >= 1 and (B, D, V) = {(B, D, V)}, got {(B, 0, D, V)}",
    ),
    "consistency: device": (
        {"consistency": meta(B, K, D, V)},
        ValueError,
        "consistency must be on the device of student (cpu), got meta",
    ),
    "consistency_x: not a tensor": (
        {"consistency_x": 0},
        TypeError,
        "consistency_x must be a Tensor, got int 0",
    ),
    "consistency_x: dtype": (
        {"consistency_x": tokens(B, K, D).int()},
        TypeError,
        "consistency_x must have dtype torch.int64, got torch.int32",
    ),
    "consistency_x: shape": (
        {"consistency_x": tokens(B, D)},
        ValueError,
        f"consistency_x must have shape (B, K, D) = {(B, K, D)}, got {(B, D)}",
    ),
    "consistency_x: device": (
        {"consistency_x": meta(B, K, D, dtype=torch.int64)},
        ValueError,
        "consistency_x must be on the device of student (cpu), got meta",
    ),
    "consistency_x: range": (
        {"consistency_x": changed("consistency_x", (0, 1, 2), V + 3)},
        ValueError,
        f"consistency_x must hold token ids in [0, {V}), got {V + 3} at index (0, 1, 2)",
    ),
    "consistency_x: mask where it counts": (
        {"consistency_x": changed("consistency_x", (AT[0], 1, AT[1]), MASK), "xu": None},
        ValueError,
        f"consistency_x must not hold mask_id = {MASK} at positions that count, got {MASK} at "
        f"index {(AT[0], 1, AT[1])}",
    ),
    "consistency_x: against xu": (
        {"consistency_x": changed("consistency_x", SHOWN, (WAS + 1) % MASK)},
        ValueError,
        "consistency_x must equal xu at positions that xu has revealed, got "
        f"{(WAS + 1) % MASK} at index {SHOWN}",
    ),
    "consistency_x: without consistency": (
        {"consistency": None, "xu": None},
        ValueError,
        "consistency_x needs consistency: the student's logits at x_u",
    ),
    # log_weights
    "log_weights: not a tensor": (
        {"log_weights": [0.0]},
        TypeError,
        "log_weights must be a Tensor, got list [0.0]",
    ),
    "log_weights: integers": (
        {"log_weights": tokens(B, N)},
        TypeError,
        "log_weights must be floating point, got torch.int64",
    ),
    "log_weights: shape": (
        {"log_weights": logits(N)},
        ValueError,
        f"log_weights must have shape (B, N) = {(B, N)}, got {(N,)}",
    ),
    "log_weights: device": (
        {"log_weights": meta(B, N)},
        ValueError,
        "log_weights must be on the device of student (cpu), got meta",
    ),
    "log_weights: NaN": (
        {"log_weights": changed("log_weights", (1, 2), NAN)},
        ValueError,
        "log_weights must hold neither NaN nor +inf, got nan at index (1, 2)",
    ),
    "log_weights: +inf": (
        {"log_weights": changed("log_weights", (0, 1), INF)},
        ValueError,
        "log_weights must hold neither NaN nor +inf, got inf at index (0, 1)",
    ),
    "log_weights: all -inf": (
        {"log_weights": changed("log_weights", 1, -INF)},
        ValueError,
        "log_weights must leave at least one component of every example a weight above -inf",
    ),
    # the rest
    "control_variate: string": (
        {"control_variate": "no"},
        TypeError,
        "control_variate must be True or False, got str 'no'",
    ),
    "control_variate: tensor": (
        {"control_variate": torch.tensor(True)},
        TypeError,
        "control_variate must be True or False, got Tensor of shape (), torch.bool, cpu",
    ),
    "return_terms: int": (
        {"return_terms": 1},
        TypeError,
        "return_terms must be True or False, got int 1",
    ),
    "reduction: unknown": (
        {"reduction": "average"},
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got 'average'",
    ),
    "reduction: None": (
        {"reduction": None},
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got None",
    ),
    "backend: unknown": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of 'auto', 'triton', 'cpu', 'torch', 'reference', got 'cuda'",
    ),
    "generator: seed": (
        {"generator": 42},
        TypeError,
        "generator must be a torch.Generator or None, got int 42",
    ),
}
for weight in ("data_weight", "teacher_weight", "consistency_weight", "component_weight"):
    CASES |= {
        f"{weight}: string": (
            {weight: "1"},
            TypeError,
            f"{weight} must be a float or a Tensor, got str '1'",
        ),
        f"{weight}: bool": (
            {weight: True},
            TypeError,
            f"{weight} must be a float or a Tensor, got bool True",
        ),
        f"{weight}: None": (
            {weight: None},
            TypeError,
            f"{weight} must be a float or a Tensor, got NoneType None",
        ),
        f"{weight}: negative": (
            {weight: -0.5},
            ValueError,
            f"{weight} must be finite and not negative, got -0.5",
        ),
        f"{weight}: NaN": (
            {weight: NAN},
            ValueError,
            f"{weight} must be finite and not negative, got nan",
        ),
        f"{weight}: inf": (
            {weight: INF},
            ValueError,
            f"{weight} must be finite and not negative, got inf",
        ),
        f"{weight}: tensor with a negative": (
            {weight: torch.tensor([1.0, -1.0])},
            ValueError,
            f"{weight} must be finite and not negative, got -1.0 at index (1,)",
        ),
        f"{weight}: tensor with NaN": (
            {weight: torch.tensor(NAN)},
            ValueError,
            f"{weight} must be finite and not negative, got nan at index ()",
        ),
        f"{weight}: tensor shape": (
            {weight: torch.ones(B, 1)},
            ValueError,
            f"{weight} must be a float or have shape (B,) = ({B},), got {(B, 1)}",
        ),
        f"{weight}: tensor of bools": (
            {weight: torch.ones(B, dtype=torch.bool)},
            TypeError,
            f"{weight} must hold real numbers, got torch.bool",
        ),
        f"{weight}: tensor device": (
            {weight: meta(B)},
            ValueError,
            f"{weight} must be on the device of student (cpu), got meta",
        ),
        f"{weight}: tensor with a graph": (
            {weight: torch.ones(B, requires_grad=True)},
            ValueError,
            f"{weight} is not differentiable: pass {weight}.detach()",
        ),
    }
