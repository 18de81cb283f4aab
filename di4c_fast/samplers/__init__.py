"""Samplers: from a denoiser to token rows."""

from .masked import sample_masked

__all__ = ["sample_masked"]
