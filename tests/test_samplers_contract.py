"""What holds for every sampler: what goes in, what comes out, seeds, λ, prompts, hooks, heads."""

from __future__ import annotations

import math

import pytest
import torch
from sampler_cases import FUNCTIONS, MASK, SAMPLERS, VOCAB, D, Denoiser, Sampler, prompts
from torch import Tensor

from di4c_fast import rng
from di4c_fast.samplers.analytic import log_linear_noise
from di4c_fast.samplers.loop import first_true
from di4c_fast.samplers.uniform import log_linear_signal


def those(*arguments: str):
    """Every sampler that takes the arguments."""
    names = [name for name, sampler in SAMPLERS.items() if sampler.takes(*arguments)]
    return pytest.mark.parametrize("name", names)


@pytest.fixture(params=SAMPLERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def sampler(name) -> Sampler:
    return SAMPLERS[name]


LABEL = torch.tensor([0, 1, 2, 3])


def some_prompt(name: str) -> dict:
    """A prompt for four sequences, with unknown tokens where a sampler knows masks."""
    sampler = SAMPLERS[name]
    if not sampler.takes("prompt"):
        return {}
    prompt = prompts(4, 5)
    if sampler.takes("mask_id"):
        prompt[0, 1] = prompt[2, :4] = MASK
    return {"prompt": prompt}


# What comes out, and how the model is called


def test_tokens_are_those_of_the_vocabulary_and_the_module_runs_in_eval_mode(name):
    model = Denoiser()
    model.inner.eval()
    tokens = SAMPLERS[name](model)
    assert tokens.shape == (4, D)
    assert tokens.dtype == torch.int64
    assert tokens.device.type == "cpu"
    assert not tokens.requires_grad
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < VOCAB
    if SAMPLERS[name].takes("mask_id"):
        assert bool((tokens != MASK).all())
    for inputs, t in zip(model.inputs, model.times, strict=True):
        assert t.dtype == torch.float32
        assert t.shape == inputs.shape[:1]
        assert bool(((t > 0) & (t <= 1)).all())
    assert model.modes == [False] * len(model.modes)
    assert model.training
    assert not model.inner.training


def test_empty_batches_single_positions_and_any_number_of_steps(sampler):
    assert sampler(Denoiser(), (0, D)).shape == (0, D)
    one_block = {"block_length": None} if "block_length" in sampler.options else {}
    for shape in ((3, 1), (2, D)):
        for steps in (1, 2, 3 * D) if "steps" in sampler.options else (None,):
            model = Denoiser()
            how = one_block if steps is None else {"steps": steps, **one_block}
            tokens = sampler(model, shape, **how)
            assert tokens.shape == shape
            assert not sampler.takes("mask_id") or bool((tokens != MASK).all())
            assert 1 <= len(model.inputs) <= (D if steps is None else steps + sampler.last)


def test_the_seed_and_the_generator_decide(name):
    draw = lambda **how: SAMPLERS[name](Denoiser(1), **how)  # noqa: E731
    if name != "factor":  # which draws nothing at temperature 0
        assert not torch.equal(draw(seed=1), draw(seed=2))
    assert torch.equal(draw(seed=1), draw(seed=1))
    if name == "factor":
        return
    generators = [torch.Generator().manual_seed(s) for s in (3, 3, 4)]
    first, again, other = (draw(seed=None, generator=g) for g in generators)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # A generator moves on, so that the next call gives other samples.
    assert not torch.equal(draw(seed=None, generator=generators[0]), first)


def test_samples_do_not_depend_on_how_they_are_batched(name):
    model, sampler = Denoiser(2), SAMPLERS[name]
    more = {"latent_dim": 1, **some_prompt(name)}
    whole = sampler(model, context={"label": LABEL}, **more)
    parts = []
    for a, b in ((0, 1), (1, 4)):
        cut = {"prompt": more["prompt"][a:b]} if "prompt" in more else {}
        how = {**more, **cut, "context": {"label": LABEL[a:b]}, "first_sequence": a}
        parts.append(sampler(model, (b - a, D), **how))
    assert torch.equal(whole, torch.cat(parts))


@those("active_only")
def test_leaving_sequences_out_of_the_call_changes_no_sample(sampler):
    results = []
    for active_only in (True, False):
        model = Denoiser(3)
        more = {"latent_dim": 1, "context": {"label": LABEL}, "active_only": active_only}
        steps = 28 if "steps" in sampler.options else None
        results.append(sampler(model, steps=steps, **more))
        sizes = {len(inputs) for inputs in model.inputs}
        assert (sizes == {4}) or active_only
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "condition", "of"),
    [
        ("analytic", "t", float),
        ("analytic", "sigma", log_linear_noise()),
        ("uniform", "t", float),
        ("uniform", "alpha", log_linear_signal()),
        ("uniform", "sigma", lambda t: -math.log(log_linear_signal()(t))),
    ],
)
def test_the_model_is_given_the_time_the_noise_or_the_signal(name, condition, of):
    given = []

    def model(tokens, t):
        given.append(float(t[0]))
        return torch.full((*tokens.shape, VOCAB), -20.0)  # so low that masks remain

    SAMPLERS[name](model, (1, 2), steps=2, condition=condition, t_min=0.5)
    assert given == pytest.approx([of(t) for t in (1.0, 0.75, 0.5)], rel=1e-6)


