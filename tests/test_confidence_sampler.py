"""The confidence sampler: tokens of a naive loop, how many positions, which rows, blocks, order."""

from __future__ import annotations

import itertools

import pytest
import torch
from confidence_cases import naive
from naming import stable_id
from sampler_cases import MASK, VOCAB, D, Denoiser, constant, prompts
from torch import Tensor

from di4c_fast.samplers import sample_confidence
from di4c_fast.testing import assert_counts_match, assert_draws_match, assert_frequency
from tools.own_head import Capped

RULES = ("low_confidence", "maskgit_plus", "topk_margin", "entropy")


def fill(model, shape=(2, D), **how) -> Tensor:
    return sample_confidence(model, shape, **{"mask_id": MASK, "seed": 0, **how})


def states(model, shape=(2, D), **how) -> list[Tensor]:
    """The tokens at the start and after every step."""
    history: list[Tensor] = []
    fill(model, shape, history=history, **how)
    return history


def check_against_naive(model, prompt, **how):
    names = {"banned": "banned_ids", "deferred": "deferred_ids"}
    ours = {names.get(name, name): value for name, value in how.items()}
    tokens = fill(model, (len(prompt), D), prompt=prompt, **ours)
    expected = torch.stack([naive(model, row, **how)[0] for row in prompt])
    assert torch.equal(tokens, expected)
    return tokens


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "how",
    [
        {"steps": 4},
        {"steps": 4, "block_length": 5},
        {"steps": 30},
        {"steps": 1},
        {"steps": 5, "schedule": "ancestral", "shift": True},
        {"steps": 6, "guidance_scale": 1.3},
        {"steps": 6, "top_p": 0.8, "top_k": 4, "schedule": "ancestral"},
        {"threshold": 0.4, "block_length": 5},
        {"threshold": 0.3},
        {"threshold": 0.3, "steps": 5},
        {"factor": 1.0, "block_length": 5},
        {"factor": 2.0},
        {"steps": 4, "banned": (3, 5)},
    ],
    ids=stable_id,
)
def test_tokens_at_temperature_0_are_those_of_the_naive_loop(rule, how):
    for seed in range(2):
        check_against_naive(Denoiser(seed, timed=False), prompts(3, 4, seed), rule=rule, **how)


def test_deferred_tokens_come_last_and_others_are_judged_without_them():
    model = Denoiser(2, timed=False)
    with_deferred = check_against_naive(model, prompts(3, 4), steps=5, deferred=(5, 4))
    for seed in (0, 3, 4):
        guided = {"guidance_scale": 2.0, "deferred": (5, 4, 1, 7)}
        check_against_naive(Denoiser(seed, timed=False), prompts(3, 4), steps=10, **guided)
    assert not torch.equal(with_deferred, check_against_naive(model, prompts(3, 4), steps=5))


def test_a_mask_that_is_drawn_stays_and_the_counts_go_on():
    model = Denoiser(3, mask_bias=4.0, timed=False)
    for how in ({"steps": 4}, {"steps": 4, "schedule": "ancestral"}):
        tokens = check_against_naive(model, prompts(4, 4), exclude_mask=False, **how)
        assert bool((tokens == MASK).any())
        assert bool((check_against_naive(model, prompts(4, 4), **how) != MASK).all())


def test_a_threshold_gives_the_mask_its_share_but_not_an_endless_loop():
    model = Denoiser(3, mask_bias=3.0, timed=False)
    how = {"threshold": 0.3, "exclude_mask": False}
    tokens = check_against_naive(model, prompts(3, 4), **how)
    assert not torch.equal(tokens, check_against_naive(model, prompts(3, 4), threshold=0.3))
    model = Denoiser(3, mask_bias=50.0, timed=False)
    assert bool((fill(model, **how) == MASK).all())
    assert len(model.inputs) == D


def test_unknown_tokens_of_a_prompt_are_filled_with_the_first_block_at_each_rows_own_rate():
    prompt = prompts(3, 6)
    prompt[0, 2] = MASK
    prompt[2, :5] = MASK
    check_against_naive(Denoiser(4, timed=False), prompt, steps=4, block_length=4)
    check_against_naive(Denoiser(4, timed=False), prompt, threshold=0.4, block_length=4)
    check_against_naive(Denoiser(4, timed=False), prompt, steps=3, schedule="ancestral")


@pytest.mark.parametrize("rule", ["maskgit_plus", "topk_margin", "entropy", "low_confidence"])
def test_a_confidence_dtype_ranks_by_what_the_repositories_compute(rule):
    class Half(Denoiser):
        def forward(self, tokens, t):
            return super().forward(tokens, t).to(torch.bfloat16)

    model = Half(5, "tensor", timed=False)
    how = {"rule": rule, "exclude_mask": False, "confidence_dtype": torch.bfloat16}
    history = states(model, (1, D), steps=D, **how)
    for before, after in itertools.pairwise(history[:6]):
        p = model.logits(before[0]).softmax(-1)
        top = p.sort(-1, descending=True).values
        confidence = {
            "topk_margin": top[:, 0] - top[:, 1],
            "entropy": (p * torch.log(p + 1e-10)).sum(-1),
        }.get(rule, top[:, 0])
        assert confidence.dtype == torch.bfloat16
        best = confidence.masked_fill(before[0] != MASK, -torch.inf).float().argmax()
        expected = before[0].clone()
        expected[best] = p[best].argmax()
        assert torch.equal(after[0], expected)


