"""Hands times that the harness measured to pytest-benchmark.

pytest-benchmark times one test after the other, which cannot interleave variants. The harness does,
and this clock then tells pytest-benchmark the same durations through its public `timer` option.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any


class Replay:
    """A timer whose consecutive pairs of readings differ by recorded durations."""

    __name__ = "replay"

    def __init__(self) -> None:
        self._readings: deque[float] = deque()
        self._now = 0.0

    def __call__(self) -> float:
        if self._readings:
            self._now = self._readings.popleft()
        return self._now

    def play(self, benchmark: Any, samples: Sequence[float]) -> None:
        """Give `samples` (seconds) to a `benchmark` fixture that uses this timer."""
        self._readings.clear()
        reading = self._now
        for sample in samples:
            self._readings += (reading, reading + sample)
            reading += sample
        benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)


REPLAY = Replay()
