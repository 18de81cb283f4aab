"""The options of the example: one frozen record that a run directory remembers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

POSITIONS = 64
SIDE = 8


def _option(default: Any, text: str, minimum: float, maximum: float = math.inf) -> Any:
    return dataclasses.field(
        default=default, metadata={"help": text, "minimum": minimum, "maximum": maximum}
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run computes. Each field is an option of the command line.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    levels: int = _option(17, "grey levels of a pixel; 17 is the data as it is", 2, 17)
    width: int = _option(96, "width of the transformers, a multiple of 4", 8, 1024)
    layers: int = _option(3, "layers of the transformers", 1, 24)
    teacher_iterations: int = _option(2600, "training iterations of the teacher", 1)
    teacher_batch: int = _option(64, "examples in a batch of the teacher", 1)
    teacher_lr: float = _option(2e-3, "peak learning rate of the teacher", 1e-8, 1.0)
    student_iterations: int = _option(900, "distillation iterations", 1)
    student_batch: int = _option(8, "examples in a batch of the student", 1)
    student_lr: float = _option(1e-3, "peak learning rate of the student", 1e-8, 1.0)
    components: int = _option(16, "N, latent draws of the student per example", 1, 1024)
    draws: int = _option(16, "K, consistency draws per example", 1, 1024)
    latent_dim: int = _option(1, "L, size of the student's latent", 1, 64)
    latent_scale: float = _option(1000.0, "factor on the latent before its sinusoids", 1e-3, 1e5)
    teacher_step: float = _option(0.2, "longest step of the teacher in time, of 1", 1e-4, 1.0)
    data_weight: float = _option(1.0, "weight of the data correlation term", 0.0)
    time_power: float = _option(0.5, "student times are u^power, u uniform; <1 favours noise", 0.05)
    samples: int = _option(4000, "samples per model and step count", 32)
    steps: tuple[int, ...] = _option((1, 2, 4, 8, 16), "step counts to sample with", 1, 4096)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "steps":
                if not isinstance(value, tuple) or not value:
                    raise TypeError(f"steps must be a tuple of at least one int, got {value!r}")
                if list(value) != sorted(set(value)):
                    raise ValueError(f"steps must increase, got {_words(value)}")
            for item in value if isinstance(value, tuple) else (value,):
                self._check_number(field, item)
        if self.width % 4:
            raise ValueError(f"width must be a multiple of 4 (the heads), got {self.width}")

    @staticmethod
    def _check_number(field: dataclasses.Field[Any], value: Any) -> None:
        whole = not isinstance(field.default, float)
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            kind = "an int" if whole else "a number"
            raise TypeError(f"{field.name} must be {kind}, got {value!r}")
        low, high = field.metadata["minimum"], field.metadata["maximum"]
        if not low <= value <= high or value == math.inf:
            bound = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise ValueError(f"{field.name} must be {bound}, got {value}")

    @property
    def mask_id(self) -> int:
        """The mask token comes after the grey levels."""
        return self.levels

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they come back from a JSON file."""
        fields = dataclasses.asdict(self)
        return {**fields, "steps": list(self.steps)}


def _words(values: tuple[Any, ...]) -> str:
    return " ".join(str(value) for value in values)
