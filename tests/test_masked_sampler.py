"""The masked ancestral sampler: the law of the naive loop, at the cost of what is used."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from di4c_fast.heads import TensorHead
from di4c_fast.samplers import sample_masked
from di4c_fast.samplers.masked import plan_unmask_steps

D, VOCAB, MASK = 3, 4, 3
STATES = VOCAB**D
# A correct implementation fails a check at this bound once in a million seeds.
P_VALUE = 1e-6


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """p-value of counts under probabilities; classes of probability 0 must be empty."""
    possible = probabilities > 0
    assert int(counts[~possible].sum()) == 0
    observed = counts[possible].double().numpy()
    expected = (probabilities[possible].double() / probabilities.double().sum()).numpy()
    return float(stats.chisquare(observed, expected * observed.sum()).pvalue)


def state_of(tokens: Tensor) -> Tensor:
    """Number of a token row (..., D) in base VOCAB."""
    powers = VOCAB ** torch.arange(tokens.shape[-1] - 1, -1, -1)
    return (tokens * powers).sum(-1)


ALL_ROWS = torch.tensor(list(itertools.product(range(VOCAB), repeat=D)))


class TabularDenoiser:
    """Any denoiser of D tokens: one table of logits per state, and per half of λ."""

    def __init__(self, seed: int, latent: bool = False):
        generator = torch.Generator().manual_seed(seed)
        self.table = 1.5 * torch.randn(2 if latent else 1, STATES, D, VOCAB, generator=generator)

    def __call__(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor:
        component = 0 if latent is None else (latent[:, 0] > 0.5).long()
        return self.table[component, state_of(tokens)] * (0.5 + t.view(-1, 1, 1))

    def probabilities(self, t: float, component: int) -> Tensor:
        """(STATES, D, VOCAB) denoising distributions in every state, the mask excluded."""
        logits = self.table[component].double() * (0.5 + t)
        logits[..., MASK] = -math.inf
        return logits.softmax(-1)

    def transition(self, t: float, s: float, component: int) -> Tensor:
        """(STATES, STATES): the naive ancestral step from t to s; s = None is the argmax."""
        probabilities = self.probabilities(t, component)
        if s is None:
            step = torch.nn.functional.one_hot(probabilities.argmax(-1), VOCAB).double()
        else:
            step = probabilities * (t - s) / t
            step[..., MASK] = s / t
        known = ALL_ROWS != MASK
        step[known] = torch.nn.functional.one_hot(ALL_ROWS, VOCAB).double()[known]
        a, b, c = step.unbind(1)
        return torch.einsum("xi,xj,xk->xijk", a, b, c).flatten(1)


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


# The law


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
    assert len(wanted) < 13
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


# Bad input


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int, got float 2.0"),
        ({"shape": (2, 0)}, ValueError, r"shape\[1\] must be at least 1, got 0"),
        ({"shape": (2,)}, TypeError, r"shape must be \(B, D\)"),
        ({"mask_id": -1}, ValueError, "mask_id must be at least 0, got -1"),
        ({"mask_id": 4}, ValueError, r"mask_id must be in \[0, V\) = \[0, 4\) of model, got 4"),
        ({"mask_id": 7, "vocab_size": 5}, ValueError, r"mask_id must be in \[0, vocab_size\)"),
        ({"vocab_size": 5}, ValueError, r"model must return logits over V = 5 classes, got shape"),
        ({"latent_dim": -1}, ValueError, "latent_dim must be at least 0, got -1"),
        ({"latent": torch.zeros(2, 1)}, ValueError, "latent needs latent_dim >= 1, got 0"),
        (
            {"latent": torch.zeros(3, 1), "latent_dim": 1},
            ValueError,
            r"latent must have shape \(B, L\) = \(2, 1\) or \(S \+ 1, B, L\) = \(4, 2, 1\), got",
        ),
        (
            {"prompt": torch.zeros(2, 6).long()},
            ValueError,
            "longer than the sequence, D = 5, got 6",
        ),
        ({"prompt": torch.zeros(3, 2).long()}, ValueError, r"prompt must have shape \(B, P\)"),
        ({"prompt": torch.zeros(2, 2)}, TypeError, "prompt must have dtype torch.int64"),
        ({"prompt": torch.tensor([0, -1])}, ValueError, r"prompt must hold .* \[0, V\), got -1"),
        (
            {"prompt": torch.tensor([0, 9]), "vocab_size": 4},
            ValueError,
            r"prompt must hold token ids in \[0, 4\), got 9",
        ),
        (
            {"prompt": torch.tensor([0, 9])},
            ValueError,
            r"prompt must hold token ids in \[0, V\) = \[0, 4\) of model, got 9",
        ),
        ({"t_min": 0.0}, ValueError, r"t_min must be in \(0, 1\), got 0.0"),
        ({"t_min": math.nan}, ValueError, "t_min must be finite"),
        ({"temperature": -1.0}, ValueError, "temperature must be finite and at least 0, got -1.0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int or None"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^63\), got -1"),
        ({"seed": 1.5}, TypeError, "seed must be an int or None"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "exclude each other"),
        ({"generator": 1}, TypeError, "generator must be a torch.Generator or None"),
        ({"model": 3}, TypeError, "model must be callable, got int"),
        ({"project_fn": 3}, TypeError, "project_fn must be callable"),
        ({"callback": "bar"}, TypeError, "callback must be callable"),
        ({"history": True}, TypeError, "history must be a list to fill or None"),
        ({"context": {"label": torch.zeros(3)}}, ValueError, r"context\['label'\] must have B = 2"),
        ({"context": [torch.zeros(2)]}, TypeError, "context must be a mapping of tensors"),
        ({"project_fn": lambda x: x[:, :2]}, ValueError, "project_fn must return tokens of shape"),
        ({"project_fn": lambda x: x.float()}, TypeError, "output of project_fn must have dtype"),
        ({"model": lambda x, t: torch.zeros(2, 5)}, ValueError, "model must return logits of sha"),
        (
            {"model": lambda x, t: torch.zeros(1, 5, 4)},
            ValueError,
            r"model must return logits of shape \(R, D, V\) .* = \(2, 5\) .* got \(1, 5, 4\)",
        ),
        ({"model": lambda x, t: x}, TypeError, "the output of model must be floating point"),
        ({"model": lambda x, t: None}, TypeError, "the output of model must be a Tensor of logits"),
        ({"model": lambda x, t: torch.zeros(2, 5, 1), "mask_id": 0}, ValueError, "at least 2 cl"),
    ],
)
def test_what_is_wrong_is_named(changes, error, message):
    arguments = {
        "model": lambda x, t: torch.zeros(*x.shape, VOCAB),
        "shape": (2, 5),
        "mask_id": MASK,
        "steps": 3,
        "t_min": 0.1,
        "active_only": False,
        **changes,
    }
    with pytest.raises(error, match=message):
        sample_masked(**arguments)
