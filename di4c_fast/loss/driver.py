"""The one driver of the loss: the two sweeps over positions, around the passes of a backend.

Shapes: B examples, N components of the student, M of the teacher, K draws, D positions, V classes,
J target rows, A = B·D slots, P slots of a chunk.

The first sweep takes each chunk of positions once: it draws the tokens x^k from the consistency
logits, and `forward` of the passes leaves what is local to a position. The joint terms couple all
positions, so the second sweep, `backward`, comes when they are known. Between the two, rows of q
and computed logits are kept as far as `plan` has room for.

The driver alone knows about chunks, budgets, draws and the order of things; heads say how their
logits are computed and where gradients go; the passes know one chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..heads import Head
from ..memory import empty, empty_strided
from ..passes.base import (
    Chunk,
    Factors,
    Joint,
    Operand,
    Places,
    RowSums,
    Statistics,
    Swept,
    Values,
    Visit,
    padded,
)
from .joint import factors, joint_terms, log_weights_gradient
from .plan import Plan, make_plan, order_positions
from .problem import Problem
from .sharded import agreed, draw_targets, exchange_statistics, find_sums, local_statistics
from .source import Source, source_of, sweep_over


@dataclasses.dataclass(frozen=True)
class Saved:
    """What the first sweep leaves for the second, beside the inputs."""

    statistics: Statistics
    rows: Tensor  # (A,) int64, or (0,) if every position is active
    count: Tensor  # () int64
    logits: Tensor  # (kept, N, padded V) computed logits of the student
    joint: Joint
    number: int | None = None  # of active positions, where the host knows it

    def tensors(self) -> list[Tensor]:
        """All tensors; empty ones stand for what is not there."""
        s = self.statistics
        sums: list[Tensor] = []
        for pair in (s.student, s.teacher, s.consistency):
            none = (s.mass.new_empty(0), s.mass.new_empty(0))
            sums += none if pair is None else (pair.shift, pair.total)
        rest = (s.log_prob, s.mass, s.teacher_kl, s.consistency_kl, s.divergence, s.q, s.q_teacher)
        joint = (self.joint.difference, self.joint.weights, self.joint.counted)
        return [s.tokens, *sums, *rest, self.rows, self.count, self.logits, *joint]

    @staticmethod
    def of(tensors: Sequence[Tensor], number: int | None = None) -> Saved:
        tokens, *others = tensors
        student = RowSums(*others[:2])
        teacher, consistency = (
            RowSums(*others[i : i + 2]) if others[i].ndim == 2 else None for i in (2, 4)
        )
        fields = (tokens, student, teacher, consistency, *others[6:13])
        statistics = Statistics(*fields, sums_known=True, all_known=True)  # type: ignore[misc, arg-type]
        rows, count, logits, *joint = others[13:]
        return Saved(statistics, rows, count, logits, Joint(*joint), number)

    def places(self, problem: Problem, passes: Any) -> Places:
        """The slots that the passes know: all, or the active ones alone."""
        batch, _, positions, _ = problem.sizes
        sizes, total = (batch, positions), batch * positions
        joint = problem.position_group, problem.ends, problem.sequence
        if self.rows.numel() == 0:
            return Places(sizes, None, None, total, *joint)
        if not passes.WRITES_ZEROS:
            assert self.number is not None
            rows = self.rows[: self.number]
            return Places(sizes, rows, None, self.number, *joint)
        return Places(sizes, self.rows, self.count, total, *joint, self.number)

    def counted(self, passes: Any, plan: Plan) -> Saved:
        """The same, and how many positions are active: read once, since a GPU has to wait for it.

        On a GPU it stays there, unless matrix products need their sizes; under capture of a graph
        nothing can be read, and all rows are multiplied.
        """
        if self.number is not None or self.rows.numel() == 0:
            return self
        if passes.WRITES_ZEROS:
            captures = self.count.is_cuda and torch.cuda.is_current_stream_capturing()
            if captures or not plan.computes:
                return self
        return dataclasses.replace(self, number=int(self.count))


def new_saved(problem: Problem, passes: Any, needs_grad: bool) -> tuple[Plan, Saved]:
    """Memory for what the first sweep leaves; its sizes follow from shapes alone.

    Small tensors are zeros, so that slots which are not active hold something, where somebody reads
    those: each zero is a launch.
    """
    plan = make_plan(problem, passes, needs_grad)
    batch, components, positions, vocabulary = problem.sizes
    total, like, row = batch * positions, problem.log_weights, padded(vocabulary)
    targets = problem.targets
    shape = (batch, targets, positions)

    small: list[Tensor] = []

    def new(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        small.append(like.new_empty(shape, dtype=dtype))
        return small[-1]

    def large(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        if type(like) is not Tensor:  # of a trace
            return torch.empty(shape, dtype=dtype, device=like.device)
        return empty(shape, dtype=dtype, device=like.device)

    def sums(head: Head | None) -> RowSums | None:
        if head is None:
            return None
        number = head.shape[1] if len(head.shape) == 4 else 1
        return RowSums(new(total, number), new(total, number))

    fills = problem.seed is not None and _draws(problem, passes) and passes.WRITES_ZEROS
    if fills and not plan.computes:  # the draw visits every slot
        tokens = like.new_empty(shape, dtype=torch.int64)
    else:
        partly = problem.active is not None
        tokens = (like.new_zeros if partly else like.new_empty)(shape, dtype=torch.int64)
        tokens[:, : problem.tokens.shape[1]].copy_(problem.tokens)
    reads_u = problem.consistency is not None and (problem.marginal or problem.seed is not None)
    both = total if problem.marginal else 0
    statistics = Statistics(
        tokens=tokens,
        student=RowSums(new(total, components), new(total, components)),
        teacher=sums(problem.teacher),
        consistency=sums(problem.consistency) if reads_u else None,
        log_prob=new(total, targets, components),
        mass=new(both, components),
        teacher_kl=new(both),
        consistency_kl=new(both),
        divergence=new(total if problem.component else 0, components),
        q=large(plan.kept if problem.marginal else 0, row),
        q_teacher=large(plan.kept if problem.component else 0, row),
        sums_known=problem.seed is not None and not _draws(problem, passes),
    )
    if problem.active is None:
        rows, count = new(0, dtype=torch.int64), new(dtype=torch.int64)
    else:
        own = type(like) is Tensor and 0 < total <= getattr(passes, "ORDERS", 0)
        rows, count = (passes.order if own else order_positions)(problem.active)
    # Passes that have what is joint read no slot that is not active.
    if total and problem.active is not None and not _joins(problem, passes):
        torch._foreach_zero_(small)  # one launch
    dtype = problem.student.prepared_dtype
    logits = large(plan.kept_logits, components, row, dtype=dtype)
    examples = like.shape[0]
    joint = Joint(
        large(total, targets, components),
        new(examples, targets, components),
        new(examples, targets),
    )
    return plan, Saved(statistics, rows, count, logits, joint)


def _draws(problem: Problem, passes: Any) -> bool:
    """Whether `forward` of the passes draws the target rows."""
    alone = problem.student.shard is None and problem.position_group is None
    return alone and problem.sizes[3] <= getattr(passes, "DRAWS_TARGETS", 0)


# The first sweep ----------------------------------------------------------------------------------


def forward(problem: Problem, passes: Any, needs_grad: bool) -> tuple[Values, Saved]:
    """Values of the problem, and what `backward` needs."""
    shard = problem.student.shard
    problem, keys = agreed(problem)
    plan, saved = new_saved(problem, passes, needs_grad)
    saved = saved.counted(passes, plan)
    statistics, mixture = saved.statistics, problem.mixture()
    draws_here = problem.seed is not None and not _draws(problem, passes)
    if not draws_here:
        given = problem.tokens.contiguous()
        mixture = dataclasses.replace(mixture, seed=problem.seed, given=given)
    places = saved.places(problem, passes)
    student = Source(problem.student, passes, plan, places)
    teacher, consistency = source_of(problem.teacher, passes, plan, places), None
    if statistics.consistency is not None:
        consistency = source_of(problem.consistency, passes, plan, places)
    if shard is not None:
        sources = (student, teacher, consistency)
        find_sums(shard, problem, passes, plan, places, sources, statistics, keys)
        statistics = local_statistics(shard, statistics)
    if shard is None or teacher is not None:
        sweep, _ = sweep_over(problem, plan, places, student, teacher, consistency)
        for visit in sweep:
            u = None if consistency is None else consistency.load(visit)
            if u is not None and draws_here and shard is None:
                assert consistency is not None
                rows = consistency.rows(visit)
                draw_targets(problem, passes, u, visit, rows, statistics, keys(rows))
            t = None if teacher is None else teacher.load(visit)
            z = student.load(visit, saved.logits)
            u = u if problem.marginal or mixture.seed is not None else None
            passes.forward(Chunk(z, t, u, visit, mixture, statistics))
    if shard is not None:
        exchange_statistics(shard, saved.statistics, places)
    evaluate = passes.joint if _joins(problem, passes) else joint_terms
    return evaluate(*_swept(problem, saved, places)), saved


def _swept(problem: Problem, saved: Saved, places: Places) -> tuple[Swept, Joint]:
    """What is known of all positions, and where what is joint stands."""
    joint = dataclasses.replace(saved.joint, difference=saved.joint.difference[: places.slots])
    return Swept(saved.statistics, problem.mixture(by_sequence=True), places), joint


def _joins(problem: Problem, passes: Any) -> bool:
    """Whether the passes have what is joint: positions of other ranks are beyond them, and so are
    sequences of a packed batch."""
    alone = problem.position_group is None and problem.ends is None
    return alone and hasattr(passes, "joint")


# The second sweep ---------------------------------------------------------------------------------


def backward(
    problem: Problem,
    passes: Any,
    saved: Saved,
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
    in_place: bool = False,
) -> list[Tensor | None]:
    """Gradients of the student's tensors and, last, of the log-weights; None where not needed.

    upstream: gradients of the rows (B, J) and the loss (B,) of `Values`; None for 0.
    """
    plan = make_plan(problem, passes, True)
    saved = saved.counted(passes, plan)
    places = saved.places(problem, passes)
    swept, joint = _swept(problem, saved, places)
    log_weights = None
    if needs[-1]:
        log_weights = log_weights_gradient(swept, joint, *upstream)
    if not any(needs[:-1]):
        return [*[None] * (len(needs) - 1), log_weights]
    find = passes.factors if _joins(problem, passes) else factors
    found = find(swept, joint, *upstream)
    shard = problem.student.shard
    if shard is not None:
        saved = dataclasses.replace(saved, statistics=local_statistics(shard, saved.statistics))
    students = _student_gradients(problem, passes, plan, saved, places, found, needs[:-1], in_place)
    return [*students, log_weights]


def _student_gradients(
    problem: Problem,
    passes: Any,
    plan: Plan,
    saved: Saved,
    places: Places,
    found: Factors,
    needs: Sequence[bool],
    in_place: bool,
) -> list[Tensor | None]:
    statistics, mixture = saved.statistics, problem.mixture()
    student = Source(problem.student, passes, plan, places)
    teacher = source_of(problem.teacher, passes, plan, places)
    drawn = problem.consistency if problem.marginal else None
    consistency = source_of(drawn, passes, plan, places)
    sweep, everything = sweep_over(problem, plan, places, student, teacher, consistency)
    head, vocabulary = problem.student, problem.sizes[3]
    target: Operand | None = None
    sums: list[Tensor | None] = []
    if student.whole is None:
        sums = student.head.new_gradients(needs)
    elif student.whole.bins is not None:
        mu, log_scale = (torch.zeros_like(student.whole.logits) for _ in range(2))
        sums, target = [mu, log_scale], student.whole.like(mu, log_scale)
    else:
        logits = head.logits().detach()
        gradient, clean = logits, False
        if not in_place:
            strides, dtype = gradient_strides(logits), logits.dtype
            gradient, clean = empty_strided(
                logits.shape, strides, dtype=dtype, device=logits.device
            )
        target = Operand.of_all(gradient)
        if not everything and not clean:
            assert saved.number is not None
            first, (batch, _, positions, _) = saved.number, problem.sizes
            inactive = Visit(first, batch * positions - first, positions, saved.rows)
            if hasattr(passes, "clear"):
                passes.clear(target, inactive)
            else:
                b, d = inactive.split()
                gradient[b, :, d] = 0.0
    scratch: Tensor | None = None
    for visit in sweep:
        known = not problem.marginal or statistics.kept(statistics.q, visit) is not None
        if problem.component:
            known = known and statistics.kept(statistics.q_teacher, visit) is not None
        t = None if teacher is None or known else teacher.load(visit)
        u = None if consistency is None or known else consistency.load(visit)
        kept = statistics.kept(saved.logits, visit)
        if target is not None or kept is None:
            z = student.load(visit)
        else:
            z = Operand.of_chunk(kept[..., :vocabulary])
        chunk = Chunk(z, t, u, visit, mixture, statistics)
        if target is not None:
            passes.backward(chunk, found, target)
            continue
        if scratch is None or scratch.shape[0] < visit.slots:
            scratch = student.new_chunk(visit.slots)
        part = scratch[: visit.slots, :, :vocabulary]
        passes.backward(chunk, found, Operand.of_chunk(part))
        student.head.add_gradient(sums, student.rows(visit), part, z.of_visit(visit))
    sums = head.share_gradients(sums)
    if target is not None and not sums:
        return [target.logits]
    return [  # contiguous: zeros to which nothing was added may have no memory of their own
        total.to(tensor.dtype).contiguous()
        if need and total is not None and tensor is not None
        else None
        for total, tensor, need in zip(sums, head.tensors(), needs, strict=True)
    ]


def is_dense(logits: Tensor) -> bool:
    """Whether the strides address every element once, with rows that may be padded."""
    reach = 0
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return logits.numel() > 0 and logits.stride(-1) == 1 and reach <= 2 * logits.numel()


def gradient_strides(logits: Tensor) -> tuple[int, ...]:
    """Strides of the gradient of logits: their own where those are dense.

    Rows that the caller has padded stay padded, so that autograd need not copy the gradient.
    """
    return (logits if is_dense(logits) else torch.empty(logits.shape, device="meta")).stride()
