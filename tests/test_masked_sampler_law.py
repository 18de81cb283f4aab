"""The law of the masked ancestral sampler: enumerated, and that of the naive loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from masked_sampler_cases import (
    MASK,
    P_VALUE,
    STATES,
    VOCAB,
    D,
    TabularDenoiser,
    chi_square,
    state_of,
)
from scipy import stats
from torch import Tensor

from di4c_fast.samplers import sample_masked
from di4c_fast.samplers.masked import plan_unmask_steps


def exact_law(model: TabularDenoiser, times: Tensor, start: Tensor, fresh: bool = True) -> Tensor:
    """Law of the final state by enumeration; λ fresh at every step or kept all the way."""
    ends = [*times[1:].tolist(), None]
    components = range(len(model.table))

    def run(choices) -> Tensor:
        law = torch.zeros(STATES, dtype=torch.float64)
        law[state_of(start)] = 1.0
        for t, s in zip(times.tolist(), ends, strict=True):
            law = torch.stack([law @ model.transition(t, s, c) for c in choices]).mean(0)
        return law

    if fresh:
        return run(components)
    return torch.stack([run([c]) for c in components]).mean(0)


def naive_loop(model, batch: int, steps: int, t_min: float, generator) -> Tensor:
    """Full logits and a draw for every position at every step, as the published loops do."""
    times = torch.linspace(1, t_min, steps + 1)
    x = torch.full((batch, D), MASK)
    for k in range(steps):
        t, s = times[k], times[k + 1]
        logits = model(x, t.expand(batch))
        logits[..., MASK] = -math.inf
        q = logits.softmax(-1) * (t - s)
        q[..., MASK] = s
        drawn = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(batch, D)
        x = torch.where(x == MASK, drawn, x)
    logits = model(x, times[-1].expand(batch))
    logits[..., MASK] = -math.inf
    return torch.where(x == MASK, logits.argmax(-1), x)


def counts_of(tokens: Tensor) -> Tensor:
    return torch.bincount(state_of(tokens), minlength=STATES)


# The samples


@pytest.mark.parametrize(("steps", "t_min"), [(1, 1e-5), (2, 0.3), (5, 1e-5)])
def test_samples_have_the_exact_joint_law_of_the_ancestral_loop(steps, t_min):
    model = TabularDenoiser(seed=steps)
    tokens = sample_masked(model, (40_000, D), mask_id=MASK, steps=steps, seed=3, t_min=t_min)
    times = torch.linspace(1, t_min, steps + 1, dtype=torch.float64)
    law = exact_law(model, times, torch.full((D,), MASK))
    assert chi_square(counts_of(tokens), law) > P_VALUE


@pytest.mark.parametrize("steps", [2, 4])
def test_pair_marginals_equal_those_of_the_naive_loop(steps):
    model = TabularDenoiser(seed=20)
    batch = 40_000
    ours = sample_masked(model, (batch, D), mask_id=MASK, steps=steps, seed=4)
    theirs = naive_loop(model, batch, steps, 1e-5, torch.Generator().manual_seed(5))
    for i, j in itertools.combinations(range(D), 2):
        tables = [
            torch.bincount(x[:, i] * VOCAB + x[:, j], minlength=VOCAB**2) for x in (ours, theirs)
        ]
        table = torch.stack(tables)
        table = table[:, table.sum(0) > 0]
        assert stats.chi2_contingency(table.numpy()).pvalue > P_VALUE


def test_the_naive_loop_of_this_file_has_the_enumerated_law():
    model = TabularDenoiser(seed=21)
    tokens = naive_loop(model, 40_000, 3, 0.1, torch.Generator().manual_seed(6))
    times = torch.linspace(1, 0.1, 4, dtype=torch.float64)
    law = exact_law(model, times, torch.full((D,), MASK))
    assert chi_square(counts_of(tokens), law) > P_VALUE


def test_a_latent_is_drawn_fresh_per_step_and_shared_by_the_positions_of_a_sequence():
    model = TabularDenoiser(seed=22, latent=True)
    tokens = sample_masked(model, (60_000, D), mask_id=MASK, steps=2, seed=7, latent_dim=1)
    times = torch.linspace(1, 1e-5, 3, dtype=torch.float64)
    start = torch.full((D,), MASK)
    counts = counts_of(tokens)
    assert chi_square(counts, exact_law(model, times, start)) > P_VALUE
    # The check can tell: the law with one λ kept for all steps is rejected.
    assert chi_square(counts, exact_law(model, times, start, fresh=False)) < P_VALUE


def test_a_latent_given_per_sequence_serves_every_step():
    model = TabularDenoiser(seed=22, latent=True)
    latent = torch.rand(60_000, 1, generator=torch.Generator().manual_seed(8))
    tokens = sample_masked(
        model, (60_000, D), mask_id=MASK, steps=2, seed=9, latent_dim=1, latent=latent
    )
    times = torch.linspace(1, 1e-5, 3, dtype=torch.float64)
    law = exact_law(model, times, torch.full((D,), MASK), fresh=False)
    assert chi_square(counts_of(tokens), law) > P_VALUE


def test_a_prompt_conditions_the_law():
    model = TabularDenoiser(seed=23)
    prompt = torch.tensor([MASK, 1])
    tokens = sample_masked(model, (30_000, D), mask_id=MASK, steps=3, seed=1, prompt=prompt)
    times = torch.linspace(1, 1e-5, 4, dtype=torch.float64)
    law = exact_law(model, times, torch.tensor([MASK, 1, MASK]))
    assert chi_square(counts_of(tokens), law) > P_VALUE


# The plan


@pytest.mark.parametrize("t_min", [1e-5, 0.2])
def test_unmask_steps_follow_the_lengths_of_the_time_steps(t_min):
    times = torch.linspace(1, t_min, 9, dtype=torch.float64)
    plan = plan_unmask_steps(times, (200, 300), seed=11)
    lengths = torch.cat([times[:-1] - times[1:], times[-1:]])
    counts = torch.bincount(plan.flatten(), minlength=9)
    assert chi_square(counts[:-1], lengths[:-1]) > P_VALUE
    assert stats.binomtest(int(counts[-1]), 60_000, float(lengths[-1])).pvalue > P_VALUE


def test_unmask_steps_of_neighbouring_positions_are_independent():
    times = torch.linspace(1, 0.25, 4, dtype=torch.float64)
    plan = plan_unmask_steps(times, (30_000, 2), seed=12)
    counts = torch.bincount(plan[:, 0] * 4 + plan[:, 1], minlength=16)
    assert chi_square(counts, torch.ones(16)) > P_VALUE
