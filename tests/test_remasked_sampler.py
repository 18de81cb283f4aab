"""Remasking: its law by enumeration, the share of masks, and what goes through the head."""

from __future__ import annotations

import functools

import pytest
import torch
from sampler_cases import MASK, D, Denoiser, Tabular, assert_same_law
from torch import Tensor

from di4c_fast.samplers import sample_masked, sample_remasked
from di4c_fast.testing import assert_counts_match

LAST = 3  # the mask of `Tabular`, which has 3 positions and 4 classes
sample = functools.partial(sample_remasked, mask_id=LAST, seed=0)
RULES = {
    "cap": {"eta": 0.3},
    "rescale": {"rule": "rescale", "eta": 0.6},
    "loop": {"rule": "loop", "eta": 0.5, "t_on": 0.7, "t_off": 0.35, "alpha_on": 0.6},
}


def transition(rule: str, eta: float, t: float, s: float, loop: dict) -> tuple[float, float]:
    """(a masked position is filled, a filled one is masked), written in α as in the paper."""
    alpha_t, alpha_s = 1 - t, 1 - s
    if rule == "loop" and t > loop["t_on"]:
        scale = loop["alpha_on"] / (1 - loop["t_on"])
        return (alpha_s - alpha_t) * scale / (1 - alpha_t * scale), 0.0
    if rule == "loop" and t <= loop["t_off"]:
        return (t - s) / t, 0.0
    if rule == "loop":
        alpha_t = alpha_s = loop["alpha_on"]
        sigma = eta
    else:
        most = 1.0 if alpha_t == 0 else min(1.0, (1 - alpha_s) / alpha_t)
        if rule == "conf":
            return (alpha_s - alpha_t) / (1 - alpha_t), most
        sigma = {"cap": min(eta, most), "rescale": eta * most}[rule]
    return (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t), sigma


def enumerated_law(model: Tabular, steps: int, t_min: float, rule="cap", eta=0.0, **loop) -> Tensor:
    """The law (V^D,) of the final tokens, step by step over all states."""
    vocab, positions = 4, 3
    states = torch.cartesian_prod(*[torch.arange(vocab)] * positions)
    law = torch.zeros(len(states), dtype=torch.float64)
    law[-1] = 1.0  # all masked
    times = torch.linspace(1, t_min, steps + 1, dtype=torch.float64).tolist()
    for i, t in enumerate(times):
        logits = model(states, torch.full((len(states),), t))
        logits[..., LAST] = -torch.inf
        p = logits.softmax(-1)
        kept = torch.nn.functional.one_hot(states, vocab).double()
        if i < steps:
            fill, most = transition(rule, eta, t, times[i + 1], loop)
            again = torch.full(states.shape, most, dtype=torch.float64)
            if rule == "conf":  # where the probability of a token is that of when it was drawn
                doubt = -p.gather(-1, states[..., None])[..., 0]
                again *= doubt.masked_fill(states == LAST, -torch.inf).softmax(1).nan_to_num()
            filled, stays = fill * p, (1 - again[..., None]) * kept
            filled[..., LAST], stays[..., LAST] = 1 - fill, again
        else:
            filled = torch.nn.functional.one_hot(p.argmax(-1), vocab).double()
            stays = kept
        move = torch.where((states == LAST)[..., None], filled, stays)
        step = torch.einsum("sa,sb,sc->sabc", *move.unbind(1)).flatten(1)
        law = law @ step
    return law


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("rule", list(RULES))
def test_tokens_have_the_law_of_the_chain(rule, timed):
    model, steps, t_min = Tabular(2, timed=timed), 7, 0.05
    tokens = sample(model, (40_000, 3), steps=steps, t_min=t_min, **RULES[rule])
    law = enumerated_law(model, steps, t_min, **RULES[rule])
    assert_counts_match(model.counts_of(tokens), law)
    with pytest.raises(AssertionError, match="chi-square"):  # remasking matters
        assert_counts_match(model.counts_of(tokens), enumerated_law(model, steps, t_min))


def test_doubtful_tokens_are_masked_again_by_their_confidence():
    model = Tabular(4, timed=False)
    model.table[:] = 2 * model.table[:, :, :1]  # tokens do not depend on one another
    tokens = sample(model, (40_000, 3), steps=6, t_min=0.05, rule="conf")
    law = enumerated_law(model, 6, 0.05, "conf")
    assert_counts_match(model.counts_of(tokens), law)
    for other in ({}, {"rule": "rescale", "eta": 1 / 3}):
        with pytest.raises(AssertionError, match="chi-square"):
            assert_counts_match(model.counts_of(tokens), enumerated_law(model, 6, 0.05, **other))


def test_without_remasking_it_is_ancestral_sampling():
    model = Tabular(3)
    options = {"mask_id": LAST, "steps": 4, "t_min": 0.1}
    ours = sample(model, (20_000, 3), steps=4, t_min=0.1, eta=0.0)
    assert_same_law(ours, sample_masked(model, (20_000, 3), seed=9, **options), 4)


@pytest.mark.parametrize("rule", ["cap", "rescale"])
def test_the_share_of_masks_is_that_of_the_time(rule):
    history: list[Tensor] = []
    sample(Tabular(1), (20_000, 3), steps=10, t_min=0.05, history=history, **RULES[rule])
    shares = [float((tokens == LAST).double().mean()) for tokens in history[:-1]]
    for t, share in zip(torch.linspace(1, 0.05, 11).tolist(), shares, strict=True):
        assert abs(share - t) < 5 * (0.25 / 60_000) ** 0.5


def test_the_loop_stays_at_its_share_of_masks():
    history: list[Tensor] = []
    options = {**RULES["loop"], "t_on": 0.65, "t_off": 0.25}
    sample(Tabular(1), (20_000, 3), steps=10, t_min=1e-9, history=history, **options)
    shares = [float((tokens == LAST).double().mean()) for tokens in history[:-1]]
    # α runs from 0 to 0.6 at t = 0.65 and beyond, to 0.6 · 0.4/0.35 at the step that passes it.
    between = 1 - 0.6 * 0.4 / 0.35
    for expected, share in zip([1.0, between], [shares[0], shares[4]], strict=True):
        assert abs(share - expected) < 5 * (0.25 / 60_000) ** 0.5
    assert shares[-1] < 1e-3
    assert all(abs(share - 0.4) < abs(between - 0.4) + 0.01 for share in shares[4:9])


def test_known_tokens_are_never_masked_and_only_filled_rows_are_taken():
    model, history = Denoiser(0), []
    prompt = torch.full((5, 4), MASK)
    prompt[:, ::2] = 3
    options = {"steps": 12, "eta": 0.5, "rule": "rescale", "history": history}
    tokens = sample_remasked(model, (5, D), mask_id=MASK, seed=1, prompt=prompt, **options)
    assert all(bool((state[:, :4:2] == 3).all()) for state in history)
    assert int(tokens.max()) < MASK
    states = torch.stack(history)
    filled = (states[:-1] == MASK) & (states[1:] != MASK)
    again = (states[:-1] != MASK) & (states[1:] == MASK)
    assert bool(again.any())
    assert sum(len(rows) for rows in model.rows) == int(filled.sum())
    changed = (states[:-1] != states[1:]) & ~filled & ~again
    assert not bool(changed.any())
