"""The fuzzer: a short run on every backend; it notices errors of one part in a thousand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from loss_heads import FAST

from di4c_fast.passes import torch as passes
from tools import fuzz

CASES = {"torch": 40, "cpu": 40, "triton": 2}  # an interpreted case takes about a second
WRONG = 1.001


@pytest.mark.parametrize("kind", fuzz.CHECKS)
@pytest.mark.parametrize("backend", FAST)
def test_a_short_run_finds_no_difference(kind, backend, capsys):
    code = fuzz.main(["--backend", backend, "--kind", kind, "--cases", str(CASES[backend])])
    assert code == 0, capsys.readouterr().out


def assert_notices(kind):
    found = (fuzz.difference(kind, seed, "torch") for seed in range(100))
    assert any(found)


@pytest.mark.parametrize("kind", ["loss", "mixture_log_prob", "correlation"])
def test_wrong_log_probabilities_are_noticed(kind, monkeypatch):
    plant_in_forward(monkeypatch, "log_prob")
    assert_notices(kind)


@pytest.mark.parametrize("field", ["mass", "teacher_kl", "consistency_kl", "divergence"])
def test_wrong_sums_over_classes_are_noticed(field, monkeypatch):
    plant_in_forward(monkeypatch, field)
    assert_notices("loss")


def plant_in_forward(monkeypatch, field):
    real = passes.forward

    def forward(chunk):
        real(chunk)
        values = getattr(chunk.statistics, field)
        if values.dtype == torch.float32:
            values[chunk.visit.part] *= WRONG

    monkeypatch.setattr(passes, "forward", forward)


@pytest.mark.parametrize("field", ["probability", "marginal", "component", "kappa"])
def test_wrong_gradients_are_noticed(field, monkeypatch):
    real = passes.backward

    def backward(chunk, factors, gradient):
        value = getattr(factors, field)
        if value.dtype == torch.float32:
            factors = dataclasses.replace(factors, **{field: WRONG * value})
        real(chunk, factors, gradient)

    monkeypatch.setattr(passes, "backward", backward)
    assert_notices("loss")


@pytest.mark.parametrize(
    "field", ["token", "total", "shift", "log_weight", "argmax", "entropy", "margin", "raw_prob"]
)
def test_wrong_draws_are_noticed(field, monkeypatch):
    real = passes.draw

    def draw(*arguments):
        drawn = real(*arguments)
        value = getattr(drawn, field)
        if drawn.total.dtype == torch.float32 and value is not None:
            # Tokens are wrong in every seventh row.
            wrong = value * WRONG if value.is_floating_point() else value.clone()
            if not value.is_floating_point():
                wrong[6::7] += 1
            drawn = dataclasses.replace(drawn, **{field: wrong})
        return drawn

    monkeypatch.setattr(passes, "draw", draw)
    assert_notices("sample")
