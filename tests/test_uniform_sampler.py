"""Duo's uniform-state posterior: its law by enumeration and beside a naive loop."""

from __future__ import annotations

import functools

import pytest
import torch
from sampler_cases import Denoiser, Tabular, assert_same_law, constant
from torch import Tensor

from di4c_fast.heads import LinearHead
from di4c_fast.samplers import uniform
from di4c_fast.samplers.uniform import cosine_signal, log_linear_signal
from di4c_fast.testing import assert_draws_match

VOCAB = 5
SIGNALS = {"log_linear": log_linear_signal(), "cosine": cosine_signal()}
ALPHA = SIGNALS["log_linear"]
sample_uniform = functools.partial(uniform.sample_uniform_state, vocab_size=VOCAB)


def literal_posterior(p: Tensor, x: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """q(x_s | x_t) of a uniform-state process with x0 ~ p, by Bayes' rule over x0; (..., V)."""
    eye = torch.eye(VOCAB, dtype=p.dtype)
    ratio = alpha_t / alpha_s

    def forward(alpha):  # [from, to]
        return alpha * eye + (1 - alpha) / VOCAB

    # Σ over x0 of p(x0) q(x_s | x0) q(x_t | x_s) / q(x_t | x0), in the form that Duo takes: the
    # normaliser averages over x0 too.
    joint = (p @ forward(alpha_s)) * forward(ratio)[:, x].movedim(0, -1)
    return joint / joint.sum(-1, keepdim=True)


# bf16 rounds a logit of the linear layer by 2^-9 of it, far below the noise of the counts.
@pytest.mark.parametrize("signal", ["log_linear", "cosine"])
@pytest.mark.parametrize("present", [0, 3])
@pytest.mark.parametrize("head", [False, True])
def test_one_step_has_the_law_of_the_posterior(signal, present, head):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, generator=generator).bfloat16()
    weight = torch.randn(VOCAB, 6, generator=generator).bfloat16()
    logits = weight.double() @ hidden.double()
    linear = lambda x, t: LinearHead(hidden.expand(*x.shape, 6), weight)  # noqa: E731
    tokens = sample_uniform(
        linear if head else constant(logits), (20_000, 1), steps=1, signal=signal, t_min=0.3,
        last_step="none", start=torch.full((20_000, 1), present), seed=2,
    )  # fmt: skip
    alphas = (SIGNALS[signal](t) for t in (1.0, 0.3))
    assert_draws_match(
        tokens, literal_posterior(logits.softmax(-1), torch.tensor(present), *alphas)
    )


@pytest.mark.parametrize(
    ("how", "left"),  # how many tokens the filters leave
    [({"temperature": 0.0}, 1), ({"temperature": 0.6, "top_p": 0.8}, 2), ({"top_k": 3}, 3)],
)
@pytest.mark.parametrize("head", [False, True])
def test_the_law_is_that_of_the_posterior_of_what_filters_leave(how, left, head):
    logits = torch.tensor([0.3, 1.0, -1.0, 0.5, 2.0]).double()
    weight = torch.eye(VOCAB).double()
    linear = lambda x, t: LinearHead(logits.expand(*x.shape, VOCAB), weight)  # noqa: E731
    x = logits / (how.get("temperature") or 1.0)
    p = x.masked_fill(x < x.topk(left).values[-1], -torch.inf).softmax(-1)
    how = {**how, "signal": lambda t: 0.9 - 0.6 * t, "t_min": 0.3, "last_step": "none"}
    for present in (0, 1, 4):
        start = torch.full((12_000, 1), present)
        model = linear if head else constant(logits)
        tokens = sample_uniform(model, start.shape, steps=1, start=start, seed=4, **how)
        assert_draws_match(tokens, literal_posterior(p, torch.tensor(present), 0.3, 0.72))


def test_the_last_step_is_the_posterior_at_full_signal():
    logits, seen = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0]).double(), []
    how = {"signal": lambda t: 0.9 - 0.5 * t, "t_min": 0.2, "seed": 3, "history": seen}
    tokens = sample_uniform(constant(logits), (20_000, 1), steps=1, **how)
    for present in range(VOCAB):
        alpha, p = 0.9 - 0.5 * 0.2, logits.softmax(-1)
        probs = (1 - alpha) * p
        probs[present] += alpha * VOCAB * p[present]
        assert_draws_match(tokens[seen[1] == present], probs)


def test_greedy_takes_the_argmax_and_none_ends_with_the_steps():
    model, history = Tabular(4, size=(4, VOCAB)), []
    greedy = sample_uniform(model, (6, 4), last_step="greedy", history=history, steps=3, seed=1)
    state = history[-2]
    assert torch.equal(greedy, model(state, torch.full((6,), 1e-5)).argmax(-1))
    assert torch.equal(sample_uniform(model, (6, 4), last_step="none", steps=3, seed=1), state)
    assert len(history) == 5


def test_rows_have_the_joint_law_of_the_naive_loop():
    model, generator = Tabular(5, size=(2, VOCAB)), torch.Generator().manual_seed(7)
    ours = sample_uniform(model, (15_000, 2), steps=4, t_min=0.05, seed=6)
    theirs = torch.randint(VOCAB, (60_000, 2), generator=generator)
    times = torch.linspace(1, 0.05, 5, dtype=torch.float64).tolist()
    alphas = [*map(ALPHA, times), 1.0]
    for step, time in enumerate(times):
        p = model(theirs, torch.full((len(theirs),), time)).double().softmax(-1)
        q = literal_posterior(p, theirs, *alphas[step : step + 2])
        theirs = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view_as(theirs)
    assert_same_law(ours, theirs, VOCAB)


def test_the_start_is_uniform():
    history: list[Tensor] = []
    model = constant(torch.zeros(VOCAB))
    sample_uniform(model, (5000, 4), steps=1, last_step="none", seed=5, history=history)
    assert_draws_match(history[0], torch.ones(VOCAB))


def test_prompts_never_change_and_never_go_through_the_head():
    model, history, prompt = Denoiser(), [], torch.tensor([[1, 4], [0, 0]])
    sample_uniform(
        model, (2, 6), vocab_size=11, steps=4, prompt=prompt, seed=0, history=history
    )  # fmt: skip
    assert all(torch.equal(state[:, :2], prompt) for state in history)
    # Rows are taken from the head of each call, and its logits at the present tokens from these.
    assert len(model.rows) == 5
    for rows in model.rows:
        assert rows.tolist() == [2, 3, 4, 5, 8, 9, 10, 11]
