"""The passes as Triton launches: contract in `base`, kernels in `kernels/README.md`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.triton.joint import gradient_factors, joint_values
from ..kernels.triton.marginal import marginal
from ..kernels.triton.mixture_backward import mixture_backward
from ..kernels.triton.mixture_forward import mixture_forward
from ..kernels.triton.order import MAX_POSITIONS, order
from ..kernels.triton.row_draw import MAX_VOCABULARY
from ..kernels.triton.row_statistics import row_statistics
from ..kernels.triton.target_gradient import target_gradient
from .base import Chunk, Factors, Joint, Operand, Swept, Values, Visit, padded
from .triton_draw import draw, draw_targets

__all__ = [
    "backward",
    "chunk_bytes",
    "draw",
    "factors",
    "forward",
    "joint",
    "order",
    "temporary_bytes",
]

ORDERS = MAX_POSITIONS
READS_BINS = DRAWS_TARGETS = MAX_VOCABULARY
WRITES_ZEROS = True  # `backward` visits inactive slots, too, and writes their zeros


def chunk_bytes(device: torch.device) -> int:
    """Of computed logits: enough to fill the device."""
    return 256 << 20


def temporary_bytes(components: int, row_bytes: int) -> int:
    """The kernels hold everything of a position in registers."""
    return 0


def forward(chunk: Chunk) -> None:
    """See `base`."""
    z, t, u, visit, mixture, statistics = chunk
    mask_id = mixture.mask_id
    student = statistics.student
    tokens, log_prob = statistics.tokens, statistics.log_prob
    if mixture.seed is not None:
        assert u is not None
        draw_targets(u, visit, mixture, statistics)
    if not statistics.all_known:
        row_statistics(z, visit, mask_id, student, tokens=tokens, log_prob=log_prob)
    if t is None:
        return
    if not statistics.all_known:
        row_statistics(t, visit, mask_id, statistics.teacher)
    q, q_teacher = (statistics.kept(rows, visit) for rows in (statistics.q, statistics.q_teacher))
    several = t.components > 1
    if several:
        q_teacher = _rows(z, visit) if q_teacher is None else q_teacher
        marginal(t, visit, mask_id, statistics.teacher, student.total, q_teacher)
    q_consistency = None
    if u is not None:
        if mixture.seed is None and not statistics.sums_known:
            row_statistics(u, visit, mask_id, statistics.consistency)
        q_consistency = _rows(z, visit) if q is None else q  # q takes its place
        sums = statistics.consistency
        marginal(u, visit, mask_id, sums, student.total, q_consistency, xu=mixture.xu)
    mixture_forward(
        z,
        t,
        visit,
        mixture,
        statistics,
        q_teacher=q_teacher,
        stored_teacher=several,
        q_consistency=q_consistency,
        q=q,
    )


def backward(chunk: Chunk, factors: Factors, gradient: Operand) -> None:
    """See `base`."""
    z, t, _, visit, mixture, statistics = chunk
    q, q_teacher = (statistics.kept(rows, visit) for rows in (statistics.q, statistics.q_teacher))
    if t is not None:
        q, q_teacher = _distributions(chunk)
    q = q if mixture.marginal else None
    q_teacher = q_teacher if mixture.component else None
    mixture_backward(z, visit, mixture, statistics, factors, gradient, q=q, q_teacher=q_teacher)
    if z.bins is None:
        target_gradient(visit, mixture, statistics, factors, gradient, q=q, q_teacher=q_teacher)


def joint(swept: Swept, out: Joint) -> Values:
    """See `base`."""
    return Values(*joint_values(*swept, out))


def factors(swept: Swept, joint: Joint, rows: Tensor | None, loss: Tensor | None) -> Factors:
    """See `base`."""
    return Factors(*gradient_factors(*swept, joint, rows, loss))


def _distributions(chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
    """Rows of q and of q_T once more, for slots that they were not kept for."""
    z, t, u, visit, mixture, statistics = chunk
    q = q_teacher = None
    alive = statistics.student.total
    mask_id = mixture.mask_id
    if mixture.component:
        q_teacher = _rows(z, visit)
        marginal(t, visit, mask_id, statistics.teacher, alive, q_teacher)
    if mixture.marginal:
        q = _rows(z, visit)
        weight = mixture.teacher_weight
        marginal(t, visit, mask_id, statistics.teacher, alive, q, weight=weight)
        if u is not None:
            weight = mixture.consistency_weight
            sums = statistics.consistency
            marginal(u, visit, mask_id, sums, alive, q, weight=weight, xu=mixture.xu, add=True)
    return q, q_teacher


def _rows(z: Operand, visit: Visit) -> Tensor:
    """Memory for a distribution of every visited slot."""
    sizes = (visit.slots, padded(z.vocabulary))
    return torch.empty(sizes, dtype=torch.float32, device=z.logits.device)
