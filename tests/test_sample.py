"""`sample`: agreement with the reference, the law, options, statistics, confidences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from loss_heads import FAST
from sample_cases import assert_near, assert_same_draw, normal, streamed

from di4c_fast.draw.api import sample
from di4c_fast.draw.law import SAMPLE_BLOCK
from di4c_fast.draw.request import STATISTICS
from di4c_fast.heads import LinearHead, LogisticHead
from di4c_fast.reference.draw import transformed_logits_ref
from di4c_fast.testing import assert_close_to_reference, assert_draws_match

INF = math.inf
LOG_FIELDS = ("log_prob", "logsumexp", "max_log_prob", "entropy", "margin", "prob", "raw_prob")


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [(2, torch.float64), (128, torch.float16), (129, torch.bfloat16), (1000, torch.float32)],
)
def test_every_combination_of_options_agrees_with_the_reference(vocabulary, dtype):
    logits = normal(2, 15, vocabulary).to(dtype)
    unconditional = normal(2, 15, vocabulary, seed=1).to(dtype)
    per_row = (torch.arange(30).view(2, 15) % 3) * 0.5
    options = {
        "temperature": (1.0, 0.0, 0.7, per_row),
        "top_p": (None, 0.8),
        "top_k": (None, 3),
        "guidance": (None, (unconditional, 1.5 if vocabulary > 200 else per_row)),
        "mask_id": (None, vocabulary - 1),
        "confidence_dtype": (None, torch.bfloat16),
    }
    for values in itertools.product(*options.values()):
        arguments = {**dict(zip(options, values, strict=True)), "seed": 3, "want": "all"}
        draw = sample(logits, backend="torch", **arguments)
        assert_near(draw, sample(logits, backend="reference", **arguments))
        assert draw.token.shape == (2, 15)


@pytest.mark.parametrize("case", ["flat", "peaked", "large", "last", "sparse"])
def test_statistics_err_no_more_than_eager_pytorch(case):
    vocabulary = 3 * SAMPLE_BLOCK + 5
    logits = normal(64, vocabulary)
    if case == "flat":
        logits *= 1e-3
    elif case == "peaked":
        logits[:, 7] += 40.0
    elif case == "large":
        logits = logits * 300.0 + 1e4
    elif case == "last":
        logits[:, -1] += 20.0  # the maximum in the last lane of a partial block
    else:
        logits[:, torch.arange(vocabulary) % 7 != 3] = -INF
    draw = streamed(logits, seed=1, want="all")
    truth = sample(logits.double(), seed=1, want="all", backend="reference")
    assert draw.token.equal(truth.token)
    assert draw.argmax.equal(truth.argmax)

    log_prob = logits.log_softmax(-1)
    prob = logits.softmax(-1)
    picked = draw.token[:, None]
    top = prob.topk(2).values
    eager = {
        "log_prob": log_prob.gather(1, picked)[:, 0],
        "logsumexp": logits.logsumexp(-1),
        "max_log_prob": log_prob.amax(-1),
        "entropy": -(prob * log_prob.clamp_min(-1e4)).sum(-1),
        "margin": top[:, 0] - top[:, 1],
        "prob": prob.gather(1, picked)[:, 0],
        "raw_prob": prob.gather(1, picked)[:, 0],
    }
    for name in LOG_FIELDS:
        # One unit in the last place of numbers around 4, where eager happens to be exact.
        assert_close_to_reference(
            getattr(draw, name), eager[name], getattr(truth, name), atol=5e-7, name=name
        )


def test_fp64_logits_are_computed_in_fp64():
    logits = normal(5, 300).double()
    draw = streamed(logits, seed=1, want="all")
    exact = logits.log_softmax(-1).gather(1, draw.token[:, None])[:, 0]
    assert draw.log_prob.dtype == torch.float64
    torch.testing.assert_close(draw.log_prob, exact, rtol=0, atol=1e-14)


def drawn_probs(logits: torch.Tensor, **transforms) -> torch.Tensor:
    return transformed_logits_ref(logits.double()[None], **transforms)[0].softmax(-1)


@pytest.mark.parametrize(
    "transforms",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5, "mask_id": 11},
        {"top_p": 0.7},
        {"top_k": 5},
        {"temperature": 1.4, "top_p": 0.9, "top_k": 40, "mask_id": 0},
    ],
)
def test_draws_follow_the_transformed_softmax(transforms):
    logits = normal(430, scale=1.5)
    draw = streamed(logits.expand(60_000, -1), seed=17, want=(), **transforms)
    assert_draws_match(draw.token, drawn_probs(logits, **transforms))


def test_draws_follow_the_guided_softmax():
    logits, unconditional = normal(200, scale=1.0), normal(200, seed=1, scale=1.0)
    draw = streamed(
        logits.expand(60_000, -1), guidance=(unconditional.expand(60_000, -1), 1.5), seed=2
    )
    expected = drawn_probs(logits, unconditional=unconditional.double()[None], guidance_scale=1.5)
    assert_draws_match(draw.token, expected)


@pytest.mark.parametrize("backend", FAST)
def test_unconditional_logits_may_be_wider(backend):
    logits, other = normal(3, 200, seed=1), normal(3, 200, seed=2)
    drawn = sample(logits, guidance=(other.double(), 1.5), seed=2, backend=backend)
    assert_same_draw(drawn, sample(logits, guidance=(other, 1.5), seed=2, backend=backend))


@pytest.mark.parametrize("vocabulary", [3, 128, 300])
def test_rows_and_steps_are_independent(vocabulary):
    """Pairs of draws of equal logits: neighbouring rows, and neighbouring steps of one row."""
    probs = torch.zeros(vocabulary)
    probs[[0, vocabulary // 2, vocabulary - 1]] = torch.tensor([0.5, 0.3, 0.2])
    logits = probs.log().expand(40_000, -1)
    first = streamed(logits, seed=6, step=1).token
    second = streamed(logits, seed=6, step=2).token
    pair_probs = torch.outer(probs, probs).flatten()
    for left, right in ((first, second), (first[0::2], first[1::2])):
        assert_draws_match(left * vocabulary + right, pair_probs)


def test_maxima_that_exp_rounds_together_are_told_apart():
    close = torch.zeros(1, 300)
    close[0, 250] = 1e-9  # exp of it is 1 in fp32
    assert streamed(close, temperature=0).token.tolist() == [250]


def test_filters_that_keep_everything_change_nothing():
    logits = normal(9, 200)
    plain = streamed(logits, seed=1, want="all")
    for arguments in ({"top_p": 1.0}, {"top_k": 200}, {"top_k": 10**9}):
        assert_same_draw(streamed(logits, seed=1, want="all", **arguments), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_raw_prob_is_the_confidence_of_llada_bit_for_bit(dtype):
    """softmax of the guided logits at temperature 1, in the model's dtype."""
    logits, unconditional = normal(2, 40, 1000).to(dtype), normal(2, 40, 1000, seed=1).to(dtype)
    scale = 0.7
    guided = unconditional + (scale + 1) * (logits - unconditional)
    for temperature in (0.0, 0.8):
        draw = streamed(
            logits,
            guidance=(unconditional, scale),
            temperature=temperature,
            seed=0,
            want=("raw_prob",),
            confidence_dtype=dtype,
        )
        confidence = guided.softmax(-1).gather(-1, draw.token.unsqueeze(-1)).squeeze(-1)
        assert draw.raw_prob.equal(confidence)
        if temperature == 0.0:
            assert draw.token.equal(guided.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, None, None), (0.4, 0.95, None), (0.4, 0.9, 12), (0.0, 0.9, 3)],
)
def test_confidences_are_those_of_dream_bit_for_bit(dtype, temperature, top_p, top_k):
    logits = normal(2, 40, 1000).to(dtype)
    work = logits / temperature if temperature > 0 else logits
    if top_p is not None:
        ordered, ids = torch.sort(work, descending=True)
        past = torch.cumsum(torch.softmax(ordered, -1), -1) > top_p
        past = torch.cat([torch.zeros_like(past[..., :1]), past[..., :-1]], -1)
        drop = torch.zeros_like(past).scatter(-1, ids, past)
        work = work.masked_fill(drop, torch.finfo(dtype).min)
    if top_k is not None:
        work = work.masked_fill(
            work < torch.topk(work, top_k).values[..., -1:], torch.finfo(dtype).min
        )
    probs = torch.softmax(work, -1)
    draw = streamed(
        logits,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=0,
        want=("prob", "margin", "entropy"),
        confidence_dtype=dtype,
    )
    largest = torch.sort(probs, descending=True).values
    assert draw.prob.equal(probs.gather(-1, draw.token.unsqueeze(-1)).squeeze(-1))
    assert (draw.prob > 0).all()
    assert draw.margin.equal(largest[..., 0] - largest[..., 1])
    assert (-draw.entropy).equal((probs * torch.log(probs + 1e-10)).sum(-1))


