"""What a loss asks of the kernels, what forward leaves for backward, and how sweeps are cut.

Shapes: B batch, N student components, M teacher components, K draws, D positions, V vocabulary,
J target rows (x0 and the K draws), A = B·D positions.

Beside logits, the rows of q_T and q_u are the largest thing that forward leaves for backward. As
many as a share of the logits allows are kept, the others are computed again.

The active positions are addressed through a permutation (active ones first) and a count that stay
on the device. Only a linear head reads the count on the host, once per sweep, because the sizes
of its matrix products have to be known there; under CUDA graph capture it multiplies all rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from .fused_heads import LINEAR, HeadSpec, padded
from .kernels.triton.operands import Visit
from .kernels.triton.tuning import launch_parameters

# Of the student's logits: what the rows of q_T and q_u may take beside a gradient in place, whose
# peak is to stay below a tenth of the logits.
DISTRIBUTION_SHARE = 0.09


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for; static."""

    mask_id: int | None
    correlation: bool  # the control variate is on
    has_q: bool  # divergences from the marginals
    has_c: bool  # component divergence
    has_u: bool  # consistency terms
    scale: float
    needs_grad: bool  # with respect to the student

    def encode(self) -> str:
        return " ".join(repr(value) for value in dataclasses.astuple(self))

    @staticmethod
    def decode(text: str) -> Request:
        mask_id, correlation, has_q, has_c, has_u, scale, needs_grad = text.split(" ")
        return Request(
            None if mask_id == "None" else int(mask_id),
            correlation == "True",
            has_q == "True",
            has_c == "True",
            has_u == "True",
            float(scale),
            needs_grad == "True",
        )


