"""Samplers: from a denoiser to token rows."""

from .analytic import sample_analytic
from .confidence import sample_confidence
from .gaussian import sample_gaussian
from .masked import sample_masked
from .maskgit import sample_maskgit
from .uniform import sample_uniform_state

__all__ = [
    "sample_analytic",
    "sample_confidence",
    "sample_gaussian",
    "sample_masked",
    "sample_maskgit",
    "sample_uniform_state",
]
