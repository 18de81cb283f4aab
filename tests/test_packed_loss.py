"""Packed batches: sequences one after the other in a row, each an example of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loss_cases import make_problem, run_loss
from loss_heads import CLOSE, EVERY, FULL, HEADS, head_tensors, single

import di4c_fast

ENDS = torch.tensor([0, 3, 3, 4, 9])
SEQUENCES = len(ENDS) - 1
UPSTREAM = torch.tensor([0.5, 1.0, -2.0, 3.0], dtype=torch.float64)
EXACT = {"rtol": 1e-11, "atol": 1e-12}
BY_ROW = ("logits", "hidden", "mu", "log_scale", "scale")


def packed_problem(**settings: Any) -> dict[str, Any]:
    problem = make_problem(3, batch=1, positions=9, **{**FULL, **settings})
    g = torch.Generator().manual_seed(1)
    problem["log_weights"] = torch.randn(SEQUENCES, 3, generator=g, dtype=torch.float64)
    for name in ("data_weight", "teacher_weight", "consistency_weight", "component_weight"):
        problem[name] = torch.rand(SEQUENCES, generator=g, dtype=torch.float64)
    return problem


def sequence_of(name: str, value: Any, s: int) -> Any:
    """What of an argument belongs to sequence s."""
    if not isinstance(value, torch.Tensor) or name in ("weight", "bias"):
        return value
    if name == "log_weights" or name.endswith("_weight"):
        return value[s : s + 1]
    part = slice(int(ENDS[s]), int(ENDS[s + 1]))
    logits = name in ("student", "teacher", "consistency", "logits", "hidden")
    return value[..., part, :] if logits else value[..., part]


def results(problem, leaves, kind, evaluate) -> dict[str, torch.Tensor]:
    """Values, and gradients of their weighted sum."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    parts = {name: leaf for name, leaf in leaves.items() if name != "log_weights"}
    found = evaluate(problem | {"log_weights": leaves["log_weights"]}, parts, kind)
    (found["loss"] * UPSTREAM).sum().backward()
    return {name: value.detach() for name, value in found.items()} | {
        f"gradient of {name}": leaf.grad for name, leaf in leaves.items()
    }


def at_once(problem, parts, kind, **options):
    call = problem | {"student": HEADS[kind](*parts.values()), "cu_seqlens": ENDS.int()}
    value, terms = run_loss(call, reduction="none", return_terms=True, **options)
    return {"loss": value, **terms._asdict()}


def one_by_one(problem, parts, kind, **options):
    every = []
    for s in range(SEQUENCES):
        own = {name: sequence_of(name, value, s) for name, value in problem.items()}
        rows = {name: sequence_of(name, value, s) for name, value in parts.items()}
        if "bias" in rows and rows["bias"].ndim == 2:
            rows["bias"] = rows["bias"][int(ENDS[s]) : int(ENDS[s + 1])]
        call = own | {"student": HEADS[kind](*rows.values())}
        value, terms = run_loss(call, reduction="none", return_terms=True, **options)
        every.append({"loss": value, **terms._asdict()})
    return {name: torch.cat([one[name] for one in every]) for name in every[0]}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, {}) for kind in HEADS if kind not in ("user, no bias", "logistic, min")]
    + [("linear", {"control_variate": False}), ("tensor", {"mask_id": None, "revealed": False})],
)
@pytest.mark.parametrize("backend", EVERY)
def test_a_packed_batch_gives_what_its_sequences_give_one_by_one(backend, kind, settings):
    if backend == "triton" and (settings or kind not in ("tensor", "linear, bias")):
        pytest.skip("the driver is the same; interpreted kernels are slow")
    classes = 8 if kind.startswith("logistic") else 7
    problem = packed_problem(vocabulary=classes, **settings)
    leaves = head_tensors(kind, (1, 3, 9), classes) | {"log_weights": problem["log_weights"]}
    expected = results(problem, leaves, kind, lambda *call: one_by_one(*call, backend="torch"))
    exact = backend in ("reference", "torch")
    if not exact:
        problem, leaves = single(problem), single(leaves)
    ours = results(problem, leaves, kind, lambda *call: at_once(*call, backend=backend))
    for name, value in ours.items():
        torch.testing.assert_close(
            value, expected[name].to(value.dtype), **(EXACT if exact else CLOSE), msg=name
        )


@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
@pytest.mark.parametrize("backend", EVERY)
def test_token_rows_of_a_packed_batch(backend, function):
    problem = packed_problem(dtype=torch.float32, draws=2)
    names = ("student", "xt", "valid", "log_weights")
    for x in (problem["consistency_x"], problem["x0"]):
        given = {name: problem[name] for name in names}
        ours = function(x=x, mask_id=3, backend=backend, cu_seqlens=ENDS, **given)
        assert ours.shape == (SEQUENCES, *x.shape[1:-1])
        for s in range(SEQUENCES):
            own = {name: sequence_of(name, value, s) for name, value in given.items()}
            row = sequence_of("x", x, s)
            expected = function(x=row, mask_id=3, backend="torch", **own)
            torch.testing.assert_close(ours[s : s + 1], expected, **CLOSE)


def test_every_backend_draws_the_same_tokens_and_the_mean_is_over_sequences():
    problem = packed_problem(dtype=torch.float32)
    del problem["consistency_x"]
    values = []
    for backend in ("reference", "torch", "cpu"):
        if di4c_fast.backends.unavailable(backend, torch.device("cpu")):
            continue
        call = problem | {"cu_seqlens": ENDS, "backend": backend}
        each = run_loss(call, generator=torch.Generator().manual_seed(4), reduction="none")
        mean = run_loss(call, generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(mean, each.mean())
        values.append(each)
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], **CLOSE)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 3, 9], "cu_seqlens must be a Tensor, got list"),
        (torch.tensor([0.0, 9.0]), "cu_seqlens must be int32 or int64, got torch.float32"),
        (torch.tensor([[0, 9]]), r"cu_seqlens must have shape \(S \+ 1,\), got \(1, 2\)"),
        (ENDS[:0], r"cu_seqlens must have shape \(S \+ 1,\), got \(0,\)"),
        (torch.tensor([0, 5, 4, 9, 9]), "must rise from 0 to the 9 positions, got 4 at index"),
        (torch.tensor([1, 3, 4, 5, 9]), "must rise from 0 to the 9 positions, got 1 at index"),
        (torch.tensor([0, 3, 4, 5, 8]), "must rise from 0 to the 9 positions, got 8 at index"),
        (torch.tensor([0, 9]), r"log_weights must have shape \(S, N\) = \(1, 3\), got \(4, 3\)"),
    ],
)
def test_wrong_cumulative_lengths_are_named(ends, message):
    problem = packed_problem()
    for name in ("data_weight", "teacher_weight", "consistency_weight", "component_weight"):
        problem.pop(name)
    with pytest.raises((TypeError, ValueError), match=message):
        run_loss(problem, cu_seqlens=ends)


def test_a_packed_batch_is_one_row():
    problem = make_problem(3, batch=2)
    with pytest.raises(ValueError, match=r"student must have shape \(1, N, T, V\) with cu_seqlens"):
        run_loss(problem, cu_seqlens=ENDS)
