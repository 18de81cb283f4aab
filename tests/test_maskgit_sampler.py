"""The MaskGIT sampler: the schedule to the letter, known answers, and only the needed rows."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from di4c_fast.heads import TensorHead
from di4c_fast.processes.reveal import SCHEDULES, gumbel, reveal_counts
from di4c_fast.samplers import sample_maskgit
from di4c_fast.samplers.maskgit import _first_true
from di4c_fast.testing import assert_counts_match


class RecordingModel(nn.Module):
    """Equal logits for every token; remembers its calls and the rows that were read."""

    def __init__(self, vocab: int):
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


def uniform_model(tokens: Tensor, t: Tensor) -> Tensor:
    return torch.zeros(*tokens.shape, 5)


# Exactly the schedule


@pytest.mark.parametrize(("positions", "steps"), [(1, 1), (7, 3), (16, 1), (16, 8), (64, 12)])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("resample", [False, True])
def test_every_step_reveals_exactly_the_schedule(positions, steps, schedule, resample):
    history: list[Tensor] = []
    sample_maskgit(
        uniform_model,
        (3, positions),
        mask_id=4,
        steps=steps,
        schedule=schedule,
        resample=resample,
        seed=0,
        history=history,
    )
    masked = torch.stack([(codes == 4).sum(-1) for codes in history])
    revealed = (masked[:-1] - masked[1:]).T.tolist()
    assert revealed == [reveal_counts(steps, positions, schedule)] * 3


def test_more_steps_than_positions_call_the_model_once_per_position():
    model = RecordingModel(5)
    tokens = sample_maskgit(model, (2, 3), mask_id=4, steps=9, seed=0)
    assert len(model.calls) == 3
    assert bool((tokens != 4).all())


def test_own_counts_are_followed():
    history: list[Tensor] = []
    sample_maskgit(
        uniform_model, (2, 6), mask_id=4, steps=3, schedule=[3, 1, 2], seed=0, history=history
    )
    assert [int((codes == 4).sum(-1)[0]) for codes in history] == [6, 3, 2, 0]


def test_rows_with_a_prompt_follow_the_schedule_of_their_unknown_positions():
    prompt = torch.tensor([[0, 4, 1, 4, 4, 4], [0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 0, 1]])
    model = RecordingModel(5)
    history: list[Tensor] = []
    tokens = sample_maskgit(
        model, (3, 6), mask_id=4, steps=3, prompt=prompt, seed=0, history=history
    )
    assert torch.equal(tokens[prompt != 4], prompt[prompt != 4])
    masked = torch.stack([(codes == 4).sum(-1) for codes in history])
    assert (masked[:-1] - masked[1:]).T.tolist() == [
        reveal_counts(3, 4),
        reveal_counts(3, 2),
        [0, 0, 0],
    ]
    # The sequence without masks takes no part, the second only until it is full.
    assert [len(call[0]) for call in model.calls] == [2, 2, 1]


def test_the_head_computes_masked_rows_only():
    model = RecordingModel(5)
    sample_maskgit(model, (2, 16), mask_id=4, steps=4, seed=0)
    left = 2 * (16 - torch.tensor([0, *itertools.accumulate(reveal_counts(4, 16))][:-1]))
    assert [rows.numel() for rows in model.rows] == left.tolist()
    for (tokens, _), rows in zip(model.calls, model.rows, strict=True):
        assert torch.equal(rows, (tokens.flatten() == 4).nonzero()[:, 0])


def test_rows_found_without_asking_the_device_are_those_of_nonzero():
    wanted = torch.rand(60, generator=torch.Generator().manual_seed(0)) < 0.3
    assert torch.equal(_first_true(wanted, int(wanted.sum())), wanted.nonzero()[:, 0])


def test_resampling_computes_every_row_and_changes_filled_positions():
    model = RecordingModel(5)
    history: list[Tensor] = []
    sample_maskgit(model, (4, 16), mask_id=4, steps=4, resample=True, seed=0, history=history)
    assert [rows.numel() for rows in model.rows] == [64] * 4
    filled = (history[1] != 4) & (history[2] != 4)
    assert bool((history[1] != history[2])[filled].any())
    without: list[Tensor] = []
    sample_maskgit(uniform_model, (4, 16), mask_id=4, steps=4, seed=0, history=without)
    for before, after in itertools.pairwise(without):
        assert torch.equal(before[before != 4], after[before != 4])


def test_resampling_keeps_the_prompt():
    prompt = torch.tensor([0, 1, 2, 3, 0, 1])
    tokens = sample_maskgit(
        uniform_model, (200, 9), mask_id=4, steps=3, prompt=prompt, resample=True, seed=0
    )
    assert bool((tokens[:, :6] == prompt).all())
    assert bool((tokens != 4).all())


def test_the_mask_token_is_drawn_only_on_request_and_then_counts_as_revealed():
    def model(tokens, t):
        return torch.tensor([0.0, 0.0, math.log(2.0)]).expand(*tokens.shape, 3)

    excluded = sample_maskgit(model, (4000, 2), mask_id=2, steps=2, seed=0)
    assert bool((excluded != 2).all())
    history: list[Tensor] = []
    drawn = sample_maskgit(
        model,
        (4000, 2),
        mask_id=2,
        steps=2,
        schedule=[1, 1],
        exclude_mask=False,
        gumbel_temperature=1e9,  # confidence without regard to the token
        seed=0,
        history=history,
    )
    counts = torch.bincount(drawn.flatten(), minlength=3)
    assert_counts_match(counts, torch.tensor([0.25, 0.25, 0.5]))
    # Half of the first draws are the mask, and stay: the second step leaves them alone.
    assert abs(int((history[1] == 2).all(-1).sum()) - 2000) < 200  # 6 standard deviations


def test_with_resampling_a_drawn_mask_is_masked_again():
    calls = []

    def model(tokens, t):
        calls.append(tokens)
        return torch.tensor([0.0, 0.0, 9.0 if len(calls) == 1 else -9.0]).expand(*tokens.shape, 3)

    tokens = sample_maskgit(
        model,
        (50, 4),
        mask_id=2,
        steps=2,
        schedule=[3, 1],
        exclude_mask=False,
        resample=True,
        seed=0,
    )
    # The mask is drawn with probability 0.9998 at the first step, and 6e-5 at the second.
    assert float((calls[1] == 2).float().mean()) > 0.95
    assert float((tokens == 2).float().mean()) < 0.05


def test_a_model_without_a_column_for_the_mask_serves_without_exclusion():
    tokens = sample_maskgit(
        uniform_model, (5, 6), mask_id=5, steps=3, exclude_mask=False, vocab_size=5, seed=0
    )
    assert int(tokens.max()) < 5


# Known answers


def ranked_model(tokens: Tensor, t: Tensor) -> Tensor:
    """Position d prefers token d with a confidence that grows with d, but for the last."""
    positions = tokens.shape[1]
    logits = torch.zeros(*tokens.shape, positions + 1)
    for d in range(positions):
        logits[:, d, d] = 3.0 + d
    logits[:, -1] = logits[:, -1] / 10
    return logits


def test_without_noise_and_temperature_the_most_confident_argmax_comes_first():
    history: list[Tensor] = []
    sample_maskgit(
        ranked_model,
        (2, 4),
        mask_id=4,
        steps=4,
        schedule=[1, 1, 1, 1],
        temperature=0.0,
        gumbel_temperature=0.0,
        seed=0,
        history=history,
    )
    expected = [[4, 4, 4, 4], [4, 4, 2, 4], [4, 1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3]]
    assert [codes[0].tolist() for codes in history] == expected
    assert [codes[1].tolist() for codes in history] == expected


def test_no_randomness_equals_a_gumbel_temperature_of_zero():
    arguments = {"mask_id": 4, "steps": 4, "schedule": [1, 1, 1, 1], "seed": 1}
    none = sample_maskgit(ranked_model, (300, 4), randomize="none", **arguments)
    zero = sample_maskgit(ranked_model, (300, 4), gumbel_temperature=0.0, **arguments)
    assert torch.equal(none, zero)


def test_equal_confidences_reveal_the_lowest_positions_first():
    history: list[Tensor] = []
    sample_maskgit(
        lambda tokens, t: torch.zeros(*tokens.shape, 5),
        (1, 5),
        mask_id=4,
        steps=3,
        schedule=[2, 2, 1],
        randomize="none",
        temperature=0.0,
        seed=0,
        history=history,
    )
    assert history[1].tolist() == [[0, 0, 4, 4, 4]]
    assert history[2].tolist() == [[0, 0, 0, 0, 4]]


@lru_cache
def first_positions(randomize: str, step: int) -> Tensor:
    history: list[Tensor] = []
    sample_maskgit(
        ranked_model,
        (3000, 4),
        mask_id=4,
        steps=4,
        schedule=[1, 1, 1, 1],
        randomize=randomize,
        seed=5,
        history=history,
    )
    new = (history[step + 1] != 4) & (history[step] == 4)
    return new.sum(0)


def test_random_confidence_reveals_every_position_equally_often():
    assert_counts_match(first_positions("random", 0), torch.ones(4))
    assert_counts_match(first_positions("random", 3), torch.ones(4))


def test_warm_up_is_random_in_two_steps_and_confident_afterwards():
    assert_counts_match(first_positions("warm_up", 0), torch.ones(4))
    assert_counts_match(first_positions("warm_up", 1), torch.ones(4))
    last = first_positions("warm_up", 3)
    assert int(last[3]) > 0.45 * int(last.sum())  # the least confident position, if still there


def test_the_noise_fades_out_and_never_turns_round():
    """At the last step of two, whose factor is 0, the confident position always wins."""
    history: list[Tensor] = []
    sample_maskgit(
        ranked_model,
        (500, 4),
        mask_id=4,
        steps=2,
        schedule=[1, 3],
        temperature=0.0,
        seed=5,
        history=history,
    )
    assert len(torch.unique((history[1] != 4).long().argmax(-1))) == 4
    assert history[2].tolist() == [[0, 1, 2, 3]] * 500


# What a sequence depends on


def test_a_sequence_does_not_depend_on_its_batch():
    def model(tokens, t, latent):
        known = (tokens * torch.arange(1, 9)).sum(-1).view(-1, 1, 1)
        return torch.linspace(0, 3, 5) * torch.sin(known + latent.unsqueeze(-1)).expand(-1, 8, 1)

    arguments = {"mask_id": 4, "steps": 3, "latent_dim": 1, "seed": 11}
    whole = sample_maskgit(model, (9, 8), **arguments)
    assert torch.equal(whole[4:7], sample_maskgit(model, (3, 8), first_sequence=4, **arguments))


@pytest.mark.parametrize("resample", [False, True])
def test_a_sequence_does_not_depend_on_the_prompts_of_others(resample):
    def model(tokens, t):
        return (
            torch.linspace(0, 2, 5).expand(*tokens.shape, 5)
            * (1 + tokens.sum(-1)).view(-1, 1, 1)
            / 20
        )

    prompt = torch.full((3, 8), 4)
    prompt[0, :6] = 1
    prompt[2] = 2
    arguments = {"mask_id": 4, "steps": 4, "seed": 3, "resample": resample}
    some = sample_maskgit(model, (3, 8), prompt=prompt, **arguments)
    alone = sample_maskgit(model, (1, 8), first_sequence=1, **arguments)
    assert torch.equal(some[1:2], alone)


def test_a_generator_gives_the_seed():
    draws = [
        sample_maskgit(
            uniform_model, (4, 6), mask_id=4, steps=2, generator=torch.Generator().manual_seed(s)
        )
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_latents_and_noise_share_no_random_number():
    latents = []

    def model(tokens, t, latent):
        latents.append(latent)
        return torch.zeros(*tokens.shape, 5)

    sample_maskgit(model, (50, 4), mask_id=4, steps=2, latent_dim=1, seed=5)
    for step, latent in enumerate(latents):
        noise = gumbel(5, step, torch.arange(50), 4)[:, 0]
        u = -torch.expm1(-torch.exp(-noise))
        assert not bool(torch.isclose(latent[:, 0].double(), u).any())


# The call of the model


def test_the_model_sees_falling_times_and_eval_mode_and_gets_its_mode_back():
    model = RecordingModel(5)
    sample_maskgit(model, (2, 16), mask_id=4, steps=4, seed=0)
    assert [float(t[0]) for _, t in model.calls] == [1.0, 0.75, 0.5, 0.25]
    assert all(t.dtype == torch.float32 for _, t in model.calls)
    assert model.modes == [False] * 4
    assert model.training


def test_callback_and_history_follow_every_step():
    seen = []
    history: list[Tensor] = []
    tokens = sample_maskgit(
        uniform_model,
        (2, 3),
        mask_id=4,
        steps=5,
        seed=0,
        callback=lambda step, total, codes: seen.append((step, total, codes.clone())),
        history=history,
    )
    assert [(step, total) for step, total, _ in seen] == [(i, 5) for i in range(1, 6)]
    assert len(history) == 6
    assert bool((history[0] == 4).all())
    for (_, _, codes), kept in zip(seen, history[1:], strict=True):
        assert torch.equal(codes, kept)
    assert torch.equal(history[-1], tokens)


def test_no_sequences_give_no_tokens():
    assert sample_maskgit(uniform_model, (0, 4), mask_id=4, steps=2, seed=0).shape == (0, 4)


def test_a_full_prompt_calls_no_model():
    prompt = torch.tensor([[0, 1, 2]])
    for resample in (False, True):
        model = RecordingModel(5)
        tokens = sample_maskgit(
            model, (1, 3), mask_id=4, steps=2, prompt=prompt, resample=resample, seed=0
        )
        assert torch.equal(tokens, prompt)
        assert model.calls == []


@pytest.mark.gpu
@pytest.mark.parametrize("resample", [False, True])
def test_the_loop_waits_for_nothing_on_a_gpu(resample):
    device = torch.device("cuda")
    prompt = torch.full((3, 16), 8, device=device)
    prompt[1, :9] = 1
    label = torch.zeros(3, dtype=torch.int64, device=device)

    def model(tokens, t, label):
        torch.cuda.set_sync_debug_mode("error")
        return torch.zeros(*tokens.shape, 9, device=device)

    def stop(step, total, tokens):
        if step == total:
            torch.cuda.set_sync_debug_mode("default")

    try:
        tokens = sample_maskgit(
            model,
            (3, 16),
            mask_id=8,
            steps=4,
            prompt=prompt,
            context={"label": label},
            unconditional={"label": label + 1},
            guidance=2.0,
            resample=resample,
            seed=0,
            callback=stop,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool((tokens != 8).all())
