"""Philox and the layout of its words."""

from __future__ import annotations

import math

import pytest
import torch

from di4c_fast import rng
from di4c_fast.rng import BLOCKS, FREE, TOKENS, philox4x32, uniform
from di4c_fast.testing import assert_counts_match

MASK = 0xFFFFFFFF

# Counter, key and result of philox4x32-10 as published with Random123 (kat_vectors).
KNOWN_ANSWERS = """\
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1"""


def philox_by_hand(counter, key):
    """One call in Python integers, written from the paper."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 1 << 32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return x0, x1, x2, x3


def number_by_hand(seed, step, row_key, stream, index):
    """The word of the documented layout as an exact fraction of Python integers."""
    counter = (stream * 2**30 + index // 4, row_key % 2**32, (row_key % 2**64) >> 32, step % 2**32)
    key = (seed % 2**32, (seed % 2**64) >> 32)
    return (philox_by_hand(counter, key)[index % 4] + 0.5) / 2**32


@pytest.mark.parametrize("line", KNOWN_ANSWERS.splitlines())
def test_philox_gives_the_published_known_answers(line):
    numbers = [int(word, 16) for word in line.split()]
    counter, key, expected = numbers[:4], tuple(numbers[4:6]), numbers[6:]
    as_tensors = tuple(torch.tensor([word, word]) for word in counter)
    words = philox4x32(as_tensors, key)
    device_key = philox4x32(as_tensors, tuple(torch.tensor(word) for word in key))
    for word, other, published in zip(words, device_key, expected, strict=True):
        assert word.tolist() == [published, published]
        assert other.tolist() == [published, published]


def test_philox_equals_python_integers_on_random_counters():
    generator = torch.Generator().manual_seed(0)
    counters = torch.randint(0, 2**32, (50, 4), generator=generator)
    key = (0xDEADBEEF, 0x00C0FFEE)
    words = torch.stack(philox4x32(tuple(counters.unbind(1)), key), 1)
    assert words.tolist() == [list(philox_by_hand(row, key)) for row in counters.tolist()]


@pytest.mark.parametrize("seed", [0, 12345, 2**40 + 17, 2**63 - 1, -3])
@pytest.mark.parametrize("step", [0, 7, 2**32 - 1])
def test_uniform_follows_the_documented_layout(seed, step):
    keys = torch.tensor([0, 5, 2**35 + 1, -1, -(2**33)])
    for stream in (BLOCKS, TOKENS, FREE):
        drawn = uniform(seed, step, keys, 7, stream=stream, dtype=torch.float64)
        expected = [
            [number_by_hand(seed, step, key, stream, index) for index in range(7)]
            for key in keys.tolist()
        ]
        assert drawn.tolist() == expected


def test_tensor_seeds_and_steps_equal_integers():
    keys = torch.arange(6)
    expected = uniform(-77, 5, keys, 9)
    assert uniform(torch.tensor(-77), torch.tensor(5), keys, 9).equal(expected)
    per_row = uniform(-77, torch.arange(6), keys, 9)
    assert per_row[5].equal(expected[5])
    assert per_row[0].equal(uniform(-77, 0, keys, 9)[0])


def test_first_selects_later_indices_of_a_row():
    keys = torch.tensor([3, 1 << 40])
    whole = uniform(1, 2, keys, 40, stream=TOKENS)
    part = uniform(1, 2, keys, 8, stream=TOKENS, first=torch.tensor([4, 32]))
    assert part[0].equal(whole[0, 4:12])
    assert part[1].equal(whole[1, 32:40])


def test_uniforms_stay_inside_the_open_interval_at_both_ends(monkeypatch):
    extremes = torch.tensor([[0, 1, 2**31, 2**32 - 1]])
    monkeypatch.setattr(rng, "random_words", lambda *args, **kwargs: (extremes,) * 4)
    single = uniform(0, 0, torch.zeros(1, dtype=torch.int64), 16)
    double = uniform(0, 0, torch.zeros(1, dtype=torch.int64), 16, dtype=torch.float64)
    assert single[0, 0] == 2.0**-33
    assert single[0, 4] == 1.5 * 2.0**-32
    assert single[0, 12] == 1.0 - 2.0**-24
    assert double[0, 12] == 1.0 - 2.0**-33
    for numbers in (single, double):
        noise = rng.exponential(numbers)
        assert (noise > 0).all()
        assert noise.isfinite().all()


def test_small_exponentials_keep_their_relative_precision(monkeypatch):
    """They win the races of unlikely tokens: a share of e^-20 is 9 steps of 2⁻³²."""
    generator = torch.Generator().manual_seed(0)
    words = torch.cat([torch.arange(2**12), torch.randint(0, 2**31, (2**12,), generator=generator)])
    monkeypatch.setattr(rng, "random_words", lambda *args, **kwargs: (words[None],) * 4)
    noise = rng.exponential(uniform(0, 0, torch.zeros(1, dtype=torch.int64), 4 * len(words)))
    exact = -torch.log1p(-(words.double() + 0.5) * 2.0**-32)
    error = (noise[0, ::4].double() / exact - 1).abs()
    assert error.amax() < 2.0**-22  # two roundings of fp32 and a logarithm


def test_uniforms_are_uniform_and_streams_steps_and_rows_are_independent():
    keys = torch.arange(4000)
    base = uniform(9, 0, keys, 64)
    counts = torch.histc(base, 256, 0.0, 1.0).long()
    assert_counts_match(counts, torch.ones(256))
    others = {
        "stream": uniform(9, 0, keys, 64, stream=TOKENS),
        "step": uniform(9, 1, keys, 64),
        "seed": uniform(10, 0, keys, 64),
        "row": uniform(9, 0, keys + 4000, 64),
        "index": base.roll(1, 1),
    }
    for name, other in others.items():
        pairs = (base * 16).long() * 16 + (other * 16).long()
        assert_counts_match(
            torch.bincount(pairs.flatten(), minlength=256), torch.ones(256), name=name
        )


def test_exponential_has_mean_and_variance_one():
    noise = rng.exponential(uniform(4, 0, torch.arange(10_000), 100, dtype=torch.float64))
    # Five standard errors of a million draws.
    assert abs(noise.mean().item() - 1.0) < 5 / math.sqrt(1e6)
    assert abs(noise.var().item() - 1.0) < 5 * math.sqrt(8 / 1e6)


def test_no_value_is_read_on_the_host():
    # Meta tensors have no values, so anything that waits for one raises.
    scalar = torch.empty((), dtype=torch.int64, device="meta")
    keys = torch.empty(5, dtype=torch.int64, device="meta")
    numbers = uniform(scalar, scalar, keys, 10, first=keys)
    assert numbers.shape == (5, 10)


def test_empty_batches_give_empty_numbers():
    assert uniform(0, 0, torch.empty(0, dtype=torch.int64), 12).shape == (0, 12)
    assert uniform(0, 0, torch.arange(3), 0).shape == (3, 0)


def test_uniform_rejects_other_dtypes():
    with pytest.raises(ValueError, match=r"dtype must be torch\.float32 or torch\.float64"):
        uniform(0, 0, torch.arange(2), 4, dtype=torch.bfloat16)


def test_seeds_follow_the_generator():
    first = rng.draw_seed(torch.Generator().manual_seed(3), torch.device("cpu"))
    again = rng.draw_seed(torch.Generator().manual_seed(3), torch.device("cpu"))
    other = rng.draw_seed(torch.Generator().manual_seed(4), torch.device("cpu"))
    assert first.dtype == torch.int64
    assert first.shape == ()
    assert first == again
    assert first != other


def test_triton_philox_gives_the_same_words():
    triton = pytest.importorskip("triton")
    kernel = pytest.importorskip("philox_kernel")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys = torch.tensor([0, 5, 2**35 + 1, -1], device=device)
    seed, step, count = 2**61 + 12345, 77, 64
    ours = torch.stack(rng.random_words(seed, step, keys, 4 * count, stream=TOKENS), -1)
    theirs = torch.empty(len(keys), count, 4, dtype=torch.int64, device=device)
    kernel.words[(len(keys),)](
        theirs, keys, seed, step, TOKENS, COUNT=triton.next_power_of_2(count)
    )
    assert ours.equal(theirs)
