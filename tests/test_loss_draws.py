"""The draws that the loss makes where none are given, on the reference and the torch backend."""

from __future__ import annotations

import pytest
import torch
from loss_cases import TIGHT, loss_and_gradients, make_problem, run_loss
from loss_heads import FULL
from torch import Tensor

import di4c_fast
from di4c_fast.testing import assert_counts_match, assert_draws_match


def decoded_draws(logits: Tensor, backend: str, seed: int, **settings) -> Tensor:
    """The draws (B, K) that the loss makes from logits (B, K, 1, V), K = 1, by their likelihoods.

    A student of one component gives every token another probability.
    """
    batch, draws, _, vocabulary = logits.shape
    assert draws == 1
    student = torch.linspace(0.0, 2.0, vocabulary, dtype=torch.float64)
    _, terms = di4c_fast.loss(
        student.expand(batch, 1, 1, vocabulary),
        torch.zeros(batch, 1, vocabulary, dtype=torch.float64),
        torch.full((batch, 1), settings.pop("x0", 0)),
        consistency=logits,
        control_variate=False,
        generator=torch.Generator().manual_seed(seed),
        backend=backend,
        return_terms=True,
        **settings,
    )
    likelihood = student.clone()
    if "mask_id" in settings:
        likelihood[settings["mask_id"]] = float("-inf")
    likelihood = likelihood.log_softmax(-1)
    distance = (-terms.consistency_correlation[:, None] - likelihood).abs()
    assert distance.amin(1).max() < 1e-9
    return distance.argmin(1)


@pytest.mark.parametrize("vocabulary", [5, 300])
def test_draws_follow_the_softmax_of_the_consistency_logits(backend, vocabulary):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(vocabulary, generator=g, dtype=torch.float64) * 1.5
    count = 20_000 if backend == "torch" else 4_000
    tokens = decoded_draws(logits.expand(count, 1, 1, vocabulary), backend, seed=1)
    assert_draws_match(tokens, logits.softmax(-1))


def test_draws_never_take_the_mask_or_an_excluded_class(backend):
    logits = torch.tensor([0.0, 1.0, 5.0, 0.5, -float("inf")], dtype=torch.float64)
    tokens = decoded_draws(logits.expand(4000, 1, 1, 5), backend, seed=2, mask_id=2)
    probs = logits.clone()
    probs[2] = -float("inf")
    assert_draws_match(tokens, probs.softmax(-1))


def test_draws_of_different_rows_are_independent(backend):
    # Pairs of neighbouring examples against the product law.
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    tokens = decoded_draws(probs.log().expand(12_000, 1, 1, 3), backend, seed=3)
    pairs = tokens[0::2] * 3 + tokens[1::2]
    assert_counts_match(
        torch.bincount(pairs, minlength=9), torch.outer(probs, probs).flatten(), name="pairs"
    )


def test_draw_k_comes_from_component_k(backend):
    # Component k wants class k for certain, at every position.
    problem = make_problem(22, components=3, draws=3, vocabulary=4, positions=3)
    problem["consistency"] = torch.full((2, 3, 3, 4), -200.0, dtype=torch.float64)
    for k in range(3):
        problem["consistency"][:, k, :, k] = 200.0
    problem["consistency_x"] = torch.arange(3)[None, :, None].expand(2, 3, 3)
    expected = loss_and_gradients(problem, backend=backend)
    actual = loss_and_gradients(problem | {"consistency_x": None}, backend=backend)
    torch.testing.assert_close(actual, expected, **TIGHT)


def test_draws_are_a_function_of_the_generator(backend):
    problem = make_problem(23, batch=4, draws=3, **FULL) | {"consistency_x": None}

    def value(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return run_loss(problem, reduction="none", generator=generator, backend=backend)

    assert torch.equal(value(0), value(0))
    assert not torch.equal(value(0), value(1))
    generator = torch.Generator().manual_seed(0)
    first = run_loss(problem, generator=generator, backend=backend)
    second = run_loss(problem, generator=generator, backend=backend)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    default = run_loss(problem, backend=backend)
    torch.manual_seed(7)
    assert torch.equal(run_loss(problem, backend=backend), default)


@pytest.mark.parametrize("vocabulary", [7, 131, 1100])
def test_backends_make_the_same_draws_from_one_seed(vocabulary):
    problem = make_problem(24, vocabulary=vocabulary, draws=3, **FULL) | {"consistency_x": None}
    results = [
        loss_and_gradients(
            problem, backend=name, generator=torch.Generator().manual_seed(11), reduction="none"
        )
        for name in ("reference", "torch")
    ]
    torch.testing.assert_close(results[1], results[0], **TIGHT)


def test_draws_do_not_depend_on_which_positions_count(backend):
    # With one component and no control variate the loss is a sum over positions.
    problem = make_problem(25, components=1, draws=1, control_variate=False)
    problem |= {"consistency_x": None, "data_weight": 0.0}

    def value(*positions: int) -> Tensor:
        valid = torch.zeros(2, 5, dtype=torch.bool)
        valid[:, list(positions)] = True
        generator = torch.Generator().manual_seed(4)
        return run_loss(
            problem, valid=valid, generator=generator, reduction="none", backend=backend
        )

    torch.testing.assert_close(value(0, 1, 2, 3, 4), value(0, 3) + value(1, 2, 4), **TIGHT)


def test_revealed_tokens_take_the_place_of_their_draws(backend):
    problem = make_problem(26, mask_id=3, revealed=True)
    shown = problem["consistency_x"]
    all_revealed = problem | {"xu": shown}
    expected = run_loss(all_revealed, backend=backend)
    actual = run_loss(all_revealed | {"consistency_x": None}, backend=backend)
    assert torch.equal(actual, expected)


def test_repeated_backward_draws_the_same_tokens(backend):
    problem = make_problem(27, **FULL) | {"consistency_x": None}
    for reduction in ("mean", "none"):
        student = problem["student"].clone().requires_grad_()
        value = run_loss(problem | {"student": student}, reduction=reduction, backend=backend)
        (first,) = torch.autograd.grad(value.sum(), student, retain_graph=True)
        (second,) = torch.autograd.grad(value.sum(), student)
        torch.testing.assert_close(first, second, **TIGHT)
