"""What belongs to one shape: its variants, inputs, checks and floor."""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from di4c_fast import backends

from .cases import Case
from .floors import Work


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compute the same thing."""

    name: str
    title: str
    library: bool = False  # di4c_fast itself, not something to compare with


# The names of the library's backends; a suffix says what else is asked of them.
BACKENDS = ("torch", "cpu", "triton")
FUSED = BACKENDS[1:]


def library(suffix: str = "", what: str = "", names: Sequence[str] = BACKENDS) -> list[Variant]:
    """The library on its backends."""
    return [Variant(name + suffix, f"di4c_fast {name}{what}", library=True) for name in names]


@dataclasses.dataclass(frozen=True)
class Check:
    """How far a variant is from the truth; `problem` says what is wrong, None if nothing is."""

    problem: str | None
    loss_error: float | None = None
    gradient_error: float | None = None

    @staticmethod
    def of(loss: float, gradient: float, limit: float) -> Check:
        """Errors of a loss and of its gradient against a limit; NaN is over any."""
        for what, error in (("loss", loss), ("gradient", gradient)):
            if not error <= limit:
                problem = f"the {what} is off by {error:.1e}, at most {limit:.0e} allowed"
                return Check(problem, loss, gradient)
        return Check(None, loss, gradient)


class Noise:
    """Random numbers for the inputs of a case."""

    def __init__(self, case: Case, seed: int):
        self.case, self.generator = case, torch.Generator(case.device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """In the dtype of the case."""
        how = {"device": self.case.device, "dtype": self.case.torch_dtype}
        return torch.randn(*shape, generator=self.generator, **how).mul_(scale)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.case.device)

    def tokens(self, *shape: int, masks: bool = True) -> Tensor:
        """masks: whether the last token is a mask, which is none of these."""
        below, how = self.case.vocabulary - masks, {"device": self.case.device}
        return torch.randint(below, shape, generator=self.generator, **how)


class Group(abc.ABC):
    """One case and the variants that compute it."""

    # Of the logits in fp32 that a variant holds at once, by the beginning of its name.
    copies: Mapping[str, float] = MappingProxyType({})

    def __init__(self, case: Case):
        self.case = case
        self.calls = 0  # of calls that draw: another seed each
        self._compiled: dict[str, Callable[..., Any]] = {}

    @abc.abstractmethod
    def variants(self) -> list[Variant]:
        """All variants that this kind of case has, in the order of the tables."""

    def unavailable(self, name: str) -> str | None:
        """Why a variant cannot run on this machine; None if it can."""
        case, device = self.case, torch.device(self.case.device)
        if name in PEERS:
            if importlib.util.find_spec(PEERS[name]) is None:
                return f"{PEERS[name]} is not installed"
            if device.type != "cuda":
                return f"{PEERS[name]} needs a GPU"
        if name == "linear-cross-entropy" and not hasattr(F, "linear_cross_entropy"):
            return f"torch {torch.__version__} has no F.linear_cross_entropy"
        if name.endswith("compiled"):
            if device.type == "cpu" and (case.shape not in COMPILED_ON_CPU or case.size == "tiny"):
                return "torch.compile would take half a minute"
            return no_compiler(device.type)
        backend = name.split("-")[0]
        if backend not in BACKENDS:
            return None
        # The interpreter goes through everything at tiny sizes; its speed means nothing.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1" and case.size == "tiny"
        if backend == "triton" and device.type == "cpu" and not interpreted:
            return "it needs a GPU"
        return backends.unavailable(backend, device)

    @abc.abstractmethod
    def make_inputs(self, seed: int) -> Any:
        """Fresh random inputs on the case's device."""

    def fresh(self, name: str, inputs: Any) -> Any:
        """The inputs for one call: a copy where the call overwrites them."""
        return inputs

    @abc.abstractmethod
    def call(self, name: str, inputs: Any) -> Any:
        """What is timed. Returns what it allocated, so that it counts as memory."""

    def truth(self, inputs: Any) -> Any:
        """What the variants should compute; None where that depends on what a variant draws."""
        return None

    @abc.abstractmethod
    def check(self, name: str, inputs: Any, truth: Any) -> Check:
        """Compare a variant with the truth."""

    @abc.abstractmethod
    def input_bytes(self) -> int: ...

    def call_bytes(self, name: str) -> int:
        """A guess at a variant's peak memory above the inputs, to skip what cannot fit: gradients
        of these, copies of the logits in fp32, for a linear head a chunk of them."""
        case, copies = self.case, {"": 0.5, **self.copies}
        held = copies[max(filter(name.startswith, copies), key=len)]
        logits = held * case.batch * case.components * case.positions * case.vocabulary * 4
        return self.input_bytes() // 2 + int(logits) + (case.head == "linear") * 2**29

    def work(self) -> Work | None:
        """The bytes and operations that nothing can avoid."""
        return None

    def details(self, name: str, inputs: Any) -> dict[str, float]:
        """Seconds of the parts of a call, see `parts`."""
        return {}

    def compiled(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, or for a variant "...-compiled" what torch.compile makes of it."""
        if not name.endswith("-compiled"):
            return function
        if name not in self._compiled:
            self._compiled[name] = torch.compile(function, dynamic=False)
        return self._compiled[name]

    def reset(self) -> None:
        """Forget what was compiled; called before the group is measured.

        The limit of recompilations would silently turn later shapes into eager ones.
        """
        torch.compiler.reset()
        self._compiled.clear()


# Shapes whose torch.compile variants are measured on a CPU, where compiling takes half a minute.
COMPILED_ON_CPU = ("language", "cross-entropy", "rows", "ancestral", "confidence", "distill")
PEERS = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
PEERS |= {"flashinfer": "flashinfer"}


@functools.cache
def no_compiler(device_type: str) -> str | None:
    """Why torch.compile cannot work here; None if it should."""
    named = os.environ.get("CXX")
    if not any(shutil.which(name) for name in (named, "g++", "clang++", "c++") if name):
        return "torch.compile needs a C++ compiler, none found"
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on a GPU"
    return None
