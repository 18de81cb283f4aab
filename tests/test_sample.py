"""`sample`: agreement with the reference, the law, options, statistics, confidences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sample_cases import assert_near, assert_same_draw, normal, streamed

from di4c_fast.draw.api import Draw, sample
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
    options = itertools.product(
        (1.0, 0.0, 0.7, per_row),
        (None, 0.8),
        (None, 3),
        (None, (unconditional, 1.5 if vocabulary > 200 else per_row)),
        (None, vocabulary - 1),
        (None, torch.bfloat16),
    )
    for temperature, top_p, top_k, guidance, mask_id, confidence_dtype in options:
        arguments = {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "guidance": guidance,
            "mask_id": mask_id,
            "confidence_dtype": confidence_dtype,
            "seed": 3,
            "want": "all",
        }
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32(dtype):
    logits = normal(20, 700).to(dtype)
    draw = streamed(logits, seed=1, temperature=0.9, top_p=0.9, want="all")
    assert_same_draw(draw, streamed(logits.float(), seed=1, temperature=0.9, top_p=0.9, want="all"))
    assert draw.log_prob.dtype == torch.float32


def test_fp64_logits_are_computed_in_fp64():
    logits = normal(5, 300).double()
    draw = streamed(logits, seed=1, want="all")
    exact = logits.log_softmax(-1).gather(1, draw.token[:, None])[:, 0]
    assert draw.log_prob.dtype == torch.float64
    torch.testing.assert_close(draw.log_prob, exact, rtol=0, atol=1e-14)


def test_poisoned_scratch_memory_is_never_read(poisoned_memory):
    logits = normal(9, 300)
    want = {"want": "all", "seed": 0}
    for arguments in ({}, {"top_p": 0.8, "top_k": 4}, {"mask_id": 4, "temperature": 0.5}):
        draw = streamed(logits, **want, **arguments)
        assert_near(draw, sample(logits, backend="reference", **want, **arguments))


def drawn_probs(logits: torch.Tensor, **transforms) -> torch.Tensor:
    return transformed_logits_ref(logits.double()[None], **transforms)[0].softmax(-1)


@pytest.mark.parametrize(
    ("arguments", "transforms"),
    [
        ({}, {}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"temperature": 2.5, "mask_id": 11}, {"temperature": 2.5, "mask_id": 11}),
        ({"top_p": 0.7}, {"top_p": 0.7}),
        ({"top_k": 5}, {"top_k": 5}),
        (
            {"temperature": 1.4, "top_p": 0.9, "top_k": 40, "mask_id": 0},
            {"temperature": 1.4, "top_p": 0.9, "top_k": 40, "mask_id": 0},
        ),
    ],
)
def test_draws_follow_the_transformed_softmax(arguments, transforms):
    logits = normal(430, scale=1.5)
    draw = streamed(logits.expand(60_000, -1), seed=17, want=(), **arguments)
    assert_draws_match(draw.token, drawn_probs(logits, **transforms))


def test_draws_follow_the_guided_softmax():
    logits, unconditional = normal(200, scale=1.0), normal(200, seed=1, scale=1.0)
    draw = streamed(
        logits.expand(60_000, -1), guidance=(unconditional.expand(60_000, -1), 1.5), seed=2
    )
    expected = drawn_probs(logits, unconditional=unconditional.double()[None], guidance_scale=1.5)
    assert_draws_match(draw.token, expected)


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


def test_excluded_tokens_are_never_drawn():
    logits = torch.zeros(20_000, 260)
    logits[:, 1::2] = -INF
    token = streamed(logits, seed=0, mask_id=0).token
    assert (token % 2 == 0).all()
    assert (token != 0).all()
    # A block whose only allowed token is the last of a partial block.
    only = torch.full((2000, 130), -INF)
    only[:, 129] = -1e4
    assert (streamed(only, seed=0).token == 129).all()


def test_argmax_takes_the_lowest_id_among_equals():
    logits = torch.zeros(4, 400)
    logits[0, [77, 200, 399]] = 2.0
    logits[1, [128, 129]] = 2.0
    logits[2, 399] = 2.0
    draw = streamed(logits, temperature=0, want=("argmax", "margin", "max_log_prob"))
    assert draw.token.tolist() == [77, 128, 399, 0]
    assert draw.argmax.tolist() == [77, 128, 399, 0]
    assert draw.margin[[0, 1, 3]].tolist() == [0.0, 0.0, 0.0]
    assert draw.margin[2] > 0.01
    # exp(1e-9) rounds to 1 in fp32; the maximum is still told apart.
    close = torch.zeros(1, 300)
    close[0, 250] = 1e-9
    assert streamed(close, temperature=0).token.tolist() == [250]


def test_the_margin_finds_a_second_token_in_the_same_block_and_in_another():
    for second in (3, 299):
        logits = torch.full((1, 300), -INF)
        logits[0, 2], logits[0, second] = math.log(0.75), math.log(0.25)
        assert streamed(logits, seed=0, want="margin").margin.item() == pytest.approx(0.5)


def test_per_row_temperatures_equal_the_numbers():
    logits = normal(30, 500)
    levels = [0.0, 0.5, 1.0, 3.0]
    temperature = torch.tensor(levels).repeat(8)[:30]
    mixed = streamed(logits, temperature=temperature, seed=2, want="all")
    for level in levels:
        rows = temperature == level
        single = streamed(logits, temperature=level, seed=2, want="all")
        assert_near(Draw(*(v[rows] for v in mixed)), Draw(*(v[rows] for v in single)))


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
    for leading in ((), (1,), (2, 3), (2, 1, 3)):
        draw = streamed(normal(*leading, 140), seed=0, want="all")
        assert all(value.shape == leading for value in draw)
    scalar = torch.tensor(0.1)
    assert streamed(LogisticHead(scalar, scalar, 9), seed=0).token.shape == ()


def test_empty_batches_give_empty_draws():
    draw = streamed(torch.empty(0, 4, 300), seed=0, want="all")
    assert draw.token.shape == (0, 4)
    assert draw.token.dtype == torch.int64
    assert draw.entropy.dtype == torch.float32


def test_a_single_token_is_always_drawn():
    draw = streamed(torch.tensor([[5.0]]), seed=0, want="all")
    assert draw.token.tolist() == [0]
    assert (draw.log_prob.item(), draw.entropy.item(), draw.margin.item()) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("name", STATISTICS)
def test_only_the_wanted_fields_come_back_and_do_not_depend_on_each_other(name):
    logits = normal(20, 300)
    for arguments in ({}, {"temperature": 0.5, "top_k": 9}, {"confidence_dtype": torch.bfloat16}):
        alone = streamed(logits, seed=1, want=name, **arguments)
        everything = streamed(logits, seed=1, want="all", **arguments)
        assert [n for n in STATISTICS if getattr(alone, n) is not None] == [name]
        assert getattr(alone, name).equal(getattr(everything, name))
        assert alone.token.equal(everything.token)


def test_log_prob_alone_is_the_default():
    draw = sample(normal(2, 5), seed=0)
    assert [n for n in STATISTICS if getattr(draw, n) is not None] == ["log_prob"]


def test_nothing_is_differentiable_and_logits_stay_untouched():
    logits = normal(5, 300).requires_grad_()
    before = logits.detach().clone()
    draw = streamed(logits, seed=0, want="all", mask_id=3, top_p=0.5, top_k=3, temperature=0.4)
    assert not any(value.requires_grad for value in draw)
    streamed(logits, seed=0, want="all", mask_id=3, top_p=0.5, confidence_dtype=torch.float32)
    assert logits.equal(before)


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


def test_unknown_backends_are_named():
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cuda'"):
        sample(torch.zeros(2, 3), backend="cuda")


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
