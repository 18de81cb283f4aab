"""The masked process: times, corruption, and teacher steps that compute only what unmasks."""

from __future__ import annotations

import pytest
import torch
from counting_head import CountingHead
from scipy import stats
from torch import Tensor

from di4c_fast.heads import LinearHead
from di4c_fast.processes import MaskedProcess, Process, masked

MASK = 4
VOCAB = 5
# A correct implementation fails a check at this bound once in a million seeds.
P_VALUE = 1e-6


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """p-value of counts under probabilities; classes of probability 0 must be empty."""
    possible = probabilities > 0
    assert int(counts[~possible].sum()) == 0
    observed = counts[possible].double().numpy()
    expected = (probabilities[possible].double() / probabilities.double().sum()).numpy()
    return float(stats.chisquare(observed, expected * observed.sum()).pvalue)


def binomial(successes: int, trials: int, p: float) -> float:
    return float(stats.binomtest(successes, trials, p).pvalue)


def test_masked_process_is_a_process():
    process = MaskedProcess(MASK)
    assert isinstance(process, Process)
    assert process.loss_mask_id == MASK


# Times


def test_times_lie_in_the_unit_interval_and_are_uniform():
    t = MaskedProcess(MASK).sample_times(20_000, generator=rng())
    assert t.dtype == torch.float32
    assert t.shape == (20_000,)
    assert float(t.min()) >= 1e-5
    assert float(t.max()) <= 1.0
    assert stats.kstest(t.numpy(), "uniform").pvalue > P_VALUE


def test_low_times_have_their_probability_and_both_parts_are_uniform():
    t = MaskedProcess(MASK).sample_times(
        40_000, low_t=0.02, low_t_probability=0.3, generator=rng(1)
    )
    low, high = t[t < 0.02], t[t >= 0.02]
    assert binomial(len(low), len(t), 0.3) > P_VALUE
    assert stats.kstest(low.numpy() / 0.02, "uniform").pvalue > P_VALUE
    assert stats.kstest((high.numpy() - 0.02) / 0.98, "uniform").pvalue > P_VALUE


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_low_time_probability_zero_and_one(probability):
    t = MaskedProcess(MASK).sample_times(
        1000, low_t=0.25, low_t_probability=probability, generator=rng(2)
    )
    assert bool(((t < 0.25) == (probability == 1.0)).all())


def test_levels_quantise_upwards_to_an_even_grid():
    t = MaskedProcess(MASK, levels=8).sample_times(16_000, generator=rng(3))
    index = t * 8
    assert torch.equal(index, index.round())
    counts = torch.bincount(index.long(), minlength=9)
    assert int(counts[0]) == 0
    assert chi_square(counts[1:], torch.ones(8)) > P_VALUE


def test_stratified_times_split_the_batch_by_the_low_probability():
    process = MaskedProcess(MASK)
    for seed in range(20):
        t = process.sample_times(
            10, low_t=0.02, low_t_probability=0.3, stratified=True, generator=rng(seed)
        )
        assert int((t < 0.02).sum()) == 3


def test_stratified_times_keep_the_law_of_each_example():
    process = MaskedProcess(MASK)
    generator = rng(4)
    t = torch.stack(
        [process.sample_times(4, stratified=True, generator=generator) for _ in range(4000)]
    )
    for column in t.unbind(1):
        assert stats.kstest(column.numpy(), "uniform").pvalue > P_VALUE


def test_no_times_for_an_empty_batch():
    assert MaskedProcess(MASK).sample_times(0).shape == (0,)
    assert MaskedProcess(MASK).sample_times(0, stratified=True).shape == (0,)


# Corruption


def test_each_example_is_masked_at_its_own_rate():
    t = torch.tensor([0.05, 0.3, 0.9, 1.0])
    x0 = torch.arange(4).repeat(5000).expand(4, -1)
    xt = MaskedProcess(MASK).corrupt(x0, t, generator=rng(5))
    noised = xt == MASK
    for row, rate in zip(noised, t.tolist(), strict=True):
        assert binomial(int(row.sum()), row.numel(), rate) > P_VALUE
    assert bool(noised[3].all())
    assert torch.equal(xt[~noised], x0[~noised])


