"""One runner for wrong arguments: every table of them is a list of `Wrong` calls."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from naming import stable_id


class Wrong(NamedTuple):
    """What is spoilt in a right call, the kind of error, and its message.

    `...` in the message stands for anything; the message may have more at both ends.
    """

    what: Any
    kind: type[Exception]
    message: str

    @contextlib.contextmanager
    def raises(self) -> Iterator[None]:
        """Exactly this kind of error, its message naming argument, expected and actual."""
        pattern = ".*".join(re.escape(part) for part in self.message.split("..."))
        with pytest.raises(self.kind, match=pattern) as caught:
            yield
        assert type(caught.value) is self.kind


def wrong(cases: Sequence[tuple] | Mapping[str, tuple]) -> pytest.MarkDecorator:
    """Parametrises a test over `wrong`, the cases as `Wrong`: of `ValueError` if they name none."""
    if not isinstance(cases, Mapping):
        cases = {f"{number}-{stable_id(case[-1])}": case for number, case in enumerate(cases)}
    found = [Wrong(what, *(kind or [ValueError]), said) for what, *kind, said in cases.values()]
    return pytest.mark.parametrize("wrong", found, ids=list(cases))
