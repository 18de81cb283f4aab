"""Target gradient: the elements of the student's gradient at the target tokens, complete.

Shapes: A slots, N student components, D positions, V vocabulary, J targets. At every visited
position and for every target j, with l and r at the target,

    dz[n, x_j] = probability_n e^l - marginal q r - component_n qT + sum over i with x_i = x_j of
                 kappa_in

Each element is recomputed from the stored log-probabilities and written over what
`mixture_backward` has left there, by one program per target; those that coincide write the same
value. The logits are not read: the gradient may have taken their place.

Moves: J·N scattered elements per position.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .mixture_backward import dense_gradient
from .tiles import (
    LOG2_E,
    LOWEST,
    load_log2_weights,
    position_at,
    row_offset,
    split_position,
    visit_arguments,
    visit_flags,
)
from .tuning import power_of_two


@triton.jit(do_not_specialize=["first", "slots"])
def _target_gradient_kernel(
    tokens_ptr,  # [B, J, D] int64, in
    log_prob_ptr,  # [A, J, N] fp32, in
    log_weights_ptr,  # [B, N] fp32, in
    probability_ptr,  # [A, N] fp32, in
    marginal_ptr,  # [A] fp32, in, with HAS_Q
    component_ptr,  # [A, N] fp32, in, with HAS_C
    kappa_ptr,  # [A, J, N] fp32, in
    rows_ptr,
    count_ptr,
    q_ptr,  # [slots, V] fp32, in, with HAS_Q
    qt_ptr,  # [slots, V] fp32, in, with HAS_C
    grad_ptr,  # out
    first,
    slots,
    N,
    J,
    D,
    V,
    mask_id,
    g_i,
    g_b,
    g_n,
    g_d,
    q_i,
    qt_i,
    HAS_ROWS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_Q: tl.constexpr,
    HAS_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0)
    slot, j = (row // J).to(tl.int64), (row % J).to(tl.int64)
    place, position, active = position_at(
        slot, slot < slots, rows_ptr, count_ptr, first, HAS_ROWS, HAS_COUNT
    )
    if not active:
        return
    b, d = split_position(position, D)
    tokens = tokens_ptr + b * J * D + d
    token = tl.load(tokens + j * D)
    if (token == mask_id) | (token >= V):  # of another rank
        return
    index = tl.arange(0, BLOCK_N).to(tl.int64)
    entry = (place * J + j) * N
    pull, qt, peak = 0.0, 0.0, tl.full([], LOWEST, tl.float32)
    if HAS_Q:
        # m at the target, from its log-probabilities under all components.
        total = 0.0
        for n0 in range(0, N, BLOCK_N):
            n = n0 + index
            weighted = tl.load(log_prob_ptr + entry + n, mask=n < N, other=float("-inf")) * LOG2_E
            weighted += load_log2_weights(log_weights_ptr, b * N + n, n < N)
            top = tl.maximum(peak, tl.max(weighted, axis=0))
            total = total * tl.exp2(peak - top) + tl.sum(tl.exp2(weighted - top), axis=0)
            peak = top
        pull = tl.load(q_ptr + slot * q_i + token) * tl.load(marginal_ptr + place)
        pull = pull / tl.where(total == 0.0, 1.0, total)
    if HAS_C:
        qt = tl.load(qt_ptr + slot * qt_i + token)

    for n0 in range(0, N, BLOCK_N):
        n = n0 + index
        inside = n < N
        log2_prob = LOG2_E * tl.load(log_prob_ptr + entry + n, mask=inside, other=float("-inf"))
        a = load_log2_weights(log_weights_ptr, b * N + n, inside)
        probability = tl.load(probability_ptr + place * N + n, mask=inside, other=0.0)
        component = probability
        if HAS_C:
            component = tl.load(component_ptr + place * N + n, mask=inside, other=0.0)
        share = log2_prob
        if HAS_Q:
            share = tl.exp2(log2_prob + a - peak)
        prob = tl.exp2(log2_prob)
        grad = dense_gradient(prob, share, probability, pull, component, qt, HAS_Q, HAS_C)
        # Targets may coincide: each element gathers the kappa of all that share its token.
        for j0 in range(0, J, BLOCK_J):
            other = j0 + tl.arange(0, BLOCK_J)
            same = tl.load(tokens + other * D, mask=other < J, other=-1) == token
            at = (place * J + other)[:, None] * N + n[None, :]
            kappa = tl.load(kappa_ptr + at, mask=same[:, None] & inside[None, :], other=0.0)
            grad += tl.sum(kappa, axis=0)
        offset = row_offset(slot, b, n, d, g_i, g_b, g_n, g_d, 1)
        tl.store(grad_ptr + offset + token, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def target_gradient(
    visit,
    mixture,
    statistics,
    factors,
    gradient,
    *,
    q: Tensor | None,
    q_teacher: Tensor | None,
) -> None:
    """Complete the gradient at the targets of every active visited slot; see `mixture_backward`."""
    targets, components = statistics.log_prob.shape[1:]
    if visit.slots == 0 or targets == 0:
        return
    like = statistics.student.total
    block_n = min(power_of_two(components), 32)
    _target_gradient_kernel[(visit.slots * targets,)](
        statistics.tokens,
        statistics.log_prob,
        mixture.log_weights,
        factors.probability,
        factors.marginal,
        factors.component,
        factors.kappa,
        *visit_arguments(visit, like)[:2],
        like if q is None else q,
        like if q_teacher is None else q_teacher,
        gradient.logits,
        visit.first,
        visit.slots,
        components,
        targets,
        visit.positions,
        gradient.vocabulary,
        -1 if mixture.mask_id is None else mixture.mask_id,
        *gradient.strides,
        0 if q is None else q.stride(0),
        0 if q_teacher is None else q_teacher.stride(0),
        **visit_flags(visit),
        HAS_Q=q is not None,
        HAS_C=q_teacher is not None,
        BLOCK_J=max(1, min(power_of_two(targets), 512 // block_n)),
        BLOCK_N=block_n,
        num_warps=1,  # so that sums need no barrier
    )