def test_positions_outside_valid_are_never_masked():
    x0 = torch.randint(0, 4, (3, 50), generator=rng())
    x0[:, 45:] = MASK  # padding may hold anything
    valid = torch.arange(50).expand(3, -1) < 40
    xt = MaskedProcess(MASK).corrupt(x0, torch.ones(3), valid=valid, generator=rng())
    assert bool((xt[:, :40] == MASK).all())
    assert torch.equal(xt[:, 40:], x0[:, 40:])


def test_corruption_depends_on_the_generator_alone():
    x0, t = torch.zeros(2, 30, dtype=torch.int64), torch.tensor([0.4, 0.6])
    process = MaskedProcess(MASK)
    first, again, other = (process.corrupt(x0, t, generator=rng(s)) for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Teacher steps


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
    assert chi_square(counts, joint) > P_VALUE


def test_examples_of_a_batch_step_by_their_own_times():
    xt = torch.full((3, 2000), MASK)
    t, u = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.0, 0.4, 0.1])
    logits = torch.zeros(3, 2000, VOCAB)
    xu = MaskedProcess(MASK).teacher_step(xt, t, u, logits, 4, generator=rng(10))
    unmasked = (xu != MASK).flatten(1).sum(1).tolist()
    assert unmasked[0] == 8000
    assert binomial(unmasked[1], 8000, 0.2) > P_VALUE
    assert binomial(unmasked[2], 8000, 0.5) > P_VALUE


def test_tokens_that_are_there_stay():
    xt = torch.randint(0, VOCAB, (2, 40), generator=rng(11))
    xu = MaskedProcess(MASK).teacher_step(
        xt, torch.full((2,), 0.9), torch.full((2,), 0.1), torch.zeros(2, 40, VOCAB), 5
    )
    known = (xt != MASK).unsqueeze(1).expand_as(xu)
    assert torch.equal(xu[known], xt.unsqueeze(1).expand_as(xu)[known])


def test_only_rows_that_unmask_are_computed():
    xt = torch.randint(0, VOCAB, (2, 40), generator=rng(12))
    head = CountingHead(torch.randn(2, 40, VOCAB, generator=rng()))
    xu = MaskedProcess(MASK).teacher_step(
        xt, torch.full((2,), 0.9), torch.full((2,), 0.8), head, 6, generator=rng(1)
    )
    rows = torch.cat(head.taken)
    assert rows.numel() == int(((xu != MASK) & (xt == MASK).unsqueeze(1)).sum())
    assert rows.numel() > 0
    position = torch.zeros(80, dtype=torch.bool)
    position[rows] = True
    assert not bool((position.view(2, 40) & (xt != MASK)).any())


def test_no_row_is_computed_when_nothing_is_masked():
    head = CountingHead(torch.randn(2, 3, VOCAB))
    xt = torch.zeros(2, 3, dtype=torch.int64)
    xu = MaskedProcess(MASK).teacher_step(xt, torch.ones(2), torch.zeros(2), head, 4)
    assert head.taken == []
    assert torch.equal(xu, xt.unsqueeze(1).expand(2, 4, 3))


def test_rows_are_taken_in_pieces_no_larger_than_the_teacher_output(monkeypatch):
    monkeypatch.setattr(masked, "_SMALL_PIECE", 1)
    head = CountingHead(torch.randn(2, 10, VOCAB))
    xt = torch.full((2, 10), MASK)
    xu = MaskedProcess(MASK).teacher_step(xt, torch.ones(2), torch.zeros(2), head, 7)
    assert [rows.numel() for rows in head.taken] == [20] * 7
    assert bool((xu != MASK).all())


