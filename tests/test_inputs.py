"""Wrong arguments of the loss: one error that names argument, expected and actual, before any work.

Every case starts from a right call and spoils one argument.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from loss_cases import make_problem, run_loss

import di4c_fast
from di4c_fast import LinearHead
from di4c_fast.inputs import prepare_inputs, prepare_log_weights
from di4c_fast.rng import draw_seed

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
        "backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'",
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


@pytest.fixture
def no_work(monkeypatch):
    """Any backend that is asked for fails."""

    def refuse(*_):
        raise AssertionError("a backend was asked for before the arguments were checked")

    monkeypatch.setattr(di4c_fast.backends, "loss_backend", refuse)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", CASES)
def test_wrong_argument_of_loss_is_named_before_any_work(case):
    arguments, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)) as caught:
        run_loss(right(), **arguments)
    assert type(caught.value) is kind


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("generator")])
def test_mistakes_do_not_advance_the_generator(case):
    arguments, kind, _ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    # The draws are made inside, unless they are what is wrong.
    drawn = {} if "consistency_x" in case else {"consistency_x": None}
    with pytest.raises(kind):
        run_loss(right(), **(drawn | {"generator": generator} | arguments))
    assert torch.equal(generator.get_state(), before)


ROW_CASES = {
    "x: not a tensor": ({"x": None}, TypeError, "x must be a Tensor, got NoneType None"),
    "x: dtype": (
        {"x": tokens(B, D).int()},
        TypeError,
        "x must have dtype torch.int64, got torch.int32",
    ),
    "x: rank 1": (
        {"x": tokens(D)},
        ValueError,
        f"x must have shape (B, D) = {(B, D)} or (B, K, D), got {(D,)}",
    ),
    "x: rank 4": (
        {"x": tokens(1, B, K, D)},
        ValueError,
        f"x must have shape (B, D) = {(B, D)} or (B, K, D), got {(1, B, K, D)}",
    ),
    "x: positions": (
        {"x": tokens(B, D + 1)},
        ValueError,
        f"x must have shape (B, D) = {(B, D)}, got {(B, D + 1)}",
    ),
    "x: positions of rows": (
        {"x": tokens(B, K, D + 1)},
        ValueError,
        f"x must have shape (B, K, D) = {(B, K, D)}, got {(B, K, D + 1)}",
    ),
    "x: batch": (
        {"x": tokens(B + 1, K, D)},
        ValueError,
        f"x must have shape (B, K, D) = {(B, K, D)}, got {(B + 1, K, D)}",
    ),
    "x: device": (
        {"x": meta(B, D, dtype=torch.int64)},
        ValueError,
        "x must be on the device of student (cpu), got meta",
    ),
    "x: range": (
        {"x": changed("consistency_x", (1, 1, 1), V), "valid": None},
        ValueError,
        f"x must hold token ids in [0, {V}), got {V} at index (1, 1, 1)",
    ),
    "x: mask where it counts": (
        {"x": changed("x0", AT, MASK)},
        ValueError,
        f"x must not hold mask_id = {MASK} at positions that count, got {MASK}",
    ),
    "student: rank": (
        {"student": logits(N, D, V)},
        ValueError,
        f"student must have shape (B, N, D, V), got {(N, D, V)}",
    ),
    "mask_id: range": (
        {"mask_id": V},
        ValueError,
        f"mask_id must be in [0, V) = [0, {V}), got {V}",
    ),
    "xt: without mask_id": ({"mask_id": None}, ValueError, "xt needs mask_id"),
    "valid: dtype": (
        {"valid": tokens(B, D)},
        TypeError,
        "valid must have dtype torch.bool, got torch.int64",
    ),
    "log_weights: shape": (
        {"log_weights": logits(B, N + 1)},
        ValueError,
        f"log_weights must have shape (B, N) = {(B, N)}, got {(B, N + 1)}",
    ),
    "backend: unknown": ({"backend": "numpy"}, ValueError, "backend must be one of 'auto'"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
@pytest.mark.parametrize("case", ROW_CASES)
def test_wrong_argument_of_token_rows_is_named_before_any_work(case, function):
    arguments, kind, message = ROW_CASES[case]
    problem = right()
    call = {name: problem[name] for name in ("student", "xt", "mask_id", "valid", "log_weights")}
    call = call | {"x": problem["x0"]} | arguments
    with pytest.raises(kind, match=re.escape(message)):
        function(call.pop("student"), call.pop("x"), **call)


def test_mask_of_the_only_class_is_refused():
    with pytest.raises(ValueError, match="mask_id excludes the only class: V must be at least 2"):
        di4c_fast.loss(logits(1, 2, 3, 1), logits(1, 3, 1), tokens(1, 3), mask_id=0)


def test_triton_backend_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot run: .+'):
        run_loss(right(), backend="triton")


def test_mask_tokens_are_welcome_where_nothing_counts():
    problem = right()
    there = tuple(int(i) for i in (~counted).nonzero()[0])
    problem["x0"] = changed("x0", there, MASK)
    problem["consistency_x"] = changed("consistency_x", (there[0], slice(None), there[1]), MASK)
    expected = run_loss(right())
    assert torch.equal(run_loss(problem), expected)


def test_dtensors_are_refused(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = tensor.distribute_tensor(right()["student"], mesh, [tensor.Replicate()])
        with pytest.raises(TypeError, match="student is a DTensor, which is not supported"):
            run_loss(right(student=sharded))
    finally:
        distributed.destroy_process_group()


# What right arguments become


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
