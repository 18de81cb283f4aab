"""How many kernels a GPU would start for a loss: launches of Triton and operations of PyTorch.

Counted in the interpreter. Views and allocations start nothing.
"""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from loss_cases import make_problem, run_loss
from loss_heads import single
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from di4c_fast.loss import op

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")

FREE = {"empty", "empty_strided", "new_empty", "empty_like", "new_empty_strided", "detach", "set_"}
FREE |= {"scalar_tensor", "_unsafe_view"}  # a number of the host, a view


class Launches(TorchDispatchMode):
    """Counts by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        name = schema.name.removeprefix("aten::")
        if not views and name not in FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """The launches of the sweeps of a loss, by name: forward and backward."""
    found = {}
    inside: list[Launches] = []
    run = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if inside:
            inside[-1].names[self.fn.__name__.strip("_")] += 1
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            with Launches() as mode:
                inside.append(mode)
                try:
                    return function(*args)
                finally:
                    found[name] = inside.pop().names

        return call

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    for name in ("forward", "backward"):
        monkeypatch.setattr(op, name, watched(name, getattr(op, name)))
    return found


@pytest.mark.parametrize(
    ("vocabulary", "masked", "most"),
    [(9, False, (7, 3)), (9, True, (8, 3)), (1025, False, (8, 3))],
    ids=["small", "masked", "image"],
)
def test_a_loss_launches_few_kernels(vocabulary, masked, most, launches):
    mask = {"mask_id": vocabulary - 1, "revealed": True} if masked else {}
    problem = single(make_problem(1, components=4, draws=4, vocabulary=vocabulary, **mask))
    problem["consistency_x"] = None
    problem["student"].requires_grad_()
    run_loss(problem, backend="triton", generator=torch.Generator().manual_seed(0)).backward()
    for name, bound in zip(("forward", "backward"), most, strict=True):
        assert launches[name].total() <= bound, (name, dict(launches[name]))
