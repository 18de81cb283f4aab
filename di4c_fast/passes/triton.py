"""The passes as Triton launches."""

from .triton_draw import draw

__all__ = ["draw"]
