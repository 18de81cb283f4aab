"""Exponential moving average of a module's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_kind, check_within
from . import parallel
from .checkpoint import differences

__all__ = ["EMA"]


class EMA:
    """Exponential moving average of a module's parameters; buffers are copied.

    After update i (from 1) the average of each floating parameter is
    `decay_i * average + (1 - decay_i) * parameter`, with
    `decay_i = min(decay, (1 + i) / (10 + i))` when `warmup` (as in the paper's code, so that the
    first weights are forgotten), else `decay`. Averages of half-precision parameters are kept in
    fp32, where steps of 1 - decay are not lost to rounding.

    Args:
        module: whose weights are averaged; held by reference.
        decay: in [0, 1) (the paper: 0.9999).
        warmup: start with a shorter memory.

    Attributes:
        updates: how many there were.
        shadow: the averages by name.
        is_applied: whether the module holds the average now.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, *, warmup: bool = True):
        check_kind(module, nn.Module, "module")
        check_within(decay, "decay", "[0, 1)")
        self.module, self.decay, self.warmup = module, float(decay), bool(warmup)
        self.updates = 0
        self.is_applied = False
        self.shadow = {name: v.detach().clone() for name, v in _state_of(module).items()}
        for name, parameter in module.named_parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                self.shadow[name] = self.shadow[name].float()

    def _live(self) -> dict[str, Tensor]:
        """The module's present state, an error where its names or shapes have changed."""
        parallel.reshard(self.module)
        live = _state_of(self.module)
        changed = _changes(self.shadow, live)
        if changed:
            raise RuntimeError(
                f"the module has changed since its EMA was made (there), make a new EMA: {changed}"
            )
        return live

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights into the average."""
        if self.is_applied:
            raise RuntimeError("EMA.update() inside EMA.applied(): the module holds the average")
        live = self._live()
        self.updates += 1
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(self.module.named_parameters())
        shadows, values = [], []
        for name, value in live.items():
            shadow = self.shadow[name]
            if name in parameters and value.is_floating_point():
                shadows.append(shadow)
                values.append(value.to(shadow.dtype))
            else:
                shadow.copy_(value)
        if shadows:
            torch._foreach_lerp_(shadows, values, 1.0 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The module with the averaged weights inside the `with`, its own again after it."""
        if self.is_applied:
            raise RuntimeError("EMA.applied() is already active")
        kept = {name: value.detach().clone() for name, value in self._live().items()}
        self.is_applied = True
        try:
            self._write(self.shadow)
            yield self.module
        finally:
            self.is_applied = False
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        """In place, so that optimisers and compiled graphs keep their hold on the weights."""
        for name, value in self._live().items():
            value.copy_(values[name])

    def state_dict(self) -> dict[str, Any]:
        """{"decay", "warmup", "updates", "shadow": name to tensor}, the tensors not copied."""
        plain = {name: getattr(self, name) for name in ("decay", "warmup", "updates")}
        return {**plain, "shadow": dict(self.shadow)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; the module itself is left as it is.

        Raises:
            TypeError, ValueError: missing or unexpected names, or a tensor of another shape;
                nothing is changed then.
        """
        for key in self.state_dict():
            if key not in state:
                raise ValueError(f"state must have the key {key!r}, got {sorted(state)}")
        for name, value in state["shadow"].items():
            check_kind(value, Tensor, f"state['shadow'][{name!r}]")
        changed = _changes(state["shadow"], self.shadow)
        if changed:
            raise ValueError(f"state must be that of this module: {changed}")
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)
        self.decay, self.warmup = float(state["decay"]), bool(state["warmup"])
        self.updates = int(state["updates"])


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, and the buffers that a checkpoint would hold.

    Other buffers, such as a cache of positions, are the module's own business.
    """
    passing = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, part in module.named_modules(remove_duplicate=False)
        for name in part._non_persistent_buffers_set
    }
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: value for name, value in named if name not in passing}


def _changes(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> str:
    """The first names and shapes that differ."""
    before, now = ({k: tuple(v.shape) for k, v in state.items()} for state in (there, here))
    return "; ".join(differences(before, now)[:3])
