"""What a user would write without this library: the loss in plain PyTorch, dense.

Shapes as in `di4c_fast.loss`: student (B, N, D, V), teacher (B, D, V), consistency (B, K, D, V).
Both versions compute the same numbers as `di4c_fast.loss` with `mask_id`, `xt` and `xu`, draw the
consistency tokens themselves where none are given, and are differentiated by autograd.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands in for -inf, so that 0 * log 0 stays finite without a mask.
NEGATIVE = -1e6


def substitute(logits: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    """The SUBS parameterisation: no mask column, one-hot at tokens that are not masked."""
    column = F.one_hot(torch.tensor(mask_id, device=logits.device), logits.shape[-1]).bool()
    log_prob = logits.masked_fill(column, NEGATIVE).log_softmax(-1)
    revealed = (tokens != mask_id).unsqueeze(-1)
    one_hot = F.one_hot(tokens, logits.shape[-1]).bool()
    certain = torch.where(one_hot, 0.0, NEGATIVE).to(log_prob.dtype)
    return torch.where(revealed, certain, log_prob)


def _draw(log_prob: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=log_prob).sample()


def dense_loss(
    student: Tensor,
    teacher: Tensor,
    x0: Tensor,
    *,
    consistency: Tensor,
    consistency_x: Tensor | None = None,
    xt: Tensor,
    xu: Tensor,
    mask_id: int,
    data_weight: float = 1.0,
    one_gather: bool = False,
) -> Tensor:
    """The loss, mean over the batch.

    Args:
        one_gather: gather all targets at once instead of one row of tokens after the other.
    """
    components = student.shape[1]
    log_prob = substitute(student, xt.unsqueeze(1).expand(student.shape[:3]), mask_id)
    with torch.no_grad():
        log_teacher = substitute(teacher, xt, mask_id)
        log_consistency = substitute(consistency, xu, mask_id)
        if consistency_x is None:
            consistency_x = _draw(log_consistency)
        target = log_consistency.exp().mean(1)
        log_target = log_consistency.logsumexp(1) - math.log(consistency.shape[1])
    marginal = log_prob.logsumexp(1) - math.log(components)

    def correlation(tokens: Tensor) -> Tensor:  # (B, D) -> (B,)
        index = tokens[:, None, :, None].expand(-1, components, -1, -1)
        picked = log_prob.gather(-1, index).squeeze(-1)  # (B, N, D)
        joint = picked.sum(-1).logsumexp(1) - math.log(components)
        return (picked.logsumexp(1) - math.log(components)).sum(-1) - joint

    def correlations(rows: Tensor) -> Tensor:  # (B, J, D) -> (B, J)
        if not one_gather:
            return torch.stack([correlation(tokens) for tokens in rows.unbind(1)], dim=1)
        index = rows.transpose(1, 2).unsqueeze(1).expand(-1, components, -1, -1)
        picked = log_prob.gather(-1, index)  # (B, N, D, J)
        joint = picked.sum(2).logsumexp(1) - math.log(components)
        return (picked.logsumexp(1) - math.log(components)).sum(1) - joint

    rows = correlations(torch.cat([x0.unsqueeze(1), consistency_x], dim=1))
    teacher_term = (log_teacher.exp() * (log_teacher - marginal)).sum((1, 2))
    consistency_term = (target * (log_target - marginal)).sum((1, 2))
    per_example = data_weight * rows[:, 0] + teacher_term + rows[:, 1:].mean(1) + consistency_term
    return per_example.mean()
