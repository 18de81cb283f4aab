"""Fused losses and exact, fast samplers for mixture discrete diffusion models (Di4C)."""

import importlib as _importlib
import importlib.util as _util
import pathlib as _pathlib
import sys as _sys

from ._version import __version__

# In a plain checkout the kernels lie beside this folder; installed, setup.py puts them inside it.
_kernels = _pathlib.Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"
if _kernels.exists() and (_kernels.parent.parent / "setup.py").exists():
    _spec = _util.spec_from_file_location(f"{__name__}.kernels", _kernels)
    assert _spec is not None
    _sys.modules[f"{__name__}.kernels"] = _util.module_from_spec(_spec)

from .draw.api import Draw, sample  # noqa: E402
from .heads import Head, LinearHead, LogisticHead, TensorHead  # noqa: E402
from .loss.api import LossTerms, correlation, loss, mixture_log_prob  # noqa: E402

# Imported when first used.
_SUBMODULES = ("integrations", "memory", "models", "processes", "samplers", "testing", "training")


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})


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
