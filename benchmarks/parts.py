"""What the time of a call is made of: some functions, matrix products outside them, the rest."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)
Named = tuple[Any, str, str]  # an object, an attribute of it that is called, the name of the part


class _Stopwatch(TorchDispatchMode):
    """Seconds by part; on a GPU it waits for each part, so that nothing overlaps."""

    def __init__(self, gpu: bool):
        super().__init__()
        self.gpu, self.inside = gpu, False
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any], *values: Any, **options: Any) -> Any:
        if self.inside:
            return function(*values, **options)
        began, self.inside = self.now(), True
        try:
            return function(*values, **options)
        finally:
            self.inside = False
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - began

    def now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def watching(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        function, own = getattr(owner, attribute), attribute in vars(owner)
        timed = functools.partial(self.timed, name, function)
        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            setattr(owner, attribute, function) if own else delattr(owner, attribute)

    def __torch_dispatch__(
        self, function: Any, types: Any, values: Any = (), options: Any = None
    ) -> Any:
        if function.overloadpacket in PRODUCTS:
            return self.timed("products of the head", function, *values, **(options or {}))
        return function(*values, **(options or {}))


def parts_of(call: Callable[[], Any], named: Sequence[Named], device: str) -> dict[str, float]:
    """Seconds of the named functions, of products outside them, and of everything else."""
    watch = _Stopwatch(gpu=device != "cpu")
    with contextlib.ExitStack() as stack:
        for part in named:
            stack.enter_context(watch.watching(*part))
        stack.enter_context(watch)
        began = watch.now()
        call()
        total = watch.now() - began
    return watch.seconds | {"the rest": total - sum(watch.seconds.values())}
