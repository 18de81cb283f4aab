"""Replacing attributes of foreign objects, and undoing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Handle", "check_attributes"]


class Handle:
    """Undoes replacements: call `remove()`, or use it as a context manager.

    Equivalent Python: `setattr(owner, name, replacement)`, and on removal the attribute as it was
    before; what an instance or class only inherits is uncovered again by deletion.

    Args:
        owner, name, replacement: the first attribute to replace; `replace` takes more. None of
            them: nothing yet.
    """

    def __init__(self, owner: Any = None, name: str | None = None, replacement: Any = None):
        self._undo: list[tuple[Any, str, bool, Any, Any]] = []
        if name is not None:
            self.replace(owner, name, replacement)

    def replace(self, owner: Any, name: str, replacement: Any) -> None:
        """Replace one more attribute. `remove()` undoes them in reverse order."""
        own = vars(owner)
        before = (owner, name, name in own, own.get(name), replacement)
        setattr(owner, name, replacement)
        self._undo.append(before)

    def remove(self) -> None:
        """Put back what was there before. Calling it again does nothing.

        Raises:
            RuntimeError: somebody has replaced the attribute again and not undone it; nothing
                more is then put back, so that it can be called again in the right order.
        """
        while self._undo:
            owner, name, had, old, replacement = self._undo[-1]
            if vars(owner).get(name) is not replacement:
                kind = type(owner).__name__
                raise RuntimeError(f"{name} of {kind} has been replaced again: undo that first")
            setattr(owner, name, old) if had else delattr(owner, name)
            self._undo.pop()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def check_attributes(owner: Any, argument: str, names: Sequence[str], known: str = "") -> None:
    """`owner`, passed as `argument`, has all the attributes; a TypeError names those it lacks.

    Dots lead to attributes of attributes. `known`: which versions are known to have them.
    """
    missing = [name for name in names if not _has(owner, name)]
    if missing:
        raise TypeError(
            f"{argument} must have the attributes {', '.join(names)}, got "
            f"{type(owner).__name__} without {', '.join(missing)}"
            + (f"; known to work: {known}" if known else "")
        )


def _has(owner: Any, name: str) -> bool:
    first, _, rest = name.partition(".")
    return hasattr(owner, first) and (not rest or _has(getattr(owner, first), rest))
