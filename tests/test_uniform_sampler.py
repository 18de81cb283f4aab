"""Duo's uniform-state posterior: its law by enumeration and beside a naive loop, randomness."""

from __future__ import annotations

import math

import pytest
import torch
from sampler_cases import Denoiser, assert_same_law
from torch import Tensor

from di4c_fast.heads import LinearHead
from di4c_fast.samplers import sample_uniform_state
from di4c_fast.samplers.uniform import cosine_signal, log_linear_signal
from di4c_fast.testing import assert_counts_match

VOCAB = 5
SIGNALS = {"log_linear": log_linear_signal(), "cosine": cosine_signal()}


class Table:
    """Logits in float64 that depend on the neighbour, the position and the time."""

    def __init__(self, positions: int, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        shape = (positions, VOCAB, VOCAB)
        self.table = torch.randn(*shape, generator=generator, dtype=torch.float64) * 1.5
        self.moments: list[Tensor] = []

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        self.moments.append(t)
        at = torch.arange(tokens.shape[1])
        return self.table[at, tokens.roll(1, 1)] * (1.5 - t.double()).view(-1, 1, 1)


def literal_posterior(p: Tensor, x: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """q(x_s | x_t) of a uniform-state process with x0 ~ p, by Bayes' rule over x0; (..., V)."""
    eye = torch.eye(VOCAB, dtype=p.dtype)
    ratio = alpha_t / alpha_s

    def forward(alpha):  # [from, to]
        return alpha * eye + (1 - alpha) / VOCAB

    # Σ over x0 of p(x0) q(x_s | x0) q(x_t | x_s) / q(x_t | x0), in the form that Duo takes: the
    # normaliser averages over x0 too.
    to_s = p @ forward(alpha_s)
    likelihood = forward(ratio)[:, x].movedim(0, -1)
    joint = to_s * likelihood
    return joint / joint.sum(-1, keepdim=True)


@pytest.mark.parametrize("signal", ["log_linear", "cosine"])
@pytest.mark.parametrize("present", [0, 3])
def test_one_step_has_the_law_of_the_posterior(signal, present):
    rows = 20_000
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)).double()
    tokens = sample_uniform_state(
        lambda x, t: logits.expand(*x.shape, VOCAB), (rows, 1), vocab_size=VOCAB, steps=1,
        signal=signal, t_min=0.3, last_step="none", start=torch.full((rows, 1), present), seed=2,
    )  # fmt: skip
    alpha = SIGNALS[signal]
    probs = literal_posterior(logits.softmax(-1), torch.tensor(present), alpha(1.0), alpha(0.3))
    assert_counts_match(torch.bincount(tokens.flatten(), minlength=VOCAB), probs)


def test_the_last_step_is_the_posterior_at_full_signal():
    rows, logits = 20_000, torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0]).double()
    seen = []
    tokens = sample_uniform_state(
        lambda x, t: logits.expand(*x.shape, VOCAB), (rows, 1), vocab_size=VOCAB, steps=1,
        signal=lambda t: 0.9 - 0.5 * t, t_min=0.2, seed=3, history=seen,
    )  # fmt: skip
    p = logits.softmax(-1)
    for present in range(VOCAB):
        chosen = seen[1][:, 0] == present
        alpha = 0.9 - 0.5 * 0.2
        probs = (1 - alpha) * p
        probs[present] += alpha * VOCAB * p[present]
        counts = torch.bincount(tokens[chosen, 0], minlength=VOCAB)
        assert_counts_match(counts, probs)


def test_greedy_takes_the_argmax_and_none_ends_with_the_steps():
    model = Table(4, seed=4)
    history = []
    options = {"vocab_size": VOCAB, "steps": 3, "seed": 1}
    greedy = sample_uniform_state(model, (6, 4), last_step="greedy", history=history, **options)
    state = history[-2]
    assert torch.equal(greedy, model(state, torch.full((6,), 1e-5)).argmax(-1))
    assert torch.equal(sample_uniform_state(model, (6, 4), last_step="none", **options), state)
    assert len(history) == 5


