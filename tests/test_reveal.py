"""The confidence rule of MaskGIT: schedules, noise, and exactly k positions revealed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from di4c_fast.processes.reveal import (
    SCHEDULES,
    gumbel,
    masked_share,
    most_confident,
    reveal_counts,
)
from di4c_fast.testing import P_VALUE


@pytest.mark.parametrize(
    ("schedule", "closed_form"),
    [
        ("arccos", lambda r: math.acos(r) * 2 / math.pi),
        ("cosine", lambda r: math.cos(r * math.pi / 2)),
        ("linear", lambda r: 1 - r),
        ("square", lambda r: 1 - r * r),
        ("root", lambda r: 1 - math.sqrt(r)),
    ],
)
def test_schedules_have_their_closed_forms(schedule, closed_form):
    ratio = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = torch.tensor([closed_form(r) for r in ratio.tolist()], dtype=torch.float64)
    # Rounding of fp64, which the infinite slope of arccos and of the root magnifies at the ends.
    torch.testing.assert_close(masked_share(ratio, schedule), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("style", ["di4c", "valeoai", "valeoai_v1"])
def test_counts_reveal_every_position_and_at_least_one_per_step(schedule, style):
    for positions in (1, 2, 7, 16, 256):
        for steps in (1, 2, 3, 8, 12, 40):
            counts = reveal_counts(steps, positions, schedule, style)
            assert len(counts) == steps
            assert sum(counts) == positions
            assert min(counts) >= 0
            done = list(itertools.accumulate(counts))
            # A step reveals nothing only if everything is revealed already.
            assert all(k > 0 or total == positions for k, total in zip(counts, done, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_counts_are_the_cumulative_rounding_of_the_closed_form(schedule):
    counts = reveal_counts(8, 256, schedule)
    left = 256 - torch.tensor([0, *itertools.accumulate(counts)])
    exact = 256 * masked_share(torch.linspace(0, 1, 9, dtype=torch.float64), schedule)
    assert float((left - exact).abs().max()) <= 0.5 + 1e-4  # fp32 rounding of 256·share


def test_known_counts_of_the_published_schedules():
    assert reveal_counts(4, 256, "arccos", "di4c") == [41, 44, 53, 118]
    assert reveal_counts(4, 256, "linear", "di4c") == [64, 64, 64, 64]
    assert reveal_counts(5, 256, "linear", "valeoai") == [1, 63, 64, 64, 64]
    assert reveal_counts(4, 90, "linear", "valeoai_v1") == [1, 15, 30, 44]


def test_no_positions_need_no_counts():
    assert reveal_counts(3, 0) == [0, 0, 0]


def test_own_counts_are_cut_to_what_is_left_and_the_last_step_takes_the_rest():
    assert reveal_counts(3, 10, [4, 20, 1]) == [4, 6, 0]
    assert reveal_counts(3, 10, [1, 2, 0]) == [1, 2, 7]


def test_the_most_confident_positions_win_and_of_equals_the_first():
    confidence = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    for counts in ([2, 3], [0, 5], [4, 1]):
        chosen = most_confident(confidence, torch.tensor(counts))
        assert chosen.sum(-1).tolist() == counts
        order = ([1, 2, 4, 3, 0], [0, 1, 2, 3, 4])
        for row, ranks, k in zip(chosen, order, counts, strict=True):
            assert row.nonzero()[:, 0].tolist() == sorted(ranks[:k])


def test_gumbel_noise_has_its_law_in_both_tails():
    noise = gumbel(1, 0, torch.arange(400), 100).flatten()
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > P_VALUE
    assert noise.dtype == torch.float64
    assert torch.equal(gumbel(1, 0, torch.tensor([7]), 5)[0], noise.view(400, 100)[7, :5])
