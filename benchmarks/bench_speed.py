"""Every group and variant: `pytest benchmarks -k "language and dense"`."""

from __future__ import annotations

from typing import Any


def test_speed(measured: Any, group: str, variant: str) -> None:
    """The shapes, then the conditions, then the sweeps; a group is measured as a whole."""
    measured(group, variant)
