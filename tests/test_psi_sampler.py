"""ψ-samplers: their law by enumeration of all states, their times and κ, known tokens."""

from __future__ import annotations

import functools

import pytest
import torch
from sampler_cases import Tabular, assert_same_law
from torch import Tensor

from di4c_fast.samplers import psi, sample_masked, sample_psi, sample_uniform_state
from di4c_fast.samplers.uniform import cosine_signal, log_linear_signal
from di4c_fast.testing import assert_counts_match

V, STEPS, T_MIN = 4, 6, 0.05
MASK = V - 1  # where there are masks
SIGNALS = {"log_linear": log_linear_signal(), "cosine": cosine_signal()}
PARTS = {"high_frac": 0.3, "middle_frac": 0.5}  # of 7 times: 2, 4 and 1
MIXED = {"high_mode": "constant-0.7", "middle_mode": "pure-pc", "low_mode": "constant-0.2", **PARTS}
KAPPAS = [0.7, 0.7, 0.0, 0.0, 0.0, 0.0]


def forward(alpha: float, masks: bool) -> Tensor:
    """q(x_t | x_0) as a matrix [from, to]."""
    noise = torch.zeros(V).double() + 1 / V
    if masks:
        noise = torch.nn.functional.one_hot(torch.tensor(MASK), V).double()
    return alpha * torch.eye(V, dtype=torch.float64) + (1 - alpha) * noise


def posterior(p: Tensor, states: Tensor, alpha_t: float, alpha_s: float, masks: bool) -> Tensor:
    """q(x_s | x_t, x_0 ~ p) by Bayes' rule, averaged in its normaliser over x_0, too."""
    between = forward(alpha_t / alpha_s, masks)
    joint = (p @ forward(alpha_s, masks)) * between[:, states].movedim(0, -1)
    return joint / joint.sum(-1, keepdim=True)


def enumerated_law(
    model: Tabular, kappas: list[float], times: list[float], signal: str, masks: bool
) -> Tensor:
    """The law (V^2,) of the final tokens, step by step over all states."""
    states = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    law = torch.ones(len(states), dtype=torch.float64) / len(states)
    if masks:
        law = (states == MASK).all(1).double()
    alphas = [SIGNALS[signal](t) for t in times] + [1.0]
    for t, a, b, kappa in zip(times, alphas[:-1], alphas[1:], [*kappas, 1.0], strict=True):
        logits = model(states, torch.full((len(states),), t))
        if masks:
            logits[..., MASK] = -torch.inf
        p = logits.softmax(-1)
        if masks:  # a token that is there is the clean one
            here = torch.nn.functional.one_hot(states, V).double()
            p = torch.where((states == MASK)[..., None], p, here)
        clean = posterior(p, states, a, 1.0, masks)
        move = kappa * posterior(p, states, a, b, masks) + (1 - kappa) * clean @ forward(b, masks)
        law = law @ torch.einsum("sa,sb->sab", *move.unbind(1)).flatten(1)
    return law


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("signal", list(SIGNALS))
def test_tokens_have_the_law_of_the_chain(signal, masks):
    model = Tabular(6, size=(2, V))
    model.table *= 2
    kind = {"mask_id": MASK} if masks else {"vocab_size": V}
    how = {"steps": STEPS, "t_min": T_MIN, "signal": signal, "seed": 1, **MIXED}
    tokens = sample_psi(model, (8_000, 2), **kind, **how)
    law = functools.partial(
        enumerated_law, model, times=psi.psi_times(STEPS, T_MIN, "linear", "", 0, 0), masks=masks
    )
    assert_counts_match(model.counts_of(tokens), law(KAPPAS, signal=signal))
    with pytest.raises(AssertionError, match="chi-square"):  # correctors matter
        assert_counts_match(model.counts_of(tokens), law([1.0] * STEPS, signal=signal))


def test_times_that_stand_still_and_chances_of_remdm():
    profile, model = "linear-constant-linear-0.7-inv", Tabular(4, size=(2, V))
    times = psi.psi_times(8, T_MIN, profile, "log_linear", 0.3, 0.4)
    expected = [1.0, 0.65, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.05]
    assert times == pytest.approx(expected, abs=1e-12)
    tokens = sample_psi(
        model, (12_000, 2), mask_id=MASK, steps=8, t_min=T_MIN, seed=2, time_profile=profile,
        middle_mode="constant-remdm-0.1", high_frac=0.3, middle_frac=0.4,
    )  # fmt: skip
    alpha = log_linear_signal()(0.3)
    kappas = [*[1.0] * 3, *[1 - 0.1 / (1 - alpha)] * 3, 1.0, 1.0]
    law = enumerated_law(model, kappas, times, "log_linear", True)
    assert_counts_match(model.counts_of(tokens), law)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("pure-posterior", [1.0] * 4),
        ("constant-0.25", [0.25] * 4),
        # α = 0, 0.25, 0.5, 0.875 in parts of their own: 1 − σ/(1 − α_s), and 1 at the end
        ("max-capped-0.5", [1 - 0.5 / 0.75, 0.0, 1 - 0.25 / 0.125, 1.0]),
        ("max-rescale-0.5", [1 - 0.5 / 0.75, 1 - 0.25 / 0.5, 1 - 0.125 / 0.125, 1.0]),
        ("constant-remdm-0.1", [1 - 0.1 / 0.75, 1 - 0.1 / 0.5, 1 - 0.1 / 0.125, 1.0]),
    ],
)
def test_kappas_of_the_modes(mode, expected):
    kappas = psi.psi_kappas(mode, "high_mode", [0.0, 0.25, 0.5, 0.875])
    assert kappas == pytest.approx([max(0.0, kappa) for kappa in expected])
    assert psi.psi_kappas(mode, "high_mode", []) == []


def test_without_correctors_they_are_the_ancestral_samplers():
    model, how = Tabular(5, size=(2, V)), {"steps": 4, "t_min": 0.1, "seed": 3}
    ours = sample_psi(model, (50, 2), vocab_size=V, **how)
    assert torch.equal(ours, sample_uniform_state(model, (50, 2), vocab_size=V, **how))
    ours = sample_psi(
        model, (8_000, 2), mask_id=MASK, signal=lambda t: 1 - t, last_step="greedy", **how
    )  # fmt: skip
    theirs = sample_masked(model, (24_000, 2), mask_id=MASK, **{**how, "seed": 9})
    assert_same_law(ours, theirs, V)


@pytest.mark.parametrize("kind", [{"mask_id": MASK}, {"vocab_size": V}])
def test_prompts_stay_and_none_ends_with_the_steps(kind):
    model, history = Tabular(6, size=(3, V)), []
    prompt = torch.tensor([[1], [0]])
    how = {"steps": 12, "middle_mode": "pure-pc", "seed": 1, "prompt": prompt}
    last = sample_psi(model, (2, 3), **kind, **how, history=history)
    assert all(torch.equal(state[:, :1], prompt) for state in history)
    assert torch.equal(sample_psi(model, (2, 3), **kind, **how, last_step="none"), history[-2])
    assert len(history) == 14
    assert torch.equal(last, history[-1])
