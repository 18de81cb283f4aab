"""The loss, forward and backward: `pytest benchmarks/bench_loss.py`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.replay import REPLAY

pytestmark = pytest.mark.benchmark(timer=REPLAY)


@pytest.mark.measures("loss")
def test_loss(measured: Any, group: str, variant: str) -> None:
    """Every way to compute the loss, at every shape."""
    measured(group, variant)


@pytest.mark.measures("linear-memory")
def test_linear_head_memory(measured: Any, group: str, variant: str) -> None:
    """Peak memory from hidden states at growing D; nothing is timed."""
    measured(group, variant)


@pytest.mark.measures("scaling")
def test_scaling(measured: Any, group: str, variant: str) -> None:
    """Time and memory over N, D, V and the masked share, one varied at a time."""
    measured(group, variant)