def naive(model: Table, batch: int, positions: int, steps: int, t_min: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(VOCAB, (batch, positions), generator=generator)
    times = torch.linspace(1, t_min, steps + 1, dtype=torch.float64).tolist()
    alpha = SIGNALS["log_linear"]
    for step in range(steps + 1):
        p = model(x, torch.full((batch,), times[step], dtype=torch.float32)).softmax(-1)
        following = 1.0 if step == steps else alpha(times[step + 1])
        q = literal_posterior(p, x, alpha(times[step]), following)
        x = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(x.shape)
    return x


def test_rows_have_the_joint_law_of_the_naive_loop():
    rows, positions = 15_000, 2
    model = Table(positions, seed=5)
    options = {"vocab_size": VOCAB, "steps": 4, "t_min": 0.05}
    ours = sample_uniform_state(model, (rows, positions), seed=6, **options)
    theirs = naive(model, 4 * rows, positions, steps=4, t_min=0.05, seed=7)
    code = torch.tensor([VOCAB, 1])
    assert_same_law(*(torch.bincount(x @ code, minlength=VOCAB**2) for x in (ours, theirs)))


def test_the_start_is_uniform():
    history = []
    sample_uniform_state(
        Table(4), (5000, 4), vocab_size=VOCAB, steps=1, last_step="none", seed=5, history=history
    )
    counts = torch.bincount(history[0].flatten(), minlength=VOCAB)
    assert_counts_match(counts, torch.full((VOCAB,), 0.2))


def test_the_model_is_given_the_time_the_noise_or_the_signal():
    alpha = log_linear_signal()
    for condition, of in (("t", lambda t: t), ("alpha", alpha), ("sigma", lambda t: -math.log(alpha(t)))):  # fmt: skip # noqa: E501
        model = Table(2)
        sample_uniform_state(
            model, (1, 2), vocab_size=VOCAB, steps=2, condition=condition, seed=0, t_min=0.5
        )
        given = [float(t[0]) for t in model.moments]
        assert given == pytest.approx([of(t) for t in (1.0, 0.75, 0.5)], rel=1e-6)


def test_prompts_never_change_and_never_go_through_the_head():
    model, history = Denoiser(), []
    prompt = torch.tensor([[1, 4], [0, 0]])
    sample_uniform_state(
        model, (2, 6), vocab_size=11, steps=4, prompt=prompt, seed=0, history=history
    )
    assert all(torch.equal(state[:, :2], prompt) for state in history)
    # Rows are taken from the head of each call, and its logits at the present tokens from these.
    assert len(model.rows) == 5
    for rows in model.rows:
        assert rows.tolist() == [2, 3, 4, 5, 8, 9, 10, 11]


def test_half_precision_logits_stay_or_go_with_the_probability_of_the_logits():
    """p of the present token, from single logits of a linear layer, agrees with the draws."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, generator=generator).bfloat16()
    weight = torch.randn(VOCAB, 6, generator=generator).bfloat16()
    rows = 20_000
    tokens = sample_uniform_state(
        lambda x, t: LinearHead(hidden.expand(*x.shape, 6), weight), (rows, 1), vocab_size=VOCAB,
        steps=1, t_min=0.3, last_step="none", start=torch.full((rows, 1), 2), seed=2,
    )  # fmt: skip
    p = (weight.double() @ hidden.double()).softmax(-1)
    alpha = SIGNALS["log_linear"]
    probs = literal_posterior(p, torch.tensor(2), alpha(1.0), alpha(0.3))
    # The rounding of a logit to bf16, 2^-9 of it, is far below the noise of the counts.
    assert_counts_match(torch.bincount(tokens.flatten(), minlength=VOCAB), probs)
