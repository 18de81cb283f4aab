"""The options of an example: a frozen record that a run directory remembers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


def option(default: Any, text: str, minimum: float, maximum: float = math.inf) -> Any:
    """A field of a `Recipe`: its default, its help text, and the range that is allowed."""
    return dataclasses.field(
        default=default, metadata={"help": text, "minimum": minimum, "maximum": maximum}
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run computes. Each field of a subclass is an option of its command line.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, tuple):
                if not isinstance(value, tuple) or not value:
                    raise TypeError(
                        f"{field.name} must be a tuple of at least one int, got {value!r}"
                    )
                if list(value) != sorted(set(value)):
                    raise ValueError(f"{field.name} must increase, got {_words(value)}")
            for item in value if isinstance(value, tuple) else (value,):
                self._check_number(field, item)

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

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they come back from a JSON file."""
        fields = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }


def _words(values: tuple[Any, ...]) -> str:
    return " ".join(str(value) for value in values)
