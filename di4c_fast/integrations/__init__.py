"""Drop-ins for the samplers of other repositories, one module each, imported when first used.

They replace sampling only: training loops stay as they are.
"""

import importlib as _importlib

__all__ = ["dream", "huggingface", "llada", "maskgit", "mdlm", "sdtt", "tauldr"]


def __getattr__(name: str) -> object:
    if name in __all__:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