def test_small_pieces_are_taken_together_with_the_same_tokens(monkeypatch):
    logits = torch.randn(2, 10, VOCAB)
    arguments = (torch.full((2, 10), MASK), torch.ones(2), torch.zeros(2))
    head = CountingHead(logits)
    together = MaskedProcess(MASK).teacher_step(*arguments, head, 7, generator=rng(1))
    assert [rows.numel() for rows in head.taken] == [140]
    monkeypatch.setattr(masked, "_SMALL_PIECE", 1)
    apart = MaskedProcess(MASK).teacher_step(*arguments, logits, 7, generator=rng(1))
    assert torch.equal(together, apart)


@pytest.mark.parametrize("draws", [2, 3, 5])
def test_draw_k_follows_component_k_of_the_teacher(draws):
    components = 3
    # Component m of example b always gives token (m + b) mod 4.
    wanted = (torch.arange(components) + torch.arange(2).unsqueeze(1)) % 4
    logits = torch.full((2, components, 6, VOCAB), -1e9)
    logits.scatter_(3, wanted.view(2, components, 1, 1).expand(-1, -1, 6, 1), 0.0)
    xt = torch.full((2, 6), MASK)
    xu = MaskedProcess(MASK).teacher_step(xt, torch.ones(2), torch.zeros(2), logits, draws)
    expected = wanted[:, torch.arange(draws) % components]
    assert torch.equal(xu, expected.unsqueeze(-1).expand_as(xu))


def test_the_mask_token_is_never_drawn_even_if_the_teacher_prefers_it():
    logits = torch.zeros(1, 500, VOCAB)
    logits[..., MASK] = 50.0
    xt = torch.full((1, 500), MASK)
    xu = MaskedProcess(MASK).teacher_step(xt, torch.ones(1), torch.zeros(1), logits, 2)
    assert bool((xu != MASK).all())


def test_positions_that_are_not_valid_keep_their_token():
    xt = torch.tensor([[MASK, MASK, 1, MASK]])
    valid = torch.tensor([[True, False, False, True]])
    logits = torch.zeros(1, 4, VOCAB)
    step = MaskedProcess(MASK).teacher_step
    xu = step(xt, torch.ones(1), torch.zeros(1), logits, 3, valid=valid, generator=rng(4))
    assert (xu[:, :, [0, 3]] != MASK).all()
    assert torch.equal(xu[:, :, [1, 2]], xt[:, None, [1, 2]].expand(-1, 3, -1))
    with pytest.raises(TypeError, match="valid must have dtype"):
        step(xt, torch.ones(1), torch.zeros(1), logits, 3, valid=valid.long())


def test_a_linear_head_steps_like_its_logits():
    hidden = torch.randn(2, 8, 3, generator=rng(13))
    weight, bias = torch.randn(VOCAB, 3, generator=rng(14)), torch.randn(8, VOCAB)
    head = LinearHead(hidden, weight, bias)
    xt = torch.full((2, 8), MASK)
    t, u = torch.ones(2), torch.full((2,), 0.3)
    process = MaskedProcess(MASK)
    from_head = process.teacher_step(xt, t, u, head, 3, generator=rng(15))
    from_logits = process.teacher_step(xt, t, u, head.logits(), 3, generator=rng(15))
    assert torch.equal(from_head, from_logits)


def test_a_teacher_step_makes_no_graph_and_leaves_xt_alone():
    logits = torch.randn(1, 5, VOCAB, requires_grad=True)
    xt = torch.full((1, 5), MASK)
    xu = MaskedProcess(MASK).teacher_step(xt, torch.ones(1), torch.zeros(1), logits, 2)
    assert not xu.requires_grad
    assert bool((xt == MASK).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("step", [1e-9, 1e-3, 0.2])
def test_a_step_from_times_of_any_dtype_ends_before_them(dtype, step):
    t = torch.tensor([1.0, 0.9, 0.5, 0.01], dtype=dtype)
    process = MaskedProcess(MASK)
    u = process.step_time(t, step)
    assert u.dtype == torch.float32
    assert bool((u < t).all())
    xt = torch.full((4, 3), MASK)
    drawn = process.teacher_step(xt, t, u, torch.zeros(4, 3, MASK + 1), 2)
    assert drawn.shape == (4, 2, 3)
