"""The passes as plain tensor operations: any device, fp32 or fp64, no compiler."""

from .torch_draw import draw

__all__ = ["draw"]
