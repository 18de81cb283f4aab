"""Mixture backward: the gradient with respect to the student's logits.

Shapes: A slots, N student components, D positions, V vocabulary. With p = exp l, r and q of
`mixture_forward` and the coefficients of `passes.base.Factors`, at every visited position

    dz_nv = probability_n p_nv - marginal q_v r_nv - component_n qT_v

everywhere; `target_gradient` then completes the J columns of the targets, so that this pass needs
no comparison with tokens. The gradient may take the place of the logits.

Moves: one read of the visited rows of z, one write of all rows of dz (zeros where not active), one
row of V per position of q, and of qT for the component term.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .logistic import add_slopes, bins_flag, bins_tile, gradient_of_slopes, pointers_of
from .tiles import (
    LOWEST,
    add_components,
    load_align,
    load_log2_weights,
    mixture_tiles,
    position_at,
    responsibility_tile,
    row_offset,
    row_tile,
    softmax_rows,
    softmax_tile,
    split_position,
    visit_arguments,
    visit_flags,
)
from .tuning import launch_parameters, tunable


@tunable("mixture_backward")
@dataclasses.dataclass(frozen=True)
class MixtureBackward:
    elements: int = 2048  # of a tile, N · BLOCK_V, in 2 bytes; half as many in fp32
    # A thread holds whole columns: with 8 warps, numbers of a column (q, m) are computed four times
    # and sums over components cross warps. 28 instructions per logit with 8, 20 with 2.
    warps: int = 2  # for tiles of up to 16 components; twice as many for 32
    bins_elements: int = 256  # of a tile of bins
    stages: int = 3
    split_columns: int = 4096  # columns of one program

    powers_of_two = ("elements", "bins_elements", "warps", "split_columns")


@triton.jit
def dense_gradient(
    prob, share, probability, pull, component, qt, HAS_Q: tl.constexpr, HAS_C: tl.constexpr
):
    """probability p - pull share - component qT; pull is marginal q over the sum of the shares."""
    grad = probability * prob
    if HAS_Q:
        grad -= share * pull
    if HAS_C:
        grad -= component * qt
    return grad


@triton.jit
def _store(grad_ptr, offset, inside, grad, cols, V, TAIL: tl.constexpr):
    keep = inside[:, None]
    if TAIL:
        keep = keep & (cols < V)[None, :]
    value = grad.to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + offset[:, None] + cols[None, :], value, mask=keep)


@triton.jit
def _finish_bins(
    sums, bins, place, n, N, b, d, J, D, V, mask_id, inside, tokens_ptr, kappa_ptr, grad_ptr,
    grad_scale_ptr, offset, BINS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Add what the targets give, once per row, and store the gradient of two numbers per row."""
    split = tl.program_id(1)
    if split == 0:
        for begin in range(0, J, BLOCK_J):
            j = begin + tl.arange(0, BLOCK_J)
            tokens = tl.load(tokens_ptr + (b * J + j) * D + d, mask=j < J, other=mask_id)
            keep = inside[:, None] & ((j < J) & (tokens != mask_id))[None, :]
            entry = (place * J + j[None, :]) * N + n[:, None]
            kappa = tl.load(kappa_ptr + entry, mask=keep, other=0.0)
            edges, _, _ = bins_tile(bins, tokens[None, :], V, BINS)
            sums = add_slopes(sums, kappa, bins, edges, BINS)
    by_mu, by_scale = gradient_of_slopes(sums, bins, V, BINS)
    offset = offset[:, None] + split
    tl.store(grad_ptr + offset, by_mu, mask=inside[:, None])
    tl.store(grad_scale_ptr + offset, by_scale, mask=inside[:, None])


