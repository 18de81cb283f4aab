"""The masked ancestral sampler: its law, enumerated from the naive loop's; its rows and calls."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sampler_cases import MASK, VOCAB, Denoiser, Tabular, constant
from torch import Tensor
from torch.nn.functional import one_hot

from di4c_fast.samplers import sample_masked
from di4c_fast.samplers.masked import plan_unmask_steps
from di4c_fast.testing import assert_counts_match, assert_frequency

D, V, HIDDEN = 3, 4, 3  # of `Tabular`, whose last token is the mask here
ROWS = torch.tensor(list(itertools.product(range(V), repeat=D)))


def grid(steps: int, t_min: float = 1e-5) -> Tensor:
    return torch.linspace(1, t_min, steps + 1, dtype=torch.float64)


def sample(model, batch: int, steps: int, **more) -> Tensor:
    return sample_masked(model, (batch, D), mask_id=HIDDEN, steps=steps, **more)


def transition(model: Tabular, t: float, s: float | None, component: int) -> Tensor:
    """(STATES, STATES): the naive ancestral step from t to s; s = None is the argmax."""
    logits = model.table[0, component].double() * (0.5 + t)
    logits[..., HIDDEN] = -math.inf
    if s is None:
        step = one_hot(logits.argmax(-1), V).double()
    else:
        step = logits.softmax(-1) * (t - s) / t
        step[..., HIDDEN] = s / t
    known = ROWS != HIDDEN
    step[known] = one_hot(ROWS, V).double()[known]
    return torch.einsum("xi,xj,xk->xijk", *step.unbind(1)).flatten(1)


def exact_law(model: Tabular, times: Tensor, start=(HIDDEN,) * D, fresh: bool = True) -> Tensor:
    """Law of the final state by enumeration; λ fresh at every step or kept all the way."""
    ends = [*times[1:].tolist(), None]
    components = range(model.table.shape[1])

    def run(choices) -> Tensor:
        law = torch.zeros(model.states, dtype=torch.float64)
        law[model.state_of(torch.tensor(start))] = 1.0
        for t, s in zip(times.tolist(), ends, strict=True):
            law = torch.stack([law @ transition(model, t, s, c) for c in choices]).mean(0)
        return law

    if fresh:
        return run(components)
    return torch.stack([run([c]) for c in components]).mean(0)


# The law


@pytest.mark.parametrize(("steps", "t_min"), [(1, 1e-5), (2, 0.3), (5, 1e-5)])
def test_samples_have_the_exact_joint_law_of_the_ancestral_loop(steps, t_min):
    model = Tabular(seed=steps)
    tokens = sample(model, 40_000, steps, seed=3, t_min=t_min)
    assert_counts_match(model.counts_of(tokens), exact_law(model, grid(steps, t_min)))


def test_first_hits_have_the_law_of_many_steps():
    model = Tabular(seed=4)
    tokens = sample(model, 20_000, None, seed=3, first_hitting=True)
    # 1,000 steps unmask two of three positions in one with a probability of 0.003.
    assert_counts_match(model.counts_of(tokens), exact_law(model, grid(1000)))


@pytest.mark.parametrize("block_length", [None, 4])
def test_a_first_hit_unmasks_one_position_at_its_time(block_length):
    seen, history = [], []

    def model(tokens, t):
        seen.append((int((tokens == 3).sum()), t))
        return torch.zeros(*tokens.shape, 4)

    known = torch.tensor([1, 3, 0] + [3] * 5)
    options = {"mask_id": 3, "first_hitting": True, "block_length": block_length}
    tokens = sample_masked(model, (500, 8), seed=1, prompt=known, history=history, **options)
    assert bool((tokens != 3).all())
    assert [masked for masked, _ in seen] == [500 * n for n in range(6, 0, -1)]
    # The k-th time is the k-th largest of n uniform numbers, n masked positions in a block.
    sizes, times = ([6] if block_length is None else [2, 4]), torch.stack([t for _, t in seen])
    first = 0
    for n in sizes:
        block, expected = times[first : first + n], torch.arange(n, 0, -1) / (n + 1)
        assert bool((block.diff(dim=0) < 0).all())
        torch.testing.assert_close(block.mean(1), expected, rtol=0, atol=0.06)  # 5 sigma
        first += n
    alone = sample_masked(model, (1, 8), seed=1, prompt=known, first_sequence=7, **options)
    assert torch.equal(alone, tokens[7:8])


def test_first_hits_have_no_steps():
    with pytest.raises(ValueError, match="steps must be None with first_hitting, got 4"):
        sample(Tabular(seed=4), 2, 4, first_hitting=True)
    with pytest.raises(ValueError, match="project_fn needs steps"):
        sample(Tabular(seed=4), 2, None, first_hitting=True, project_fn=lambda x: x)
    with pytest.raises(TypeError, match="steps must be an int"):
        sample(Tabular(seed=4), 2, None)


def test_a_latent_is_fresh_per_step_or_as_given_and_shared_by_the_positions_of_a_sequence():
    model, generator = Tabular(seed=22, latent=True), torch.Generator().manual_seed(8)
    given = torch.rand(60_000, 1, generator=generator)
    for latent, fresh in ((None, True), (given, False)):
        counts = model.counts_of(sample(model, 60_000, 2, seed=7, latent_dim=1, latent=latent))
        assert_counts_match(counts, exact_law(model, grid(2), fresh=fresh))
        # The check can tell: the law of the other kind is rejected.
        with pytest.raises(AssertionError):
            assert_counts_match(counts, exact_law(model, grid(2), fresh=not fresh))


def test_a_prompt_conditions_the_law():
    model = Tabular(seed=23)
    tokens = sample(model, 30_000, 3, seed=1, prompt=torch.tensor([HIDDEN, 1]))
    law = exact_law(model, grid(3), (HIDDEN, 1, HIDDEN))
    assert_counts_match(model.counts_of(tokens), law)


def test_what_remains_takes_the_argmax_at_the_last_time():
    history, times = [], []

    def model(tokens, t):
        times.append(t)
        return torch.tensor([0.0, 0.0, 0.1, 9.0]).expand(*tokens.shape, V)

    tokens = sample_masked(model, (20, 50), mask_id=3, steps=1, seed=0, t_min=0.5, history=history)
    assert torch.equal(times[-1], torch.full((20,), 0.5))
    assert bool((tokens[history[1] == 3] == 2).all())
    assert int((history[1] == 3).sum()) > 100


def test_temperature_and_filters_reach_the_draws():
    model = Tabular(seed=32)
    argmax = sample(model, 400, 3, seed=1, temperature=0.0)
    assert torch.equal(sample(model, 400, 3, seed=1, top_k=1), argmax)
    assert torch.equal(sample(model, 400, 3, seed=1, top_p=1e-6), argmax)
    assert not torch.equal(sample(model, 400, 3, seed=1), argmax)


# The plan


@pytest.mark.parametrize("t_min", [1e-5, 0.2])
def test_unmask_steps_follow_the_lengths_of_the_time_steps(t_min):
    times = grid(8, t_min)
    counts = torch.bincount(plan_unmask_steps(times, (200, 300), seed=11).flatten(), minlength=9)
    assert_counts_match(counts[:-1], times[:-1] - times[1:])
    assert_frequency(int(counts[-1]), 60_000, t_min)


def test_unmask_steps_of_neighbouring_positions_are_independent():
    plan = plan_unmask_steps(grid(3, 0.25), (30_000, 2), seed=12)
    counts = torch.bincount(plan[:, 0] * 4 + plan[:, 1], minlength=16)
    assert_counts_match(counts, torch.ones(16))


# What is computed


def test_the_head_computes_every_masked_position_once_and_nothing_else():
    model, prompt = Denoiser(), torch.tensor([0, MASK, 1])
    history = []
    sample_masked(model, (5, 14), mask_id=MASK, steps=6, seed=0, prompt=prompt, history=history)
    assert sum(rows.numel() for rows in model.rows) == 5 * 12
    for inputs, rows in zip(model.inputs, model.rows, strict=True):
        assert bool((inputs.flatten()[rows] == MASK).all())
        assert rows.unique().numel() == rows.numel()
    for before, after in itertools.pairwise(history):  # tokens never change once they are there
        assert torch.equal(before[before != MASK], after[before != MASK])


def test_the_model_is_called_at_steps_that_unmask_something_with_sequences_that_do():
    times, model, latent = grid(50), Denoiser(), torch.rand(51, 3, 2)
    plan = plan_unmask_steps(times, (3, 4), seed=13)
    how = {"mask_id": MASK, "steps": 50, "seed": 13, "latent": latent, "latent_dim": 2}
    sample_masked(model, (3, 4), **how)
    wanted = plan.unique().tolist()
    assert len(model.inputs) == len(wanted)
    for step, inputs, t, lam in zip(wanted, model.inputs, model.times, model.latents, strict=True):
        active = (plan == step).any(1)
        assert inputs.shape == (int(active.sum()), 4)
        torch.testing.assert_close(t, times[step].float().expand(len(inputs)))
        assert torch.equal(lam, latent[step, active])


# Projections


def test_a_prefix_by_projection_equals_a_prefix_by_prompt():
    model = Tabular(seed=31)

    def project(tokens):
        tokens[:, :2] = torch.tensor([2, 0])
        return tokens

    projected = sample(model, 50, 4, seed=3, project_fn=project)
    assert torch.equal(projected, sample(model, 50, 4, seed=3, prompt=torch.tensor([2, 0])))


def test_tokens_filled_by_a_projection_stay_and_cost_nothing():
    model, calls = Denoiser(), itertools.count()

    def project(tokens):
        if next(calls) == 1:  # after the first step
            tokens[:, 5:] = 2
        return tokens

    tokens = sample_masked(model, (3, 14), mask_id=MASK, steps=6, seed=0, project_fn=project)
    assert bool((tokens[:, 5:] == 2).all())
    assert sum(rows.numel() for rows in model.rows[1:]) <= 15


def test_tokens_masked_again_unmask_at_the_rate_of_the_loop():
    steps, again_after, calls = 4, 2, itertools.count()

    def project(tokens):
        if next(calls) == again_after:
            tokens[:] = MASK
        return tokens

    history: list[Tensor] = []
    how = {"mask_id": MASK, "steps": steps, "seed": 0, "t_min": 0.1, "project_fn": project}
    tokens = sample_masked(constant(torch.zeros(VOCAB)), (100, 200), history=history, **how)
    assert bool((tokens != MASK).all())
    assert bool((history[again_after] == MASK).all())
    masked = torch.stack([(state == MASK).sum() for state in history[again_after:]])
    times = grid(steps, 0.1)[again_after:]
    lengths = torch.cat([times[:-1] - times[1:], times[-1:]])
    assert_counts_match(masked[:-1] - masked[1:], lengths)
