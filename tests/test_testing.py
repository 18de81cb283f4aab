"""The checks themselves: they pass what is right and fail what is wrong."""

from __future__ import annotations

import math

import pytest
import torch

from di4c_fast import testing
from di4c_fast.testing import (
    assert_close_to_reference,
    assert_counts_match,
    assert_draws_match,
    assert_frequency,
    assert_tail_mass,
    count_chance,
)

TRUTH = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
EAGER = (TRUTH + 0.01).float()


def test_twice_the_eager_error_is_accepted():
    assert_close_to_reference((TRUTH - 0.019).float(), EAGER, TRUTH, atol=0.0)


def test_more_than_twice_the_eager_error_names_the_worst_element():
    ours = TRUTH.float().clone()
    ours[1, 0] += 0.03
    with pytest.raises(
        AssertionError, match=r"grad: error 3\.000e-02 at \(1, 0\).*truth 3; 1 of 4"
    ):
        assert_close_to_reference(ours, EAGER, TRUTH, atol=1e-3, name="grad")


def test_atol_allows_what_eager_happens_to_get_exactly():
    ours = (TRUTH + 1e-4).float()
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close_to_reference(ours, TRUTH.float(), TRUTH, atol=0.0)
    assert_close_to_reference(ours, TRUTH.float(), TRUTH, atol=2e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_fail_even_beside_a_bad_eager(value):
    ours = TRUTH.float().clone()
    ours[0, 1] = value
    eager = EAGER.clone()
    eager[0, 1] = math.nan
    with pytest.raises(AssertionError, match=r"at \(0, 1\)"):
        assert_close_to_reference(ours, eager, TRUTH, atol=1.0)


def test_equal_infinities_are_no_error():
    truth = TRUTH.clone()
    truth[0, 0] = -math.inf
    assert_close_to_reference(truth.float(), truth.float(), truth, atol=0.0)
    finite = TRUTH.float()
    with pytest.raises(AssertionError, match=r"at \(0, 0\)"):
        assert_close_to_reference(finite, truth.float(), truth, atol=1.0)


def test_shapes_and_dtypes_must_agree():
    with pytest.raises(AssertionError, match=r"shape \(4,\) is not that of eager \(2, 2\)"):
        assert_close_to_reference(TRUTH.flatten(), EAGER, TRUTH, atol=0.0)
    with pytest.raises(AssertionError, match=r"dtype torch\.float64 is not that of eager"):
        assert_close_to_reference(TRUTH, EAGER, TRUTH, atol=0.0)


def test_scalars_and_empty_tensors_are_judged_too():
    one = torch.tensor(1.0)
    assert_close_to_reference(one, one, one.double(), atol=0.0)
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(one + 1, one, one.double(), atol=0.0)
    empty = torch.empty(0, 3)
    assert_close_to_reference(empty, empty, empty.double(), atol=0.0)


def test_relative_l2_of_a_known_pair():
    assert testing.relative_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == 0.1


def test_counts_of_the_right_law_pass_and_of_another_fail():
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.5, 0.3, 0.2])
    tokens = torch.multinomial(probs, 100_000, replacement=True, generator=generator)
    assert_draws_match(tokens, probs)
    assert_draws_match(tokens, 7 * probs)  # normalised inside
    with pytest.raises(AssertionError, match=r"p = .* outcome \d came"):
        assert_draws_match(tokens, torch.tensor([0.48, 0.32, 0.2]))


def test_chi_square_chance_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    counts = torch.tensor([130, 95, 80, 95])
    chance = stats.chisquare(counts.numpy()).pvalue
    assert_counts_match(counts, torch.ones(4), p_value=chance * 0.999)
    with pytest.raises(AssertionError, match="chi-square"):
        assert_counts_match(counts, torch.ones(4), p_value=chance * 1.001)


def test_an_impossible_outcome_fails_at_once():
    with pytest.raises(AssertionError, match="outcome 1 came 1 times, its share is 0"):
        assert_counts_match(torch.tensor([1_000_000, 1, 10]), torch.tensor([1.0, 0.0, 1e-5]))


def test_rare_outcomes_are_pooled_not_ignored():
    probs = torch.cat([torch.tensor([0.5, 0.5 - 1e-3]), torch.full((1000,), 1e-6)])
    counts = (probs * 100_000).long()
    counts[2:102] += 1
    assert_counts_match(counts, probs)
    counts[102:302] += 1
    with pytest.raises(AssertionError, match="all rare outcomes together"):
        assert_counts_match(counts, probs)


def test_too_few_draws_for_a_test_raise():
    with pytest.raises(ValueError, match="too few to tell outcomes apart"):
        assert_counts_match(torch.tensor([3, 2]), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    ("count", "trials", "probability"),
    [(40, 1000, 0.03), (15, 1000, 0.03), (560, 1000, 0.5), (0, 9, 0.04)],
)
def test_count_chance_is_close_to_the_binomial_test(count, trials, probability):
    stats = pytest.importorskip("scipy.stats")
    law = stats.binom(trials, probability)
    exact = min(1.0, 2 * min(law.cdf(count), law.sf(count - 1)))
    assert count_chance(count, trials, probability) == pytest.approx(exact, rel=0.2)


def test_frequencies_far_from_their_probability_fail():
    assert_frequency(1030, 100_000, 0.01)
    with pytest.raises(AssertionError, match=r"tail: came 1200 times in 100000, 1000\.0 expected"):
        assert_frequency(1200, 100_000, 0.01, name="tail")
    with pytest.raises(AssertionError, match="p = "):
        assert_frequency(0, 100_000, 0.5)


@pytest.mark.parametrize(("gap", "rows"), [(16.0, 40_000), (18.0, 200_000)])
def test_the_tail_check_passes_exact_noise_and_catches_coarse_noise(gap, rows):
    """Gumbel noise from −log of a grid of 2⁻²⁴, as in fp32, starves the tail at a gap of 18."""
    generator = torch.Generator().manual_seed(0)

    def gumbel_max(logits, grid):
        tail = logits.shape[1] - 1
        one, many = torch.rand(2, logits.shape[0], generator=generator, dtype=torch.float64)
        many = many ** (1.0 / tail)  # the largest of `tail` uniform numbers
        if grid:
            one, many = ((u * 2**24).floor().clamp(1, 2**24 - 1) / 2**24 for u in (one, many))
        noise, tail_noise = (-torch.log(-torch.log(u)) for u in (one, many))
        return (tail_noise + logits[0, -1] > noise + logits[0, 0]).long()

    assert_tail_mass(lambda logits: gumbel_max(logits, grid=False), gap, rows)
    if gap == 18.0:
        with pytest.raises(AssertionError, match="tail of 50000 tokens at a gap of 18: came"):
            assert_tail_mass(lambda logits: gumbel_max(logits, grid=True), gap, rows)