def test_leading_shapes_are_kept():
    for leading in ((), (1,), (2, 3), (2, 1, 3), (0, 4)):
        draw = streamed(normal(*leading, 140), seed=0, want="all")
        assert all(value.shape == leading for value in draw)
        assert (draw.token.dtype, draw.entropy.dtype) == (torch.int64, torch.float32)
    scalar = torch.tensor(0.1)
    assert streamed(LogisticHead(scalar, scalar, 9), seed=0).token.shape == ()


def test_log_prob_alone_is_the_default():
    draw = sample(normal(2, 5), seed=0)
    assert [n for n in STATISTICS if getattr(draw, n) is not None] == ["log_prob"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(dtype):
    head = LinearHead(normal(40, 16).to(dtype), normal(300, 16, seed=1).to(dtype))
    arguments = {"seed": 0, "want": "all", "top_p": 0.9, "confidence_dtype": dtype}
    expected = streamed(head, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_draw(streamed(head, **arguments), expected)


def test_no_value_is_read_on_the_host_away_from_the_cpu():
    # Meta tensors have no values, so anything that waits for one raises.
    logits = torch.empty(6, 300, device="meta")
    scalar = torch.empty((), dtype=torch.int64, device="meta")
    for arguments in (
        {},
        {"temperature": 0},
        {"top_p": 0.9, "top_k": 5, "temperature": 0.4},
        {"guidance": (logits, 1.0), "mask_id": 3},
        {"confidence_dtype": torch.bfloat16, "top_p": 0.9},
    ):
        draw = streamed(logits, seed=scalar, step=scalar, want="all", **arguments)
        assert draw.token.shape == (6,)


def test_a_backend_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match='backend="triton" cannot run: '):
        sample(torch.zeros(2, 3), backend="triton")
    assert sample(torch.zeros(2, 3), seed=0).token.shape == (2,)


def test_seeds_come_from_the_generator():
    logits = torch.zeros(50, 300)

    def tokens(generator=None):
        return sample(logits, generator=generator).token

    first = tokens(torch.Generator().manual_seed(0))
    assert first.equal(tokens(torch.Generator().manual_seed(0)))
    assert not first.equal(tokens(torch.Generator().manual_seed(1)))
    torch.manual_seed(0)
    default = tokens()
    assert not default.equal(tokens())
    torch.manual_seed(0)
    assert default.equal(tokens())
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    sample(torch.zeros(3, 5), temperature=0, generator=generator)
    assert generator.get_state().equal(state)
