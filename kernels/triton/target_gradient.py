"""Target gradient: the elements of the student's gradient at the target tokens, complete.

Shapes: B batch, N student components, D positions, V vocabulary, J targets. With the notation of
`mixture_backward`, at every visited position and for every target j

    dz[n, x_j] = g (coefficient_n p - q r - component_weight e_n qT + sum over i with x_i = x_j of
                 kappa_in)

Each element is recomputed from the stored log-probabilities and written once, over what
`mixture_backward` has left there; targets that coincide write the same value. Reads nothing that
`mixture_backward` overwrites.

Moves: J·N scattered elements per position.
"""

from __future__ import annotations

import dataclasses

import triton
import triton.language as tl
from torch import Tensor

from ._tl import (
    kappa_sum,
    kappa_tile,
    load_logsumexp,
    logits_at,
    position_at,
    row_offset,
    split_position,
)
from .mixture_forward import STORED, TEACHER
from .operands import Operand, Visit
from .tuning import power_of_two


@triton.jit
def coefficients(
    picked_ptr,
    marginal_ptr,
    joint_ptr,
    alpha_ptr,
    mass_ptr,
    divergence_ptr,
    component_weight,
    lse,  # [BLOCK_N]
    a,  # [BLOCK_N]
    position,
    b,
    n,  # [BLOCK_N]
    J,
    N,
    HAS_Q: tl.constexpr,
    HAS_C: tl.constexpr,
    CORRELATION: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What p_nv is multiplied with, and component_weight e^{a_n}: [BLOCK_N] each."""
    coefficient = -kappa_sum(
        picked_ptr, marginal_ptr, joint_ptr, alpha_ptr, a, position, b, n, J, N,
        CORRELATION, BLOCK_J, BLOCK_N,
    )  # fmt: skip
    factor = tl.zeros([BLOCK_N], tl.float32)
    if HAS_Q:
        coefficient += tl.load(mass_ptr + position * N + n, mask=n < N, other=0.0)
    if HAS_C:
        # An infinite divergence has no gradient; in rows without any class nothing counts.
        divergence = tl.load(divergence_ptr + position * N + n, mask=n < N, other=0.0)
        finite = (divergence < float("inf")) & (lse < float("inf"))
        factor = tl.where(finite, component_weight * tl.exp(a), 0.0)
        coefficient += factor
    return coefficient, factor


@triton.jit
def _target_gradient_kernel(
    t_ptr,
    ty_ptr,
    lse_ptr,
    lse_t_ptr,
    log_weights_ptr,
    teacher_weight_ptr,
    consistency_weight_ptr,
    component_weight_ptr,
    upstream_ptr,
    tokens_ptr,  # [B, J, D] int64, in
    picked_ptr,
    marginal_ptr,
    joint_ptr,
    alpha_ptr,
    mass_ptr,
    divergence_ptr,
    rows_ptr,
    count_ptr,
    qt_ptr,
    qu_ptr,
    grad_ptr,
    first,
    slots,
    N,
    J,
    D,
    V,
    mask_id,
    t_eps,
    scale,
    t_i,
    t_b,
    t_m,
    t_d,
    g_i,
    g_b,
    g_n,
    g_d,
    qt_i,
    qu_i,
    T_KIND: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    T_SOURCE: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_Q: tl.constexpr,
    HAS_C: tl.constexpr,
    CORRELATION: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The elements dz[n, x_j] of one position, complete; see `_mixture_backward_kernel`."""
    slot = tl.program_id(0).to(tl.int64)
    position, active = position_at(slot, slot < slots, rows_ptr, count_ptr, first, HAS_ROWS)
    if not active:
        return
    b, d = split_position(position, D)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    inside = (j < J)[:, None] & (n < N)[None, :]
    tokens = tl.load(tokens_ptr + (b * J + j) * D + d, mask=j < J, other=0)
    a = tl.load(log_weights_ptr + b * N + n, mask=n < N, other=float("-inf"))
    lse = load_logsumexp(lse_ptr + position * N + n, n < N)
    entry = (position * J + j[:, None]) * N + n[None, :]
    log_prob = tl.load(picked_ptr + entry, mask=inside, other=float("-inf"))

    # Targets may coincide: each element gathers the kappa of all that share its token.
    hits = tl.zeros([BLOCK_J, BLOCK_N], tl.float32)
    component_weight = 0.0
    if HAS_C:
        component_weight = tl.load(component_weight_ptr + b)
    for other in range(0, J):
        one = other + tl.arange(0, 1)
        kappa = kappa_tile(
            picked_ptr, marginal_ptr, joint_ptr, alpha_ptr, a, position, b, one, n, J, N,
            CORRELATION,
        )  # fmt: skip
        kappa = tl.sum(kappa, axis=0)
        token = tl.load(tokens_ptr + (b * J + other) * D + d)
        hits += tl.where((tokens == token)[:, None], kappa[None, :], 0.0)

    coefficient, factor = coefficients(
        picked_ptr, marginal_ptr, joint_ptr, alpha_ptr, mass_ptr, divergence_ptr,
        component_weight, lse, a, position, b, n, J, N,
        HAS_Q, HAS_C, CORRELATION, BLOCK_J, BLOCK_N,
    )  # fmt: skip
    # In a row without any class the targets are not counted either.
    grad = tl.where((lse < float("inf"))[None, :], hits, 0.0)
    grad += coefficient[None, :] * tl.exp(log_prob)
    qt = tl.zeros([BLOCK_J], tl.float32)
    if T_SOURCE == 1:
        qt = tl.load(qt_ptr + slot * qt_i + tokens, mask=j < J, other=0.0)
    if T_SOURCE == 2:
        lse_t = load_logsumexp(lse_t_ptr + position, active)
        t_offset = row_offset(slot, position, 0, D, t_i, t_b, t_m, t_d, 1)
        t = logits_at(t_ptr, ty_ptr, t_offset, tokens, j < J, V, mask_id, t_eps, T_KIND)
        qt = tl.exp(t - lse_t)
    if HAS_C:
        grad -= qt[:, None] * factor[None, :]
    if HAS_Q:
        q = qt * tl.load(teacher_weight_ptr + b)
        if HAS_U:
            qu = tl.load(qu_ptr + slot * qu_i + tokens, mask=j < J, other=0.0)
            q += qu * tl.load(consistency_weight_ptr + b)
        marginal = tl.load(marginal_ptr + position * J + j, mask=j < J, other=float("-inf"))
        counted = marginal > float("-inf")
        share = tl.exp(a[None, :] + log_prob - tl.where(counted, marginal, 0.0)[:, None])
        grad -= q[:, None] * tl.where(counted[:, None], share, 0.0)
    g_offset = row_offset(slot, position, n, D, g_i, g_b, g_n, g_d, 1)
    value = (grad * (tl.load(upstream_ptr + b) * scale)).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + g_offset[None, :] + tokens[:, None], value, mask=inside)


