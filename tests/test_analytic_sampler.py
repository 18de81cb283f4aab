"""SEDD's analytic step: its law by enumeration and beside a naive loop, rows, randomness."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from naming import stable_id
from torch import Tensor

from di4c_fast.heads import LinearHead
from di4c_fast.samplers import sample_analytic
from di4c_fast.samplers.analytic import geometric_noise, log_linear_noise
from di4c_fast.testing import assert_counts_match, assert_draws_match

VOCAB, MASK = 5, 4
NOISES = {"log_linear": log_linear_noise(), "geometric": geometric_noise()}


def log_scores(seed: int, scale: float = 1.0) -> Tensor:
    """(V,), SEDD's convention: the score of the mask itself is 1."""
    scores = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    scores[MASK] = 0.0
    return scores


class Scores:
    """Log-scores that depend on both neighbours and the time."""

    def __init__(self, positions: int, seed: int = 0, latent: bool = False):
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(positions, VOCAB, VOCAB, generator=generator, dtype=torch.float64)
        self.latent = latent
        self.inputs: list[Tensor] = []
        self.moments: list[Tensor] = []

    def __call__(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor:
        self.inputs.append(tokens)
        self.moments.append(t)
        at = torch.arange(tokens.shape[1])
        logits = self.table[at, tokens.roll(1, 1)] + self.table[at, tokens.roll(-1, 1)]
        logits = logits - 1.5 * t.view(-1, 1, 1)
        if latent is not None:
            logits = logits * (0.5 + latent.view(-1, 1, 1))
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
    counts, shares = (torch.bincount(x @ code, minlength=VOCAB**2) for x in (ours, theirs))
    # Two samples: the statistic counts the noise of both, 1 + 1/4 of one. Outcomes are compared
    # as if the larger sample were exact after the smaller is thinned by that factor.
    scale = 1 / (1 + rows / (4 * rows))
    assert_counts_match((counts * scale).round().long(), shares.double() + 1e-9)


def test_only_masked_rows_and_sequences_are_computed():
    model = Scores(6, seed=8)
    taken = []

    class Noting(LinearHead):
        def take(self, rows):
            if self.hidden.ndim == 3:
                taken.append(rows.numel())
            return super().take(rows)

    weight = torch.eye(VOCAB, dtype=torch.float64)
    history = []
    sample_analytic(
        lambda x, t: Noting(model(x, t), weight), (4, 6), mask_id=MASK, steps=6, seed=1,
        history=history,
    )  # fmt: skip
    masked = [int((state == MASK).sum()) for state in history]
    assert taken == [count for count in masked if count]
    assert [len(x) for x in model.inputs] == [
        int((state == MASK).any(1).sum()) for state in history if bool((state == MASK).any())
    ]
    for before, after in itertools.pairwise(history):
        kept = before != MASK
        assert torch.equal(before[kept], after[kept])


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


def test_samples_do_not_depend_on_how_they_are_batched():
    model = Scores(4, seed=10, latent=True)
    options = {"mask_id": MASK, "steps": 5, "seed": 2, "latent_dim": 1}
    whole = sample_analytic(model, (9, 4), **options)
    parts = [
        sample_analytic(model, (size, 4), first_sequence=first, **options)
        for first, size in ((0, 4), (4, 1), (5, 4))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, sample_analytic(model, (9, 4), **{**options, "seed": 3}))


def test_prompts_and_projections_hold():
    model = Scores(5, seed=11)
    prompt = torch.tensor([[1, MASK, 2], [0, 3, MASK]])

    def project(tokens):
        tokens[:, 4] = 3
        return tokens

    calls = []
    tokens = sample_analytic(
        model, (2, 5), mask_id=MASK, steps=3, prompt=prompt, project_fn=project, seed=1,
        callback=lambda step, total, x: calls.append((step, total)),
    )  # fmt: skip
    known = prompt != MASK
    assert torch.equal(tokens[:, :3][known], prompt[known])
    assert bool((tokens[:, 4] == 3).all())
    assert bool((tokens != MASK).all())
    assert calls == [(k, 4) for k in range(1, 5)]


def test_passed_latents_and_context_reach_the_model():
    latent = torch.rand(4, 2, 1)
    seen = []

    def model(tokens, t, latent, label):
        seen.append((latent, label))
        return torch.zeros(*tokens.shape, VOCAB) - 20.0  # nothing unmasks before the end

    label = torch.tensor([3, 4])
    sample_analytic(
        model, (2, 3), mask_id=MASK, steps=3, latent=latent, latent_dim=1, seed=0,
        context={"label": label},
    )  # fmt: skip
    assert torch.equal(torch.stack([lam for lam, _ in seen]), latent)
    assert all(torch.equal(given, label) for _, given in seen)


def test_without_denoising_masks_may_remain():
    model = lambda x, t: torch.zeros(*x.shape, VOCAB) - 20.0  # noqa: E731
    tokens = sample_analytic(model, (2, 3), mask_id=MASK, steps=2, denoise=False, seed=0)
    assert bool((tokens == MASK).all())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"shape": 3}, TypeError, r"shape must be \(B, D\)"),
        ({"mask_id": -1}, ValueError, "mask_id must be at least 0, got -1"),
        ({"mask_id": 5}, ValueError, r"mask_id must be in \[0, V\) = \[0, 5\) of model, got 5"),
        ({"mask_id": 5, "vocab_size": 5}, ValueError, r"mask_id must be in \[0, vocab_size\)"),
        ({"vocab_size": 6}, ValueError, "model must return logits over V = 6 classes"),
        ({"noise": "cosine"}, ValueError, "noise must be one of 'log_linear', 'geometric'"),
        ({"noise": 3}, TypeError, "noise must be callable, got int"),
        ({"noise": lambda t: 1.0}, ValueError, "noise must be finite, not negative and increasing"),
        ({"noise": lambda t: math.inf}, ValueError, "noise must be finite"),
        ({"condition": "time"}, ValueError, "condition must be one of 't', 'sigma'"),
        ({"t_min": 1.0}, ValueError, r"t_min must be in \(0, 1\), got 1.0"),
        ({"latent_dim": -1}, ValueError, "latent_dim must be at least 0, got -1"),
        ({"latent": torch.zeros(2, 1)}, ValueError, "latent needs latent_dim >= 1, got 0"),
        ({"prompt": torch.zeros(2, 6).long()}, ValueError, "longer than the sequence, D = 3"),
        ({"prompt": torch.tensor([7])}, ValueError, r"prompt must hold .* of model, got 7"),
        ({"context": {"a": torch.zeros(3)}}, ValueError, r"context\['a'\] must have B = 2"),
        ({"seed": 0.5}, TypeError, "seed must be an int or None"),
        ({"first_sequence": -1}, ValueError, "first_sequence must be at least 0, got -1"),
        ({"project_fn": 1}, TypeError, "project_fn must be callable"),
        ({"project_fn": lambda x: x[:1]}, ValueError, "project_fn must return tokens of shape"),
        ({"callback": 1}, TypeError, "callback must be callable"),
        ({"history": 1}, TypeError, "history must be a list to fill or None"),
        ({"model": None}, TypeError, "model must be callable, got NoneType"),
        ({"model": lambda x, t: torch.zeros(2, 5)}, ValueError, "model must return logits of sha"),
    ],
    ids=stable_id,
)
def test_what_is_wrong_is_named(changes, error, message):
    arguments = {
        "model": lambda x, t: torch.zeros(*x.shape, VOCAB),
        "shape": (2, 3),
        "mask_id": MASK,
        "steps": 2,
        **changes,
    }
    with pytest.raises(error, match=message):
        sample_analytic(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: log_linear_noise(0.0), r"eps must be in \(0, 1\), got 0.0"),
        (lambda: geometric_noise(0.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: geometric_noise(2.0, 1.0), "0 < sigma_min < sigma_max"),
    ],
)
def test_schedules_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
