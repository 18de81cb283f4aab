"""Wrong arguments of the loss: one error that names argument, expected and actual, before any work.

Every case starts from a right call and spoils one argument.
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from loss_cases import make_problem, run_loss
from wrong_arguments import Wrong, wrong

import di4c_fast
from di4c_fast import LinearHead

B, N, K, D, V, MASK = 2, 3, 2, 5, 7, 6
FLOATING = "floating point (float64, float32, bfloat16 or float16)"
NAN, INF = math.nan, math.inf
Cases = dict[str, tuple]


def right(**settings) -> dict:
    return make_problem(0, mask_id=MASK, revealed=True, padded=True, weighted=True) | settings


def changed(name: str, index, value) -> torch.Tensor:
    """An argument of the right call with one element replaced."""
    tensor = right()[name].clone()
    tensor[index] = value
    return tensor


def zeros(*shape: int, dtype=torch.float64, device="cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


def tokens(*shape: int, device="cpu") -> torch.Tensor:
    return zeros(*shape, dtype=torch.int64, device=device)


def first(condition: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in condition.nonzero()[0])


counted = (right()["xt"] == MASK) & right()["valid"]
AT = first(counted)  # a position that counts
SHOWN = first((right()["xu"] != MASK) & counted[:, None])  # one that a draw reveals, too
OTHER = (int(right()["xu"][SHOWN]) + 1) % MASK


def head_cases(name: str, shape: tuple[int, ...], shapes: dict[str, str]) -> Cases:
    """shapes: further wrong ones as text, and what the message says of each."""
    must = f"{name} must be a Tensor of logits or a Head, got"
    cases: Cases = {
        "not a tensor": ("u", TypeError, f"{must} str 'u'"),
        "list": ([[1.0]], TypeError, f"{must} list [[1.0]]"),
        "complex": (zeros(*shape, dtype=torch.complex64), TypeError, "got torch.complex64"),
        "fp8": (zeros(*shape).to(torch.float8_e5m2), TypeError, "got torch.float8_e5m2"),
    }
    for dtype in (torch.int64, torch.bool):
        value = zeros(*shape, dtype=dtype)
        cases[str(dtype)] = (value, TypeError, f"{name} must be {FLOATING}, got {dtype}")
    if name != "student":
        message = f"{name} must be on the device of student (cpu), got meta"
        cases["device"] = (zeros(*shape, device="meta"), ValueError, message)
    for text, said in shapes.items():
        sizes = tuple(int(size) for size in text.split(","))
        cases[f"shape {text}"] = (zeros(*sizes), ValueError, said.format(sizes))
    return {f"{name}: {case}": ({name: what}, *rest) for case, (what, *rest) in cases.items()}


def tensor_cases(
    name: str, letters: str, sizes: tuple[int, ...], dtype=torch.int64, ids: bool = True
) -> Cases:
    """ids: the tensor holds token ids, and so has a range."""
    must, shape = f"{name} must have", f"{name} must have shape ({letters}) = {sizes}, got"
    there = f"{name} must be on the device of student (cpu), got meta"
    cases: Cases = {
        "not a tensor": (3, TypeError, f"{name} must be a Tensor, got int 3"),
        "list": ([[0]], TypeError, f"{name} must be a Tensor, got list [[0]]"),
        "device": (zeros(*sizes, dtype=dtype, device="meta"), there),
    }
    for other in (torch.int16, torch.int32, torch.int64, torch.float64):
        said = (
            f"{name} must be floating point" if dtype == torch.float64 else f"{must} dtype {dtype}"
        )
        if other != dtype:
            cases[str(other)] = (zeros(*sizes, dtype=other), TypeError, f"{said}, got {other}")
    for wanted in (
        sizes[1:],
        (1, *sizes),
        (*sizes[:-1], sizes[-1] + 1),
        (sizes[0] + 1, *sizes[1:]),
    ):
        cases[f"shape {wanted}"] = (zeros(*wanted, dtype=dtype), ValueError, f"{shape} {wanted}")
    found = {f"{name}: {case}": ({name: what}, *rest) for case, (what, *rest) in cases.items()}
    last = tuple(size - 1 for size in sizes)
    for value in (V, V + 3, -1, -100) if ids else ():
        message = f"{name} must hold token ids in [0, {V}), got {value} at index {last}"
        spoilt = changed("x0" if name == "x" else name, last, value)
        found[f"{name}: {value}"] = ({name: spoilt, "valid": None}, ValueError, message)
    return found


def option_cases(name: str, kind: type[Exception], must: str, values: dict) -> Cases:
    """values: the wrong ones, with what the message says that came."""
    return {
        f"{name}: {got}": ({name: value}, kind, f"{name} must {must}, got {got}")
        for got, value in values.items()
    }


def not_masked(name: str, at: object) -> str:
    return (
        f"{name} must not hold mask_id = {MASK} at positions that count, got {MASK} at index {at}"
    )


DRAW = (AT[0], 1, AT[1])
STUDENT = "student must have shape (B, N, D, V), got {}"
TEACHER = (
    "teacher must have shape (B, D, V) or (B, M, D, V) with M >= 1 "
    f"and (B, D, V) = {(B, D, V)}, got {{}}"
)
CONSISTENCY = (
    f"consistency must have shape (B, K, D, V) with K >= 1 and (B, D, V) = {(B, D, V)}, got {{}}"
)
MASK_IDS = option_cases(
    "mask_id",
    TypeError,
    "be an int or None",
    {
        "float 6.0": 6.0,
        "bool True": True,
        "Tensor of shape (), torch.int64, cpu": torch.tensor(6),
    },
) | option_cases("mask_id", ValueError, f"be in [0, V) = [0, {V})", {str(V): V, "-1": -1})
CASES: Cases = {
    **head_cases(
        "student",
        (B, N, D, V),
        {
            f"{B},{D},{V}": STUDENT,
            f"1,{B},{N},{D},{V}": STUDENT,
            f"{B},0,{D},{V}": "student must have N >= 1 components, got shape {}",
            f"{B},{N},{D},0": "student must have V >= 1 classes, got shape {}",
        },
    ),
    "student: rows": (
        {"student": zeros(B * N, D, V)},
        f"got {(B * N, D, V)}; rows of all components become one with student.unflatten(0, (B, N))",
    ),
    "student: head of rows": (
        {"student": LinearHead(zeros(N, D, 4), zeros(V, 4))},
        f"{STUDENT.format((N, D, V))}; rows of all components become one with student.unflatten(B",
    ),
    **head_cases(
        "teacher",
        (B, D, V),
        dict.fromkeys(
            (f"{B},{D}", f"{B + 1},{D},{V}", f"{B},{D + 1},{V}", f"{B},{D},{V - 1}"), TEACHER
        )
        | {f"{B},0,{D},{V}": TEACHER},
    ),
    **head_cases(
        "consistency",
        (B, K, D, V),
        dict.fromkeys((f"{B},{D},{V}", f"{B},{K},{D},{V + 1}", f"{B},0,{D},{V}"), CONSISTENCY),
    ),
    **tensor_cases("x0", "B, D", (B, D)),
    **tensor_cases("xt", "B, D", (B, D)),
    **tensor_cases("xu", "B, K, D", (B, K, D)),
    **tensor_cases("consistency_x", "B, K, D", (B, K, D)),
    **tensor_cases("valid", "B, D", (B, D), torch.bool, ids=False),
    **tensor_cases("log_weights", "B, N", (B, N), torch.float64, ids=False),
    "x0: mask where it counts": ({"x0": changed("x0", AT, MASK)}, not_masked("x0", AT)),
    "consistency_x: mask where it counts": (
        {"consistency_x": changed("consistency_x", DRAW, MASK), "xu": None},
        not_masked("consistency_x", DRAW),
    ),
    "consistency_x: against xu": (
        {"consistency_x": changed("consistency_x", SHOWN, OTHER)},
        f"consistency_x must equal xu at ... that xu has revealed, got {OTHER} at index {SHOWN}",
    ),
    "xt: without mask_id": (
        {"mask_id": None, "xu": None},
        "xt needs mask_id: without it there are no masked positions",
    ),
    "xu: without mask_id": (
        {"mask_id": None, "xt": None},
        "xu needs mask_id: without it no position is revealed",
    ),
    "xu: without consistency": (
        {"consistency": None, "consistency_x": None},
        "xu needs consistency",
    ),
    "consistency_x: without consistency": (
        {"consistency": None, "xu": None},
        "consistency_x needs consistency: the student's logits at x_u",
    ),
    **MASK_IDS,
    **{
        f"log_weights: {value}": (
            {"log_weights": changed("log_weights", (1, 2), value)},
            ValueError,
            f"log_weights must hold neither NaN nor +inf, got {value} at index (1, 2)",
        )
        for value in (NAN, INF)
    },
    "log_weights: all -inf": (
        {"log_weights": changed("log_weights", 1, -INF)},
        "log_weights must leave at least one component of every example a weight above -inf",
    ),
    **option_cases(
        "control_variate",
        TypeError,
        "be True or False",
        {"str 'no'": "no", "Tensor of shape (), torch.bool, cpu": torch.tensor(True)},
    ),
    **option_cases("return_terms", TypeError, "be True or False", {"int 1": 1}),
    **option_cases(
        "reduction", ValueError, "be one of 'mean', 'sum', 'none'", {"'avg'": "avg", "None": None}
    ),
    **option_cases(
        "backend",
        ValueError,
        "be one of 'auto', 'triton', 'cpu', 'torch', 'reference'",
        {"'cuda'": "cuda"},
    ),
    **option_cases("generator", TypeError, "be a torch.Generator or None", {"int 42": 42}),
}
for weight in ("data_weight", "teacher_weight", "consistency_weight", "component_weight"):
    kinds = {"str '1'": "1", "bool True": True, "NoneType None": None}
    numbers = {"-0.5": -0.5, "nan": NAN, "inf": INF, "100000": 10**400}
    tensors = {
        "-1.0 at index (1,)": torch.tensor([1.0, -1.0]),
        "nan at index ()": torch.tensor(NAN),
    }
    shape, there = f"have shape (B,) = ({B},)", "be on the device of student (cpu)"
    CASES |= option_cases(weight, TypeError, "be a float or a Tensor", kinds)
    CASES |= option_cases(weight, ValueError, "be finite and not negative", numbers | tensors)
    CASES |= option_cases(weight, ValueError, f"be a float or {shape}", {f"{(B, 1)}": zeros(B, 1)})
    CASES |= option_cases(weight, ValueError, there, {"meta": zeros(B, device="meta")})
    bools = {"torch.bool": torch.ones(B, dtype=torch.bool)}
    CASES |= option_cases(weight, TypeError, "hold real numbers", bools)
    CASES[f"{weight}: a tensor with a graph"] = (
        {weight: torch.ones(B, requires_grad=True)},
        ValueError,
        f"{weight} is not differentiable: pass {weight}.detach()",
    )


@pytest.fixture
def no_work(monkeypatch):
    """Any backend that is asked for fails."""

    def refuse(*_):
        raise AssertionError("a backend was asked for before the arguments were checked")

    monkeypatch.setattr(di4c_fast.backends, "resolve", refuse)


@pytest.mark.usefixtures("no_work")
@wrong(CASES)
def test_wrong_argument_of_loss_is_named_before_any_work_or_draw(wrong: Wrong):
    # The draws are made inside, unless they are what is wrong.
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    given = {"consistency", "consistency_x"} & wrong.what.keys()
    drawn = {} if given else {"consistency_x": None}
    for call in (right(), right() | drawn | {"generator": generator}):
        with wrong.raises():
            run_loss(call, **wrong.what)
    assert torch.equal(generator.get_state(), before)


SHAPE = f"x must have shape (B, D) = {(B, D)} or (B, K, D), got"
PART = {
    name: CASES[name]
    for name in (
        f"student: shape {B},{D},{V}",
        "valid: torch.int64",
        f"log_weights: shape {(B, N + 1)}",
    )
}
ROWS: Cases = {
    **{n: c for n, c in tensor_cases("x", "B, D", (B, D)).items() if "shape" not in n},
    "x: rank 1": ({"x": tokens(D)}, f"{SHAPE} {(D,)}"),
    "x: rank 4": ({"x": tokens(1, B, K, D)}, f"{SHAPE} {(1, B, K, D)}"),
    **{
        f"x: shape {sizes}": (
            {"x": tokens(*sizes)},
            ValueError,
            f"x must have shape ({letters}) = {wanted}, got {sizes}",
        )
        for letters, wanted, sizes in (
            ("B, D", (B, D), (B, D + 1)),
            ("B, K, D", (B, K, D), (B, K, D + 1)),
            ("B, K, D", (B, K, D), (B + 1, K, D)),
        )
    },
    "x: range of rows": (
        {"x": changed("consistency_x", (1, 1, 1), V), "valid": None},
        f"x must hold token ids in [0, {V}), got {V} at index (1, 1, 1)",
    ),
    "x: mask where it counts": ({"x": changed("x0", AT, MASK)}, not_masked("x", "...")),
    "xt: without mask_id": ({"mask_id": None}, "xt needs mask_id"),
    **option_cases("backend", ValueError, "be one of 'auto'...", {"'numpy'": "numpy"}),
    **PART,
    **MASK_IDS,
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
@wrong(ROWS)
def test_wrong_argument_of_token_rows_is_named_before_any_work(wrong: Wrong, function):
    problem = right()
    call = {name: problem[name] for name in ("student", "xt", "mask_id", "valid", "log_weights")}
    call = call | {"x": problem["x0"]} | wrong.what
    with wrong.raises():
        function(call.pop("student"), call.pop("x"), **call)


def test_mask_of_the_only_class_is_refused():
    with pytest.raises(ValueError, match="mask_id excludes the only class: V must be at least 2"):
        di4c_fast.loss(zeros(1, 2, 3, 1), zeros(1, 3, 1), tokens(1, 3), mask_id=0)


@pytest.mark.parametrize("name", ["student", "teacher", "consistency"])
def test_probabilities_in_place_of_logits_are_warned_of(name):
    problem = right()
    for dtype in (torch.float64, torch.bfloat16):
        probs = problem[name].softmax(-1).to(dtype)
        with pytest.warns(UserWarning, match=rf"{name} must hold logits, got rows that sum to 1"):
            run_loss(problem, **{name: probs}, backend="torch")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run_loss(problem, **{name: probs.log()}, backend="torch")


def test_triton_backend_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r'backend="triton" cannot run: .+'):
        run_loss(right(), backend="triton")


def test_mask_tokens_are_welcome_where_nothing_counts():
    problem = right()
    b, d = first(~counted)
    problem["x0"] = changed("x0", (b, d), MASK)
    problem["consistency_x"] = changed("consistency_x", (b, slice(None), d), MASK)
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
