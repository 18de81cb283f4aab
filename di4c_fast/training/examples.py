"""The examples of a distillation step: what each has, permuted and cut together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.call import Context
from .draws import Source


class Examples(NamedTuple):
    """The per-example tensors of a step, so that they are permuted and cut together."""

    x0: Tensor
    t: Tensor
    xt: Tensor
    latent: Tensor | None
    latent_teacher: Tensor | None
    valid: Tensor | None
    context: Context
    u: Tensor
    latent_u: Tensor
    source: Source
    local: Source  # of what this rank's positions draw
    xu: Tensor | None = None
    consistency_x: Tensor | None = None

    def select(self, index: Tensor | slice) -> Examples:
        """Those of an index on the CPU."""
        numbers = torch.arange(len(self.x0))[index].tolist()

        def some(source: Source) -> Source:
            return tuple(source[i] for i in numbers) if isinstance(source, tuple) else source

        fields: dict[str, Any] = {"source": some(self.source), "local": some(self.local)}
        if isinstance(index, Tensor):
            index = index.to(self.x0.device, non_blocking=True)
        fields |= {k: v[index] for k, v in self._asdict().items() if isinstance(v, Tensor)}
        context = {name: value[index] for name, value in self.context.items()}
        return self._replace(**fields, context=context)
