"""Wrong calls of `sample`: what is changed, the kind of error and its message."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from di4c_fast.draw.api import sample

INF = math.inf
CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": [0.0]}, TypeError, "logits must be a Tensor of logits or a Head"),
    ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits must be floating point"),
    ({"logits": torch.zeros(2, 0)}, ValueError, "at least one column, got shape (2, 0)"),
    ({"logits": torch.tensor(0.0)}, ValueError, "must have at least 1 dim"),
    ({"temperature": -0.1}, ValueError, "temperature must be finite and at least 0, got -0.1"),
    ({"temperature": math.nan}, ValueError, "temperature must be finite"),
    ({"temperature": True}, TypeError, "temperature must be a number, got bool True"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got str 'hot'"),
    (
        {"temperature": torch.tensor([1.0, -1.0])},
        ValueError,
        "temperature must be finite and at least 0, got -1.0 at index (1,)",
    ),
    ({"temperature": torch.ones(3)}, ValueError, "temperature must have shape … = (2,)"),
    ({"temperature": torch.tensor(1)}, TypeError, "temperature must be floating point"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_k": 2.0}, TypeError, "top_k must be an int, got float 2.0"),
    ({"top_p": 0.0}, ValueError, "top_p must be in (0, 1], got 0.0"),
    ({"top_p": 1.5}, ValueError, "top_p must be in (0, 1], got 1.5"),
    ({"top_p": "0.9"}, TypeError, "top_p must be a number, got str '0.9'"),
    ({"guidance": torch.zeros(2, 5)}, TypeError, "guidance must be a pair (unconditional"),
    ({"guidance": (torch.zeros(2, 4), 1.0)}, ValueError, "guidance[0] must have … = (2, 5)"),
    ({"guidance": (torch.zeros(2, 5), None)}, TypeError, "guidance[1] must be a number"),
    ({"guidance": (torch.zeros(2, 5), INF)}, ValueError, "guidance[1] must be finite"),
    ({"guidance": (None, 1.0)}, TypeError, "guidance[0] must be a Tensor of logits"),
    ({"mask_id": 5}, ValueError, "mask_id must be in [0, V) = [0, 5), got 5"),
    ({"mask_id": -1}, ValueError, "mask_id must be in …, got -1"),
    ({"mask_id": 1.0}, TypeError, "mask_id must be an int"),
    ({"logits": torch.zeros(2, 1), "mask_id": 0}, ValueError, "excludes the only token"),
    ({"seed": 1.5}, TypeError, "seed must be an int, got float 1.5"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed must have shape"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed must have dtype torch.int64"),
    ({"seed": 1, "generator": torch.Generator()}, ValueError, "seed and generator cannot both"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int 3"),
    ({"step": "1"}, TypeError, "step must be an int"),
    ({"step": torch.arange(2)}, ValueError, "step must have shape"),
    ({"row_keys": torch.arange(3)}, ValueError, "row_keys must have shape … = (2,)"),
    ({"row_keys": torch.ones(2)}, TypeError, "row_keys must have dtype torch.int64"),
    (
        {"row_keys": torch.empty(2, dtype=torch.int64, device="meta")},
        ValueError,
        "device of logits",
    ),
    ({"want": "logprob"}, ValueError, "want must hold names out of …, got 'logprob'"),
    ({"want": ("log_prob", "token")}, ValueError, "want must hold …, got 'token'"),
    ({"confidence_dtype": torch.int64}, ValueError, "confidence_dtype must be None or one of"),
    ({"budget_bytes": 0}, ValueError, "budget_bytes must be at least 1, got 0"),
]


def call(**changes: Any) -> None:
    arguments = {"logits": torch.zeros(2, 5), **changes}
    sample(arguments.pop("logits"), **arguments)


TABLES = {
    "sample": [
        (functools.partial(call, **changes), changes, kind, message)
        for changes, kind, message in CASES
    ]
}
