"""Wrong arguments: one error that names argument, expected and actual, before any work.

The wrong calls stand in tables: those of `loss` in input_cases.py, those of the functions of token
rows here, others in `*_input_cases.py`. A message is a part of that of the error; … stands for
anything.
"""

from __future__ import annotations

import re

import process_input_cases
import pytest
import sample_input_cases
import sampler_input_cases
import torch
from input_cases import (
    AT,
    CASES,
    MASK,
    B,
    D,
    K,
    N,
    V,
    changed,
    counted,
    logits,
    meta,
    right,
    tokens,
)
from loss_cases import run_loss
from naming import stable_id

import di4c_fast


@pytest.fixture
def no_work(monkeypatch):
    """Any backend that is asked for fails."""

    def refuse(*_):
        raise AssertionError("a backend was asked for before the arguments were checked")

    monkeypatch.setattr(di4c_fast.backends, "resolve", refuse)


def refuses(call, kind: type[Exception], message: str) -> None:
    pattern = ".*".join(re.escape(part) for part in message.split("…"))
    with pytest.raises(kind, match=pattern) as caught:
        call()
    assert type(caught.value) is kind


TABLES = sample_input_cases.TABLES | sampler_input_cases.TABLES | process_input_cases.TABLES
WRONG = [(name, *case) for name, table in TABLES.items() for case in table]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [(call, kind, message) for _, call, _, kind, message in WRONG],
    ids=[stable_id(f"{name} {changes}") for name, _, changes, _, _ in WRONG],
)
def test_wrong_arguments_are_named(call, kind, message):
    refuses(call, kind, message)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", CASES)
def test_wrong_argument_of_loss_is_named_before_any_work(case):
    arguments, kind, message = CASES[case]
    refuses(lambda: run_loss(right(), **arguments), kind, message)


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
    refuses(lambda: function(call.pop("student"), call.pop("x"), **call), kind, message)


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