# Hooks


def test_history_and_callback_hear_of_every_step(name, sampler):
    history, calls = [], []
    model = Denoiser(4)
    tokens = sampler(model, history=history, callback=lambda *call: calls.append(call))
    steps = sampler.options.get("steps")
    total = D if steps is None else steps + sampler.last
    assert [call[1] for call in calls] == [total] * len(calls)
    numbers = [call[0] for call in calls]
    # Confidence steps that ask nothing are not told of.
    whole = list(range(1, (total if steps else len(model.inputs)) + 1))
    assert numbers == whole or (name == "origin" and set(numbers) <= set(whole))
    assert len(history) == len(calls) + 1
    for (*_, seen), state in zip(calls, history[1:], strict=True):
        assert seen is state
    assert torch.equal(history[-1], tokens)
    if sampler.takes("mask_id"):
        assert bool((history[0] == MASK).all())
    assert all(state.shape == (4, D) for state in history)


def test_tokens_are_not_changed_in_place(name):
    model, history = Denoiser(4), []
    copies = []
    model.on_call = lambda: copies.append([state.clone() for state in history])
    SAMPLERS[name](model, history=history)
    for before in copies:
        assert all(torch.equal(a, b) for a, b in zip(before, history, strict=False))


@those("project_fn")
def test_projections_hold_at_every_step(sampler):
    def project(tokens):
        tokens[:, 4] = 3
        return tokens

    history = []
    tokens = sampler(Denoiser(5), project_fn=project, history=history)
    assert all(bool((state[:, 4] == 3).all()) for state in history)
    assert bool((tokens != MASK).all())


# Prompts, λ, context


@those("prompt")
def test_prompts_stay_and_their_unknown_tokens_are_filled(name, sampler):
    prompt = some_prompt(name)["prompt"]
    how = {"block_length": 3} if "block_length" in sampler.options else {}
    if how and "steps" in sampler.options:
        how["steps"] = 15
    for given in (prompt, prompt[0], prompt[:, :0]):
        history = []
        tokens = sampler(Denoiser(6), prompt=given, history=history, **how)
        known = (given != MASK).expand(4, -1)
        for state in [*history, tokens]:
            assert torch.equal(state[:, : given.shape[-1]][known], given.expand(4, -1)[known])
        assert not sampler.takes("mask_id") or bool((tokens != MASK).all())


@those("prompt")
def test_a_full_prompt_calls_no_model(name):
    model, prompt = Denoiser(6), prompts(4, D)
    how = {"block_length": None} if "block_length" in SAMPLERS[name].options else {}
    assert torch.equal(SAMPLERS[name](model, prompt=prompt, **how), prompt)
    assert model.inputs == []


def test_latents_are_fresh_per_step_and_sequence_or_as_passed(name, sampler):
    model = Denoiser(7)
    sampler(model, latent_dim=2)
    drawn = torch.cat(model.latents)
    assert drawn.shape == (sum(len(x) for x in model.inputs), 2)
    assert drawn.unique().numel() == drawn.numel()
    assert bool(((drawn > 0) & (drawn < 1)).all())
    steps = sampler.options.get("steps")
    calls = D if steps is None else steps + sampler.last
    # λ that tells its step and its sequence.
    passed = torch.arange(calls).view(-1, 1, 1) + torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1)
    model.latents.clear()
    sampler(model, latent_dim=1, latent=passed)
    number = [lam.floor().unique().tolist() for lam in model.latents]
    assert all(len(step) == 1 for step in number)
    assert number == sorted(number)
    assert len({step[0] for step in number}) == len(number)
    if name != "psi" and not name.startswith(
        ("masked", "remasked", "origin")
    ):  # every step has a call
        assert number == [[step] for step in range(len(number))]
    for lam in model.latents:
        sequences = lam - lam.floor()
        assert torch.equal(sequences, sequences.sort(0).values)
    model.latents.clear()
    sampler(model, latent_dim=1, latent=passed[0])
    assert bool(torch.isin(torch.cat(model.latents), passed[0]).all())


