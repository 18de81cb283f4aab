"""Noise processes: q(x_t | x_0), one teacher step, training times."""

from .base import Process
from .gaussian import GaussianProcess
from .masked import MaskedProcess
from .maskgit import MaskGITProcess

__all__ = ["GaussianProcess", "MaskGITProcess", "MaskedProcess", "Process"]