def test_equal_confidences_keep_the_lowest_positions():
    # Exactly equal, whatever the rounding of a row: one token has all the probability.
    model = constant(torch.tensor([0.0, *[-torch.inf] * 10]))
    for step, state in enumerate(states(model, (2, 9), steps=3)):
        expected = torch.where(torch.arange(9) < 3 * step, 0, MASK)
        assert torch.equal(state, expected.expand(2, 9))


# How many, and what is computed


@pytest.mark.parametrize("steps", [1, 3, 4, 10, 13])
def test_each_step_fills_exactly_its_number_of_positions(steps):
    model = Denoiser(6)
    history = states(model, (3, D), steps=steps, prompt=prompts(3, 4), temperature=1.0)
    masked = [(state == MASK).sum(1) for state in history]
    counts = torch.stack([a - b for a, b in itertools.pairwise(masked)])
    expected = [10 // steps + (i < 10 % steps) for i in range(steps) if 10 // steps or i < 10]
    assert torch.equal(counts, torch.tensor(expected)[:, None].expand(-1, 3))
    assert len(model.inputs) == len(expected)


def test_only_masked_rows_of_the_current_block_go_through_the_head():
    model = Denoiser(7)
    history = states(model, steps=6, block_length=5, prompt=prompts(2, 4))
    assert len(model.rows) == 6
    for step, (before, rows) in enumerate(zip(history, model.rows, strict=False)):
        end = 4 + 5 * (step // 3 + 1)
        active = (before == MASK) & (torch.arange(D) < end)
        assert torch.equal(rows, active.flatten().nonzero()[:, 0])


def test_shifted_rows_are_those_of_the_positions_before():
    model = Denoiser(8)
    fill(model, steps=1, shift=True)
    place = torch.arange(D)
    expected = (torch.arange(2)[:, None] * D + (place - 1).clamp(min=0)).flatten()
    assert torch.equal(model.rows[0], expected)


def test_guidance_masks_the_prompt_in_the_second_half_of_the_batch():
    model = Denoiser(9)
    prompt = prompts(2, 4)
    fill(model, steps=2, prompt=prompt, guidance_scale=2.0)
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
        tokens = fill(model, (3, D), steps=3, prompt=prompt, active_only=active_only)
        assert [x.shape[0] for x in model.inputs] == [rows] * 3
        assert bool((tokens[::2] == 2).all())


def test_no_tensor_of_all_logits_is_made():
    positions, vocabulary = 256, 5003
    hidden = torch.randn(2, positions, 8, generator=torch.Generator().manual_seed(0))
    weight, bias = hidden.new_ones(vocabulary, 8), torch.randn(vocabulary)
    sizes = []

    class Noting(Capped):
        budget_bytes = 64 * vocabulary * 4

        def logits(self):
            sizes.append(self.shape.numel())
            return super().logits()

    model = lambda x, t: Noting(hidden[: len(x)], weight, bias)  # noqa: E731
    how = {"mask_id": 0, "temperature": 0.7, "banned_ids": [3], "deferred_ids": [5]}
    fill(model, (2, positions), steps=2, **how)
    assert 0 < max(sizes) <= 64 * vocabulary


def test_time_is_the_share_of_masked_positions():
    model = Denoiser(11)
    fill(model, (1, D), steps=2, prompt=prompts(1, 4))
    torch.testing.assert_close(torch.cat(model.times), torch.tensor([10 / 14, 5 / 14]))


# Blocks, thresholds and ends


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
    options = {"block_length": 5, "prompt": prompt, **how}
    tokens = fill(model, eos_id=end, **options)
    assert torch.equal(tokens[0], torch.tensor([end] * 4 + [1, 1, end, 1, 1] + [end] * 5))
    assert torch.equal(tokens[0], tokens[1])
    stopped = len(model.sizes)
    assert bool((fill(model, **options)[:, 12] == 5).all())
    assert len(model.sizes) - stopped > stopped


# Randomness


def test_tokens_at_a_temperature_follow_the_softmax():
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 1.5
    tokens = fill(constant(logits), (400, 10), steps=5, temperature=0.7, rule="random")
    probs = logits.clone()
    probs[MASK] = -torch.inf
    assert_draws_match(tokens, (probs / 0.7).softmax(-1))


def test_random_and_origin_fill_positions_in_a_random_order():
    for how in ({"rule": "random"}, {"rule": "origin", "t_min": 1e-3}):
        history = states(constant(torch.zeros(VOCAB)), (4000, 4), steps=2, seed=1, **how)
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
    history = states(model, (3, D), steps=4, rule="origin", prompt=prompts(3, 4))
    assert sum(rows.numel() for rows in model.rows) == 30
    for (before, after), rows in zip(itertools.pairwise(history), model.rows, strict=True):
        assert rows.numel() == int((before != after).sum())


def test_a_confidence_temperature_draws_positions_by_their_softmax():
    certain = torch.tensor([0.2, 1.0, 2.0, 3.0])

    def model(tokens, t):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[..., 0] = certain
        return logits

    how = {"confidence_temperature": 0.3, "rule": "maskgit_plus"}
    history = states(model, (4000, 4), steps=4, seed=2, **how)
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
