"""Joint terms: what couples the positions, the loss, and the factors of its gradient; the equations
of `di4c_fast.loss.joint`.

Shapes: B examples, N components, M teacher components, J target rows, D positions, A slots, W slots
of a tile. One program per example and target row takes the slots of its example twice: once for the
sums over positions, which run in fp64, once for rho - w. One more program per example adds up its
divergences. The loss is a launch of its own: it needs all rows of an example.

Moves: two reads of log_prob and one write of the difference, 4 A J N bytes each; on the way back
one read of the difference and one write of kappa.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .random import LOG2_E
from .tiles import position_at, split_position
from .tuning import power_of_two


@triton.jit
def _slots_of(
    rows_ptr, count_ptr, total_ptr, begin, stop, b, N, D,
    HAS_ROWS: tl.constexpr, HAS_COUNT: tl.constexpr, BLOCK_N: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Slots begin .. begin + W - 1, which are of example b, and at which of those some row of the
    student counts and has a class; and the sums of their rows, over components."""
    slot = begin + tl.arange(0, W).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    own = slot < stop
    if HAS_ROWS:
        own = own & (tl.load(rows_ptr + slot, mask=own, other=-1) // D == b)
    alive = own
    if HAS_COUNT:
        alive = alive & (slot < tl.load(count_ptr))
    keep = alive[:, None] & (n < N)[None, :]
    total = tl.load(total_ptr + slot[:, None] * N + n[None, :], mask=keep, other=0.0)
    total = tl.sum(total, axis=1)
    return slot, own, alive & (total != 0.0), total


@triton.jit
def _shares(
    log_prob_ptr, log_weights, slot, alive, j, N, J,
    CORRELATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where the target counts, and l - m + a, or l without correlation, [W, N]; with the offset of
    each."""
    n = tl.arange(0, BLOCK_N)
    entry = (slot[:, None] * J + j) * N + n[None, :]
    inside = alive[:, None] & (n < N)[None, :]
    share = tl.load(log_prob_ptr + entry, mask=inside, other=float("-inf"))
    counted = alive
    if CORRELATION:
        share += log_weights[None, :]
        peak = tl.max(share, axis=1)  # without any NaN; a sum has it
        sums = tl.sum(tl.where(inside, share, 0.0), axis=1)
        counted = counted & ((peak > float("-inf")) | (sums != sums))
        peak = tl.where(peak > float("-inf"), peak, 0.0)[:, None]
        total = tl.sum(tl.exp2((share - peak) * LOG2_E), axis=1)
        share = share - peak - tl.log(tl.where(counted, total, 1.0))[:, None]
    return counted, share, entry


@triton.jit(do_not_specialize=["A"])
def _joint_kernel(
    log_prob_ptr,  # [A, J, N] fp32, in
    total_ptr,  # [A, N] fp32, in, the student's row sums
    teacher_kl_ptr,  # [A] fp32, in, with MARGINAL
    consistency_kl_ptr,  # [A] fp32, in, with HAS_U
    divergence_ptr,  # [A, N] fp32, in, with COMPONENT
    log_weights_ptr,  # [B, N] fp32, in
    rows_ptr,  # [A] int64, in, with HAS_ROWS
    count_ptr,  # [] int64, in, with HAS_COUNT
    value_ptr,  # [B, J] fp32, out
    component_ptr,  # [B] fp32, out, and so the sums of both KL terms
    teacher_ptr,
    consistency_ptr,
    difference_ptr,  # [A, J, N] fp32, out
    weights_ptr,  # [B, J, N] fp32, out
    counted_ptr,  # [B, J] fp32, out
    A,
    N,
    J,
    D,
    HAS_ROWS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    CORRELATION: tl.constexpr,
    MARGINAL: tl.constexpr,
    HAS_U: tl.constexpr,
    COMPONENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    W: tl.constexpr,
):
    b, j = (tl.program_id(0) // (J + 1)).to(tl.int64), tl.program_id(0) % (J + 1)
    n = tl.arange(0, BLOCK_N)
    a = tl.load(log_weights_ptr + b * N + n, mask=n < N, other=float("-inf"))
    start = 0
    stop = A
    if not HAS_ROWS:
        start = b * D
        stop = start + D
    if j == J:
        undefined = 0
        teacher = tl.zeros([W], tl.float64)
        consistency = tl.zeros([W], tl.float64)
        joint = tl.zeros([BLOCK_N], tl.float64)
        for begin in range(start, stop, W):
            slot, _, alive, total = _slots_of(
                rows_ptr, count_ptr, total_ptr, begin, stop, b, N, D,
                HAS_ROWS, HAS_COUNT, BLOCK_N, W,
            )  # fmt: skip
            if MARGINAL:
                undefined += tl.sum((alive & (total != total)).to(tl.int32), axis=0)
                teacher += tl.load(teacher_kl_ptr + slot, mask=alive, other=0.0)
            if HAS_U:
                consistency += tl.load(consistency_kl_ptr + slot, mask=alive, other=0.0)
            if COMPONENT:
                entry = slot[:, None] * N + n[None, :]
                keep = alive[:, None] & (a > float("-inf"))[None, :]
                divergence = tl.load(divergence_ptr + entry, mask=keep, other=0.0)
                divergence += 0.0 * tl.load(total_ptr + entry, mask=keep, other=0.0)
                joint += tl.sum(divergence.to(tl.float64), axis=0)
        # However small its weight, a component that excludes a class of q_T is infinitely far.
        joint = tl.where(joint == float("inf"), joint, joint * tl.exp2(a * LOG2_E))
        # Divergences from a row whose sum is NaN are NaN even where q is 0.
        broken = tl.where(undefined > 0, float("nan"), 0.0)
        if HAS_U:
            consistency += broken
        tl.store(component_ptr + b, tl.sum(joint, axis=0).to(tl.float32))
        tl.store(teacher_ptr + b, tl.sum(teacher, axis=0).to(tl.float32) + broken)
        tl.store(consistency_ptr + b, tl.sum(consistency, axis=0).to(tl.float32))
    else:
        # Of a component of weight 0 the share is -inf already.
        present = tl.where((a == float("-inf")) | (not CORRELATION), 0.0, a)
        joint = a.to(tl.float64)
        occupied = 0
        number = 0
        for begin in range(start, stop, W):
            slot, _, alive, _ = _slots_of(
                rows_ptr, count_ptr, total_ptr, begin, stop, b, N, D,
                HAS_ROWS, HAS_COUNT, BLOCK_N, W,
            )  # fmt: skip
            counted, share, _ = _shares(log_prob_ptr, a, slot, alive, j, N, J, CORRELATION, BLOCK_N)
            share = tl.where(counted[:, None], share - present[None, :], 0.0)
            joint += tl.sum(share.to(tl.float64), axis=0)
            occupied += tl.sum(alive.to(tl.int32), axis=0)
            number += tl.sum(counted.to(tl.int32), axis=0)
        sums = tl.sum(tl.where(n < N, joint, 0.0), axis=0)  # NaN if any is
        joint = tl.where(n < N, joint, float("-inf"))
        peak = tl.max(joint, axis=0)
        possible = (peak > float("-inf")) | (sums != sums)
        peak = tl.where(peak > float("-inf"), peak, 0.0)
        part = tl.exp(joint - peak)
        total = tl.sum(part, axis=0)
        defined = (occupied > 0) & possible
        value = tl.where(possible, -(peak + tl.log(total)), float("inf"))
        weights = tl.where(defined, part / total, 0.0).to(tl.float32)
        row = b * J + j
        tl.store(value_ptr + row, tl.where(occupied > 0, value, 0.0).to(tl.float32))
        tl.store(weights_ptr + row * N + n, weights, mask=n < N)
        tl.store(counted_ptr + row, tl.where(defined, number, 0).to(tl.float32))
        for begin in range(start, stop, W):
            slot, own, alive, _ = _slots_of(
                rows_ptr, count_ptr, total_ptr, begin, stop, b, N, D,
                HAS_ROWS, HAS_COUNT, BLOCK_N, W,
            )  # fmt: skip
            counted, share, entry = _shares(
                log_prob_ptr, a, slot, alive, j, N, J, CORRELATION, BLOCK_N
            )
            rho = -weights[None, :]
            if CORRELATION:
                rho += tl.exp2(share * LOG2_E)
            rho = tl.where((counted & defined)[:, None], rho, 0.0)
            tl.store(difference_ptr + entry, rho, mask=own[:, None] & (n < N)[None, :])


@triton.jit
def _row_weight(data_ptr, consistency_ptr, b, j, J):
    """The weights of target rows j in the loss."""
    share = tl.load(consistency_ptr + b) / tl.maximum(J - 1, 1)
    return tl.where(j == 0, tl.load(data_ptr + b), share)


@triton.jit
def _weighted(term, weight):
    """An infinite term of weight 0 must not give NaN."""
    return tl.where(weight > 0.0, term, 0.0) * weight


@triton.jit
def _loss_kernel(
    value_ptr,  # [B, J] fp32, in
    component_ptr,  # [B] fp32, in, with COMPONENT
    teacher_ptr,  # [B] fp32, in, with MARGINAL
    consistency_ptr,
    data_weight_ptr,  # [B] fp32, in, and so the other weights
    teacher_weight_ptr,
    consistency_weight_ptr,
    component_weight_ptr,
    loss_ptr,  # [B] fp32, out
    J,
    MARGINAL: tl.constexpr,
    COMPONENT: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    b, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_J)
    row = tl.load(value_ptr + b * J + j, mask=j < J, other=0.0)
    weight = _row_weight(data_weight_ptr, consistency_weight_ptr, b, j, J)
    loss = tl.sum(_weighted(row, weight), axis=0)
    if MARGINAL:
        loss += _weighted(tl.load(teacher_ptr + b), tl.load(teacher_weight_ptr + b))
        loss += _weighted(tl.load(consistency_ptr + b), tl.load(consistency_weight_ptr + b))
    if COMPONENT:
        loss += _weighted(tl.load(component_ptr + b), tl.load(component_weight_ptr + b))
    tl.store(loss_ptr + b, loss)


@triton.jit(do_not_specialize=["A"])
def _factors_kernel(
    difference_ptr,  # [A, J, N] fp32, in
    mass_ptr,  # [A, N] fp32, in, with MARGINAL
    divergence_ptr,  # [A, N] fp32, in, with COMPONENT, and so the sums of the teacher's rows
    teacher_total_ptr,  # [A, M]
    log_weights_ptr,  # [B, N] fp32, in
    data_ptr,  # [B] fp32, in, with HAS_LOSS, and so the other weights
    consistency_ptr,
    component_ptr,
    gradient_rows_ptr,  # [B, J] fp32, in, with HAS_GRADIENT_ROWS
    gradient_ptr,  # [B] fp32 of the loss, in, with HAS_LOSS
    rows_ptr,
    count_ptr,
    probability_ptr,  # [A, N] fp32, out
    marginal_ptr,  # [A] fp32, out
    factor_ptr,  # [A, N] fp32, out
    kappa_ptr,  # [A, J, N] fp32, out
    A,
    N,
    M,
    J,
    D,
    HAS_ROWS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    HAS_GRADIENT_ROWS: tl.constexpr,
    MARGINAL: tl.constexpr,
    COMPONENT: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    _, position, active = position_at(slot, slot < A, rows_ptr, count_ptr, 0, HAS_ROWS, HAS_COUNT)
    if not active:
        return
    b, _ = split_position(position, D)
    n = tl.arange(0, BLOCK_N)
    probability = tl.zeros([BLOCK_N], tl.float32)
    upstream = 0.0
    if HAS_LOSS:
        upstream = tl.load(gradient_ptr + b)
    for begin in range(0, J, BLOCK_J):
        j = begin + tl.arange(0, BLOCK_J)
        alpha = tl.zeros([BLOCK_J], tl.float32)
        if HAS_GRADIENT_ROWS:
            alpha += tl.load(gradient_rows_ptr + b * J + j, mask=j < J, other=0.0)
        if HAS_LOSS:
            weight = _row_weight(data_ptr, consistency_ptr, b, j, J)
            alpha += tl.where(weight > 0.0, weight * upstream, 0.0)
        entry = (slot * J + j[:, None]) * N + n[None, :]
        inside = (j < J)[:, None] & (n < N)[None, :]
        kappa = tl.load(difference_ptr + entry, mask=inside, other=0.0) * alpha[:, None]
        kappa = tl.where(inside, kappa, 0.0)
        tl.store(kappa_ptr + entry, kappa, mask=inside)
        probability -= tl.sum(kappa, axis=0)
    entry = slot * N + n
    if MARGINAL:
        probability += upstream * tl.load(mass_ptr + entry, mask=n < N, other=0.0)
    if COMPONENT:
        weight = tl.load(component_ptr + b)
        factor = tl.where(weight > 0.0, weight * upstream, 0.0)
        a = tl.load(log_weights_ptr + b * N + n, mask=n < N, other=float("-inf"))
        # An infinite divergence has no gradient.
        divergence = tl.load(divergence_ptr + entry, mask=n < N, other=0.0)
        factor = tl.where(divergence == float("inf"), 0.0, factor * tl.exp2(a * LOG2_E))
        # A teacher's component without any class takes its share out of q_T.
        m = tl.arange(0, BLOCK_M)
        teacher = tl.load(teacher_total_ptr + slot * M + m, mask=m < M, other=0.0)
        probability += factor * (tl.sum((teacher != 0.0).to(tl.float32), axis=0) / M)
        tl.store(factor_ptr + entry, factor, mask=n < N)
    tl.store(marginal_ptr + slot, upstream)
    tl.store(probability_ptr + entry, probability, mask=n < N)


# On the host --------------------------------------------------------------------------------------


def _places(places: Any, like: Tensor) -> tuple[list[Tensor], dict[str, bool]]:
    """rows and count as the kernels take them."""
    given = (places.rows, places.count)
    flags = zip(("HAS_ROWS", "HAS_COUNT"), (part is not None for part in given), strict=True)
    return [like if part is None else part for part in given], dict(flags)


def joint_values(statistics: Any, mixture: Any, places: Any, out: Any) -> tuple[Tensor, ...]:
    """The fields of `Values`: see `joint_terms` of `di4c_fast.loss.joint`."""
    s, m, like = statistics, mixture, statistics.log_prob
    _, targets, components = like.shape
    batch, positions = places.sizes
    rows = like.new_empty(batch, targets)
    loss, *sums = (like.new_empty(batch) for _ in range(4))
    if batch == 0:
        return rows, loss, *sums
    block_n = power_of_two(components)
    pointers, flags = _places(places, like)
    asked = {"MARGINAL": m.marginal, "COMPONENT": m.component}
    _joint_kernel[(batch * (targets + 1),)](
        like,
        s.student.total,
        s.teacher_kl,
        s.consistency_kl,
        s.divergence,
        m.log_weights,
        *pointers,
        rows,
        *sums,
        out.difference,
        out.weights,
        out.counted,
        places.slots,
        components,
        targets,
        positions,
        **flags,
        **asked,
        CORRELATION=m.correlation,
        HAS_U=m.marginal and s.consistency is not None,
        BLOCK_N=block_n,
        # More would spill 8 to 16 bytes with 64 components.
        W=max(1, (2048 if block_n <= 32 else 512) // block_n),
        num_warps=4,
    )
    if m.data_weight is None:
        loss.zero_()
    else:
        weights = (m.data_weight, m.teacher_weight, m.consistency_weight, m.component_weight)
        block_j = power_of_two(targets)
        _loss_kernel[(batch,)](
            rows, *sums, *weights, loss, targets, **asked, BLOCK_J=block_j, num_warps=1
        )
    return rows, loss, *sums


def gradient_factors(
    statistics: Any,
    mixture: Any,
    places: Any,
    joint: Any,
    rows: Tensor | None,
    loss: Tensor | None,
) -> tuple[Tensor, ...]:
    """The fields of `Factors`: see `factors` of `di4c_fast.loss.joint`."""
    s, m, like = statistics, mixture, joint.difference
    slots, targets, components = like.shape
    probability, component = like.new_empty(2, slots, components)
    marginal, kappa = like.new_empty(slots), torch.empty_like(like)
    if slots == 0:
        return probability, marginal, component, kappa
    given = loss is not None and m.data_weight is not None
    block_n, teachers = power_of_two(components), 1
    if s.teacher is not None:
        teachers = s.teacher.total.shape[1]
    pointers, flags = _places(places, like)
    _factors_kernel[(slots,)](
        like,
        s.mass,
        s.divergence,
        like if s.teacher is None else s.teacher.total,
        m.log_weights,
        *(m.data_weight if given else like, m.consistency_weight),
        like if m.component_weight is None else m.component_weight,
        like if rows is None else rows.contiguous(),
        loss.contiguous() if given and loss is not None else like,
        *pointers,
        probability,
        marginal,
        component,
        kappa,
        slots,
        components,
        teachers,
        targets,
        places.sizes[1],
        **flags,
        HAS_LOSS=given,
        HAS_GRADIENT_ROWS=rows is not None,
        MARGINAL=m.marginal,
        COMPONENT=m.component,
        BLOCK_J=max(1, min(power_of_two(targets), 1024 // block_n)),
        BLOCK_N=block_n,
        BLOCK_M=power_of_two(teachers),
        num_warps=1,
    )
    return probability, marginal, component, kappa
