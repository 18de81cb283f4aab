"""Drawing tokens: `pytest benchmarks/bench_sample.py`."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.replay import REPLAY

pytestmark = pytest.mark.benchmark(timer=REPLAY)


@pytest.mark.measures("draw")
def test_draw(measured: Any, group: str, variant: str) -> None:
    """One token per row of logits, with its log-probability."""
    measured(group, variant)


@pytest.mark.measures("ancestral")
def test_ancestral(measured: Any, group: str, variant: str) -> None:
    """Masked ancestral sampling with a transformer, from noise to tokens."""
    measured(group, variant)


@pytest.mark.measures("confidence")
def test_confidence(measured: Any, group: str, variant: str) -> None:
    """Confidence sampling behind a prompt, with the head of a large language model."""
    measured(group, variant)
