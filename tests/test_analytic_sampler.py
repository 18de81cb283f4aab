"""SEDD's analytic step: its law by enumeration and beside a naive loop, rows, randomness."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sampler_cases import Denoiser, assert_same_law
from torch import Tensor

from di4c_fast.samplers import sample_analytic
from di4c_fast.samplers.analytic import geometric_noise, log_linear_noise
from di4c_fast.testing import assert_draws_match

VOCAB, MASK = 5, 4
NOISES = {"log_linear": log_linear_noise(), "geometric": geometric_noise()}


def log_scores(seed: int, scale: float = 1.0) -> Tensor:
    """(V,), SEDD's convention: the score of the mask itself is 1."""
    scores = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    scores[MASK] = 0.0
    return scores


class Scores:
    """Log-scores that depend on both neighbours and the time."""

    def __init__(self, positions: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(positions, VOCAB, VOCAB, generator=generator, dtype=torch.float64)
        self.moments: list[Tensor] = []

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        self.moments.append(t)
        at = torch.arange(tokens.shape[1])
        logits = self.table[at, tokens.roll(1, 1)] + self.table[at, tokens.roll(-1, 1)]
        logits = logits - 1.5 * t.view(-1, 1, 1)
        logits[..., MASK] = 0.0
        return logits


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
    draw = sample_analytic(
        lambda x, t: logits.expand(*x.shape, VOCAB), (4000, 5), mask_id=MASK, steps=1, noise=noise,
        t_min=0.4, denoise=False, seed=3,
    )  # fmt: skip
    dsigma = NOISES[noise](1.0) - NOISES[noise](0.4)
    probs = literal_step(logits.double().exp(), dsigma)
    assert_draws_match(draw, probs)
    if offset == 4.0:
        assert float(probs[MASK]) == 0.0


def test_the_last_step_draws_from_the_scores_without_staying():
    logits = log_scores(2)
    tokens = sample_analytic(
        lambda x, t: logits.expand(*x.shape, VOCAB) - (t[:, None, None] == 1) * 50.0,
        (4000, 5), mask_id=MASK, steps=1, seed=4,
    )  # fmt: skip
    probs = logits.exp()
    probs[MASK] = 0.0
    assert_draws_match(tokens, probs)


def naive(model: Scores, batch: int, positions: int, steps: int, t_min: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((batch, positions), MASK)
    times = torch.linspace(1, t_min, steps + 1, dtype=torch.float64).tolist()
    sigma = NOISES["log_linear"]
    for step in range(steps + 1):
        last = step == steps
        scores = model(x, torch.full((batch,), times[step], dtype=torch.float32)).exp()
        dsigma = sigma(times[step]) - (0.0 if last else sigma(times[step + 1]))
        probs = literal_step(scores, dsigma)
        if last:
            probs[..., MASK] = 0.0
        drawn = torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(x.shape)
        x = torch.where(x == MASK, drawn, x)
    return x


def test_rows_have_the_joint_law_of_the_naive_loop():
    rows, positions = 30_000, 2
    model = Scores(positions, seed=5)
    code = torch.tensor([VOCAB, 1])
    ours = sample_analytic(model, (rows, positions), mask_id=MASK, steps=4, seed=6, t_min=0.01)
    theirs = naive(model, 4 * rows, positions, steps=4, t_min=0.01, seed=7)
    assert_same_law(*(torch.bincount(x @ code, minlength=VOCAB**2) for x in (ours, theirs)))


def test_only_masked_rows_and_sequences_are_computed():
    model, history = Denoiser(8), []
    model.bias -= 6.0  # so low that sequences are filled at different steps
    sample_analytic(model, (6, 2), mask_id=10, steps=6, seed=1, history=history, noise="geometric")
    masked = [(state == 10) for state in history if bool((state == 10).any())]
    assert [rows.numel() for rows in model.rows] == [int(m.sum()) for m in masked]
    assert [len(x) for x in model.inputs] == [int(m.any(1).sum()) for m in masked]
    assert len({len(x) for x in model.inputs}) > 1
    for before, after in itertools.pairwise(history):
        assert torch.equal(before[before != 10], after[before != 10])


def test_the_model_is_given_the_time_or_the_noise():
    for condition in ("t", "sigma"):
        model = Scores(3, seed=9)
        sample_analytic(
            model, (1, 3), mask_id=MASK, steps=2, condition=condition, seed=0, t_min=0.5
        )
        given = [float(t[0]) for t in model.moments]
        times = [1.0, 0.75, 0.5][: len(given)]
        sigma = log_linear_noise()
        expected = times if condition == "t" else [sigma(t) for t in times]
        assert given == pytest.approx(expected, rel=1e-6)


def test_without_denoising_masks_may_remain():
    model = lambda x, t: torch.zeros(*x.shape, VOCAB) - 20.0  # noqa: E731
    tokens = sample_analytic(model, (2, 3), mask_id=MASK, steps=2, denoise=False, seed=0)
    assert bool((tokens == MASK).all())
