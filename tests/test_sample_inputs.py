"""Bad input of `sample`: every message names the argument and what came."""

from __future__ import annotations

import math

import pytest
import torch
from sample_cases import normal, streamed

from di4c_fast.draw.api import sample

INF = math.inf


def test_rows_without_an_allowed_token_are_named():
    logits = torch.zeros(2, 3, 200)
    logits[1, 2] = -INF
    for backend in ("torch", "reference"):
        with pytest.raises(ValueError, match="logits allow no token in row"):
            sample(logits, seed=0, backend=backend)
    with pytest.raises(ValueError, match=r"no token in row \(1, 2\)"):
        streamed(logits, seed=0)
    logits[1, 2, 7] = 0.0
    streamed(logits, seed=0)
    with pytest.raises(ValueError, match=r"no token in row \(1, 2\): all are -inf or the mask_id"):
        streamed(logits, seed=0, mask_id=7)


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (INF, r"\+inf")])
@pytest.mark.parametrize("arguments", [{}, {"top_p": 0.5}, {"temperature": 0}, {"top_k": 3}])
def test_logits_that_are_not_numbers_are_named(value, kind, arguments):
    logits = torch.zeros(200, 300)
    logits[130, 299] = value
    with pytest.raises(
        ValueError, match=rf"logits must not hold {kind}, got it in row \(130,\) at 299"
    ):
        streamed(logits, seed=0, **arguments)
    with pytest.raises(ValueError, match=f"logits must not hold {kind}"):
        streamed(logits.bfloat16(), seed=0, confidence_dtype=torch.bfloat16, **arguments)


def test_unconditional_logits_that_leave_no_distribution_are_named():
    logits, unconditional = torch.zeros(4, 5), torch.zeros(4, 5)
    unconditional[2, 1] = math.nan
    with pytest.raises(
        ValueError, match=r"guidance\[0\] must not hold NaN, got it in row \(2,\) at 1"
    ):
        streamed(logits, guidance=(unconditional, 1.0), seed=0)
    unconditional[2, 1] = -INF
    with pytest.raises(ValueError, match=r"row \(2,\).*-inf in guidance\[0\] alone"):
        streamed(logits, guidance=(unconditional, 1.0), seed=0)
    logits[2, 1] = -INF
    assert streamed(logits, guidance=(unconditional, 1.0), seed=0).token[2] != 1


def test_unchecked_rows_are_marked_and_leave_the_others_alone():
    logits = normal(4, 300)
    expected = streamed(logits, seed=0, want="all")
    logits[1] = -INF
    logits[2, 5] = math.nan
    draw = streamed(logits, seed=0, want="all", check=False)
    assert draw.token[1:3].tolist() == [-1, -1]
    assert draw.argmax[1:3].tolist() == [-1, -1]
    assert draw.log_prob[1:3].isnan().all()
    for value, before in zip(draw, expected, strict=True):
        assert value[[0, 3]].equal(before[[0, 3]])


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e300])
def test_a_temperature_that_float32_cannot_hold_is_named(temperature):
    with pytest.raises(ValueError, match="temperature must be 0 or between"):
        sample(torch.zeros(2, 5), temperature=temperature, seed=0)
