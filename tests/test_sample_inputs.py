"""Bad input of `sample`: every message names the argument and what came."""

from __future__ import annotations

import math

import pytest
import torch
from sample_cases import streamed
from wrong_arguments import Wrong, wrong

from di4c_fast.draw.api import sample

INF = math.inf


def test_rows_without_an_allowed_token_are_named():
    logits = torch.zeros(2, 3, 200)
    logits[1, 2], logits[1, 2, 7] = -INF, 0.0
    streamed(logits, seed=0)
    with pytest.raises(ValueError, match=r"no token in row \(1, 2\): all are -inf or the mask_id"):
        streamed(logits, seed=0, mask_id=7)
    with pytest.raises(ValueError, match="logits allow no token in row"):
        sample(logits, seed=0, mask_id=7, backend="reference")


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


WRONG = [
    ({"logits": [0.0]}, TypeError, "logits must be a Tensor of logits or a Head"),
    ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits must be floating point"),
    ({"logits": torch.zeros(2, 0)}, "at least one column, got shape (2, 0)"),
    ({"logits": torch.tensor(0.0)}, "must have at least 1 dim"),
    ({"temperature": -0.1}, "temperature must be finite and at least 0, got -0.1"),
    ({"temperature": math.nan}, "temperature must be finite"),
    ({"temperature": True}, TypeError, "temperature must be a number, got bool True"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got str 'hot'"),
    (
        {"temperature": torch.tensor([1.0, -1.0])},
        "temperature must be finite and at least 0, got -1.0 at index (1,)",
    ),
    ({"temperature": torch.ones(3)}, "temperature must have shape ... = (2,)"),
    ({"temperature": torch.tensor(1)}, TypeError, "temperature must be floating point"),
    ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ({"top_k": 2.0}, TypeError, "top_k must be an int, got float 2.0"),
    ({"top_p": 0.0}, "top_p must be in (0, 1], got 0.0"),
    ({"top_p": 1.5}, "top_p must be in (0, 1], got 1.5"),
    ({"top_p": "0.9"}, TypeError, "top_p must be a number, got str '0.9'"),
    ({"guidance": torch.zeros(2, 5)}, TypeError, "guidance must be a pair (unconditional"),
    ({"guidance": (torch.zeros(2, 4), 1.0)}, "guidance[0] must have ... = (2, 5)"),
    ({"guidance": (torch.zeros(2, 5), None)}, TypeError, "guidance[1] must be a number"),
    ({"guidance": (torch.zeros(2, 5), INF)}, "guidance[1] must be finite"),
    ({"guidance": (None, 1.0)}, TypeError, "guidance[0] must be a Tensor of logits"),
    ({"mask_id": 5}, "mask_id must be in [0, V) = [0, 5), got 5"),
    ({"mask_id": -1}, "mask_id must be in ..., got -1"),
    ({"mask_id": 1.0}, TypeError, "mask_id must be an int"),
    ({"logits": torch.zeros(2, 1), "mask_id": 0}, "excludes the only class"),
    ({"seed": 1.5}, TypeError, "seed must be an int, got float 1.5"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must have shape"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed must have dtype torch.int64"),
    ({"seed": 1, "generator": torch.Generator()}, "seed and generator cannot both"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int 3"),
    ({"step": "1"}, TypeError, "step must be an int"),
    ({"step": torch.arange(2)}, "step must have shape"),
    ({"row_keys": torch.arange(3)}, "row_keys must have shape ... = (2,)"),
    ({"row_keys": torch.ones(2)}, TypeError, "row_keys must have dtype torch.int64"),
    ({"row_keys": torch.empty(2, dtype=torch.int64, device="meta")}, "device of logits"),
    ({"backend": "cuda"}, "backend must be one of ..., got 'cuda'"),
    ({"want": "logprob"}, "want must hold names out of ..., got 'logprob'"),
    ({"want": ("log_prob", "token")}, "want must hold ..., got 'token'"),
    ({"confidence_dtype": torch.int64}, "confidence_dtype must be None or one of"),
    ({"budget_bytes": 0}, "budget_bytes must be at least 1, got 0"),
]


@wrong(WRONG)
def test_wrong_arguments_are_named(wrong: Wrong):
    arguments = {"logits": torch.zeros(2, 5), **wrong.what}
    with wrong.raises():
        sample(arguments.pop("logits"), **arguments)


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e300])
def test_a_temperature_that_float32_cannot_hold_is_named(temperature):
    with pytest.raises(ValueError, match="temperature must be 0 or between"):
        sample(torch.zeros(2, 5), temperature=temperature, seed=0)
