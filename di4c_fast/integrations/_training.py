"""What the drop-ins for the training code of Di4C's authors share.

Their five numbers of a step, in their order: the component term ("distil"), the data term (its
correlation with the weight of its time, and the teacher's KL), the data correlation alone, the
consistency terms together, the consistency correlation alone. Each is the mean over the batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..training import DistillConfig, DistillOutput, Schedule, data_weights

__all__ = ["KNOWN", "Numbers", "five_numbers", "schedule_of"]

KNOWN = "sony/di4c at ac61ff9f"


def schedule_of(name: Any) -> Schedule:
    """The schedule of the data term; theirs is constant for every other name."""
    return name if name in ("sigmoid", "linear") else "constant"


def five_numbers(output: DistillOutput, config: DistillConfig) -> Tensor:
    """The five numbers (5,) of a step whose terms were asked for, without a sync."""
    assert output.terms is not None
    data, teacher, consistency, marginal, component = output.terms
    if output.t_min is None:  # the component term of the examples with low times
        low = output.low.to(component.device, non_blocking=True)
        component = component.where(low, 0.0)
    weights = data_weights(output.t, config.data_schedule, config.data_weight)
    both = consistency
    weighted = weights * data
    if config.control_variate:
        weighted, both = weighted + teacher, both + marginal
    numbers = config.component_weight * component, weighted, data, both, consistency
    return torch.stack([number.mean() for number in numbers])


class Numbers:
    """The numbers of the steps since they were last asked for, kept where they were computed."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def add(self, numbers: Tensor) -> None:
        self._kept.append(numbers)

    def fill(self, lists: Iterable[Any], limit: int = 100) -> None:
        """Append what was kept to the five deques, one sync for all; the last `limit` stay."""
        if not self._kept:
            return
        rows = torch.stack(self._kept).tolist()
        self._kept.clear()
        for numbers, values in zip(lists, zip(*rows, strict=True), strict=True):
            numbers.extend(values)
            while len(numbers) > limit:
                numbers.popleft()
