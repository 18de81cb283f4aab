"""Names of parametrised tests."""

from __future__ import annotations

import re
from typing import Any


def stable_id(value: Any) -> str:
    """`str(value)` without addresses, so that every process collects the same names."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
