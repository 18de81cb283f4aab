"""The masked ancestral sampler: only what is used is computed; what goes in and what comes out."""

from __future__ import annotations

import itertools

import pytest
import torch
from masked_sampler_cases import MASK, P_VALUE, VOCAB, D, TabularDenoiser, chi_square
from torch import Tensor, nn

from di4c_fast.heads import TensorHead
from di4c_fast.samplers import sample_masked
from di4c_fast.samplers.masked import plan_unmask_steps


class UniformModel(nn.Module):
    """Equal logits for every token; remembers what it was called with and which rows were read."""

    def __init__(self, vocab: int = VOCAB):
        super().__init__()
        self.vocab = vocab
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.rows: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, tokens: Tensor, t: Tensor):
        self.calls.append((tokens.clone(), t.clone()))
        self.modes.append(self.training)
        rows = self.rows

        class Head(TensorHead):
            def take(self, wanted: Tensor):
                rows.append(wanted)
                return super().take(wanted)

        return Head(torch.zeros(*tokens.shape, self.vocab))


# What is computed


def test_the_head_computes_every_masked_position_once_and_nothing_else():
    model = UniformModel()
    prompt = torch.tensor([0, MASK, 1])
    tokens = sample_masked(model, (5, 40), mask_id=MASK, steps=6, seed=0, prompt=prompt)
    assert sum(rows.numel() for rows in model.rows) == 5 * 38
    for (inputs, _), rows in zip(model.calls, model.rows, strict=True):
        assert bool((inputs.flatten()[rows] == MASK).all())
        assert rows.unique().numel() == rows.numel()
    assert bool((tokens != MASK).all())


def test_the_model_is_called_at_steps_that_unmask_something_and_with_sequences_that_do():
    steps, shape, seed = 50, (3, 4), 13
    times = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64)
    plan = plan_unmask_steps(times, shape, seed=seed)
    model = UniformModel()
    sample_masked(model, shape, mask_id=MASK, steps=steps, seed=seed)
    wanted = plan.unique().tolist()
    assert len(model.calls) == len(wanted)
    for step, (inputs, t) in zip(wanted, model.calls, strict=True):
        active = int((plan == step).any(1).sum())
        assert inputs.shape == (active, 4)
        torch.testing.assert_close(t, times[step].float().expand(active))


def test_all_sequences_are_given_on_request_with_the_same_samples():
    shape = (6, 5)
    table = torch.randn(5, VOCAB, VOCAB)

    def model(tokens, t):
        model.sizes.append(tokens.shape[0])
        return table.expand(tokens.shape[0], -1, -1, -1)[
            torch.arange(tokens.shape[0]).unsqueeze(1), torch.arange(5), tokens.roll(1, 1)
        ]

    results = []
    for active_only in (True, False):
        model.sizes = []
        results.append(
            sample_masked(model, shape, mask_id=MASK, steps=9, seed=2, active_only=active_only)
        )
        assert (set(model.sizes) == {6}) == (not active_only)
    assert torch.equal(*results)


def test_no_call_when_nothing_is_masked():
    model = UniformModel()
    prompt = torch.tensor([[0, 1], [2, 0]])
    tokens = sample_masked(model, (2, 2), mask_id=MASK, steps=4, seed=0, prompt=prompt)
    assert torch.equal(tokens, prompt)
    assert model.calls == []


def test_an_empty_batch_gives_no_rows():
    assert sample_masked(UniformModel(), (0, 7), mask_id=MASK, steps=3, seed=0).shape == (0, 7)


def test_what_remains_takes_the_argmax_at_the_last_time():
    def model(tokens, t):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[..., 2] = 0.1
        logits[..., MASK] = 9.0
        model.last = t
        return logits

    history = []
    tokens = sample_masked(
        model, (20, 50), mask_id=MASK, steps=1, seed=0, t_min=0.5, history=history
    )
    assert torch.equal(model.last, torch.full((20,), 0.5))
    assert bool((tokens[history[1] == MASK] == 2).all())
    assert int((history[1] == MASK).sum()) > 100


# What comes out


def test_temperature_and_filters_reach_the_draws():
    model = TabularDenoiser(seed=32)
    options = {"mask_id": MASK, "steps": 3, "seed": 1}
    argmax = sample_masked(model, (400, D), temperature=0.0, **options)
    assert torch.equal(sample_masked(model, (400, D), top_k=1, **options), argmax)
    assert torch.equal(sample_masked(model, (400, D), top_p=1e-6, **options), argmax)
    assert not torch.equal(sample_masked(model, (400, D), **options), argmax)


def test_tokens_never_change_once_they_are_there():
    history = []
    tokens = sample_masked(UniformModel(), (8, 30), mask_id=MASK, steps=12, seed=5, history=history)
    assert len(history) == 14
    assert bool((history[0] == MASK).all())
    assert torch.equal(history[-1], tokens)
    for before, after in itertools.pairwise(history):
        known = before != MASK
        assert torch.equal(before[known], after[known])


def test_samples_are_a_function_of_the_seed():
    draw = lambda **how: sample_masked(UniformModel(), (4, 20), mask_id=MASK, steps=5, **how)  # noqa: E731
    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))
    generators = [torch.Generator().manual_seed(s) for s in (3, 3, 4)]
    first, again, other = (draw(generator=g) for g in generators)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # A generator moves on, so that the next call gives other samples.
    assert not torch.equal(draw(generator=generators[0]), first)


