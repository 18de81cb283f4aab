"""Confidence sampling at temperature 0 gives the tokens of a naive loop over dense logits."""

from __future__ import annotations

import itertools

import pytest
import torch
from confidence_cases import MASK, VOCAB, D, Denoiser, prompts
from naming import stable_id
from torch import Tensor

from di4c_fast.samplers import sample_confidence

RULES = ("low_confidence", "maskgit_plus", "topk_margin", "entropy")


def naive_confidence(row: Tensor, rule: str, top_k=None, top_p=None) -> tuple[int, float]:
    """Token and confidence of one row at temperature 0, one token at a time."""
    raw = row.softmax(-1)
    kept = row.clone()
    if top_p is not None:
        total, order = 0.0, row.argsort(descending=True).tolist()
        for place, token in enumerate(order):
            if place and total > top_p:
                kept[token] = -torch.inf
            total += float(raw[token])
    if top_k is not None:
        kept[row < row.sort(descending=True).values[top_k - 1]] = -torch.inf
    p = kept.softmax(-1)
    token = int(row.argmax())
    ordered = p.sort(descending=True).values
    return token, {
        "low_confidence": float(raw[token]),
        "maskgit_plus": float(p[token]),
        "topk_margin": float(ordered[0] - ordered[1]),
        "entropy": float(torch.where(p > 0, p * p.log(), 0.0).sum()),
    }[rule]


def naive(
    model: Denoiser,
    prompt: Tensor,
    *,
    steps: int | None = None,
    rule: str = "low_confidence",
    schedule: str = "even",
    t_min: float = 1e-3,
    block_length: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    guidance_scale: float = 0.0,
    shift: bool = False,
    exclude_mask: bool = True,
    banned: tuple[int, ...] = (),
    deferred: tuple[int, ...] = (),
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, list[int]]:
    """One sequence by the rules, and how many positions each step filled."""
    start = len(prompt)
    x = torch.full((D,), MASK)
    x[:start] = prompt
    known = x != MASK
    length = block_length or D - start
    blocks = -(-(D - start) // length)
    filled = []
    for block in range(blocks):
        end = min(start + (block + 1) * length, D)
        n = int((x[:end] == MASK).sum())
        per_block = None if steps is None else steps // blocks
        for index in itertools.count():
            active = [d for d in range(end) if x[d] == MASK]
            if not active or (per_block is not None and index == per_block and threshold is None):
                break
            logits = model.logits(x)
            if guidance_scale:
                without = model.logits(torch.where(known, MASK, x))
                logits = without + (guidance_scale + 1) * (logits - without)
            if shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            if exclude_mask:
                logits[:, MASK] = -torch.inf
            logits[:, list(banned)] = -torch.inf
            found = {}
            for d in active:
                token, confidence = naive_confidence(logits[d], rule, top_k, top_p)
                if deferred:
                    rest = logits[d].clone()
                    rest[list(deferred)] = -torch.inf
                    confidence = float(rest.softmax(-1)[token])
                found[d] = (confidence, token)
            order = sorted(active, key=lambda d: (-found[d][0], d))
            count = len(active)
            if per_block is not None and schedule == "even":
                count = n // per_block + (index < n % per_block)
            elif schedule == "ancestral":
                times = torch.linspace(1, t_min, per_block + 1)
                if index < per_block - 1:
                    count = int(len(active) * (1 - times[index + 1] / times[index]))
            if threshold is not None:
                if per_block is not None:
                    reached = sum(
                        n // per_block + (i < n % per_block)
                        for i in range(min(index + 1, per_block))
                    )
                    count = max(1, reached - (n - len(active)))
                passing = [d for d in order if found[d][0] >= threshold]
                count = min(count, max(1, len(passing)))
            if factor is not None:
                count = 1
                while count < len(order):
                    if found[order[count]][0] < 1 - factor / (count + 2):
                        break
                    count += 1
            for d in order[:count]:
                x[d] = found[d][1]
            filled.append(count)
    return x, filled


def check_against_naive(model, prompt, **how):
    mapped = {"banned_ids": how.get("banned", ()), "deferred_ids": how.get("deferred", ())}
    ours = {k: v for k, v in how.items() if k not in ("banned", "deferred")}
    tokens = sample_confidence(
        model, (len(prompt), D), mask_id=MASK, prompt=prompt, seed=0, **ours, **mapped
    )
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
        check_against_naive(Denoiser(seed), prompts(3, 4, seed), rule=rule, **how)


def test_deferred_tokens_come_last_and_others_are_judged_without_them():
    model = Denoiser(2)
    with_deferred = check_against_naive(model, prompts(3, 4), steps=5, deferred=(5, 4))
    guided = {"guidance_scale": 0.8, "deferred": (5, 4)}
    check_against_naive(model, prompts(3, 4), steps=5, **guided)
    assert not torch.equal(with_deferred, check_against_naive(model, prompts(3, 4), steps=5))


def test_a_mask_that_is_drawn_stays_and_the_counts_go_on():
    model = Denoiser(3, mask_bias=4.0)
    for how in ({"steps": 4}, {"steps": 4, "schedule": "ancestral"}):
        tokens = check_against_naive(model, prompts(4, 4), exclude_mask=False, **how)
        assert bool((tokens == MASK).any())
        assert bool((check_against_naive(model, prompts(4, 4), **how) != MASK).all())


def test_a_threshold_gives_the_mask_its_share_but_not_an_endless_loop():
    model = Denoiser(3, mask_bias=1.0)
    how = {"threshold": 0.3, "exclude_mask": False}
    tokens = check_against_naive(model, prompts(3, 4), **how)
    assert not torch.equal(tokens, check_against_naive(model, prompts(3, 4), threshold=0.3))
    model = Denoiser(3, mask_bias=50.0)
    tokens = sample_confidence(model, (2, D), mask_id=MASK, seed=0, **how)
    assert bool((tokens == MASK).all())
    assert len(model.inputs) == D


def test_unknown_tokens_of_a_prompt_are_filled_with_the_first_block_at_each_rows_own_rate():
    prompt = prompts(3, 6)
    prompt[0, 2] = MASK
    prompt[2, :5] = MASK
    check_against_naive(Denoiser(4), prompt, steps=4, block_length=4)
    check_against_naive(Denoiser(4), prompt, threshold=0.4, block_length=4)
    check_against_naive(Denoiser(4), prompt, steps=3, schedule="ancestral")


@pytest.mark.parametrize("rule", ["maskgit_plus", "topk_margin", "entropy", "low_confidence"])
def test_a_confidence_dtype_ranks_by_what_the_repositories_compute(rule):
    class Half(Denoiser):
        def forward(self, tokens, t):
            return super().forward(tokens, t).logits().to(torch.bfloat16)

        def logits(self, tokens):
            p = (super().logits(tokens).to(torch.bfloat16)).softmax(-1)
            return p  # used below only

    model = Half(5)
    history = []
    sample_confidence(
        model, (1, D), mask_id=MASK, steps=D, rule=rule, exclude_mask=False, seed=0,
        confidence_dtype=torch.bfloat16, history=history,
    )  # fmt: skip
    for before, after in itertools.pairwise(history[:6]):
        p = model.logits(before[0])
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
    history = []
    sample_confidence(
        lambda x, t: torch.zeros(*x.shape, VOCAB), (2, 9), mask_id=MASK, steps=3, history=history
    )
    for step, state in enumerate(history):
        expected = torch.where(torch.arange(9) < 3 * step, 0, MASK)
        assert torch.equal(state, expected.expand(2, 9))
