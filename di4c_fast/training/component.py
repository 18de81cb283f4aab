"""Calls of a model for all components of a batch, and the component term from calls of its own.

Shapes: B examples, N components, D positions, V classes, L latent dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..heads import HeadLike
from ..loss.api import loss
from ..models.call import Context, call_model, evaluation_mode, repeat_context, unflatten_rows
from ..models.latent import draw_latents
from ..processes import Process
from ..rng import generator_uniform
from .config import DistillConfig


def call_components(
    model: Callable[..., HeadLike],
    name: str,
    tokens: Tensor,
    t: Tensor,
    latent: Tensor | None,
    context: Context,
    vocab_size: int | None = None,
) -> Any:
    """One call for all components of all examples; a head (B, N, D, V), or (B, D, V) without λ.

    tokens: (B, D), the same for each component, or (B, N, D).
    """
    if latent is None:
        return call_model(model, name, tokens, t, None, context, vocab_size)
    batch, rows = latent.shape[:2]
    if tokens.ndim == 2:
        tokens = tokens.unsqueeze(1).expand(-1, rows, -1)
    head = call_model(
        model,
        name,
        tokens.flatten(0, 1),
        t.repeat_interleave(rows),
        latent.flatten(0, 1),
        repeat_context(context, rows),
        vocab_size,
    )
    return unflatten_rows(head, batch, rows)


def component_step(
    student: Callable[..., HeadLike],
    teacher: Callable[..., HeadLike],
    x0: Tensor,
    latent: Tensor,
    valid: Tensor | None,
    context: Context,
    time: float,
    process: Process,
    config: DistillConfig,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The component term from calls of its own: weighted mean, term (B,), t_min, x_min."""
    batch, rows = latent.shape[:2]
    count = batch * rows
    t_min = torch.full((count,), time, dtype=torch.float32, device=x0.device)
    if config.component_spread:
        later = generator_uniform((2, count), generator=generator, device=x0.device)
        t_min = t_min + (later[0] < 0.5) * later[1] * config.component_spread
        t_min = t_min.clamp(max=1.0)
    x0, context = x0.repeat_interleave(rows, dim=0), repeat_context(context, rows)
    valid = None if valid is None else valid.repeat_interleave(rows, dim=0)
    x_min = process.corrupt(x0, t_min, valid=valid, generator=generator)
    latent_teacher = None
    if config.teacher_components > 1:
        latent_teacher = draw_latents(
            count, 1, config.latent_dim, generator=generator, device=x0.device
        )
    with torch.no_grad(), evaluation_mode(teacher):
        targets = call_components(teacher, "teacher", x_min, t_min, latent_teacher, context)
    torch.clear_autocast_cache()
    prediction = call_components(
        student, "student", x_min, t_min, latent.flatten(0, 1).unsqueeze(1), context,
        targets.shape[-1],
    )  # fmt: skip
    share = config.component_weight / count
    weighted = loss(
        prediction,
        targets,
        x0,
        xt=x_min if process.loss_mask_id is not None else None,
        mask_id=process.loss_mask_id,
        valid=valid,
        data_weight=0.0,
        teacher_weight=0.0,
        consistency_weight=0.0,
        component_weight=share,
        reduction="none",
        backend=config.backend,
    )
    term = weighted.detach().view(batch, rows).sum(1) * (batch / config.component_weight)
    return weighted.sum(), term, t_min.view(batch, rows), x_min.view(batch, rows, -1)
