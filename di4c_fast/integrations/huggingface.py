"""Masked language models of Hugging Face as denoisers: see `di4c_fast.models.MaskedLM`."""

from ..models.masked_lm import MaskedLM, has_linear_head

__all__ = ["MaskedLM", "has_linear_head"]
