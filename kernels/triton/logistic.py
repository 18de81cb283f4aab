"""Bins of a discretised logistic distribution, and the way back to its two numbers.

Shapes: R rows, V bins of [-1, 1]. With i = exp(2 - log_scale), left and right the edges of a bin
minus mu times i, width = 2 i / V and mass = 1 - exp(-width),

    lower = log F(right) + log(F(-left) mass + eps)          F the sigmoid
    upper = log F(-left) + log(F(right) mass + eps)
    logit = lower, or min(lower, upper) with clamp "min"

which is log(F(right) - F(left)) without cancellation; at eps = 0 both are log F(right) +
log F(-left) + log mass, whose terms stay finite where a product would underflow.

Moves: two numbers read and a row of V written per row; back, a row of V read and two written.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import launch_parameters, power_of_two, tunable


@tunable("logistic")
@dataclasses.dataclass(frozen=True)
class Logistic:
    elements: int = 1024  # of a tile, rows · BLOCK_V: bins take registers of their own
    warps: int = 4

    powers_of_two = ("elements", "warps")


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both without cancellation."""
    tail = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + tail)
    small = tail * large
    return tl.where(x >= 0, large, small), tl.where(x >= 0, small, large)


@triton.jit
def _one_minus_exp(width):
    """1 - exp(-width) for width >= 0, without cancellation for small widths."""
    series = width * (1.0 - width * (0.5 - width * (1.0 / 6.0 - width * (1.0 / 24.0))))
    return tl.where(width < 0.03, series, 1.0 - tl.exp(-width))


@triton.jit
def _edges(mu_ptr, log_scale_ptr, row, wanted, cols, V):
    """left, right [R, W], width and inverse scale [R, 1]."""
    mu = tl.load(mu_ptr + row, mask=wanted, other=0.0).to(tl.float32)[:, None]
    log_scale = tl.load(log_scale_ptr + row, mask=wanted, other=0.0).to(tl.float32)[:, None]
    inverse = tl.exp(2.0 - log_scale)
    step = 2.0 / V
    left = (cols.to(tl.float32) * step - 1.0)[None, :] - mu
    return left * inverse, (left + step) * inverse, step * inverse, inverse


@triton.jit(do_not_specialize=["R"])
def _bins_kernel(
    mu_ptr,  # [R] in
    log_scale_ptr,  # [R] in
    out_ptr,  # [R, V] fp32, out
    R,
    V,
    eps,
    stride_r,
    EXACT: tl.constexpr,  # eps is 0
    BOTH: tl.constexpr,  # clamp "min"
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    left, right, width, _ = _edges(mu_ptr, log_scale_ptr, row, row < R, cols, V)
    mass = _one_minus_exp(width)
    if EXACT:
        logits = _log_sigmoid(right) + _log_sigmoid(-left) + tl.log(mass)
    else:
        _, above = _sigmoids(left)
        logits = _log_sigmoid(right) + tl.log(above * mass + eps)
        if BOTH:
            below, _ = _sigmoids(right)
            upper = _log_sigmoid(-left) + tl.log(below * mass + eps)
            # Not tl.minimum, which drops NaN.
            logits = tl.where(upper < logits, upper, logits)
    keep = (row < R)[:, None] & (cols < V)[None, :]
    tl.store(out_ptr + row[:, None] * stride_r + cols[None, :], logits, mask=keep)


@triton.jit(do_not_specialize=["R"])
def _bins_gradient_kernel(
    mu_ptr,  # [R] in
    log_scale_ptr,  # [R] in
    grad_ptr,  # [R, V] fp32, in
    grad_mu_ptr,  # [R] fp32, out
    grad_log_scale_ptr,  # [R] fp32, out
    R,
    V,
    eps,
    stride_r,
    EXACT: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    sum_mu = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    sum_scale = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for begin in range(0, V, BLOCK_V):
        cols = begin + tl.arange(0, BLOCK_V)
        keep = (row < R)[:, None] & (cols < V)[None, :]
        grad = tl.load(grad_ptr + row[:, None] * stride_r + cols[None, :], mask=keep, other=0.0)
        left, right, width, inverse = _edges(mu_ptr, log_scale_ptr, row, row < R, cols, V)
        mass = _one_minus_exp(width)
        not_above, above = _sigmoids(left)
        below, not_below = _sigmoids(right)
        # How the logit falls with left, rises with right, and rises with width.
        if EXACT:
            by_left, by_right, by_width = not_above, not_below, (1.0 - mass) / mass
        else:
            lower_sum = above * mass + eps
            by_left = mass * above * not_above / lower_sum
            by_right = not_below
            by_width = (1.0 - mass) * above / lower_sum
            if BOTH:
                upper_sum = below * mass + eps
                lower = _log_sigmoid(right) + tl.log(lower_sum)
                upper = _log_sigmoid(-left) + tl.log(upper_sum)
                # Where both are equal a minimum passes half of the gradient to each.
                part = tl.where(lower < upper, 1.0, tl.where(lower > upper, 0.0, 0.5))
                by_left = part * by_left + (1.0 - part) * not_above
                by_right = part * by_right + (1.0 - part) * mass * below * not_below / upper_sum
                by_width = part * by_width + (1.0 - part) * (1.0 - mass) * below / upper_sum
        sum_mu += grad * inverse * (by_left - by_right)
        # Bins beyond V have no gradient, whatever their slope.
        slope = left * by_left - right * by_right - width * by_width
        sum_scale += tl.where(keep, grad * slope, 0.0)
    tl.store(grad_mu_ptr + row, tl.sum(sum_mu, axis=1), mask=row < R)
    tl.store(grad_log_scale_ptr + row, tl.sum(sum_scale, axis=1), mask=row < R)


def _launch(kernel, mu: Tensor, log_scale: Tensor, table: Tensor, results, eps, clamp) -> None:
    """Launch over rows of `table` (..., V), whose rows have one stride."""
    rows, vocabulary = mu.numel(), table.shape[-1]
    if rows == 0:
        return
    tuned = launch_parameters("logistic", mu.device)
    block_v = min(power_of_two(vocabulary), tuned.elements)
    block_r = max(1, tuned.elements // block_v)
    grid = (triton.cdiv(rows, block_r), 1 if results else triton.cdiv(vocabulary, block_v))
    kernel[grid](
        mu.contiguous(),
        log_scale.contiguous(),
        table,
        *results,
        rows,
        vocabulary,
        eps,
        table.stride(-2) if table.ndim > 1 else vocabulary,
        EXACT=eps == 0.0,
        BOTH=clamp == "min",
        BLOCK_R=block_r,
        BLOCK_V=block_v,
        num_warps=tuned.warps,
    )


def logistic_logits(mu: Tensor, log_scale: Tensor, out: Tensor, *, eps: float, clamp: str) -> None:
    """Fill `out` (..., V) fp32 with the bins of mu and log_scale (...): see `LogisticHead`."""
    _launch(_bins_kernel, mu, log_scale, out, (), eps, clamp)


def logistic_gradient(
    mu: Tensor, log_scale: Tensor, gradient: Tensor, *, eps: float, clamp: str
) -> tuple[Tensor, Tensor]:
    """dL/dmu and dL/dlog_scale (...) fp32 of dL/dlogits (..., V) fp32."""
    grad_mu, grad_log_scale = (
        torch.empty(mu.shape, dtype=torch.float32, device=mu.device) for _ in range(2)
    )
    results = (grad_mu, grad_log_scale)
    _launch(_bins_gradient_kernel, mu, log_scale, gradient, results, eps, clamp)
    return results
