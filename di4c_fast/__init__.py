"""Fused losses and exact, fast samplers for mixture discrete diffusion models (Di4C)."""

import pathlib as _pathlib

from ._version import __version__

# In a plain checkout the kernels lie beside this folder; installed, setup.py puts them inside it.
_checkout = _pathlib.Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "__init__.py").exists() and (_checkout / "setup.py").exists():
    __path__.append(str(_checkout))

from .heads import Head, LinearHead, LogisticHead, TensorHead  # noqa: E402
from .loss import LossTerms, correlation, loss, mixture_log_prob  # noqa: E402
from .sample import Draw, sample  # noqa: E402

__all__ = [
    "Draw",
    "Head",
    "LinearHead",
    "LogisticHead",
    "LossTerms",
    "TensorHead",
    "__version__",
    "correlation",
    "loss",
    "mixture_log_prob",
    "sample",
]
