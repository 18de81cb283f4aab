"""Noise processes: q(x_t | x_0), one teacher step, training times."""

from .base import Process
from .masked import MaskedProcess

__all__ = ["MaskedProcess", "Process"]
