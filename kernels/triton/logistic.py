"""Rows of bins of a discretised logistic distribution, in registers, from two numbers per row.

Shapes: V bins of [-1, 1]; rows and columns broadcast, so that a tile may have any form. With
i = exp(2 - log_scale), l and r the edges of a bin minus mu times i, w = r - l, mass = 1 - e^-w,
E = e^-l and R = e^-r,

    e^logit = sigmoid(r) (sigmoid(-l) mass + eps) = (E (mass + eps) + eps) / ((1 + E) (1 + R))

which needs no logarithm and has no cancellation. The form of the upper tail, which clamp "min" has
where it is smaller, that is where l + r > 0, is the same at the mirror image (-r, -l) of a bin. At
eps = 0 both are the same, and mirrored so that E >= 1. Then only E grows too large for a float;
by what it exceeds 2^LARGEST is an exponent of its own: e^logit = factor 2^exponent.

`BINS` of a kernel says what an operand holds: None logits, eps bins with clamp "left", -eps bins
with clamp "min".
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .random import LN_2, LOG2_E, log_positive

LARGEST = tl.constexpr(60.0)
WIDE = tl.constexpr(35.0)  # a width to base 2 beyond which R = E e^-w would need a larger E


@triton.jit
def bins_of_rows(mu_ptr, scale_ptr, offset, wanted, V):
    """What `bins_tile` takes of rows: mu, i to base 2, e^-w, mass, whether any is wide, 2 / V."""
    mu = tl.load(mu_ptr + offset, mask=wanted, other=0.0)
    log_scale = tl.load(scale_ptr + offset, mask=wanted, other=0.0)
    scale = tl.minimum(tl.exp(2.0 - log_scale), 1.0e30) * LOG2_E  # finite: no product is NaN
    step = 2.0 / V
    rest = tl.exp2(-scale * step)
    w = scale * step * LN_2
    mass = w * (1.0 - w * (0.5 - w * (1.0 / 6.0 - w * (1.0 / 24.0))))  # no cancellation
    mass = tl.where(w < 0.03, mass, 1.0 - rest)
    # Minima and maxima drop NaN.
    mass = tl.where((mu == mu) & (log_scale == log_scale), mass, float("nan"))
    return mu, scale, rest, mass, tl.max(scale) * step > WIDE, step


@triton.jit
def bins_tile(rows, cols, V, BINS: tl.constexpr):
    """Of columns: what `add_slopes` takes, the factor and the exponent.

    The first is how far they lie below mu, -l (mirrored), both to base 2, E, 1 + E, R, 1 + R, the
    numerator of the head of this file and 1 over its denominator.
    """
    mu, scale, rest, mass, wide, step = rows
    MIRROR: tl.constexpr = BINS <= 0
    EPS: tl.constexpr = -BINS if MIRROR else BINS
    # The left edge, or the centre.
    below = (mu - (2 * cols + MIRROR - V).to(tl.float32) * (0.5 * step)) * scale
    x = below
    if MIRROR:
        x = tl.abs(below) + scale * (0.5 * step)
    low = tl.minimum(x, LARGEST)
    left = tl.exp2(low)
    if wide:
        # Where E is cut off sigmoid(-l) is 1.
        x_right = x - scale * step
        low_right = tl.minimum(x_right, LARGEST)
        right = tl.exp2(low_right)
        one_right = 1.0 + right
        exponent = low_right - x_right
    else:
        right = left * rest
        one_right = 1.0 + left * rest
        exponent = low - x
    one_left = 1.0 + left
    inverse = tl.rsqrt(one_left * one_right)  # a division takes eight instructions
    inverse *= inverse
    numerator = left * (mass + EPS) + EPS
    edges = below, x, left, one_left, right, one_right, numerator, inverse
    return edges, numerator * inverse, exponent


@triton.jit
def bins_logits(mu_ptr, scale_ptr, offset, wanted, cols, V, BINS: tl.constexpr):
    """Logits of some columns."""
    rows = bins_of_rows(mu_ptr, scale_ptr, offset, wanted, V)
    _, factor, exponent = bins_tile(rows, cols, V, BINS)
    logits = log_positive(factor) + exponent * LN_2
    if BINS == 0:
        logits = tl.where(factor == 0.0, float("-inf"), logits)  # NaN stays
    return logits


@triton.jit
def add_slopes(sums, grad, rows, edges, BINS: tl.constexpr):
    """Take dL/dlogit of a tile into three sums, tiles too: by mu, by log_scale, its own."""
    _, scale, rest, mass, _, step = rows
    below, x, left, one_left, right, one_right, numerator, inverse = edges
    # How the logit falls with l, rises with r, and rises with w.
    by_width = tl.rsqrt(numerator)
    by_width = left * by_width * by_width
    by_left = by_width * mass * (one_right * inverse)
    under = one_left * inverse  # sigmoid(r); its rest is 1 to the last bit in the tail
    by_right = tl.where(right > 1.0, 1.0 - under, right * under)
    by_edges = by_left - by_right
    by_mu = by_edges
    if BINS <= 0:  # where both forms are equal a minimum passes half of the gradient to each
        by_mu = tl.where(below > 0, by_edges, tl.where(below < 0, -by_edges, 0.0))
    by_scale = x * by_edges + scale * step * (by_right + rest * by_width)
    return sums[0] + grad * by_mu, sums[1] + grad * by_scale, sums[2] + grad


@triton.jit
def gradient_of_slopes(sums, rows, V, BINS: tl.constexpr):
    """dL/dmu and dL/dlog_scale of rows, [N, 1], of sums [N, W].

    All dL/dlogit of a row add up to 0, and far from mu all slopes are alike: so they count from
    those of the bin next to mu.
    """
    mu, scale, _, _, _, _ = rows
    mode = tl.minimum(tl.maximum((mu + 1.0) * 0.5 * V, 0.0), V - 1.0).to(tl.int32)
    zero = mu * 0.0
    edges, _, _ = bins_tile(rows, mode, V, BINS)
    at_mode = add_slopes((zero, zero, zero), 1.0, rows, edges, BINS)
    rest = tl.sum(sums[2], axis=1, keep_dims=True)
    by_mu = tl.sum(sums[0], axis=1, keep_dims=True) - rest * at_mode[0]
    by_scale = tl.sum(sums[1], axis=1, keep_dims=True) - rest * at_mode[1]
    return by_mu * scale * LN_2, -by_scale * LN_2


# On the host --------------------------------------------------------------------------------------


def bins_flag(operand: Any) -> float | None:
    """BINS of an operand."""
    if operand.bins is None:
        return None
    return operand.bins.eps if operand.bins.clamp == "left" else -operand.bins.eps


def pointers_of(operand: Any) -> tuple[Tensor, Tensor]:
    """Logits, or mu and log_scale; kernels do not read the second of logits."""
    bins = operand.bins
    return operand.logits, operand.logits if bins is None else bins.log_scale