def test_latents_share_no_random_number_with_the_noise_of_a_rule(name, monkeypatch):
    used: list[tuple[int, int, int]] = []
    words = rng.random_words

    def recording(seed, step, row_keys, count, *, stream=rng.FREE, first=None):
        steps = torch.as_tensor(step).expand(row_keys.shape)
        used.extend((stream, *pair) for pair in zip(steps.tolist(), row_keys.tolist(), strict=True))
        return words(seed, step, row_keys, count, stream=stream, first=first)

    monkeypatch.setattr(rng, "random_words", recording)
    # Without the draws of tokens, whose streams are theirs.
    SAMPLERS[name](Denoiser(7), latent_dim=1)
    own = [number for number in used if number[0] == rng.FREE]
    assert own
    assert len(set(own)) == len(own)


def test_context_follows_the_sequences(sampler):
    def model(tokens, t, label):
        logits = torch.full((*tokens.shape, VOCAB), -1e9)
        return logits.scatter(2, label.view(-1, 1, 1).expand(*tokens.shape, 1), 0.0)

    how = {} if not sampler.takes("threshold") else {"guidance_scale": 1.0}
    if sampler.takes("randomize"):
        how = {"unconditional": {"label": LABEL}, "guidance": 1.0}
    tokens = sampler(model, context={"label": LABEL}, **how)
    assert torch.equal(tokens, LABEL.unsqueeze(1).expand(4, D))


# Heads


@pytest.mark.parametrize("kind", ["linear", "positional", "logistic", "own"])
def test_every_kind_of_head_draws_what_its_logits_draw(name, sampler, kind):
    class Dense(Denoiser):
        def forward(self, *inputs, **context) -> Tensor:
            return super().forward(*inputs, **context).logits()

    more = some_prompt(name)
    if sampler.takes("banned_ids"):
        more["banned_ids"] = [1, 4]
        if sampler.options.get("rule") is None:
            more |= {"deferred_ids": [2], "guidance_scale": 0.5}
    by_head = sampler(Denoiser(8, kind), **more)
    assert torch.equal(by_head, sampler(Dense(8, kind), **more))
    if "banned_ids" in more:
        drawn = by_head[:, 5:]
        assert not bool(torch.isin(drawn, torch.tensor([1, 4])).any())


def test_half_precision_and_autocast(name):
    class Half(Denoiser):
        def forward(self, *inputs, **context) -> Tensor:
            return super().forward(*inputs, **context).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = SAMPLERS[name](Half(9, "tensor"))
    assert torch.equal(inside, SAMPLERS[name](Half(9, "tensor")))


def test_a_model_whose_vocabulary_changes_between_calls_is_refused(name):
    calls = []

    def model(tokens, t):
        calls.append(t)
        logits = torch.zeros(*tokens.shape, VOCAB + (len(calls) > 1))
        # Log-scores so low that the analytic sampler leaves something for its second call.
        return logits - 20.0 * torch.ones(VOCAB + (len(calls) > 1))

    with pytest.raises(ValueError, match="must return logits over V = 11 classes, got shape"):
        SAMPLERS[name](model, (4, D))
    assert len(calls) == 2


def test_logits_that_are_not_numbers_are_refused(name):
    with pytest.raises(ValueError, match="must not hold"):
        SAMPLERS[name](lambda tokens, t: torch.full((*tokens.shape, VOCAB), torch.nan))


# Devices


def test_rows_found_without_asking_the_device_are_those_of_nonzero():
    wanted = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(first_true(wanted, int(wanted.sum())), wanted.nonzero()[:, 0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_device_with_its_number_is_that_of_the_context(name):
    how = {"device": "cpu:0", "latent_dim": 1, "latent": torch.rand(4, 1)}
    assert SAMPLERS[name](Denoiser(), context={"label": LABEL}, **how).shape == (4, D)


@pytest.mark.gpu
def test_samples_on_a_gpu_are_those_on_the_cpu_and_known_counts_need_no_sync(name, sampler):
    on_cpu = sampler(Denoiser(10, "tensor"), latent_dim=1)
    model = Denoiser(10, "tensor").cuda()
    on_gpu = sampler(model, latent_dim=1)
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), on_cpu)
    if name in ("analytic", "threshold", "factor", "canvas, ending"):  # which ask what is left
        return
    model.on_call = lambda: torch.cuda.set_sync_debug_mode("error")
    try:
        sampler(model, latent_dim=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
