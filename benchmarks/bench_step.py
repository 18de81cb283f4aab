"""A whole distillation step: `pytest benchmarks/bench_step.py`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.replay import REPLAY

pytestmark = pytest.mark.benchmark(timer=REPLAY)


@pytest.mark.measures("step")
def test_step(measured: Any, group: str, variant: str) -> None:
    """Teacher, student twice, loss, backward: the plain way and `di4c_fast.training.step`."""
    measured(group, variant)
