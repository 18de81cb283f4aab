"""Schedulers for diffusers: their laws, and that they fit its interface.

Every test runs with a stand-in for the interface, and with diffusers itself where it is installed.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import diffusers_stand_in
import pytest
import torch
from sampler_cases import Tabular, assert_same_law, reveal_law
from torch import Tensor
from wrong_arguments import Wrong, wrong

from di4c_fast.heads import LinearHead
from di4c_fast.samplers import sample_masked
from di4c_fast.testing import assert_counts_match, assert_draws_match

V, MASK = 5, 4
NAME = "di4c_fast.integrations.diffusers"


@pytest.fixture(params=["stand-in", "diffusers"], scope="module")
def ours(request) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            diffusers_stand_in.install(patch)
        else:
            pytest.importorskip("diffusers")
        patch.delitem(sys.modules, NAME, raising=False)
        patch.setattr("di4c_fast.integrations.diffusers", None, raising=False)
        yield importlib.import_module(NAME)


def all_masked(*shape: int) -> Tensor:
    return torch.full(shape, MASK)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_logits(*shape: int, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(*shape, V, generator=generator(seed))


# Ancestral sampling


def test_ancestral_steps_have_the_law_of_the_sampler(ours):
    model, tokens = Tabular(8, size=(2, V)), all_masked(8_000, 2)
    scheduler = ours.MaskedAncestralScheduler(mask_token_id=MASK, t_min=0.05, temperature=0.8)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == pytest.approx(torch.linspace(1, 0.05, 5).tolist())
    source = generator(1)
    for t in scheduler.timesteps:
        logits = model(tokens, t.expand(len(tokens)))
        tokens = scheduler.step(logits, t, tokens, generator=source).prev_sample
    options = {"mask_id": MASK, "steps": 4, "t_min": 0.05, "temperature": 0.8}
    assert_same_law(tokens, sample_masked(model, (20_000, 2), seed=1, **options), V)


def test_filled_tokens_stay_and_the_last_step_takes_the_argmax(ours):
    scheduler = ours.MaskedAncestralScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(3)
    tokens, logits = all_masked(40, 6), some_logits(40, 6)
    tokens[:, 2] = 1
    before = tokens
    for t in scheduler.timesteps[:-1]:
        (after,) = scheduler.step(logits, t, before, generator(2), return_dict=False)
        assert torch.equal(after[before != MASK], before[before != MASK])
        before = after
    last = scheduler.step(logits, scheduler.timesteps[-1], tokens).prev_sample
    assert torch.equal(last, torch.where(tokens == MASK, logits[..., :MASK].argmax(-1), tokens))


def test_noise_masks_with_the_probability_of_the_time(ours):
    scheduler = ours.MaskedAncestralScheduler(mask_token_id=MASK)
    clean, times = torch.zeros(2, 10_000, dtype=torch.int64), torch.tensor([0.2, 0.7])
    noisy = scheduler.add_noise(clean, times, generator=generator())
    shares = (noisy == MASK).double().mean(1)
    assert shares.tolist() == pytest.approx(times.tolist(), abs=0.025)


# Confidence


@pytest.mark.parametrize("threshold", [0.4, 0.7, 1.5])
def test_blocks_keep_what_is_sure_or_enough_of_it(ours, threshold):
    scheduler = ours.ConfidenceScheduler(block_length=7, threshold=threshold)
    scheduler.set_timesteps(3)
    tokens = all_masked(6, 7)
    tokens[torch.rand(6, 7, generator=generator(3)) < 0.3] = 2
    for step, enough in enumerate([3, 2, 2, 2]):
        logits = some_logits(6, 7, seed=step)
        output = scheduler.step(logits, step, tokens, mask_token_id=MASK)
        probs, drawn = logits.softmax(-1).max(-1)
        for row in range(6):
            masked = tokens[row] == MASK
            order = probs[row].masked_fill(~masked, -1.0).argsort(descending=True, stable=True)
            kept = (masked & (probs[row] > threshold)).index_fill(0, order[:enough], True) & masked
            assert torch.equal(output.transfer_index[row], kept)
            expected = torch.where(kept, drawn[row], tokens[row])
            assert torch.equal(output.prev_sample[row], expected)
            assert torch.equal(output.sampled_tokens[row][masked], drawn[row][masked])
        tokens = output.prev_sample
        assert not output.editing_transfer_index.any()
        assert output.pred_logits is logits


def test_draws_have_the_law_of_the_filtered_softmax_and_their_probability(ours):
    scheduler = ours.ConfidenceScheduler(block_length=4)
    scheduler.set_timesteps(4)
    logits = some_logits()
    how = {"temperature": 0.6, "top_k": 3, "generator": generator(), "mask_token_id": MASK}
    tokens = all_masked(4000, 4)
    output = scheduler.step(logits.expand(4000, 4, V), 0, tokens, **how, return_dict=False)
    *_, drawn, probs, _ = output
    expected = logits.masked_fill(logits < logits.topk(3).values[-1], -torch.inf) / 0.6
    assert_draws_match(drawn.flatten(), expected.softmax(-1))
    torch.testing.assert_close(probs, expected.softmax(-1)[drawn])
    how |= {"sampling_method": "greedy"}
    greedy = scheduler.step(logits.expand(4000, 4, V), 0, tokens, **how)
    assert bool((greedy.sampled_tokens == logits.argmax()).all())


def test_steps_that_edit_or_have_no_mask_are_those_of_diffusers(ours, monkeypatch):
    asked = []
    base = ours.ConfidenceScheduler.__mro__[1]
    monkeypatch.setattr(base, "step", lambda self, *args, **options: asked.append(options))
    scheduler = ours.ConfidenceScheduler(block_length=4)
    scheduler.set_timesteps(4)
    how = {"editing_threshold": 0.5, "mask_token_id": MASK, "minimal_topk": 1}
    scheduler.step(some_logits(2, 4), 0, all_masked(2, 4), **how)
    scheduler.step(some_logits(2, 4), 0, all_masked(2, 4), top_p=0.9)
    assert [step["mask_token_id"] for step in asked] == [MASK, None]
    assert asked[0].items() >= how.items()
    assert asked[1]["top_p"] == 0.9


# MaskGIT


@pytest.mark.parametrize("row", [[MASK] * 3, [MASK, 2, MASK]])
@pytest.mark.parametrize("temperature", [(2.0, 0.0), (0.0, 0.0)])
def test_the_least_confident_are_masked_again(ours, row, temperature):
    scheduler = ours.MaskGITScheduler(mask_token_id=MASK, masking_schedule="linear")
    scheduler.set_timesteps(2, temperature=temperature)
    model, logits = Tabular(2, size=(3, V)), some_logits(3)
    logits[:, MASK] = -torch.inf
    tokens = torch.tensor(row).expand(20_000, 3)
    outcome = scheduler.step(logits.expand(20_000, 3, V), 1, tokens, generator=generator(1))
    counts = model.counts_of(outcome.prev_sample)
    reveal = row.count(MASK) - 1  # of 3 positions, 1.5 stay masked after the first step of two
    law = torch.zeros(V**3, dtype=torch.float64)
    for state, share in reveal_law(logits, row, MASK, reveal, temperature[0]).items():
        law[model.state_of(torch.tensor(state))] = share
    assert_counts_match(counts, law)
    drawn = outcome.pred_original_sample
    assert bool((drawn != MASK).all())
    kept = outcome.prev_sample != MASK
    assert torch.equal(outcome.prev_sample[kept], drawn[kept])


@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
def test_images_keep_their_shape_and_the_schedule_its_counts(ours, schedule):
    scheduler = ours.MaskGITScheduler(mask_token_id=MASK, masking_schedule=schedule)
    scheduler.set_timesteps(4)
    tokens, source = all_masked(2, 4, 6), generator()
    share = {"cosine": [0.92388, 0.70711, 0.38268, 0.0], "arccos": [0.8391, 0.66667, 0.46, 0.0]}
    for step, t in enumerate(scheduler.timesteps):
        logits = some_logits(2, 4, 6, seed=step)
        logits[..., MASK] = -torch.inf
        logits = logits.movedim(-1, 1)
        tokens, drawn = scheduler.step(logits, t, tokens, 1.0, source, return_dict=False)
        assert tokens.shape == drawn.shape == (2, 4, 6)
        assert (tokens == MASK).sum((1, 2)).tolist() == [int(24 * share[schedule][step])] * 2


# All of them


def schedulers(ours) -> list[tuple[Any, dict[str, Any]]]:
    return [
        (ours.MaskedAncestralScheduler(mask_token_id=MASK, top_p=0.9), {}),
        (ours.ConfidenceScheduler(block_length=6, threshold=0.8), {"mask_token_id": MASK}),
        (ours.MaskGITScheduler(mask_token_id=MASK, masking_schedule="root"), {}),
    ]


def test_configurations_come_back_from_their_files(ours, tmp_path):
    for scheduler, _ in schedulers(ours):
        scheduler.save_pretrained(tmp_path)
        loaded = type(scheduler).from_pretrained(tmp_path)
        again = type(scheduler).from_config(scheduler.config)
        for other in (loaded, again):
            for name in ("mask_token_id", "top_p", "threshold", "masking_schedule", "t_min"):
                assert getattr(other.config, name, 0) == getattr(scheduler.config, name, 0)
        assert type(scheduler).__name__ in next(tmp_path.iterdir()).read_text()


def test_only_masked_rows_are_drawn_from_logits_or_heads_and_the_generator_decides(ours):
    hidden, weight = torch.randn(3, 6, 4, generator=generator()), some_logits(4).T.contiguous()
    tokens = all_masked(3, 6)
    tokens[:, ::2] = 1
    hidden[:, ::2] = torch.nan  # an error where a row is drawn
    for scheduler, more in schedulers(ours):
        scheduler.set_timesteps(2)
        first = scheduler.timesteps[0] if not more else 0
        results = []
        for output, seed in (
            (LinearHead(hidden, weight), 4),
            (hidden @ weight.T, 4),
            (hidden @ weight.T, 4),
        ):
            given = {"generator": generator(seed), **more}
            results.append(scheduler.step(output, first, tokens, **given).prev_sample)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[1], results[2])
        assert torch.equal(results[0][:, ::2], tokens[:, ::2])


def test_without_masks_nothing_changes(ours):
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    for scheduler, more in schedulers(ours):
        scheduler.set_timesteps(2)
        first = scheduler.timesteps[0] if not more else 0
        assert torch.equal(
            scheduler.step(some_logits(2, 6), first, tokens, **more).prev_sample, tokens
        )
        assert torch.equal(
            scheduler.step(some_logits(0, 6), first, tokens[:0], **more).prev_sample, tokens[:0]
        )


T, VALUE = TypeError, ValueError
ANCESTRAL, CONFIDENCE, MASKGIT = (
    "MaskedAncestralScheduler",
    "ConfidenceScheduler",
    "MaskGITScheduler",
)


@wrong(
    [
        ((ANCESTRAL, {"timestep": 0.3}), VALUE, "timestep must be one of the scheduler's times"),
        ((ANCESTRAL, {"timestep": torch.ones(2)}), VALUE, "timestep must be one number, got shape"),
        ((ANCESTRAL, {"timestep": "a"}), T, "timestep must be a number, got str 'a'"),
        ((ANCESTRAL, {"steps": None}), VALUE, "timesteps must be set before a step: call set_time"),
        ((CONFIDENCE, {"steps": None}), VALUE, "timesteps must be set before a step"),
        ((MASKGIT, {"steps": None}), VALUE, "timesteps must be set before a step"),
        ((ANCESTRAL, {"steps": 0}), VALUE, "steps must be at least 1, got 0"),
        ((ANCESTRAL, {"logits": torch.zeros(2, 5, V)}), VALUE, "model_output must have shape (B"),
        ((CONFIDENCE, {"logits": torch.zeros(2, 5, V)}), VALUE, "(2, 6, 5), got (2, 5, 5)"),
        ((MASKGIT, {"logits": None}), T, "model_output must be a Tensor of logits"),
        ((MASKGIT, {"sample": torch.zeros(2, 6)}), T, "sample must have dtype torch.int64"),
        ((ANCESTRAL, {"temperature": -1.0}), VALUE, "temperature must be finite and at least 0"),
        ((ANCESTRAL, {"mask_token_id": 9}), VALUE, "mask_id must be"),
        ((ANCESTRAL, {"mask_token_id": -1}), VALUE, "mask_token_id must be at least 0, got -1"),
        ((CONFIDENCE, {"mask_token_id": True}), T, "mask_token_id must be an int, got"),
        ((CONFIDENCE, {"threshold": "a"}), T, "threshold must be a number, got str 'a'"),
        ((CONFIDENCE, {"foo": 3}), T, "step takes the arguments of diffusers, got foo"),
        ((ANCESTRAL, {"t_min": 2.0}), VALUE, "t_min must be in (0, 1), got 2.0"),
        ((CONFIDENCE, {"sampling_method": "beam"}), VALUE, "sampling_method must be one of 'auto'"),
        ((MASKGIT, {"masking_schedule": "cubic"}), VALUE, "masking_schedule must be one of"),
    ]
)  # fmt: skip
def test_wrong_arguments_are_named(wrong: Wrong, ours):
    name, changes = wrong.what
    own = {"mask_token_id": MASK, "temperature": 1.0, "t_min": 0.1, "masking_schedule": "cosine"}
    given = {"steps": 2, "timestep": 0.0, "logits": some_logits(2, 6), "sample": all_masked(2, 6)}
    given = types.SimpleNamespace(**{**given, "sampling_method": "auto", **changes})
    names = {ANCESTRAL: ("mask_token_id", "temperature", "t_min"), CONFIDENCE: ()}
    kind = names.get(name, ("mask_token_id", "masking_schedule"))
    more = {"mask_token_id": MASK, "sampling_method": given.sampling_method}
    more |= {key: changes[key] for key in ("mask_token_id", "threshold", "foo") if key in changes}
    with wrong.raises():
        scheduler = getattr(ours, name)(**{key: changes.get(key, own[key]) for key in kind})
        if given.steps is not None:
            scheduler.set_timesteps(given.steps)
        if name == ANCESTRAL and "timestep" not in changes and given.steps:
            given.timestep = scheduler.timesteps[0]
        options = more if name == CONFIDENCE else {}
        scheduler.step(given.logits, given.timestep, given.sample, **options)


def test_without_diffusers_the_import_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match="diffusers"):
        importlib.import_module(NAME)