@dataclasses.dataclass(frozen=True)
class Known:
    """What the forward pass leaves for the backward pass; empty tensors where not needed."""

    tokens: Tensor  # [B, J, D] int64
    lse: Tensor  # [A, N] fp32
    lse_teacher: Tensor  # [A, M]
    lse_consistency: Tensor  # [A, K]
    picked: Tensor  # [A, J, N]
    marginal: Tensor  # [A, J]
    joint: Tensor  # [B, J, N]
    alpha: Tensor  # [B, J]
    mass: Tensor  # [A, N]
    divergence: Tensor  # [A, N]
    q_teacher: Tensor  # [slots kept, padded V] fp32, by slot
    q_consistency: Tensor  # [slots kept, padded V] fp32, by slot
    logits: Tensor  # [slots kept, N, padded V], by slot
    rows: Tensor  # [A] int64, empty if all positions are active
    count: Tensor  # [] int64


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many positions a chunk has, and for how many slots what is kept; from shapes alone."""

    chunk: int
    kept_teacher: int
    kept_consistency: int
    kept_logits: int
    first: int = 0  # positions of the first chunk; 0: as many as of the others


def stored_distributions(request: Request, teacher: HeadSpec, components: int) -> tuple[bool, bool]:
    """Whether q_T and q_u are worth storing: where one row stands for several, or for a product."""
    wanted = request.has_q or request.has_c
    return wanted and (components > 1 or teacher.kind == LINEAR), request.has_q and request.has_u


def make_plan(
    request: Request,
    student: HeadSpec,
    teacher: HeadSpec,
    consistency: HeadSpec | None,
    sizes: tuple[int, int, int, int],
    teacher_components: int,
    draws: int,
    element_size: int,
    device: torch.device,
) -> Plan:
    """Split the byte budget between the logits of a chunk and what is kept of them."""
    batch, components, positions, vocabulary = sizes
    total = batch * positions
    store_t, store_u = stored_distributions(request, teacher, teacher_components)
    row = padded(vocabulary)
    per_chunk, widest = 0, 1
    for spec, number in (
        (student, components),
        (teacher, teacher_components),
        (consistency, draws),
    ):
        if spec is not None and spec.kind == LINEAR:
            per_chunk += number * row * element_size
            widest = max(widest, number)
    tuned = launch_parameters(device)
    if per_chunk == 0 or total == 0:
        logits = batch * components * positions * vocabulary * element_size
        return _plan_of_logits(
            total,
            (store_t, store_u),
            4 * row,
            max(tuned.distribution_bytes, int(DISTRIBUTION_SHARE * logits)),
            request.needs_grad,
        )
    store_t, store_u = store_t and request.needs_grad, store_u and request.needs_grad
    budgets = [s.budget_bytes for s in (student, teacher, consistency) if s is not None]
    budget = min([value for value in budgets if value] or [tuned.budget_bytes])
    row_bytes = 4 * row
    student_bytes = components * row * element_size
    keep_student = student.kind == LINEAR and request.needs_grad
    whole = per_chunk + (store_t + store_u) * row_bytes + keep_student * student_bytes
    fewest = -(-tuned.minimum_rows // widest)
    if total * whole <= budget:
        chunk = total
    else:
        chunk = min(total, max(budget // 2 // per_chunk, fewest, 1))
    left = max(0, budget - chunk * per_chunk)
    # Distributions first: they save the products of two heads, and cost one row each.
    kept = []
    for wanted, size in ((store_u, row_bytes), (store_t, row_bytes), (keep_student, student_bytes)):
        slots = min(total, left // size // chunk * chunk) if wanted else 0
        if wanted and left >= total * size:
            slots = total
        left -= slots * size
        kept.append(slots)
    kept_consistency, kept_teacher, kept_logits = kept
    return Plan(chunk, kept_teacher, kept_consistency, kept_logits)


def _plan_of_logits(
    total: int, stored: tuple[bool, bool], row_bytes: int, budget: int, needs_grad: bool
) -> Plan:
    """The plan without linear heads: only the rows of q_T and q_u take memory.

    Where they do not all fit, those of the first chunk stay for backward; active positions come
    first, so these are the ones most likely needed. The rest of the room serves the other chunks in
    turn, once in forward and once more in backward.
    """
    rows = sum(stored)
    slots = max(2, budget // (rows * row_bytes)) if rows else total
    if slots >= total:
        kept = total * needs_grad
        return Plan(total, kept * stored[0], kept * stored[1], 0)
    if not needs_grad:
        return Plan(slots, 0, 0, 0)
    # Few chunks, since each is several launches.
    chunk = min(total - slots, slots // 2)
    kept = slots - chunk
    return Plan(chunk, kept * stored[0], kept * stored[1], 0, first=kept)


@dataclasses.dataclass(frozen=True)
class Chunk:
    visit: Visit
    index: Tensor  # [P] int64 positions of the slots; used by linear heads only


def walk(
    plan: Plan, total: int, rows: Tensor, count: Tensor, linear: bool, like: Tensor
) -> Iterator[Chunk]:
    """The chunks of a sweep."""
    has_rows = rows.numel() > 0
    stop = total
    if linear and has_rows and not _capturing(like):
        stop = int(count)  # the one host read: matrix products need their sizes
    first = 0
    while first < stop:
        slots = min(plan.first if plan.first and first == 0 else plan.chunk, stop - first)
        visit = Visit(slots, first, rows if has_rows else None, count if has_rows else None)
        if not linear:
            index = rows
        elif has_rows:
            index = rows[first : first + slots]
        else:
            index = torch.arange(first, first + slots, device=like.device)
        yield Chunk(visit, index)
        first += slots


def _capturing(like: Tensor) -> bool:
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


def part_of(kept: Tensor, visit: Visit) -> Tensor | None:
    """The rows of a visit in a buffer by slot; None where the buffer does not hold them."""
    if kept.shape[0] == 0:
        return None
    part = kept[visit.first : visit.first + visit.slots]
    return part if part.shape[0] == visit.slots else None


@dataclasses.dataclass(frozen=True)
class Batch:
    """The tensors of one loss."""

    student: list[Tensor]
    teacher: list[Tensor]
    consistency: list[Tensor]
    x0: Tensor
    consistency_x: Tensor | None
    xu: Tensor | None
    active: Tensor | None
    log_weights: Tensor
    weights: tuple[Tensor, Tensor, Tensor, Tensor]  # data, teacher, consistency, component
    seed: Tensor | None
    specs: tuple[HeadSpec, HeadSpec | None, HeadSpec | None]

    def plan(self, request: Request) -> Plan:
        student, teacher, consistency = self.specs
        sizes = student.shape(self.student)
        return make_plan(
            request,
            student,
            teacher or HeadSpec("tensor"),
            consistency if request.has_u else None,
            sizes,
            teacher.shape(self.teacher)[1] if teacher is not None else 1,
            consistency.shape(self.consistency)[1] if consistency is not None else 0,
            self.student[0].element_size(),
            self.student[0].device,
        )
