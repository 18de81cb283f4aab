"""The loss held against values recorded from the authors' own code (sony/di4c).

`tests/data/recorded_<domain>.safetensors` holds, for the three systems of the paper, the inputs of
one training loss in the terms of `di4c_fast.loss` and what the authors' code made of them in
float64: the loss, the terms it forms on the way, and the gradient of the loss with respect to the
student's logits (location and log-scale for pixels). Metadata: repository, commit, source, and one
line per case. Tensors are named `case/tensor`; weights are per example, after the schedules.

The pixel system distils its components in a call of its own at the smallest time, with one example
per component; these tensors are named `low_*`, and the recorded loss is the sum of both calls.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import NamedTuple

import pytest
import torch
from loss_cases import TERMS
from safetensors import safe_open
from torch import Tensor

import di4c_fast
from di4c_fast import backends

DATA = pathlib.Path(__file__).parent / "data"
DOMAINS = ("masked_language", "vq_image", "gaussian_pixels")
COMMIT = "ac61ff9fe8e85120f9e1d2a8c5a332f8b8353dd3"

# Both sides evaluate the same formula. In float64 rounding leaves about 1e-14, or 1e-11 where the
# logistic head has a bin of no mass, and 1e-9 is far below what any difference in meaning makes
# (the eps of the logistic head, the smallest constant there is, makes 1e-7 to 1e-5). In float32 the
# inputs are rounded by 6e-8, which the near-converged cases and the logistic head turn into 5e-6.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}

TERM_WEIGHTS = dict(TERMS)


@functools.cache
def _recording(domain: str) -> tuple[dict[str, str], dict[str, dict], dict[str, dict[str, Tensor]]]:
    """Metadata, case descriptions, and the tensors of each case."""
    with safe_open(str(DATA / f"recorded_{domain}.safetensors"), framework="pt") as file:
        metadata = file.metadata()
        cases: dict[str, dict] = json.loads(metadata["cases"])
        tensors: dict[str, dict[str, Tensor]] = {case: {} for case in cases}
        for key in file.keys():  # noqa: SIM118 - a file handle, not a dict
            case, name = key.split("/")
            tensors[case][name] = file.get_tensor(key)
    return metadata, cases, tensors


class Evaluation(NamedTuple):
    loss: Tensor
    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]


def _head(tensors: dict[str, Tensor], prefix: str, case: dict) -> di4c_fast.Head | Tensor | None:
    if f"{prefix}_logits" in tensors:
        return tensors[f"{prefix}_logits"]
    if f"{prefix}_mu" in tensors:
        return di4c_fast.LogisticHead(
            tensors[f"{prefix}_mu"],
            tensors[f"{prefix}_log_scale"],
            case["num_classes"],
            eps=case["eps"],
            clamp=case["clamp"],
        )
    return None


@functools.cache
def _evaluate(domain: str, name: str, backend: str, dtype: torch.dtype, device: str) -> Evaluation:
    """Loss, terms and gradients of one recorded case by one of our backends."""
    _, cases, recorded = _recording(domain)
    case = cases[name]
    tensors = {
        key: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype).clone()
        for key, tensor in recorded[name].items()
    }
    wanted = {key.removeprefix("grad_") for key in tensors if key.startswith("grad_")}
    for key in wanted:
        tensors[key].requires_grad_()

    value, terms = di4c_fast.loss(
        _head(tensors, "student", case),
        _head(tensors, "teacher", case),
        tensors["x0"],
        consistency=_head(tensors, "consistency", case),
        consistency_x=tensors.get("consistency_x"),
        xt=tensors.get("xt"),
        xu=tensors.get("xu"),
        mask_id=case.get("mask_id"),
        control_variate=case["control_variate"],
        reduction="mean",
        backend=backend,
        return_terms=True,
        **{weight: tensors[weight] for weight in sorted(set(TERM_WEIGHTS.values()))},
    )
    found = {term: getattr(terms, term) for term in TERM_WEIGHTS}
    if "low_student_mu" in tensors:
        low, low_terms = di4c_fast.loss(
            _head(tensors, "low_student", case),
            _head(tensors, "low_teacher", case),
            tensors["low_x0"],
            data_weight=0.0,
            teacher_weight=0.0,
            consistency_weight=0.0,
            component_weight=1.0,
            reduction="mean",
            backend=backend,
            return_terms=True,
        )
        value = value + low
        # Theirs is per example, the mean over its components.
        found["low_component"] = low_terms.component.view(len(tensors["x0"]), -1).mean(1)
    value.backward()
    return Evaluation(
        value.detach().cpu().double(),
        {term: tensor.cpu().double() for term, tensor in found.items()},
        {key: tensors[key].grad.cpu().double() for key in sorted(wanted)},
    )


def _run(backend: str, dtype: torch.dtype, device: str = "cpu"):
    marks = pytest.mark.gpu if device == "cuda" else ()
    where = {"cuda": "-cuda", "cpu": "-interpreter" if backend == "triton" else ""}[device]
    name = f"{backend}{where}-{str(dtype).removeprefix('torch.')}"
    return pytest.param((backend, dtype, device), id=name, marks=marks)


RUNS = [
    _run("reference", torch.float64),
    _run("reference", torch.float32),
    _run("torch", torch.float64),
    _run("torch", torch.float32),
    _run("triton", torch.float32),
    _run("torch", torch.float32, "cuda"),
    _run("triton", torch.float32, "cuda"),
]
CASES = [(domain, name) for domain in DOMAINS for name in _recording(domain)[1]]


@pytest.fixture(params=CASES, ids="-".join)
def case(request) -> tuple[str, str]:
    return request.param


@pytest.fixture(params=RUNS)
def run(request, case) -> tuple[str, torch.dtype, str]:
    backend, dtype, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if backend == "triton":
        reason = backends.unavailable("triton", torch.device(device))
        if reason is not None:
            pytest.skip(f'backend="triton" cannot run: {reason}')
    return backend, dtype, device


@pytest.mark.parametrize("domain", DOMAINS)
def test_recordings_name_the_code_they_come_from(domain):
    metadata, cases, _ = _recording(domain)
    assert metadata["repository"] == "https://github.com/sony/di4c"
    assert metadata["commit"] == COMMIT
    assert metadata["source"]
    assert all(case["what"] for case in cases.values())


def test_loss_equals_the_authors_loss(case, run):
    domain, name = case
    expected = _recording(domain)[2][name]["loss"].item()
    actual = _evaluate(domain, name, *run).loss.item()
    assert actual == pytest.approx(expected, rel=TOLERANCE[run[1]], abs=0)


def test_terms_equal_the_authors_terms(case, run):
    # A correlation is a difference of sums of many nats and may be near 0, so the error is
    # relative to the term or to 1 nat, whichever is larger. The authors' code exposes a term
    # where its weight is positive; elsewhere there is nothing to compare.
    domain, name = case
    recorded = _recording(domain)[2][name]
    compared = 0
    for term, actual in _evaluate(domain, name, *run).terms.items():
        if term == "low_component":
            active = torch.ones_like(recorded[term], dtype=torch.bool)
        else:
            active = recorded[TERM_WEIGHTS[term]] > 0
        if not active.any():
            continue
        expected = recorded[term][active]
        error = (actual[active] - expected).abs() / expected.abs().clamp_min(1.0)
        assert error.max() <= TOLERANCE[run[1]], (term, actual[active], expected)
        compared += 1
    assert compared >= 3


def test_gradients_equal_the_authors_gradients(case, run):
    # Relative to the norm of each example's gradient: single elements are differences of nearly
    # equal numbers (at a converged student all of them are), so their own relative error means
    # nothing, and per example so that a small one cannot hide behind a large one.
    domain, name = case
    recorded = _recording(domain)[2][name]
    gradients = _evaluate(domain, name, *run).gradients
    assert gradients
    for key, actual in gradients.items():
        expected = recorded[f"grad_{key}"]
        assert actual.shape == expected.shape
        difference = (actual - expected).flatten(1).norm(dim=1)
        error = difference / expected.flatten(1).norm(dim=1)
        assert error.max() <= TOLERANCE[run[1]], (key, error)


def test_token_rows_equal_the_authors_correlation_and_joint_likelihood(case, backend):
    domain, name = case
    _, cases, recorded = _recording(domain)
    tensors = recorded[name]
    controlled = cases[name]["control_variate"]
    score, sign = (di4c_fast.correlation, 1) if controlled else (di4c_fast.mixture_log_prob, -1)
    student = _head(tensors, "student", cases[name])
    masks = {"xt": tensors.get("xt"), "mask_id": cases[name].get("mask_id"), "backend": backend}
    tolerance = {"rtol": TOLERANCE[torch.float64], "atol": TOLERANCE[torch.float64]}
    at_data = sign * score(student, tensors["x0"], **masks)
    torch.testing.assert_close(at_data, tensors["data_correlation"], **tolerance)
    if "consistency_x" in tensors:
        at_draws = sign * score(student, tensors["consistency_x"], **masks).mean(1)
        torch.testing.assert_close(at_draws, tensors["consistency_correlation"], **tolerance)
