"""The torch backend of `sample`: tails, invariance, heads, draws from probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from di4c_fast.streaming_sample import SAMPLE_BLOCK, draw_from_probs
from sample_cases import assert_near, assert_same_draw, draws_of_one_row, normal, streamed

from di4c_fast import streaming_sample
from di4c_fast.draw.api import Draw
from di4c_fast.heads import Head, LinearHead, LogisticHead
from di4c_fast.reference.draw import draw_ref
from di4c_fast.testing import assert_tail_mass, tail_logits


@pytest.mark.parametrize(("gap", "rows"), [(16, 30_000), (18, 100_000), (20, 300_000)])
def test_tails_keep_their_mass_in_fp32(gap, rows):
    """168, 76 and 31 draws of the 50 000 tail tokens expected; coarse noise gives 0.08 of it."""
    assert_tail_mass(lambda logits: draws_of_one_row(logits[0], rows, seed=gap), gap, rows)


def test_the_public_call_keeps_the_mass_of_a_tail():
    logits, _ = tail_logits(14.0, tail=20_000)
    assert draws_of_one_row(logits, 500, seed=3).equal(
        streamed(logits.expand(500, -1), seed=3).token
    )
    assert_tail_mass(lambda rows: streamed(rows, seed=3).token, 14.0, 6000, tail=20_000)


@pytest.mark.parametrize(("gap", "rows"), [(6.0, 20_000), (12.0, 300_000)])
def test_tails_within_one_block_keep_their_mass(gap, rows):
    """The exponential race alone: 127 tail tokens beside the likely one."""
    tail = SAMPLE_BLOCK - 1
    assert_tail_mass(lambda logits: draws_of_one_row(logits[0], rows, seed=1), gap, rows, tail=tail)


@pytest.mark.parametrize("vocabulary", [100, 1025, 8193])
def test_rows_give_the_same_draw_in_any_batch_and_order(vocabulary):
    logits = normal(37, vocabulary)
    keys = torch.arange(37) * 1_000_003
    arguments = {"seed": 5, "step": 2, "temperature": 0.9, "want": "all"}
    whole = streamed(logits, row_keys=keys, **arguments)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    shuffled = streamed(logits[order], row_keys=keys[order], **arguments)
    assert_same_draw(shuffled, Draw(*(value[order] for value in whole)))
    alone = streamed(logits[9], row_keys=keys[9], **arguments)
    assert_same_draw(alone, Draw(*(value[9] for value in whole)))


@pytest.mark.parametrize("arguments", [{}, {"top_p": 0.9}, {"mask_id": 500, "want": "all"}])
def test_chunks_and_groups_do_not_change_a_draw(monkeypatch, arguments):
    logits = normal(70, 1025)
    expected = streamed(logits, seed=5, **arguments)
    monkeypatch.setattr(streaming_sample, "MIN_GROUP_ROWS", 1)
    for chunk_bytes, numbers in ((1, 1), (1, 1 << 20), (20_000, 5000), (1 << 30, 1000)):
        monkeypatch.setattr(streaming_sample, "_CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(streaming_sample, "_GROUP_NUMBERS", numbers)
        assert_same_draw(streamed(logits, seed=5, **arguments), expected)


def test_strides_do_not_change_a_draw():
    logits = normal(6, 5, 300)
    expected = streamed(logits, seed=5, want="all")
    padded = torch.full((6, 5, 320), math.nan)[..., :300]
    padded.copy_(logits)
    transposed = logits.transpose(0, 2).contiguous().transpose(0, 2)
    interleaved = torch.stack([logits, logits + 1], -1)[..., 0]
    for view in (padded, transposed, interleaved):
        assert not view.is_contiguous()
        assert_same_draw(streamed(view, seed=5, want="all"), expected)
    row = logits[:1, :1]
    assert_same_draw(
        streamed(row.expand(6, 5, -1), seed=5, want="all"),
        streamed(row.expand(6, 5, -1).contiguous(), seed=5, want="all"),
    )


def test_seeds_steps_and_keys_all_matter():
    logits = torch.zeros(50, 300)
    base = streamed(logits, seed=1, step=0).token
    assert base.equal(streamed(logits, seed=1, step=0, row_keys=torch.arange(50)).token)
    assert base.equal(streamed(logits, seed=torch.tensor(1), step=torch.tensor(0)).token)
    for other in (
        streamed(logits, seed=2).token,
        streamed(logits, seed=1 + 2**40).token,
        streamed(logits, seed=1, step=1).token,
        streamed(logits, seed=1, row_keys=torch.arange(50) + 50).token,
        streamed(logits, seed=1, row_keys=torch.arange(50) + 2**40).token,
    ):
        assert (base != other).sum() > 40
    equal_keys = streamed(logits, seed=1, row_keys=torch.zeros(50, dtype=torch.int64)).token
    assert (equal_keys == equal_keys[0]).all()


def test_seeds_come_from_the_generator():
    logits = torch.zeros(50, 300)

    def drawn(generator=None):
        return streamed(logits, generator=generator).token

    first = drawn(torch.Generator().manual_seed(0))
    assert first.equal(drawn(torch.Generator().manual_seed(0)))
    assert not first.equal(drawn(torch.Generator().manual_seed(1)))
    torch.manual_seed(0)
    default = drawn()
    assert not default.equal(drawn())
    torch.manual_seed(0)
    assert default.equal(drawn())


def test_temperature_zero_leaves_the_generator_alone():
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    streamed(torch.zeros(3, 5), temperature=0, generator=generator)
    assert generator.get_state().equal(state)


class CountingHead(Head):
    """A tensor that counts how many rows of logits anybody holds at a time."""

    def __init__(self, logits, log):
        self.inner, self.log = logits, log

    shape = property(lambda self: self.inner.shape)
    dtype = property(lambda self: self.inner.dtype)
    device = property(lambda self: self.inner.device)

    def take(self, rows):
        return CountingHead(self.inner.flatten(0, -2)[rows], self.log)

    def logits(self):
        self.log.append(self.inner.shape[:-1].numel())
        return self.inner

    def tensors(self):
        return (self.inner,)

    def with_tensors(self, tensors):
        return CountingHead(tensors[0], self.log)


def test_a_head_is_asked_for_its_rows_in_groups_under_the_budget():
    logits, log = normal(10, 50, 300), []
    draw = streamed(CountingHead(logits, log), seed=1, budget_bytes=80 * 300 * 4, want="all")
    assert_same_draw(draw, streamed(logits, seed=1, want="all"))
    assert log == [80] * 6 + [20]
    log.clear()
    streamed(CountingHead(logits, log), seed=1, budget_bytes=1)
    assert max(log) == 64  # products of fewer rows would waste the weights they read


@pytest.mark.parametrize("bias", [None, "vector", "positions"])
def test_linear_heads_give_the_draws_of_their_logits(bias):
    hidden, weight = normal(3, 70, 16, scale=1.0), normal(300, 16, seed=1, scale=1.0)
    offset = {"vector": normal(300, seed=2), "positions": normal(70, 300, seed=2)}.get(bias)
    head = LinearHead(hidden, weight, offset, budget_bytes=64 * 300 * 4)
    draw = streamed(head, seed=1, mask_id=299, want="all")
    assert_near(draw, streamed(head.logits(), seed=1, mask_id=299, want="all"))
    assert draw.token.shape == (3, 70)


def test_logistic_heads_give_the_draws_of_their_logits():
    head = LogisticHead(normal(4, 90, scale=0.5), normal(4, 90, seed=1, scale=0.5), 256)
    arguments = {"seed": 1, "want": "all", "budget_bytes": 1}
    assert_near(streamed(head, **arguments), streamed(head.logits(), **arguments))


def test_guidance_takes_heads_too():
    hidden, other = normal(2, 70, 8, scale=1.0), normal(2, 70, 8, seed=3, scale=1.0)
    weight = normal(300, 8, seed=1, scale=1.0)
    heads = LinearHead(hidden, weight), LinearHead(other, weight)
    draw = streamed(heads[0], guidance=(heads[1], 2.0), seed=1, want="all", budget_bytes=1)
    dense = [head.logits() for head in heads]
    assert_near(draw, streamed(dense[0], guidance=(dense[1], 2.0), seed=1, want="all"))


@pytest.mark.parametrize("vocabulary", [1, 128, 200, 1025])
def test_draws_from_probabilities_equal_those_from_logits(vocabulary):
    logits = normal(3, 20, vocabulary)
    keys = torch.arange(60).view(3, 20) * 7
    expected = streamed(logits, seed=4, step=9, row_keys=keys).token
    probs = logits.softmax(-1)
    assert draw_from_probs(probs, 4, step=9, row_keys=keys).equal(expected)
    assert draw_from_probs(probs * 0.25, torch.tensor(4), step=9, row_keys=keys).equal(expected)
    assert draw_ref(logits, 4, step=9, row_keys=keys).equal(expected)
    assert draw_from_probs(probs.double(), 4, step=9, row_keys=keys).equal(expected)
    padded = torch.full((3, 20, vocabulary + 7), math.nan)[..., :vocabulary]
    assert draw_from_probs(padded.copy_(probs), 4, step=9, row_keys=keys).equal(expected)


def test_draws_from_probabilities_without_mass_give_token_zero():
    assert draw_from_probs(torch.zeros(2, 3, 300), 0).tolist() == [[0] * 3] * 2
    assert draw_from_probs(torch.zeros(0, 300), 0).shape == (0,)


@pytest.mark.parametrize("vocabulary", [5, 127, 128, 129, 300, 512])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_chosen_block_is_padded_with_zeros_beyond_the_vocabulary(vocabulary, contiguous):
    wide = normal(40, vocabulary + 9, seed=3).exp()
    values = wide[:, :vocabulary].contiguous() if contiguous else wide[:, :vocabulary]
    blocks = streaming_sample.blocks_of(vocabulary)
    chosen = torch.arange(40) % blocks
    padded = torch.nn.functional.pad(values, (0, blocks * SAMPLE_BLOCK - vocabulary))
    expected = padded.unflatten(1, (blocks, SAMPLE_BLOCK))[torch.arange(40), chosen]
    assert torch.equal(streaming_sample.take_block(values, chosen), expected)
