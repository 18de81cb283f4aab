"""Noise processes: q(x_t | x_0), one teacher step, training times.

Wrong arguments, also of the processes' own fields, raise a TypeError or ValueError that names them,
what was expected and what came.
"""

from .base import Process
from .gaussian import GaussianProcess
from .masked import MaskedProcess
from .maskgit import MaskGITProcess

__all__ = ["GaussianProcess", "MaskGITProcess", "MaskedProcess", "Process"]
