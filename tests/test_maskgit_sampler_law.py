"""The law of the MaskGIT sampler: enumerated, and that of the published loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from di4c_fast.samplers import sample_maskgit
from di4c_fast.testing import P_VALUE, assert_counts_match

D, VOCAB, MASK = 3, 4, 3
STATES = VOCAB**D
ALL_ROWS = list(itertools.product(range(VOCAB), repeat=D))


def state_of(tokens: Tensor) -> Tensor:
    """Number of a token row (..., D) in base VOCAB."""
    powers = VOCAB ** torch.arange(tokens.shape[-1] - 1, -1, -1)
    return (tokens * powers).sum(-1)


class TabularDenoiser:
    """Any denoiser of D tokens: one table of logits per state, for two labels and halves of λ."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.table = 1.5 * torch.randn(2, 2, STATES, D, VOCAB, generator=generator)

    def __call__(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None, label=None):
        half = 0 if latent is None else (latent[:, 0] > 0.5).long()
        label = torch.zeros(len(tokens), dtype=torch.int64) if label is None else label
        return self.table[label, half, state_of(tokens)]


def step_law(
    logits: Tensor, row: tuple[int, ...], reveal: int, factor: float, exclude: bool = True
) -> dict[tuple[int, ...], float]:
    """Law of the next row by enumeration of tokens and of the order of confidences.

    Sorting log p + factor·Gumbel is drawing without replacement with weights p^(1/factor).
    """
    masked = [d for d in range(D) if row[d] == MASK]
    logits = logits.double().clone()
    if exclude:
        logits[:, MASK] = -math.inf
    p = logits.softmax(-1)
    law: dict[tuple[int, ...], float] = {}
    for tokens in itertools.product(range(VOCAB), repeat=len(masked)):
        drawn = {d: float(p[d, v]) for d, v in zip(masked, tokens, strict=True)}
        chance = math.prod(drawn.values())
        if chance == 0.0:
            continue
        token = dict(zip(masked, tokens, strict=True))
        if factor == 0.0:
            orders = {tuple(sorted(masked, key=lambda d: -drawn[d])[:reveal]): 1.0}
        else:
            weight = {d: drawn[d] ** (1.0 / factor) for d in masked}
            orders = {}
            for order in itertools.permutations(masked, reveal):
                left, share = sum(weight.values()), 1.0
                for d in order:
                    share *= weight[d] / left
                    left -= weight[d]
                orders[order] = share
        for order, share in orders.items():
            after = tuple(token[d] if d in order else row[d] for d in range(D))
            law[after] = law.get(after, 0.0) + chance * share
    return law


def exact_law(logits_of, counts: list[int], gumbel_temperature: float) -> Tensor:
    """(STATES,) law of the final row; logits_of(row, step) gives a list of (share, (D, V))."""
    law = {(MASK,) * D: 1.0}
    n = len(counts)
    for step, reveal in enumerate(counts):
        factor = gumbel_temperature * (1 - step / max(n - 1, 1))
        after: dict[tuple[int, ...], float] = {}
        for row, chance in law.items():
            for share, logits in logits_of(row, step):
                for target, p in step_law(logits, row, reveal, factor).items():
                    after[target] = after.get(target, 0.0) + chance * share * p
        law = after
    return torch.tensor([law.get(row, 0.0) for row in ALL_ROWS], dtype=torch.float64)


def counts_of(tokens: Tensor) -> Tensor:
    return torch.bincount(state_of(tokens), minlength=STATES)


@pytest.mark.parametrize(("schedule", "gumbel_temperature"), [([1, 2], 4.5), ([1, 1, 1], 1.0)])
def test_samples_have_the_exact_law_of_the_rule(schedule, gumbel_temperature):
    model = TabularDenoiser(seed=1)
    tokens = sample_maskgit(
        model,
        (20_000, D),
        mask_id=MASK,
        steps=len(schedule),
        schedule=schedule,
        gumbel_temperature=gumbel_temperature,
        seed=3,
    )
    table = model.table[0, 0]
    law = exact_law(
        lambda row, step: [(1.0, table[ALL_ROWS.index(row)])], schedule, gumbel_temperature
    )
    assert_counts_match(counts_of(tokens), law)


def test_a_fresh_latent_per_step_gives_the_mixture_at_every_step():
    model = TabularDenoiser(seed=2)
    tokens = sample_maskgit(
        model, (20_000, D), mask_id=MASK, steps=2, schedule=[1, 2], latent_dim=1, seed=4
    )

    def both(row, step):
        return [(0.5, model.table[0, half, ALL_ROWS.index(row)]) for half in range(2)]

    assert_counts_match(counts_of(tokens), exact_law(both, [1, 2], 4.5))


def test_one_step_with_a_passed_latent_is_one_component():
    model = TabularDenoiser(seed=3)
    latent = torch.tensor([0.1, 0.9]).repeat_interleave(10_000).unsqueeze(1)
    tokens = sample_maskgit(
        model, (20_000, D), mask_id=MASK, steps=1, latent_dim=1, latent=latent, seed=4
    )
    for half, part in enumerate(tokens.split(10_000)):
        table = model.table[0, half]
        law = exact_law(lambda row, step, x=table: [(1.0, x[ALL_ROWS.index(row)])], [3], 4.5)
        assert_counts_match(counts_of(part), law)


def naive_loop(model, label, other, batch, counts, guidance, generator) -> Tensor:
    """Full logits for both halves, a draw for every position, noise by −log(−log u)."""
    x = torch.full((batch, D), MASK)
    n = len(counts)
    t = torch.ones(batch)
    for i, k in enumerate(counts):
        w = guidance * i / (n - 1)
        logits = (1 + w) * model(x, t, label=label) - w * model(x, t, label=other)
        logits[..., MASK] = -math.inf
        p = logits.softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(batch, D)
        noise = -(-torch.rand(batch, D, generator=generator, dtype=torch.float64).log()).log()
        confidence = p.gather(-1, drawn.unsqueeze(-1))[..., 0].log() + 4.5 * noise * (
            1 - i / (n - 1)
        )
        confidence[x != MASK] = -math.inf
        chosen = confidence.topk(k).indices
        x = x.scatter(1, chosen, drawn.gather(1, chosen))
    return x


def test_pair_marginals_with_guidance_are_those_of_the_naive_loop():
    model = TabularDenoiser(seed=5)
    batch, counts, w = 30_000, [1, 1, 1], 1.5
    label, other = torch.zeros(batch, dtype=torch.int64), torch.ones(batch, dtype=torch.int64)
    ours = sample_maskgit(
        model,
        (batch, D),
        mask_id=MASK,
        steps=3,
        schedule=counts,
        context={"label": label},
        unconditional={"label": other},
        guidance=w,
        seed=6,
    )
    theirs = naive_loop(model, label, other, batch, counts, w, torch.Generator().manual_seed(7))
    for i, j in itertools.combinations(range(D), 2):
        table = torch.stack(
            [torch.bincount(x[:, i] * VOCAB + x[:, j], minlength=16) for x in (ours, theirs)]
        )
        table = table[:, table.sum(0) > 0]
        assert stats.chi2_contingency(table.numpy()).pvalue > P_VALUE
