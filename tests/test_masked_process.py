"""The masked process: levels of times, and teacher steps that compute only what unmasks."""

from __future__ import annotations

import torch
from process_cases import MASK, VOCAB, rng

from di4c_fast.processes import MaskedProcess, masked
from di4c_fast.testing import assert_counts_match, assert_frequency
from tools.own_head import OwnHead


def test_levels_quantise_upwards_to_an_even_grid():
    t = MaskedProcess(MASK, levels=8).sample_times(16_000, generator=rng(3))
    index = t * 8
    assert torch.equal(index, index.round())
    counts = torch.bincount(index.long(), minlength=9)
    assert int(counts[0]) == 0
    assert_counts_match(counts[1:], torch.ones(8))


def test_step_time_is_the_step_or_half_the_time():
    t = torch.tensor([1.0, 0.3, 0.1])
    u = MaskedProcess(MASK).step_time(t, 0.1)
    torch.testing.assert_close(u, torch.tensor([0.9, 0.2, 0.05]))
    assert bool((u > 0).all())


def test_a_teacher_step_has_the_joint_law_of_the_ancestral_step():
    """Every outcome of D=2 positions, each unmasking with probability (t - u)/t on its own."""
    logits = torch.randn(1, 2, VOCAB, generator=rng(6))
    t, u = torch.tensor([0.8]), torch.tensor([0.5])
    draws = 60_000
    xt = torch.full((1, 2), MASK)
    xu = MaskedProcess(MASK).teacher_step(xt, t, u, logits, draws, generator=rng(9))
    chance = (0.8 - 0.5) / 0.8
    single = torch.zeros(2, VOCAB)
    single[:, :MASK] = chance * logits[0, :, :MASK].softmax(-1)
    single[:, MASK] = 1 - chance
    joint = (single[0].unsqueeze(1) * single[1]).flatten()
    counts = torch.bincount((xu[0, :, 0] * VOCAB + xu[0, :, 1]), minlength=VOCAB**2)
    assert_counts_match(counts, joint)


def test_examples_of_a_batch_step_by_their_own_times():
    xt = torch.full((3, 2000), MASK)
    t, u = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.0, 0.4, 0.1])
    logits = torch.zeros(3, 2000, VOCAB)
    xu = MaskedProcess(MASK).teacher_step(xt, t, u, logits, 4, generator=rng(10))
    unmasked = (xu != MASK).flatten(1).sum(1).tolist()
    assert unmasked[0] == 8000
    assert_frequency(unmasked[1], 8000, 0.2)
    assert_frequency(unmasked[2], 8000, 0.5)


def test_only_rows_that_unmask_are_computed():
    xt = torch.randint(0, VOCAB, (2, 40), generator=rng(12))
    head = OwnHead(torch.randn(2, 40, VOCAB, generator=rng()))
    xu = MaskedProcess(MASK).teacher_step(
        xt, torch.full((2,), 0.9), torch.full((2,), 0.8), head, 6, generator=rng(1)
    )
    rows = torch.cat(head.taken)
    assert rows.numel() == int(((xu != MASK) & (xt == MASK).unsqueeze(1)).sum())
    assert rows.numel() > 0
    position = torch.zeros(80, dtype=torch.bool)
    position[rows] = True
    assert not bool((position.view(2, 40) & (xt != MASK)).any())


def test_rows_are_taken_in_pieces_no_larger_than_the_teacher_output(monkeypatch):
    monkeypatch.setattr(masked, "_SMALL_PIECE", 1)
    head = OwnHead(torch.randn(2, 10, VOCAB))
    xt = torch.full((2, 10), MASK)
    xu = MaskedProcess(MASK).teacher_step(xt, torch.ones(2), torch.zeros(2), head, 7)
    assert [rows.numel() for rows in head.taken] == [20] * 7
    assert bool((xu != MASK).all())
