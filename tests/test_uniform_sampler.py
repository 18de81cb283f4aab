"""Duo's uniform-state posterior: its law by enumeration and beside a naive loop, randomness."""

from __future__ import annotations

import math

import pytest
import torch
from naming import stable_id
from torch import Tensor

from di4c_fast.heads import LinearHead, LogisticHead, TensorHead
from di4c_fast.samplers import sample_uniform_state
from di4c_fast.samplers.uniform import cosine_signal, log_linear_signal, logits_at
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
        self.rows: list[int] = []

    def __call__(self, tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor:
        self.moments.append(t)
        at = torch.arange(tokens.shape[1])
        logits = self.table[at, tokens.roll(1, 1)] * (1.5 - t.double()).view(-1, 1, 1)
        return logits if latent is None else logits * (0.5 + latent.double().view(-1, 1, 1))


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
    counts, shares = (torch.bincount(x @ code, minlength=VOCAB**2) for x in (ours, theirs))
    # Two samples: the noise of the larger adds a quarter, so the smaller is thinned by as much.
    scale = 1 / (1 + rows / (4 * rows))
    assert_counts_match((counts * scale).round().long(), shares.double() + 1e-9)


def test_a_linear_head_draws_what_its_logits_draw():
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, 4, generator=generator, dtype=torch.float64)
    for bias_shape in ((VOCAB,), (7, VOCAB)):
        bias = torch.randn(*bias_shape, generator=generator, dtype=torch.float64)
        head = LinearHead(hidden, weight, bias)
        options = {"vocab_size": VOCAB, "steps": 4, "seed": 3, "prompt": torch.tensor([1, 2])}
        by_head = sample_uniform_state(lambda x, t: head, (3, 7), **options)  # noqa: B023
        dense = sample_uniform_state(lambda x, t: head.logits(), (3, 7), **options)  # noqa: B023
        assert torch.equal(by_head, dense)


def test_single_logits_are_those_of_every_kind_of_head(monkeypatch):
    monkeypatch.setattr("di4c_fast.samplers.uniform._GATHER_BYTES", 100)  # several chunks
    generator = torch.Generator().manual_seed(9)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    rows = torch.randint(2 * 6, (9,), generator=generator)
    ids = torch.randint(VOCAB, (9,), generator=generator)
    for head in (
        TensorHead(normal(2, 6, VOCAB)),
        TensorHead(normal(2, 6, VOCAB).bfloat16()),
        LinearHead(normal(2, 6, 4), normal(VOCAB, 4)),
        LinearHead(normal(2, 6, 4), normal(VOCAB, 4), normal(VOCAB)),
        LinearHead(normal(2, 6, 4), normal(VOCAB, 4), normal(6, VOCAB)),
        LogisticHead(normal(2, 6), normal(2, 6), VOCAB),
    ):
        expected = head.logits().flatten(0, 1)[rows].gather(1, ids[:, None])[:, 0].float()
        torch.testing.assert_close(logits_at(head.take(rows), ids), expected)
        assert logits_at(head.take(rows[:0]), ids[:0]).shape == (0,)


def test_the_start_is_uniform():
    history = []
    sample_uniform_state(
        Table(4), (5000, 4), vocab_size=VOCAB, steps=1, last_step="none", seed=5, history=history
    )
    counts = torch.bincount(history[0].flatten(), minlength=VOCAB)
    assert_counts_match(counts, torch.full((VOCAB,), 0.2))


def test_prompts_never_change_and_never_go_through_the_head():
    taken = []

    class Noting(LinearHead):
        def take(self, rows):
            if self.hidden.ndim == 3:
                taken.append(rows)
            return super().take(rows)

    prompt = torch.tensor([[1, 4], [0, 0]])
    history = []
    sample_uniform_state(
        lambda x, t: Noting(torch.zeros(2, 6, 3), torch.zeros(VOCAB, 3)), (2, 6),
        vocab_size=VOCAB, steps=4, prompt=prompt, seed=0, history=history,
    )  # fmt: skip
    assert all(torch.equal(state[:, :2], prompt) for state in history)
    assert len(taken) == 5
    for rows in taken:
        assert rows.tolist() == [2, 3, 4, 5, 8, 9, 10, 11]


def test_the_model_is_given_the_time_the_noise_or_the_signal():
    alpha = log_linear_signal()
    for condition, of in (("t", lambda t: t), ("alpha", alpha), ("sigma", lambda t: -math.log(alpha(t)))):  # fmt: skip # noqa: E501
        model = Table(2)
        sample_uniform_state(
            model, (1, 2), vocab_size=VOCAB, steps=2, condition=condition, seed=0, t_min=0.5
        )
        given = [float(t[0]) for t in model.moments]
        assert given == pytest.approx([of(t) for t in (1.0, 0.75, 0.5)], rel=1e-6)