@triton.jit(do_not_specialize=["first", "slots"])
def _mixture_backward_kernel(
    z_ptr,  # student logits, or mu of its bins, in
    z_scale_ptr,  # log_scale of its bins, in
    shift_ptr,  # [A, N] fp32, in, and so total: the student's row sums
    total_ptr,
    log_weights_ptr,  # [B, N] fp32, in
    probability_ptr,  # [A, N] fp32, in
    marginal_ptr,  # [A] fp32, in, with HAS_Q
    component_ptr,  # [A, N] fp32, in, with HAS_C
    rows_ptr,
    count_ptr,
    q_ptr,  # [slots, V] fp32, in, with HAS_Q
    qt_ptr,  # [slots, V] fp32, in, with HAS_C
    grad_ptr,  # student's gradient, out; may be z, but not of bins
    grad_scale_ptr,  # that of log_scale, out, with Z_BINS, and so what follows, in:
    tokens_ptr,  # [B, J, D] int64
    kappa_ptr,  # [A, J, N] fp32
    first,
    slots,
    N,
    J,
    D,
    V,
    split,
    mask_id,
    z_i,
    z_b,
    z_n,
    z_d,
    g_i,
    g_b,
    g_n,
    g_d,
    q_i,
    qt_i,
    Z_BINS: tl.constexpr,
    Z_ALIGN: tl.constexpr,
    G_ALIGN: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    HAS_Q: tl.constexpr,
    HAS_C: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * split
    place, position, active = position_at(
        slot, slot < slots, rows_ptr, count_ptr, first, HAS_ROWS, HAS_COUNT
    )
    b, d = split_position(position, D)
    stop = tl.minimum(start + split, V)
    full = start + (stop - start) // BLOCK_V * BLOCK_V
    index = tl.arange(0, BLOCK_N).to(tl.int64)
    if active:
        pull = 0.0
        if HAS_Q:
            pull = tl.load(marginal_ptr + place)
        q_row = q_ptr + slot * q_i
        qt_row = qt_ptr + slot * qt_i
        if ONE_TILE:
            inside = index < N
            entry = place * N + index
            a = load_log2_weights(log_weights_ptr, b * N + index, inside)
            z_offset = row_offset(slot, b, index, d, z_i, z_b, z_n, z_d, Z_ALIGN)
            rows = softmax_rows(
                z_ptr, z_scale_ptr, z_offset, shift_ptr, total_ptr, entry, inside, V, Z_BINS
            )
            g_offset = row_offset(slot, b, index, d, g_i, g_b, g_n, g_d, G_ALIGN)
            probability = tl.load(probability_ptr + entry, mask=inside, other=0.0)
            component = probability
            if HAS_C:
                component = tl.load(component_ptr + entry, mask=inside, other=0.0)
            if Z_BINS is not None:
                zero = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
                sums = (zero, zero, zero)
        for TAIL in tl.static_range(2):
            for begin in tl.range(
                full if TAIL else start, stop if TAIL else full, BLOCK_V, num_stages=STAGES
            ):
                cols = begin + tl.arange(0, BLOCK_V)
                q = tl.zeros([BLOCK_V], tl.float32)
                qt = q
                if HAS_Q:
                    q = pull * row_tile(q_row, cols, V, TAIL)
                if HAS_C:
                    qt = row_tile(qt_row, cols, V, TAIL)
                if ONE_TILE:
                    factor, log2_prob, edges = softmax_tile(
                        z_ptr, rows, begin, BLOCK_V, V, mask_id, TAIL, Z_BINS
                    )
                    share = log2_prob
                    if HAS_Q:
                        share, total, _ = responsibility_tile(factor, log2_prob, a)
                        q = q / tl.where(total == 0.0, 1.0, total)
                    grad = dense_gradient(
                        factor * tl.exp2(log2_prob), share, probability[:, None], q[None, :],
                        component[:, None], qt[None, :], HAS_Q, HAS_C,
                    )  # fmt: skip
                    if Z_BINS is None:
                        _store(grad_ptr, g_offset, inside, grad, cols, V, TAIL)
                    else:
                        sums = add_slopes(sums, grad, rows[0], edges, Z_BINS)
                else:
                    # First m over all components, then each of them. The gradient may take the
                    # place of the logits: both runs read only the columns of this program.
                    peak = tl.full([BLOCK_V], LOWEST, tl.float32)
                    total = tl.zeros([BLOCK_V], tl.float32)
                    if HAS_Q:
                        for n0 in range(0, N, BLOCK_N):
                            n = n0 + index
                            inside = n < N
                            a = load_log2_weights(log_weights_ptr, b * N + n, inside)
                            z_offset = row_offset(slot, b, n, d, z_i, z_b, z_n, z_d, Z_ALIGN)
                            rows = softmax_rows(
                                z_ptr, z_scale_ptr, z_offset, shift_ptr, total_ptr, place * N + n,
                                inside, V, Z_BINS,
                            )  # fmt: skip
                            factor, log2_prob, edges = softmax_tile(
                                z_ptr, rows, begin, BLOCK_V, V, mask_id, TAIL, Z_BINS
                            )
                            peak, total = add_components(
                                peak, total, factor, log2_prob + a[:, None]
                            )
                    q = q / tl.where(total == 0.0, 1.0, total)
                    for n0 in range(0, N, BLOCK_N):
                        n = n0 + index
                        inside = n < N
                        entry = place * N + n
                        a = load_log2_weights(log_weights_ptr, b * N + n, inside)
                        z_offset = row_offset(slot, b, n, d, z_i, z_b, z_n, z_d, Z_ALIGN)
                        g_offset = row_offset(slot, b, n, d, g_i, g_b, g_n, g_d, G_ALIGN)
                        probability = tl.load(probability_ptr + entry, mask=inside, other=0.0)
                        component = probability
                        if HAS_C:
                            component = tl.load(component_ptr + entry, mask=inside, other=0.0)
                        rows = softmax_rows(
                            z_ptr, z_scale_ptr, z_offset, shift_ptr, total_ptr, entry, inside, V,
                            Z_BINS,
                        )  # fmt: skip
                        factor, log2_prob, edges = softmax_tile(
                            z_ptr, rows, begin, BLOCK_V, V, mask_id, TAIL, Z_BINS
                        )
                        share = log2_prob
                        if HAS_Q:
                            share = factor * tl.exp2(log2_prob + a[:, None] - peak[None, :])
                        grad = dense_gradient(
                            factor * tl.exp2(log2_prob), share, probability[:, None], q[None, :],
                            component[:, None], qt[None, :], HAS_Q, HAS_C,
                        )  # fmt: skip
                        if Z_BINS is None:
                            _store(grad_ptr, g_offset, inside, grad, cols, V, TAIL)
                        else:  # the one block of columns of this program
                            zero = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
                            sums = add_slopes((zero, zero, zero), grad, rows[0], edges, Z_BINS)
                            _finish_bins(
                                sums, rows[0], place, n, N, b, d, J, D, V, mask_id, inside,
                                tokens_ptr, kappa_ptr, grad_ptr, grad_scale_ptr, g_offset,
                                Z_BINS, BLOCK_V,
                            )  # fmt: skip
        if ONE_TILE and Z_BINS is not None:
            _finish_bins(
                sums, rows[0], place, index, N, b, d, J, D, V, mask_id, inside,
                tokens_ptr, kappa_ptr, grad_ptr, grad_scale_ptr, g_offset, Z_BINS, BLOCK_V,
            )  # fmt: skip
    elif slot < slots:
        zero = tl.zeros([BLOCK_N, BLOCK_V], grad_ptr.dtype.element_ty)
        for n0 in range(0, N if Z_BINS is None else 0, BLOCK_N):
            n = n0 + index
            g_offset = row_offset(slot, b, n, d, g_i, g_b, g_n, g_d, G_ALIGN)
            for begin in range(start, stop, BLOCK_V):
                cols = begin + tl.arange(0, BLOCK_V)
                keep = (n < N)[:, None] & (cols < V)[None, :]
                tl.store(grad_ptr + g_offset[:, None] + cols[None, :], zero, mask=keep)


def mixture_backward(
    student,
    visit,
    mixture,
    statistics,
    factors,
    gradient,
    *,
    q: Tensor | None,
    q_teacher: Tensor | None,
) -> None:
    """Write the gradient of every visited slot, zeros where it is not active.

    `gradient` is an operand that may be the student's own memory; q and q_teacher are (slots, >= V)
    fp32 rows of the visit, None where their term is not asked for. Of bins it is complete, the
    targets included, and no zeros are written.
    """
    if visit.slots == 0:
        return
    like = statistics.student.total
    tuned = launch_parameters("mixture_backward", like.device)
    tiles = mixture_tiles(student, tuned)
    parts = None
    if student.bins is not None and tiles.splits > 1:  # each split leaves its part of the sums
        parts = torch.zeros(2, visit.slots, student.components, tiles.splits, device=like.device)
    # A split of the columns shares no gradient with another, so it may be as wide as one likes;
    # with many components every program would read them all for each of its tiles.
    _mixture_backward_kernel[(visit.slots, tiles.splits)](
        *pointers_of(student),
        statistics.student.shift,
        statistics.student.total,
        mixture.log_weights,
        factors.probability,
        factors.marginal,
        factors.component,
        *visit_arguments(visit, like)[:2],
        like if q is None else q,
        like if q_teacher is None else q_teacher,
        *(pointers_of(gradient) if parts is None else parts),
        statistics.tokens,
        factors.kappa,
        visit.first,
        visit.slots,
        student.components,
        statistics.tokens.shape[1],
        visit.positions,
        student.vocabulary,
        tiles.split,
        -1 if mixture.mask_id is None else mixture.mask_id,
        *student.strides,
        *(gradient.strides if parts is None else (parts.stride(1), 0, parts.stride(2), 0)),
        0 if q is None else q.stride(0),
        0 if q_teacher is None else q_teacher.stride(0),
        Z_BINS=bins_flag(student),
        Z_ALIGN=load_align(student, tiles.block_n),
        G_ALIGN=1 if parts is not None else load_align(gradient, tiles.block_n),
        **visit_flags(visit),
        HAS_Q=q is not None,
        HAS_C=q_teacher is not None,
        ONE_TILE=tiles.one_tile,
        BLOCK_N=tiles.block_n,
        BLOCK_V=tiles.block_v,
        STAGES=tuned.stages,
        num_warps=tiles.warps,
    )
    if parts is not None:
        b, d = visit.split(like.device)
        for whole, part in zip(pointers_of(gradient), parts.sum(-1), strict=True):
            whole[b, :, d] = part