def test_samples_do_not_depend_on_how_they_are_batched():
    model = TabularDenoiser(seed=30, latent=True)
    options = {"mask_id": MASK, "steps": 4, "seed": 9, "latent_dim": 1}
    whole = sample_masked(model, (10, D), **options)
    parts = [
        sample_masked(model, (size, D), first_sequence=first, **options)
        for first, size in ((0, 3), (3, 6), (9, 1))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_a_callback_hears_of_every_step():
    calls = []
    tokens = sample_masked(
        UniformModel(),
        (1, 2),
        mask_id=MASK,
        steps=7,
        seed=0,
        callback=lambda step, total, x: calls.append((step, total, x)),
    )
    assert [call[:2] for call in calls] == [(k, 8) for k in range(1, 9)]
    assert torch.equal(calls[-1][2], tokens)


def test_a_module_samples_in_eval_mode_without_a_graph_and_gets_its_mode_back():
    model = UniformModel()
    model.inner = nn.Dropout(0.5)
    model.inner.eval()
    tokens = sample_masked(model, (2, 5), mask_id=MASK, steps=3, seed=0)
    assert model.modes == [False] * len(model.modes)
    assert model.training
    assert not model.inner.training
    assert not tokens.requires_grad


# What the model is given


def test_latents_given_per_step_reach_the_model():
    seen = {}

    def model(tokens, t, latent):
        seen[round(float(t[0]), 4)] = latent.clone()
        return torch.zeros(*tokens.shape, VOCAB)

    latent = torch.rand(4, 50, 2)
    sample_masked(
        model, (50, 20), mask_id=MASK, steps=3, seed=0, latent_dim=2, latent=latent, t_min=0.25
    )
    assert sorted(seen) == [0.25, 0.5, 0.75, 1.0]
    for t, k in ((1.0, 0), (0.75, 1), (0.5, 2), (0.25, 3)):
        assert torch.equal(seen[t], latent[k])


def test_context_follows_the_sequences():
    def model(tokens, t, label):
        logits = torch.full((*tokens.shape, VOCAB), -1e9)
        return logits.scatter(2, label.view(-1, 1, 1).expand(*tokens.shape, 1), 0.0)

    label = torch.tensor([0, 2, 1, 2])
    tokens = sample_masked(model, (4, 3), mask_id=MASK, steps=10, seed=0, context={"label": label})
    assert torch.equal(tokens, label.unsqueeze(1).expand(4, 3))


# Prompts and projections


def test_prompts_stay_and_unknown_tokens_of_a_prompt_are_filled():
    prompt = torch.tensor([[0, MASK, 2, 1], [1, 1, MASK, MASK]])
    tokens = sample_masked(UniformModel(), (2, 9), mask_id=MASK, steps=4, seed=0, prompt=prompt)
    known = prompt != MASK
    assert torch.equal(tokens[:, :4][known], prompt[known])
    assert bool((tokens != MASK).all())


def test_a_prefix_by_projection_equals_a_prefix_by_prompt():
    model = TabularDenoiser(seed=31)

    def project(tokens):
        tokens[:, :2] = torch.tensor([2, 0])
        return tokens

    options = {"mask_id": MASK, "steps": 4, "seed": 3}
    projected = sample_masked(model, (50, D), project_fn=project, **options)
    prompted = sample_masked(model, (50, D), prompt=torch.tensor([2, 0]), **options)
    assert torch.equal(projected, prompted)


def test_tokens_filled_by_a_projection_stay_and_cost_nothing():
    model = UniformModel()
    calls = iter(range(100))

    def project(tokens):
        if next(calls) == 1:  # after the first step
            tokens[:, 5:] = 2
        return tokens

    tokens = sample_masked(model, (3, 30), mask_id=MASK, steps=6, seed=0, project_fn=project)
    assert bool((tokens[:, 5:] == 2).all())
    assert sum(rows.numel() for rows in model.rows[1:]) <= 15


def test_tokens_masked_again_unmask_at_the_rate_of_the_loop():
    steps, again_after = 4, 2
    calls = iter(range(100))

    def project(tokens):
        if next(calls) == again_after:
            tokens[:] = MASK
        return tokens

    history = []
    tokens = sample_masked(
        UniformModel(),
        (100, 200),
        mask_id=MASK,
        steps=steps,
        seed=0,
        t_min=0.1,
        project_fn=project,
        history=history,
    )
    assert bool((tokens != MASK).all())
    assert bool((history[again_after] == MASK).all())
    masked = torch.stack([(state == MASK).sum() for state in history[again_after:]])
    times = torch.linspace(1, 0.1, steps + 1, dtype=torch.float64)[again_after:]
    lengths = torch.cat([times[:-1] - times[1:], times[-1:]])
    assert chi_square(masked[:-1] - masked[1:], lengths) > P_VALUE


# On a GPU


class RolledTable(nn.Module):
    """Logits in float64 that depend on the neighbouring token; no work on the host."""

    def __init__(self):
        super().__init__()
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        self.table = nn.Parameter(table.double())
        self.on_call = lambda: None

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor) -> Tensor:
        self.on_call()
        return self.table[tokens.roll(1, 1)] * (t + latent[:, 0]).double().view(-1, 1, 1)


@pytest.mark.gpu
def test_samples_on_a_gpu_are_those_on_the_cpu():
    options = {"mask_id": MASK, "steps": 6, "seed": 5, "latent_dim": 1}
    on_cpu = sample_masked(RolledTable(), (16, 40), **options)
    on_gpu = sample_masked(RolledTable().cuda(), (16, 40), **options)
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.gpu
def test_the_loop_runs_without_host_syncs_on_a_gpu():
    model = RolledTable().cuda()
    options = {"mask_id": MASK, "steps": 6, "seed": 5, "latent_dim": 1}
    sample_masked(model, (16, 40), **options)  # compiles what is compiled on first use
    model.on_call = lambda: torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = sample_masked(model, (16, 40), **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool((tokens != MASK).all())