def test_samples_do_not_depend_on_how_they_are_batched():
    model = Table(4, seed=10)
    options = {"vocab_size": VOCAB, "steps": 5, "seed": 2, "latent_dim": 1}
    whole = sample_uniform_state(model, (9, 4), **options)
    parts = [
        sample_uniform_state(model, (size, 4), first_sequence=first, **options)
        for first, size in ((0, 4), (4, 1), (5, 4))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, sample_uniform_state(model, (9, 4), **{**options, "seed": 3}))


def test_passed_latents_context_and_callbacks():
    latent = torch.rand(4, 2, 1)
    seen, calls = [], []

    def model(tokens, t, latent, label):
        seen.append((latent, label))
        return torch.zeros(*tokens.shape, VOCAB)

    label = torch.tensor([3, 4])
    sample_uniform_state(
        model, (2, 3), vocab_size=VOCAB, steps=3, latent=latent, latent_dim=1, seed=0,
        context={"label": label}, callback=lambda step, total, x: calls.append((step, total)),
    )  # fmt: skip
    assert torch.equal(torch.stack([lam for lam, _ in seen]), latent)
    assert all(torch.equal(given, label) for _, given in seen)
    assert calls == [(k, 4) for k in range(1, 5)]


@pytest.mark.gpu
def test_samples_on_a_gpu_are_those_on_the_cpu_without_syncs_in_the_loop():
    table = Table(6, seed=11).table

    def run(device, before=lambda: None):
        here, at = table.to(device), torch.arange(6, device=device)

        def model(tokens, t):
            before()
            return here[at, tokens.roll(1, 1)] * (1.5 - t.double()).view(-1, 1, 1)

        return sample_uniform_state(model, (8, 6), vocab_size=VOCAB, steps=8, seed=1, device=device)

    assert torch.equal(run("cuda").cpu(), run("cpu"))
    try:
        run("cuda", lambda: torch.cuda.set_sync_debug_mode("error"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"shape": (2, 0)}, ValueError, r"shape\[1\] must be at least 1, got 0"),
        ({"vocab_size": 1}, ValueError, "vocab_size must be at least 2, got 1"),
        ({"vocab_size": 6}, ValueError, "model must return logits over V = 6 classes"),
        ({"signal": "linear"}, ValueError, "signal must be one of 'log_linear', 'cosine'"),
        ({"signal": 1}, TypeError, "signal must be callable, got int"),
        ({"signal": lambda t: t}, ValueError, r"signal must be in \[0, 1\] and decreasing in t"),
        ({"signal": lambda t: 1 - t, "condition": "sigma"}, ValueError, "positive at t = 1"),
        ({"condition": "time"}, ValueError, "condition must be one of 't', 'sigma', 'alpha'"),
        ({"last_step": "argmax"}, ValueError, "last_step must be one of 'ancestral', 'greedy'"),
        ({"t_min": 0.0}, ValueError, r"t_min must be in \(0, 1\), got 0.0"),
        ({"latent_dim": -1}, ValueError, "latent_dim must be at least 0, got -1"),
        ({"latent": torch.zeros(2, 1)}, ValueError, "latent needs latent_dim >= 1, got 0"),
        ({"prompt": torch.zeros(2, 6).long()}, ValueError, "longer than the sequence, D = 3"),
        ({"prompt": torch.tensor([7])}, ValueError, r"prompt must hold token ids in \[0, 5\)"),
        ({"start": torch.zeros(2, 2).long()}, ValueError, r"start must have shape \(B,D\)"),
        ({"start": torch.zeros(2, 3)}, TypeError, "start must have dtype torch.int64"),
        ({"start": torch.full((2, 3), 5)}, ValueError, r"start must hold token ids in \[0, 5\)"),
        ({"start": 3}, TypeError, "start must be a Tensor"),
        ({"context": {"a": torch.zeros(3)}}, ValueError, r"context\['a'\] must have B = 2"),
        ({"seed": 0.5}, TypeError, "seed must be an int or None"),
        ({"first_sequence": -1}, ValueError, "first_sequence must be at least 0, got -1"),
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
        "vocab_size": VOCAB,
        "steps": 2,
        **changes,
    }
    with pytest.raises(error, match=message):
        sample_uniform_state(**arguments)


@pytest.mark.parametrize("make", [log_linear_signal, cosine_signal])
def test_schedules_out_of_range_are_named(make):
    with pytest.raises(ValueError, match=r"eps must be in \(0, 1\), got 1.0"):
        make(1.0)
