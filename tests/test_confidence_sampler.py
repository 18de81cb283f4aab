"""The confidence sampler: how many positions, which rows are computed, blocks, randomness."""

from __future__ import annotations

import itertools

import pytest
import torch
from confidence_cases import MASK, VOCAB, D, Denoiser, prompts
from naming import stable_id

from di4c_fast.heads import LinearHead
from di4c_fast.samplers import sample_confidence
from di4c_fast.testing import assert_counts_match, assert_frequency

# How many, and what is computed


@pytest.mark.parametrize("steps", [1, 3, 4, 10, 13])
def test_each_step_fills_exactly_its_number_of_positions(steps):
    history = []
    model = Denoiser(6)
    sample_confidence(
        model, (3, D), mask_id=MASK, steps=steps, prompt=prompts(3, 4), seed=1,
        temperature=1.0, history=history,
    )  # fmt: skip
    masked = [(state == MASK).sum(1) for state in history]
    counts = torch.stack([a - b for a, b in itertools.pairwise(masked)])
    expected = [10 // steps + (i < 10 % steps) for i in range(steps) if 10 // steps or i < 10]
    assert torch.equal(counts, torch.tensor(expected)[:, None].expand(-1, 3))
    assert len(model.inputs) == len(expected)


def test_only_masked_rows_of_the_current_block_go_through_the_head():
    model = Denoiser(7)
    history = []
    sample_confidence(
        model, (2, D), mask_id=MASK, steps=6, block_length=5, prompt=prompts(2, 4),
        history=history, seed=0,
    )  # fmt: skip
    assert len(model.rows) == 6
    for step, (before, rows) in enumerate(zip(history, model.rows, strict=False)):
        end = 4 + 5 * (step // 3 + 1)
        active = (before == MASK) & (torch.arange(D) < end)
        assert torch.equal(rows, active.flatten().nonzero()[:, 0])


def test_shifted_rows_are_those_of_the_positions_before():
    model = Denoiser(8)
    sample_confidence(model, (2, D), mask_id=MASK, steps=1, shift=True, seed=0)
    place = torch.arange(D)
    expected = (torch.arange(2)[:, None] * D + (place - 1).clamp(min=0)).flatten()
    assert torch.equal(model.rows[0], expected)


def test_guidance_masks_the_prompt_in_the_second_half_of_the_batch():
    model = Denoiser(9)
    prompt = prompts(2, 4)
    sample_confidence(
        model, (2, D), mask_id=MASK, steps=2, prompt=prompt, guidance_scale=2.0, seed=0
    )
    for inputs in model.inputs:
        assert inputs.shape == (4, D)
        assert torch.equal(inputs[:2, :4], prompt)
        assert bool((inputs[2:, :4] == MASK).all())
        assert torch.equal(inputs[:2, 4:], inputs[2:, 4:])


def test_sequences_without_work_are_left_out_of_the_call_on_request():
    prompt = torch.full((3, D), 2)
    prompt[1, 5:8] = MASK
    for active_only, rows in ((True, 1), (False, 3)):
        model = Denoiser(10)
        tokens = sample_confidence(
            model, (3, D), mask_id=MASK, steps=3, prompt=prompt, active_only=active_only
        )
        assert [x.shape[0] for x in model.inputs] == [rows] * 3
        assert bool((tokens[::2] == 2).all())
    model = Denoiser(10)
    full = torch.full((3, D), 2)
    assert torch.equal(sample_confidence(model, (3, D), mask_id=MASK, steps=3, prompt=full), full)
    assert model.inputs == []


def test_no_tensor_of_all_logits_is_made(monkeypatch):
    batch, positions, vocabulary, width = 2, 256, 5003, 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, positions, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    largest = 0
    plain = LinearHead.logits

    def noting(self):
        nonlocal largest
        result = plain(self)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(LinearHead, "logits", noting)
    budget = 64 * vocabulary * 4
    sample_confidence(
        lambda x, t: LinearHead(hidden[: len(x)], weight, budget_bytes=budget),
        (batch, positions),
        mask_id=0,
        steps=2,
        seed=0,
        temperature=0.7,
    )
    assert 0 < largest <= 64 * vocabulary


def test_time_is_the_share_of_masked_positions():
    model = Denoiser(11)
    sample_confidence(model, (1, D), mask_id=MASK, steps=2, prompt=prompts(1, 4), seed=0)
    torch.testing.assert_close(torch.cat(model.times), torch.tensor([10 / 14, 5 / 14]))


# Blocks, thresholds and ends


def test_a_sequence_goes_to_its_next_block_without_waiting_for_others():
    model = Denoiser(12)
    whole = sample_confidence(
        model, (4, D), mask_id=MASK, threshold=0.4, block_length=5, prompt=prompts(4, 4), seed=3,
        temperature=1.0,
    )  # fmt: skip
    for row in range(4):
        alone = sample_confidence(
            model, (1, D), mask_id=MASK, threshold=0.4, block_length=5, seed=3, temperature=1.0,
            prompt=prompts(4, 4)[row : row + 1], first_sequence=row,
        )  # fmt: skip
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize(
    "how",
    [{"steps": 10}, {"steps": 10, "exclude_mask": False}, {"threshold": 0.99},
     {"steps": 10, "rule": "origin"}],
)  # fmt: skip
def test_an_end_of_sequence_ends_the_work_after_its_block(how):
    end = 3

    def model(tokens, t):
        logits = torch.zeros(*tokens.shape, VOCAB, dtype=torch.float64)
        logits[..., 1] = 3.0
        logits[:, 6, end] = 9.0
        logits[:, 12, 5] = 9.0
        model.sizes.append(len(tokens))
        return logits

    model.sizes = []
    prompt = torch.full((2, 4), end)  # not an end: it is part of the prompt
    options = {"mask_id": MASK, "block_length": 5, "prompt": prompt, "seed": 0, **how}
    tokens = sample_confidence(model, (2, D), eos_id=end, **options)
    assert torch.equal(tokens[0], torch.tensor([end] * 4 + [1, 1, end, 1, 1] + [end] * 5))
    assert torch.equal(tokens[0], tokens[1])
    stopped = len(model.sizes)
    assert bool((sample_confidence(model, (2, D), **options)[:, 12] == 5).all())
    assert len(model.sizes) - stopped > stopped


def test_an_empty_batch_gives_no_rows():
    model = lambda x, t: torch.zeros(*x.shape, VOCAB)  # noqa: E731
    for how in ({"steps": 3}, {"threshold": 0.5}, {"steps": 3, "rule": "origin"}):
        assert sample_confidence(model, (0, 7), mask_id=MASK, seed=0, **how).shape == (0, 7)


# Randomness


def test_tokens_at_a_temperature_follow_the_softmax():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 1.5
    model = lambda x, t: logits.expand(*x.shape, VOCAB)  # noqa: E731
    tokens = sample_confidence(
        model, (400, 10), mask_id=MASK, steps=5, temperature=0.7, rule="random", seed=0
    )
    probs = logits.clone()
    probs[MASK] = -torch.inf
    counts = torch.bincount(tokens.flatten(), minlength=VOCAB)
    assert_counts_match(counts, (probs / 0.7).softmax(-1))


def test_random_and_origin_fill_positions_in_a_random_order():
    model = lambda x, t: torch.zeros(*x.shape, VOCAB)  # noqa: E731
    for how in ({"rule": "random"}, {"rule": "origin", "t_min": 1e-3}):
        history = []
        sample_confidence(model, (4000, 4), mask_id=MASK, steps=2, seed=1, history=history, **how)
        first = (history[1] != MASK).sum(0)
        share = 0.5 if how["rule"] == "random" else (1 - 1e-3) / 2
        for count in first.tolist():
            assert_frequency(count, 4000, share)
        assert bool((history[-1] != MASK).all())
    together = (history[1] != MASK).sum(1)  # of origin: independent positions
    shares = torch.distributions.Binomial(4, torch.tensor(share)).log_prob(torch.arange(5.0)).exp()
    assert_counts_match(torch.bincount(together, minlength=5), shares)


def test_origin_computes_only_the_rows_that_unmask():
    model = Denoiser(13)
    history = []
    sample_confidence(
        model, (3, D), mask_id=MASK, steps=4, rule="origin", prompt=prompts(3, 4), history=history,
        seed=0,
    )  # fmt: skip
    assert sum(rows.numel() for rows in model.rows) == 30
    for (before, after), rows in zip(itertools.pairwise(history), model.rows, strict=True):
        assert rows.numel() == int((before != after).sum())


def test_a_confidence_temperature_draws_positions_by_their_softmax():
    certain = torch.tensor([0.2, 1.0, 2.0, 3.0])

    def model(tokens, t):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[..., 0] = certain
        return logits

    history = []
    sample_confidence(
        model, (4000, 4), mask_id=MASK, steps=4, seed=2, confidence_temperature=0.3,
        history=history, rule="maskgit_plus",
    )  # fmt: skip
    p = certain.exp() / (certain.exp() + VOCAB - 2)
    q = (p / 0.3).softmax(-1)
    first = (history[1] != MASK).int().argmax(1)
    assert_counts_match(torch.bincount(first, minlength=4), q)
    # Without replacement: the pair of the first two positions.
    second = ((history[2] != MASK) & (history[1] == MASK)).int().argmax(1)
    pairs = torch.bincount(first * 4 + second, minlength=16)
    expected = q[:, None] * q / (1 - q[:, None])
    expected.fill_diagonal_(0)
    assert_counts_match(pairs, expected.flatten())


@pytest.mark.parametrize(
    "how",
    [
        {"steps": 5},
        {"steps": 4, "rule": "origin", "block_length": 5},
        {"steps": 5, "rule": "random"},
        {"factor": 1.5},
        {"steps": 5, "confidence_temperature": 0.5, "rule": "entropy"},
    ],
    ids=stable_id,
)
def test_samples_do_not_depend_on_how_they_are_batched(how):
    model = Denoiser(14)
    prompt = prompts(7, 4)
    options = {"mask_id": MASK, "seed": 9, "latent_dim": 1, "temperature": 0.8, **how}
    whole = sample_confidence(model, (7, D), prompt=prompt, **options)
    parts = [
        sample_confidence(
            model, (b - a, D), first_sequence=a, prompt=prompt[a:b], active_only=False, **options
        )
        for a, b in ((0, 2), (2, 3), (3, 7))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_samples_are_a_function_of_the_seed():
    model = Denoiser(15)
    draw = lambda **how: sample_confidence(  # noqa: E731
        model, (4, D), mask_id=MASK, steps=3, temperature=1.0, **how
    )
    assert torch.equal(draw(seed=1), draw(seed=1))
    assert not torch.equal(draw(seed=1), draw(seed=2))
    first, again = (draw(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_latents_are_fresh_per_step_and_sequence_or_as_passed():
    model = Denoiser(16)
    options = {"mask_id": MASK, "seed": 0, "latent_dim": 2}
    sample_confidence(model, (3, D), steps=4, **options)
    drawn = torch.stack(model.latents)
    assert drawn.shape == (4, 3, 2)
    assert drawn.unique().numel() == 24
    assert bool(((drawn > 0) & (drawn < 1)).all())
    passed = torch.rand(4, 3, 2)
    for latent, expected in ((passed, passed), (passed[0], passed[:1].expand(4, -1, -1))):
        model.latents.clear()
        sample_confidence(model, (3, D), steps=4, latent=latent, **options)
        assert torch.equal(torch.stack(model.latents), expected)
    model.latents.clear()
    by_step = torch.rand(D, 3, 2)
    sample_confidence(model, (3, D), threshold=0.3, latent=by_step, active_only=False, **options)
    assert torch.equal(torch.stack(model.latents), by_step[: len(model.latents)])


# What the caller hears and passes


def test_a_callback_and_a_history_hear_of_every_step():
    calls, history = [], []
    tokens = sample_confidence(
        Denoiser(17), (2, D), mask_id=MASK, steps=7, seed=0, history=history,
        callback=lambda step, total, x: calls.append((step, total, x)),
    )  # fmt: skip
    assert [call[:2] for call in calls] == [(k, 7) for k in range(1, 8)]
    assert all(torch.equal(a[2], b) for a, b in zip(calls, history[1:], strict=True))
    assert bool((history[0] == MASK).all())
    assert torch.equal(history[-1], tokens)


def test_context_follows_the_sequences():
    def model(tokens, t, label):
        assert len(label) == len(tokens)
        logits = torch.zeros(*tokens.shape, VOCAB)
        return logits.scatter(2, label.view(-1, 1, 1).expand(*tokens.shape, 1), 5.0)

    label = torch.tensor([0, 2, 1])
    prompt = torch.full((3, 2), MASK)
    prompt[0] = 4
    tokens = sample_confidence(
        model, (3, 2), mask_id=MASK, steps=2, prompt=prompt, context={"label": label},
        guidance_scale=1.0,
    )  # fmt: skip
    assert tokens.tolist() == [[4, 4], [2, 2], [1, 1]]


# On a GPU


@pytest.mark.gpu
def test_samples_on_a_gpu_are_those_on_the_cpu_and_known_counts_need_no_sync():
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)).double()

    def run(device, before=lambda: None):
        here = table.to(device)

        def model(tokens, t):
            before()
            return here[tokens.roll(1, 1)] * (t.double() + 0.5).view(-1, 1, 1)

        return sample_confidence(
            model, (8, 40), mask_id=MASK, steps=8, block_length=20, seed=1, device=device,
            temperature=0.8,
        )  # fmt: skip

    expected = run("cpu")
    assert torch.equal(run("cuda").cpu(), expected)
    try:
        run("cuda", lambda: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