@dataclasses.dataclass(frozen=True)
class BackwardSums:
    """What the backward kernels read besides logits and distributions; fp32, contiguous."""

    tokens: Tensor  # [B, J, D] int64
    lse: Tensor  # [B * D, N]
    lse_teacher: Tensor  # [B * D, M]
    log_weights: Tensor  # [B, N]
    teacher_weight: Tensor  # [B]
    consistency_weight: Tensor  # [B]
    component_weight: Tensor  # [B]
    picked: Tensor  # [B * D, J, N]
    marginal: Tensor  # [B * D, J]
    joint: Tensor  # [B, J, N]
    alpha: Tensor  # [B, J]
    mass: Tensor  # [B * D, N]
    divergence: Tensor  # [B * D, N]
    correlation: bool
    has_q: bool
    has_c: bool


def teacher_source(known: BackwardSums, q_teacher: Tensor | None) -> int:
    """The value of `T_SOURCE`: absent (0), stored, or from the teacher's logits."""
    if not (known.has_q or known.has_c):
        return 0
    return TEACHER if q_teacher is None else STORED


def target_gradient(
    student: Operand,
    teacher: Operand | None,
    visit: Visit,
    positions: int,
    mask_id: int | None,
    known: BackwardSums,
    *,
    upstream: Tensor,
    scale: float,
    grad: Tensor,
    grad_strides: tuple[int, int, int, int],
    q_teacher: Tensor | None = None,
    q_consistency: Tensor | None = None,
) -> None:
    """Overwrite the gradient at the target tokens; arguments as for `mixture_backward`."""
    targets = known.tokens.shape[1]
    if targets == 0 or visit.slots == 0:
        return
    source = student if teacher is None else teacher
    rows, count, first, has_rows = visit.arguments(known.lse)
    nothing = known.lse
    q_strides = [0 if x is None else x.stride(0) for x in (q_teacher, q_consistency)]
    block_n = min(power_of_two(student.components), 32)
    block_j = min(power_of_two(targets), 32)
    grid = (
        visit.slots,
        triton.cdiv(targets, block_j),
        triton.cdiv(student.components, block_n),
    )
    _target_gradient_kernel[grid](
        source.x,
        source.y,
        known.lse,
        known.lse_teacher,
        known.log_weights,
        known.teacher_weight,
        known.consistency_weight,
        known.component_weight,
        upstream,
        known.tokens,
        known.picked,
        known.marginal,
        known.joint,
        known.alpha,
        known.mass,
        known.divergence,
        rows,
        count,
        nothing if q_teacher is None else q_teacher,
        nothing if q_consistency is None else q_consistency,
        grad,
        first,
        visit.slots,
        student.components,
        targets,
        positions,
        student.vocabulary,
        -1 if mask_id is None else mask_id,
        source.eps,
        scale,
        *source.strides,
        *grad_strides,
        *q_strides,
        T_KIND=source.kind,
        HAS_ROWS=has_rows,
        T_SOURCE=teacher_source(known, q_teacher),
        HAS_U=known.has_q and q_consistency is not None,
        HAS_Q=known.has_q,
        HAS_C=known.has_c,
        CORRELATION=known.correlation,
        BLOCK_J=block_j,
        BLOCK_N=block_n,
        num_warps=2,
    )
