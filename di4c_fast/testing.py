"""Checks of tolerance and of distribution that the tests of this package and its users share.

Numbers are held to a truth in higher precision by what eager PyTorch reaches in the same dtype;
draws are held to probabilities by tests that fail by chance once in a million runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import check_int64, check_rank, check_shape

P_VALUE = 1e-6  # how often a statistical check may fail by chance
_SMALLEST_BIN = 10.0  # expected counts below this are pooled


def assert_close_to_reference(
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    atol: float,
    factor: float = 2.0,
    name: str = "result",
) -> None:
    """Our largest error is at most `factor` × the largest error of eager PyTorch + `atol`.

    Args:
        ours: the tensor to judge.
        eager: the same quantity by plain PyTorch operations, in the dtype of `ours`.
        truth: the same in higher precision, of any dtype.
        atol: what is allowed where eager PyTorch happens to be exact.

    Raises:
        AssertionError: shapes or dtypes differ, ours is not finite where the truth is (infinite
            elements must be equal), or the error is too large; with the worst element.
    """
    for other, label in ((eager, "eager"), (truth, "truth")):
        if ours.shape != other.shape:
            raise AssertionError(
                f"{name}: shape {tuple(ours.shape)} is not that of {label} {tuple(other.shape)}"
            )
    if ours.dtype != eager.dtype:
        raise AssertionError(f"{name}: dtype {ours.dtype} is not that of eager {eager.dtype}")
    if ours.numel() == 0:
        return
    exact = truth.detach().double()
    our_error = _errors(ours, exact)
    eager_error = _errors(eager, exact)
    bound = factor * float(eager_error.nan_to_num(nan=0.0, posinf=0.0).amax()) + atol
    worst = int(our_error.nan_to_num(nan=math.inf).argmax())
    error = float(our_error.flatten()[worst])
    if error <= bound:
        return
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape or (1,)))
    values = [float(tensor.detach().flatten()[worst]) for tensor in (ours, eager, truth)]
    wrong = int((our_error > bound).sum())
    raise AssertionError(
        f"{name}: error {error:.3e} at {index} exceeds {bound:.3e} "
        f"(= {factor:g} x eager's largest error + {atol:.1e}); "
        f"ours {values[0]:.9g}, eager {values[1]:.9g}, truth {values[2]:.9g}; "
        f"{wrong} of {ours.numel()} elements are over the bound"
    )


def _errors(values: Tensor, truth: Tensor) -> Tensor:
    """|values − truth|; 0 where both are the same infinity, infinite where one is not a number."""
    values = values.detach().double().to(truth.device)
    error = (values - truth).abs().masked_fill(values == truth, 0.0)
    return error.masked_fill(values.isnan() != truth.isnan(), math.inf).masked_fill(
        values.isnan() & truth.isnan(), 0.0
    )


def relative_l2(ours: Tensor, truth: Tensor) -> float:
    """‖ours − truth‖ / ‖truth‖ in fp64: the size of an error that no single element shows."""
    truth = truth.detach().double()
    difference = ours.detach().double().to(truth.device) - truth
    return float(difference.norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny))


def assert_counts_match(
    counts: Tensor, probs: Tensor, *, p_value: float = P_VALUE, name: str = "counts"
) -> None:
    """Chi-square test of counts against probabilities.

    Args:
        counts: (K,) how often each outcome came; int64.
        probs: (K,) its probability; normalised here. Bins with an expected count below 10 are
            pooled.
        p_value: the largest probability of failing by chance.

    Raises:
        AssertionError: an outcome of probability 0 came, or the counts are too unlikely; with
            the bin that contributes most.
    """
    check_int64(counts, "counts")
    check_rank(counts, "counts", exactly=1)
    check_shape(probs, "probs", "K", counts.shape)
    observed = counts.double().cpu()
    share = probs.detach().double().cpu()
    share = share / share.sum()
    impossible = (share == 0) & (observed > 0)
    if bool(impossible.any()):
        k = int(impossible.nonzero()[0, 0])
        raise AssertionError(f"{name}: outcome {k} came {int(observed[k])} times, its share is 0")
    expected = share * observed.sum()
    small = expected < _SMALLEST_BIN
    labels = [str(k) for k in (~small).nonzero()[:, 0].tolist()]
    pooled_observed, pooled_expected = observed[small].sum(), expected[small].sum()
    observed, expected = observed[~small], expected[~small]
    if float(pooled_expected) >= _SMALLEST_BIN:
        observed = torch.cat([observed, pooled_observed[None]])
        expected = torch.cat([expected, pooled_expected[None]])
        labels.append("all rare outcomes together")
    elif len(labels) and bool(small.any()):
        # The rare outcomes are not enough for a bin of their own.
        observed[0] += pooled_observed
        expected[0] += pooled_expected
    if len(labels) < 2:
        raise ValueError(f"{name}: {int(counts.sum())} draws are too few to tell outcomes apart")
    parts = (observed - expected) ** 2 / expected
    freedom = torch.tensor((len(labels) - 1) / 2, dtype=torch.float64)
    chance = float(torch.special.gammaincc(freedom, parts.sum() / 2))
    if chance < p_value:
        k = int(parts.argmax())
        raise AssertionError(
            f"{name}: chi-square {float(parts.sum()):.1f} with {len(labels) - 1} degrees of "
            f"freedom has p = {chance:.1e} < {p_value:.0e}; outcome {labels[k]} came "
            f"{int(observed[k])} times, {float(expected[k]):.1f} expected"
        )


def assert_draws_match(
    tokens: Tensor, probs: Tensor, *, p_value: float = P_VALUE, name: str = "draws"
) -> None:
    """Chi-square test of independent tokens, int64 of any shape, against probs (V,)."""
    check_int64(tokens, "tokens")
    counts = torch.bincount(tokens.flatten().cpu(), minlength=probs.shape[-1])
    assert_counts_match(counts, probs, p_value=p_value, name=name)


def count_chance(count: int, trials: int, probability: float) -> float:
    """Two-sided p-value of `count` successes in `trials`, each of the given probability.

    A Poisson tail for rare successes, where it is slightly larger than the binomial one, a normal
    tail (the z-test) otherwise.
    """
    mean = trials * probability
    if probability > 0.05:
        deviation = math.sqrt(mean * (1.0 - probability)) or 1e-300
        return math.erfc(max(abs(count - mean) - 0.5, 0.0) / deviation / math.sqrt(2.0))
    rate = torch.tensor(mean, dtype=torch.float64)
    below = float(torch.special.gammaincc(torch.tensor(count + 1.0, dtype=torch.float64), rate))
    above = 1.0
    if count:
        above = float(torch.special.gammainc(torch.tensor(float(count), dtype=torch.float64), rate))
    return min(1.0, 2.0 * min(below, above))


def assert_frequency(
    count: int, trials: int, probability: float, *, p_value: float = P_VALUE, name: str = "event"
) -> None:
    """An event of known probability came as often as it should."""
    chance = count_chance(count, trials, probability)
    if chance < p_value:
        raise AssertionError(
            f"{name}: came {count} times in {trials}, {trials * probability:.1f} expected, "
            f"p = {chance:.1e} < {p_value:.0e}"
        )


def tail_logits(gap: float, tail: int = 50_000) -> tuple[Tensor, float]:
    """One likely token before `tail` tokens that lie `gap` lower: (tail + 1,) fp32, tail's mass.

    Samplers whose noise is too coarse starve the tail: with −log(u) on a grid of 2⁻²⁴ its mass
    comes out 12 times too small at a gap of 18.
    """
    logits = torch.full((tail + 1,), -float(gap))
    logits[0] = 0.0
    odds = tail * math.exp(-gap)
    return logits, odds / (1.0 + odds)


def assert_tail_mass(
    draw: Callable[[Tensor], Tensor],
    gap: float,
    rows: int,
    *,
    tail: int = 50_000,
    p_value: float = P_VALUE,
) -> None:
    """A sampler gives the tail of `tail_logits` its exact mass.

    Args:
        draw: maps logits (rows, tail + 1), an expanded tensor, to tokens (rows,).
        rows: how many draws; mass × rows should be 50 or more for the check to mean anything.
    """
    logits, mass = tail_logits(gap, tail)
    tokens = draw(logits.expand(rows, -1))
    check_shape(tokens, "the draws", "rows", (rows,))
    count = int((tokens != 0).sum())
    assert_frequency(
        count, rows, mass, p_value=p_value, name=f"tail of {tail} tokens at a gap of {gap:g}"
    )
