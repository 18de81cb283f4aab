from __future__ import annotations

import importlib
from typing import Any, Literal

Backend = Literal["auto", "triton", "cpu", "torch", "reference"]


def names():
    return ("auto", "triton", "cpu", "torch", "reference")


def resolve(name, device, dtype):
    return "torch" if name in ("auto", "cpu") else name


def passes_for(name, device, dtype) -> Any:
    return importlib.import_module(f"di4c_fast.passes.{name}")


def triton_unavailable(d):
    return None
