"""The judge of the text example: the n-gram model by hand and by recursion, the other measures."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest

pytest.importorskip("sacrebleu")

from examples.text import data
from examples.text.metrics import Judge, repeats, self_bleu
from examples.text.ngram import NGramModel


@pytest.fixture(scope="module")
def text() -> data.Text:
    return data.load()


def test_kneser_ney_matches_a_calculation_by_hand():
    # abab a: bigrams ab ab ba ba. c_2: ab 2, ba 2; no n-gram once, so d_2 = 0.5.
    # Order 1 counts what precedes: a after b, b after a: 1 each, d_1 = 2 / (2 + 0) -> 0.95.
    model = NGramModel([np.array([0, 1, 0, 1, 0])], vocabulary=3, order=2)
    unigram = (1 - 0.95) / 2 + 0.95 * 2 / 2 / 3
    seen = (2 - 0.5) / 2 + 0.5 * 1 / 2 * unigram
    unseen = 0.5 * 1 / 2 * (0.95 * 2 / 2 / 3)
    probabilities = 2 ** model.log2_prob(np.array([0, 1, 0, 2, 1]))
    # After 'a' comes 'b', after 'b' 'a', after 'a' never 'c', and 'c' was never a context.
    assert probabilities == pytest.approx([seen, seen, unseen, unigram], rel=1e-12)


def _kneser_ney(texts, vocabulary, order, context, token):
    """The recursion of the module's docstring on dictionaries."""

    def grams(length):
        return collections.Counter(
            tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)
        )

    counts = {order: grams(order)}
    for length in range(order - 1, 0, -1):
        counts[length] = collections.Counter(gram[1:] for gram in counts[length + 1])

    def prob(length, context):
        if length == 0:
            return 1.0 / vocabulary
        count = counts[length]
        lower = prob(length - 1, context[1:])
        follow = {gram[-1]: n for gram, n in count.items() if gram[:-1] == context}
        if not follow:
            return lower
        once, twice = (sum(n == k for n in count.values()) for k in (1, 2))
        discount = min(once / (once + 2 * twice), 0.95) if once else 0.5
        own = max(follow.get(token, 0) - discount, 0.0)
        return (own + discount * len(follow) * lower) / sum(follow.values())

    return prob(order, tuple(context))


def test_kneser_ney_matches_the_recursion_on_dictionaries():
    rng = np.random.default_rng(0)
    # Skewed tokens, so that n-grams come once, twice and often; contexts seen and not seen.
    texts = [rng.choice(6, size=size, p=[0.4, 0.3, 0.15, 0.1, 0.05, 0.0]) for size in (90, 2, 40)]
    model = NGramModel(texts, vocabulary=6, order=3)
    lists = [text.tolist() for text in texts]
    queries = rng.integers(6, size=(4, 12))
    found = 2 ** model.log2_prob(queries)
    assert found.shape == (4, 10)
    for row, line in zip(queries.tolist(), found, strict=True):
        for i, value in enumerate(line):
            expected = _kneser_ney(lists, 6, 3, row[i : i + 2], row[i + 2])
            assert value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_judge_gives_probabilities_that_sum_to_one(order):
    rng = np.random.default_rng(1)
    model = NGramModel([rng.integers(5, size=200)], vocabulary=7, order=order)
    contexts = rng.integers(7, size=(50, 1, order - 1)).repeat(7, axis=1)
    rows = np.concatenate([contexts, np.arange(7).reshape(1, 7, 1).repeat(50, axis=0)], axis=2)
    total = (2 ** model.log2_prob(rows)).sum(axis=(1, 2))
    assert total == pytest.approx(np.ones(50), rel=1e-9)


def test_the_judge_ranks_real_text_shuffled_words_and_shuffled_characters(text):
    judge = Judge(text, 64, 5)
    rng = np.random.default_rng(2)
    real = judge.held_out[:200]
    characters = rng.permuted(real, axis=1)
    index = text.alphabet.index(" ")
    shuffled = []
    for row in real:
        words = np.split(row, np.flatnonzero(row == index))
        shuffled.append(np.concatenate([words[i] for i in rng.permutation(len(words))]))
    bits = [judge.model.bits(rows) for rows in (real, np.array(shuffled), characters)]
    assert bits[0] + 0.3 < bits[1] < bits[2] - 1.0
    assert 1.5 < bits[0] < 3.0
    uniform = rng.integers(judge.vocabulary, size=(200, 64))
    assert judge.model.bits(uniform) > math.log2(judge.vocabulary)


def test_no_model_of_that_order_is_possible():
    with pytest.raises(ValueError, match="order 10 and vocabulary 100"):
        NGramModel([np.arange(20)], vocabulary=100, order=10)
    with pytest.raises(ValueError, match="at least 5 tokens"):
        NGramModel([np.arange(4), np.arange(3)], vocabulary=9, order=5)


def test_collapse_shows_in_each_measure_of_diversity(text):
    judge = Judge(text, 64, 5)
    real, windows = judge.real(96)
    assert windows == 96
    collapsed = judge.score(judge.held_out[:4].repeat(24, axis=0))
    # Four passages said again and again are as likely as the passages.
    assert collapsed.bits < real.bits + 1.0
    assert collapsed.reverse_bits > real.reverse_bits + 0.5
    assert collapsed.self_bleu > 99.0 > 2 * real.self_bleu
    assert collapsed.repeats > 0.9 > 2 * real.repeats


def test_repeats_and_self_bleu_have_known_values():
    rows = np.array([[1, 2, 3, 4], [1, 2, 3, 5]])
    assert repeats(rows, length=3) == pytest.approx(1 / 4)
    assert repeats(rows, length=4) == 0.0
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(100.0)
    same, different = "one two three four five six", "a b c d e f"
    mixed = self_bleu([same, same, different])
    assert self_bleu([same, different]) < 10.0
    assert 66.0 < mixed < 70.0
    # Groups are compared within themselves.
    assert self_bleu([same, same, different, different], group=2) == pytest.approx(100.0)
    assert self_bleu([same, different, same, different], group=2) < 10.0
