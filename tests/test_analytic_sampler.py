"""SEDD's analytic step: its law by enumeration and beside a naive loop, and its rows."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from sampler_cases import Denoiser, Tabular, assert_same_law, constant
from torch import Tensor

from di4c_fast.samplers import analytic
from di4c_fast.samplers.analytic import geometric_noise, log_linear_noise
from di4c_fast.testing import assert_draws_match

VOCAB, MASK = 5, 4
NOISES = {"log_linear": log_linear_noise(), "geometric": geometric_noise()}
sample_analytic = functools.partial(analytic.sample_analytic, mask_id=MASK)


def log_scores(seed: int) -> Tensor:
    """(V,), SEDD's convention: the score of the mask itself is 1."""
    scores = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    scores[MASK] = 0.0
    return scores


def literal_step(scores: Tensor, dsigma: float) -> Tensor:
    """Probabilities of a masked position by SEDD's matrices: stagger, then the transition."""
    staggered = scores * math.exp(dsigma)
    staggered[..., MASK] += (1 - math.exp(dsigma)) * scores.sum(-1)
    transition = torch.full((VOCAB,), 1 - math.exp(-dsigma), dtype=scores.dtype)
    transition[MASK] += math.exp(-dsigma)
    return (staggered * transition).clamp(min=0)


@pytest.mark.parametrize("noise", ["log_linear", "geometric"])
@pytest.mark.parametrize("offset", [-3.0, 0.0, 4.0])
def test_one_step_has_the_law_of_the_matrices(noise, offset):
    # At an offset of 4 the weight of staying is negative, which the repository never draws.
    logits = log_scores(1)
    logits[:MASK] += offset
    how = {"steps": 1, "noise": noise, "t_min": 0.4, "denoise": False, "seed": 3}
    dsigma = NOISES[noise](1.0) - NOISES[noise](0.4)
    probs = literal_step(logits.double().exp(), dsigma)
    assert_draws_match(sample_analytic(constant(logits), (4000, 5), **how), probs)
    assert offset < 4.0 or float(probs[MASK]) == 0.0


def test_the_last_step_draws_from_the_scores_without_staying():
    logits = log_scores(2)
    tokens = sample_analytic(
        lambda x, t: logits.expand(*x.shape, VOCAB) - (t[:, None, None] == 1) * 50.0,
        (4000, 5), steps=1, seed=4,
    )  # fmt: skip
    probs = logits.exp()
    probs[MASK] = 0.0
    assert_draws_match(tokens, probs)


def test_rows_have_the_joint_law_of_the_naive_loop():
    table, generator = Tabular(5, size=(2, VOCAB)), torch.Generator().manual_seed(7)
    times = torch.linspace(1, 0.01, 5, dtype=torch.float64).tolist()
    sigmas = [*map(NOISES["log_linear"], times), 0.0]

    def model(tokens: Tensor, t: Tensor) -> Tensor:
        logits = table(tokens, t) - 1.5
        logits[..., MASK] = 0.0
        return logits

    ours = sample_analytic(model, (30_000, 2), steps=4, seed=6, t_min=0.01)
    theirs = torch.full((120_000, 2), MASK)
    for step, time in enumerate(times):
        scores = model(theirs, torch.full((len(theirs),), time)).exp()
        probs = literal_step(scores, sigmas[step] - sigmas[step + 1])
        if step == 4:
            probs[..., MASK] = 0.0
        drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view_as(theirs)
        theirs = torch.where(theirs == MASK, drawn, theirs)
    assert_same_law(ours, theirs, VOCAB)


def test_only_masked_rows_and_sequences_are_computed():
    model, history = Denoiser(8), []
    model.bias -= 6.0  # so low that sequences are filled at different steps
    how = {"mask_id": 10, "steps": 6, "seed": 1, "noise": "geometric"}
    sample_analytic(model, (6, 2), history=history, **how)
    masked = [(state == 10) for state in history if bool((state == 10).any())]
    assert [rows.numel() for rows in model.rows] == [int(m.sum()) for m in masked]
    assert [len(x) for x in model.inputs] == [int(m.any(1).sum()) for m in masked]
    assert len({len(x) for x in model.inputs}) > 1
    for before, after in itertools.pairwise(history):
        assert torch.equal(before[before != 10], after[before != 10])


def test_without_denoising_masks_may_remain():
    model = constant(torch.full((VOCAB,), -20.0))
    tokens = sample_analytic(model, (2, 3), steps=2, denoise=False, seed=0)
    assert bool((tokens == MASK).all())
