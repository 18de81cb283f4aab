"""Joint terms of the target rows, and the sums over positions of everything else.

Shapes: B batch, N components, D positions, J target rows, G groups of positions, S splits.

    counted_jd = position d is active and alive and (with the control variate) m_jd > -inf
    m_jd       = logsumexp_n(a_n + picked_djn)
    joint_jn   = a_n + sum over counted d of (picked_djn - m_jd)       without m: log-likelihood
    value_j    = -logsumexp_n joint_jn
    weight_jn  = softmax_n joint_jn                  0 throughout where value_j is infinite

A position is alive if some component allows some class. Sums over positions run in fp64: a
log-likelihood of thousands of nats leaves fp32 too few digits for the weights. Two stages with
parts in memory, so results repeat exactly. Moves a few MB at most.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .mixture_forward import ForwardSums
from .tuning import power_of_two

GROUP = 256  # positions whose sum one program forms
TILE = 2048  # elements of its tile


@triton.jit
def _joint_part_kernel(
    picked_ptr,  # [B * D, J, N] fp32, in
    lse_ptr,  # [B * D, N] fp32, in
    active_ptr,  # [B * D] bool, in, with HAS_ACTIVE
    log_weights_ptr,  # [B, N] fp32, in
    marginal_ptr,  # [B * D, J] fp32, out, with CORRELATION
    part_ptr,  # [B, J, G, N + 1] fp64, out; the last entry counts positions
    D,
    J,
    N,
    G,
    GROUP: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    CORRELATION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # b * J + j
    group = tl.program_id(1)
    b, j = row // J, row % J
    n = tl.arange(0, BLOCK_N)
    a = tl.load(log_weights_ptr + b * N + n, mask=n < N, other=float("-inf"))
    sums = tl.zeros([BLOCK_N], tl.float64)
    number = tl.zeros([BLOCK_D], tl.float64)
    stop = tl.minimum((group + 1) * GROUP, D)
    for begin in range(group * GROUP, stop, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        position = b * D + d
        visited = d < stop
        if HAS_ACTIVE:
            visited = visited & (tl.load(active_ptr + position, mask=visited, other=0) != 0)
        inside = visited[:, None] & (n < N)[None, :]
        lse = tl.load(
            lse_ptr + position[:, None] * N + n[None, :], mask=inside, other=float("-inf")
        )
        counted = visited & (tl.max(lse, axis=1) > float("-inf"))
        entry = (position[:, None] * J + j) * N + n[None, :]
        picked = tl.load(picked_ptr + entry, mask=inside, other=float("-inf"))
        if CORRELATION:
            weighted = picked + a[None, :]
            peak = tl.max(weighted, axis=1)
            counted = counted & (peak > float("-inf"))
            peak = tl.where(counted, peak, 0.0)
            m = peak + tl.log(tl.sum(tl.exp(weighted - peak[:, None]), axis=1))
            tl.store(
                marginal_ptr + position * J + j,
                tl.where(counted, m, float("-inf")),
                mask=visited,
            )
            picked = picked - tl.where(counted, m, 0.0)[:, None]
        picked = tl.where(counted[:, None], picked, 0.0)
        sums += tl.sum(picked.to(tl.float64), axis=0)
        number += counted.to(tl.float64)
    place = part_ptr + (row * G + group) * (N + 1)
    tl.store(place + n, sums, mask=n < N)
    tl.store(place + N, tl.sum(number, axis=0))


@triton.jit
def _finish_kernel(
    part_ptr,  # [B, J, G, N + 1] fp64, in
    log_weights_ptr,  # [B, N] fp32, in
    active_ptr,  # [B * D] bool, in, with HAS_ACTIVE
    kl_t_ptr,  # [B * D, S] fp32, in, with HAS_Q
    kl_u_ptr,  # [B * D, S] fp32, in, with HAS_Q and HAS_U
    divergence_ptr,  # [B * D, S, N] fp32, in, with HAS_C
    data_weight_ptr,  # [B] fp32, in, and so the three below; with HAS_LOSS
    teacher_weight_ptr,
    consistency_weight_ptr,
    component_weight_ptr,
    values_ptr,  # [B, J] fp32, out
    joint_ptr,  # [B, J, N] fp32, out
    alpha_ptr,  # [B, J] fp32, out: weight of each target row, 0 where its value is infinite
    loss_ptr,  # [B] fp32, out, with HAS_LOSS
    terms_ptr,  # [5, B] fp32, out, with HAS_LOSS
    B,
    D,
    J,
    N,
    G,
    S,
    scale,
    HAS_ACTIVE: tl.constexpr,
    HAS_Q: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_LOSS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    a = tl.load(log_weights_ptr + b * N + n, mask=n < N, other=float("-inf"))
    data = 0.0
    consistency = 0.0
    if HAS_LOSS:
        data_weight = tl.load(data_weight_ptr + b)
        consistency_weight = tl.load(consistency_weight_ptr + b)
    draws = tl.maximum(J - 1, 1)
    for j in range(0, J):
        row = b * J + j
        joint = a.to(tl.float64)
        number = tl.zeros([], tl.float64)
        for group in range(0, G):
            place = part_ptr + (row * G + group) * (N + 1)
            joint += tl.load(place + n, mask=n < N, other=0.0)
            number += tl.load(place + N)
        peak = tl.max(joint, axis=0)
        possible = peak > float("-inf")
        peak = tl.where(possible, peak, 0.0)
        part = tl.exp((joint - peak).to(tl.float32))
        total = tl.sum(part, axis=0)
        value = -(peak.to(tl.float32) + tl.log(total))
        value = tl.where(possible, value, float("inf"))
        # Without a position the value is exactly 0, not a rounded logsumexp.
        value = tl.where(number > 0, value, 0.0)
        tl.store(values_ptr + row, value)
        weight = tl.where(possible & (number > 0), part / tl.maximum(total, 1.0), 0.0)
        tl.store(joint_ptr + row * N + n, weight, mask=n < N)
        if HAS_LOSS:
            alpha = tl.where(j == 0, data_weight, consistency_weight / draws)
            tl.store(alpha_ptr + row, tl.where(possible, alpha, 0.0))
            data += tl.where(j == 0, value, 0.0)
            consistency += tl.where(j == 0, 0.0, value)

    if HAS_LOSS:
        consistency = consistency / draws
        kl_t = tl.zeros([BLOCK_E], tl.float32)
        kl_u = tl.zeros([BLOCK_E], tl.float32)
        if HAS_Q:
            for begin in range(0, D * S, BLOCK_E):
                entry = begin + tl.arange(0, BLOCK_E)
                inside = entry < D * S
                if HAS_ACTIVE:
                    visited = tl.load(active_ptr + b * D + entry // S, mask=inside, other=0)
                    inside = inside & (visited != 0)
                place = b * D * S + entry
                kl_t += tl.load(kl_t_ptr + place, mask=inside, other=0.0)
                if HAS_U:
                    kl_u += tl.load(kl_u_ptr + place, mask=inside, other=0.0)
        teacher_marginal = tl.sum(kl_t, axis=0)
        consistency_marginal = tl.sum(kl_u, axis=0)
        divergence = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
        if HAS_C:
            weights = tl.exp(a)[None, :]
            for begin in range(0, D * S, BLOCK_C):
                entry = begin + tl.arange(0, BLOCK_C)
                inside = entry < D * S
                if HAS_ACTIVE:
                    visited = tl.load(active_ptr + b * D + entry // S, mask=inside, other=0)
                    inside = inside & (visited != 0)
                place = (b * D * S + entry)[:, None] * N + n[None, :]
                wanted = inside[:, None] & (n < N)[None, :] & (weights > 0.0)
                divergence += tl.load(divergence_ptr + place, mask=wanted, other=0.0) * weights
        component = tl.sum(tl.sum(divergence, axis=1), axis=0)
        teacher_weight = tl.load(teacher_weight_ptr + b)
        component_weight = tl.load(component_weight_ptr + b)
        # A term of weight 0 is left out, not multiplied: it may be infinite.
        loss = tl.where(data_weight > 0, data_weight * data, 0.0)
        loss += tl.where(teacher_weight > 0, teacher_weight * teacher_marginal, 0.0)
        loss += tl.where(
            consistency_weight > 0, consistency_weight * (consistency + consistency_marginal), 0.0
        )
        loss += tl.where(component_weight > 0, component_weight * component, 0.0)
        tl.store(loss_ptr + b, loss * scale)
        tl.store(terms_ptr + b, data)
        tl.store(terms_ptr + B + b, teacher_marginal)
        tl.store(terms_ptr + 2 * B + b, consistency)
        tl.store(terms_ptr + 3 * B + b, consistency_marginal)
        tl.store(terms_ptr + 4 * B + b, component)


def joint_terms(
    picked: Tensor,
    lse: Tensor,
    active: Tensor | None,
    log_weights: Tensor,
    *,
    correlation: bool,
    weights: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    sums: ForwardSums | None = None,
    has_q: bool = False,
    has_u: bool = False,
    has_c: bool = False,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Joint values and weights of target rows and, with `weights`, the loss and its terms.

    Args:
        picked: (B·D, J, N) fp32 log-probabilities of the targets, as `row_statistics` leaves them.
        lse: (B·D, N) fp32.
        active: (B, D) bool, contiguous, or None.
        log_weights: (B, N) fp32.
        correlation: subtract the marginal of every position (the control variate).
        weights: data, teacher, consistency and component weight, each (B,) fp32.
        sums: what `mixture_forward` left.

    Returns:
        values (B, J), joint (B, J, N), marginal (B·D, J), alpha (B, J), loss (B,), terms (5, B),
        all fp32. The loss is multiplied by `scale`; alpha is not.
    """
    batch, components = log_weights.shape
    rows, targets, _ = picked.shape
    positions = rows // max(batch, 1)
    device = picked.device

    def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    groups = max(1, triton.cdiv(positions, GROUP))
    part = buffer(batch, targets, groups, components + 1, dtype=torch.float64)
    result = {
        "values": buffer(batch, targets),
        "joint": buffer(batch, targets, components),
        "marginal": buffer(rows if correlation else 0, targets),
        "alpha": buffer(batch, targets),
        "loss": buffer(batch),
        "terms": buffer(5, batch),
    }
    if batch == 0:
        return result
    flags = lse if active is None else active.view(torch.uint8)
    block_n = power_of_two(components)
    if targets:
        _joint_part_kernel[(batch * targets, groups)](
            picked,
            lse,
            flags,
            log_weights,
            result["marginal"],
            part,
            positions,
            targets,
            components,
            groups,
            GROUP=GROUP,
            HAS_ACTIVE=active is not None,
            CORRELATION=correlation,
            BLOCK_D=max(1, min(power_of_two(positions), TILE // block_n)),
            BLOCK_N=block_n,
            num_warps=4,
        )
    has_loss = weights is not None
    data, teacher, consistency, component = weights or (log_weights,) * 4
    none = log_weights
    _finish_kernel[(batch,)](
        part,
        log_weights,
        flags,
        sums.kl_teacher if sums is not None else none,
        sums.kl_consistency if sums is not None else none,
        sums.divergence if sums is not None else none,
        data,
        teacher,
        consistency,
        component,
        result["values"],
        result["joint"],
        result["alpha"],
        result["loss"],
        result["terms"],
        batch,
        positions,
        targets,
        components,
        groups,
        sums.tiles.splits if sums is not None else 1,
        scale,
        HAS_ACTIVE=active is not None,
        HAS_Q=has_q,
        HAS_U=has_u,
        HAS_C=has_c,
        HAS_LOSS=has_loss,
        BLOCK_N=block_n,
        BLOCK_E=1024,
        BLOCK_C=max(1, TILE // block_n),
        num_warps=4,
    )
    return result
