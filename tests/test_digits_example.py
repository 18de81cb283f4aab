"""The digits example: its data, its model, its metrics and its table of speed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from example_support import DIGITS, stored

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples.common.rundir import RunDirectory
from examples.digits import data, speed, train
from examples.digits.metrics import (
    Judge,
    frechet_distance,
    pair_distance,
    pair_joints,
)
from examples.digits.model import DigitsDenoiser

TINY = DIGITS["masked"]


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.load(TINY.levels)


@pytest.fixture(scope="module")
def judge(digits: data.Digits) -> Judge:
    return Judge(digits)


def test_training_changes_weights_and_the_returned_model_holds_their_average(digits, tmp_path):
    run = RunDirectory(tmp_path, TINY)
    teacher = train.train_teacher(TINY, digits, run, seed=0)
    tensors, losses = stored(tmp_path / "seed-0" / "teacher.safetensors")
    assert len(losses) == TINY.teacher_iterations
    torch.manual_seed(0)
    fresh = DigitsDenoiser(TINY.levels, TINY.width, TINY.layers)
    for name, parameter in teacher.named_parameters():
        average = tensors[f"ema/shadow/{name}"]
        assert torch.equal(parameter, average)
        assert not torch.equal(tensors[f"module/{name}"], average), name
    assert not torch.equal(fresh.head.weight, tensors["module/head.weight"])


def test_quantised_digits_use_all_levels_and_17_levels_change_nothing():
    from sklearn.datasets import load_digits

    pixels = load_digits().data
    for levels in (2, 5, 17):
        tokens = data.load(levels).tokens
        assert tokens.shape == (1797, 64)
        assert tokens.unique().tolist() == list(range(levels))
    assert np.array_equal(data.load(17).tokens.numpy(), pixels)


def test_cross_entropy_counts_masked_positions_only_and_never_the_mask():
    logits = torch.zeros(2, 4, 3)
    logits[0, 0] = torch.tensor([2.0, 0.0, 50.0])  # the mask column must not matter
    logits[0, 1] = torch.tensor([9.0, 0.0, 0.0])  # nor what is not masked
    x0 = torch.zeros(2, 4, dtype=torch.int64)
    masked = torch.tensor([[True, False, True, False], [False] * 4])
    value = train.masked_cross_entropy(logits, x0, masked, mask_id=2)
    first = -torch.log_softmax(torch.tensor([2.0, 0.0]), 0)[0].item()
    # Example 1 has no masked position and contributes 0 to the mean over two examples.
    assert value.item() == pytest.approx((first + math.log(2)) / 2 / 2, rel=1e-6)


def test_frechet_distance_matches_its_closed_forms():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3))
    shift = np.array([1.0, -2.0, 0.5])
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, a + shift) == pytest.approx(5.25, rel=1e-9)
    # Scaling by 3: tr(C + 9C - 2·3C) = 4 tr C, plus the shift of the mean by 2 times itself.
    expected = 4 * np.trace(np.cov(a, rowvar=False)) + 4 * (a.mean(axis=0) ** 2).sum()
    assert frechet_distance(a, 3 * a) == pytest.approx(expected, rel=1e-9)
    # Covariances that do not commute, against the root of the product itself.
    from scipy.linalg import sqrtm

    b = rng.normal(size=(400, 3)) @ rng.normal(size=(3, 3))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    direct = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b))
    )
    assert frechet_distance(a, b) == pytest.approx(direct, rel=1e-6)


def test_pair_distance_matches_counting_by_hand():
    rng = np.random.default_rng(1)
    a, b = rng.integers(3, size=(50, 64)), rng.integers(3, size=(70, 64))
    total = 0.0
    for i in range(64):
        for j in range(i + 1, 64):
            for u in range(3):
                for v in range(3):
                    p = ((a[:, i] == u) & (a[:, j] == v)).mean()
                    q = ((b[:, i] == u) & (b[:, j] == v)).mean()
                    total += abs(p - q) / 2
    ours = pair_distance(pair_joints(a, 3), pair_joints(b, 3))
    assert ours == pytest.approx(total / (64 * 63 / 2), rel=1e-12)


def test_both_distances_see_correlation_that_the_pixels_alone_do_not_show(digits, judge):
    tokens = digits.tokens.numpy()
    rng = np.random.default_rng(2)
    independent = np.stack([rng.permutation(column) for column in tokens.T], axis=1)
    floor, broken = judge.noise_floor(len(tokens)), judge.score(independent)
    # The marginals of `independent` are exact, so only the joints are off.
    assert broken.frechet > 10 * floor.frechet
    assert broken.pair_tv > 2 * floor.pair_tv
    assert judge.features.accuracy > 0.9


def test_the_noise_floor_falls_with_the_number_of_samples(judge):
    few, many = judge.noise_floor(100), judge.noise_floor(1600)
    # Means fall with 1/samples and frequencies with its root: 16 and 4 in the limit.
    assert few.frechet > 8 * many.frechet
    assert 3 < few.pair_tv / many.pair_tv < 5
    # The same sums in the order that the product takes, which may depend on where memory lies.
    assert judge.score(judge._real).pair_tv == pytest.approx(0.0, abs=1e-12)


def test_the_loss_comparison_runs_the_same_problem_on_both_backends():
    problem = speed.Problem(speed.Shape("tiny", 2, 3, 5, 7, 1))
    own_loss = problem.run("auto")
    own_grad = problem.student.grad
    assert own_grad is not None
    reference_loss = problem.run("reference")
    torch.testing.assert_close(own_loss, reference_loss)
    torch.testing.assert_close(own_grad, problem.student.grad)


def test_the_speed_table_says_when_memory_cannot_be_read():
    one = speed.Comparison(
        "a", (1, 2, 3, 4), {"auto": 0.5, "reference": 2.0}, dict.fromkeys(speed.BACKENDS), 0.0
    )
    text = speed.table([one])
    assert "4.0" in text
    assert "cannot be read" in text
