"""The discretised Gaussian process: exact matrices, exact draws, one teacher pass for all draws."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import linalg, stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from di4c_fast import transitions
from di4c_fast.distill import DistillConfig, distill_step
from di4c_fast.heads import LogisticHead, TensorHead
from di4c_fast.processes import GaussianProcess, Process, gaussian
from di4c_fast.testing import P_VALUE, assert_counts_match, assert_draws_match
from di4c_fast.transitions import (
    GaussianTransitions,
    draw_by_weights,
    draw_from_cdf,
    fine_uniform,
)

V = 5
# Wide moves and a target that is not flat, so that nothing is symmetric by accident.
SMALL = GaussianProcess(V, rate_sigma=1.2, target_sigma=2.0, time_base=0.02)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(process: GaussianProcess, s: float, t: float) -> Tensor:
    """Q(s → t) from the matrix exponential."""
    passed = process.time_base * (process.time_exponential**t - process.time_exponential**s)
    return torch.matrix_exp(process.transitions.rate * passed)


def posterior(process: GaussianProcess, p0: Tensor, xt: int, u: float, t: float) -> Tensor:
    """Law of x_u given x_t and p(x_0 | x_t), by enumeration over x_0."""
    joint = exact(process, 0.0, u) * exact(process, u, t)[:, xt]  # [x_0, x_u]
    return p0.double() @ (joint / joint.sum(1, keepdim=True))


def test_gaussian_process_is_a_process():
    process = GaussianProcess(256, t_min=0.02)
    assert isinstance(process, Process)
    assert process.loss_mask_id is None
    assert process.component_time == 0.02


# Rate and transition matrices


def literal_rate(classes: int, rate_sigma: float, target_sigma: float) -> Tensor:
    """Moves inwards first, then moves back by detailed balance, pair by pair."""
    weight = [
        math.exp(-((i - classes / 2) ** 2) / (2 * target_sigma**2)) for i in range(1, classes + 1)
    ]
    rate = torch.zeros(classes, classes, dtype=torch.float64)
    for low in range(classes):
        for high in range(low + 1, classes):
            size = math.exp(-((high - low - 1) ** 2) / rate_sigma**2)
            if low + high < classes:
                rate[low, high] = size
                rate[high, low] = size * weight[low] / weight[high]
            else:
                rate[high, low] = size
                rate[low, high] = size * weight[high] / weight[low]
    return rate - torch.diag(rate.sum(1))


@pytest.mark.parametrize("classes", [2, 5, 8, 17])
def test_rate_follows_its_definition_and_keeps_the_target(classes):
    made = GaussianTransitions(classes, rate_sigma=1.7, target_sigma=3.0)
    torch.testing.assert_close(made.rate, literal_rate(classes, 1.7, 3.0), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(
        made.target @ made.rate, torch.zeros(classes, dtype=torch.float64), rtol=0, atol=1e-14
    )
    flow = made.target.unsqueeze(1) * made.rate
    torch.testing.assert_close(flow, flow.T, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("classes", "sigma"), [(2, 512.0), (5, 1.0), (17, 20.0), (256, 512.0)])
def test_transitions_match_the_matrix_exponential(classes, sigma):
    made = GaussianTransitions(classes, target_sigma=sigma)
    t = torch.tensor([1e-3, 0.01, 0.3, 1.0])
    ours = made.batched(0.0, t)
    truth = torch.stack(
        [
            torch.from_numpy(linalg.expm((made.rate * made.elapsed(torch.zeros(()), x)).numpy()))
            for x in t.unbind()
        ]
    )
    assert ours.dtype == torch.float64
    # Rounding of a few float64 products; torch.matrix_exp is off by 3e-11 at short times.
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-13)
    assert bool((ours >= 0).all())
    torch.testing.assert_close(ours.sum(-1), torch.ones(4, classes).double(), rtol=0, atol=1e-14)


def test_transitions_compose_over_time():
    made = GaussianTransitions(17, rate_sigma=1.0, target_sigma=10.0)
    s, t = torch.tensor([0.01, 0.2, 0.6]), torch.tensor([0.3, 0.2005, 1.0])
    two = made.batched(0.0, s) @ made.batched(s, t)
    torch.testing.assert_close(two, made.batched(0.0, t), rtol=0, atol=1e-13)


def test_no_time_means_no_move():
    t = torch.tensor([0.4])
    torch.testing.assert_close(
        SMALL.transitions.batched(t, t)[0], torch.eye(V).double(), rtol=0, atol=1e-14
    )


def test_columns_are_the_transpose():
    made, t = GaussianTransitions(17, target_sigma=4.0), torch.tensor([0.01, 0.7])
    columns = made.batched(0.0, t, columns=True)
    assert columns.is_contiguous()
    torch.testing.assert_close(columns.mT, made.batched(0.0, t), rtol=0, atol=1e-15)


def test_short_times_keep_their_relative_accuracy():
    made = GaussianTransitions(17)
    t = torch.tensor(0.5, dtype=torch.float64)
    passed = made.elapsed(t - 1e-9, t)
    expected = made.time_base * 10.0 * math.log(100.0) * float(t - (t - 1e-9))
    assert float(passed) == pytest.approx(expected, rel=1e-8)


def test_matrices_between_two_numbers_are_made_once():
    made = GaussianTransitions(V)
    first = made.between(0.1, 0.3, dtype=torch.float32)
    assert made.between(0.1, 0.3, dtype=torch.float32) is first
    assert made.between(0.1, 0.3) is not first
    assert made.between(0.1, 0.3 + 1e-16 * 8) is not made.between(0.1, 0.3)
    batched = made.batched(torch.tensor([0.1]).double(), torch.tensor([0.3]).double())
    assert torch.equal(first, batched[0].float())


def test_cache_keeps_the_matrices_used_last(monkeypatch):
    monkeypatch.setattr(transitions, "_CACHE_BYTES", 2 * V * V * 8)
    made = GaussianTransitions(V)
    a, b = made.between(0.0, 0.1), made.between(0.0, 0.2)
    assert made.between(0.0, 0.1) is a
    made.between(0.0, 0.3)
    assert made.between(0.0, 0.1) is a
    assert made.between(0.0, 0.2) is not b


def test_matrices_made_in_inference_mode_serve_outside_of_it():
    made = GaussianTransitions(V)
    with torch.inference_mode():
        made.between(0.0, 0.5)
        made.batched(0.0, torch.tensor([0.5]))
    weight = torch.ones(V, dtype=torch.float64, requires_grad=True)
    (made.between(0.0, 0.5) @ weight).sum().backward()
    assert weight.grad is not None


def test_equal_processes_share_their_matrices():
    assert GaussianProcess(7).transitions is GaussianProcess(7, t_min=0.5).transitions
    assert GaussianProcess(7).transitions is not GaussianProcess(7, rate_sigma=1.0).transitions


# Draws from rows


def test_draws_by_weights_follow_them():
    weights = torch.tensor([[0.0, 3.0, 1.0, 0.0, 2.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 1e-3]])
    u = fine_uniform(5, 0, torch.arange(2), 60_000)
    tokens = draw_by_weights(weights, u)
    for row, weight in zip(tokens, weights, strict=True):
        assert_draws_match(row, weight)


def test_classes_of_weight_zero_are_never_drawn_at_the_ends():
    weights = torch.tensor([[0.0, 0.7, 0.0, 0.3, 0.0]])
    u = torch.tensor([[2.0**-53, 1.0 - 2.0**-53]], dtype=torch.float64)
    assert draw_by_weights(weights, u).tolist() == [[1, 3]]
    cdf = weights.double().cumsum(-1)
    drawn = draw_from_cdf(cdf, torch.zeros(2, dtype=torch.int64), u[0])
    assert drawn.tolist() == [1, 3]


@pytest.mark.parametrize("classes", [1, 2, 3, 8, 17])
def test_draws_from_a_table_are_those_of_a_copied_row(classes):
    weights = torch.rand(6, classes, generator=rng()) + 0.01
    rows = torch.randint(0, 6, (40, 9), generator=rng(1))
    u = fine_uniform(1, 0, torch.arange(40), 9)
    expected = draw_by_weights(weights[rows].flatten(0, 1), u.reshape(-1, 1)).view(rows.shape)
    assert torch.equal(draw_from_cdf(weights.double().cumsum(-1), rows, u), expected)


def test_fine_uniforms_depend_on_seed_step_key_and_column_alone():
    keys = torch.tensor([3, 9])
    u = fine_uniform(7, 2, keys, 5)
    assert u.dtype == torch.float64
    assert torch.equal(fine_uniform(7, 2, keys.flip(0), 3), u.flip(0)[:, :3])
    assert not bool((fine_uniform(8, 2, keys, 5) == u).any())
    assert not bool((fine_uniform(7, 3, keys, 5) == u).any())
    many = fine_uniform(0, 0, torch.arange(2000), 10)
    assert stats.kstest(many.flatten().numpy(), "uniform").pvalue > P_VALUE


# Times


def test_times_are_uniform_above_the_smallest():
    process = GaussianProcess(V, t_min=0.1, min_step=0.05)
    t = process.sample_times(20_000, generator=rng())
    assert t.dtype == torch.float32
    assert float(t.min()) >= 0.15
    assert float(t.max()) <= 1.0
    assert stats.kstest((t.numpy() - 0.15) / 0.85, "uniform").pvalue > P_VALUE


def test_low_times_have_their_probability():
    t = GaussianProcess(V).sample_times(20_000, low_t=0.3, low_t_probability=0.25, generator=rng(1))
    low = t[t < 0.3]
    assert stats.binomtest(len(low), len(t), 0.25).pvalue > P_VALUE
    assert stats.kstest((low.numpy() - 0.011) / 0.289, "uniform").pvalue > P_VALUE


def test_no_times_for_an_empty_batch():
    assert GaussianProcess(V).sample_times(0).shape == (0,)


def test_steps_are_log_uniform():
    t = torch.ones(20_000, dtype=torch.float64)
    u = GaussianProcess(V).step_time(t, 1e-2, generator=rng(2))
    assert u.dtype == torch.float64
    share = torch.log10((t - u) / 1e-3)
    assert stats.kstest(share.numpy(), "uniform").pvalue > P_VALUE


def test_steps_near_the_smallest_time_end_there_or_above():
    process = GaussianProcess(V)
    t = torch.full((1000,), 0.013)
    u = process.step_time(t, 1e-2, generator=rng(3))
    assert float(u.min()) >= 0.01 - 1e-9  # float32 of t_min
    lengths = (t - u).double()
    assert float(lengths.min()) >= 1e-3 - 2e-9
    share = torch.log(lengths / 1e-3) / math.log(0.003 / 1e-3)
    # float32 times of 0.01 resolve lengths to 1e-9, far below what the test can see.
    assert stats.kstest(share.numpy(), "uniform").pvalue > P_VALUE


@pytest.mark.parametrize("step", [1e-5, 1e-3, 1.0])
def test_steps_always_lead_down(step):
    process = GaussianProcess(V)
    just = float(torch.nextafter(torch.tensor(0.01), torch.tensor(1.0)))
    t = torch.tensor([just, 0.0101, 0.011, 0.5, 1.0])
    for seed in range(20):
        u = process.step_time(t, step, generator=rng(seed))
        assert u.dtype == torch.float32
        assert bool((u < t).all())
        assert float(u.min()) >= 0.01 - 1e-9


# Corruption


def test_corruption_follows_the_exact_law():
    t = torch.tensor([0.02, 0.4, 1.0])
    x0 = torch.arange(V).repeat(8000).expand(3, -1)
    xt = SMALL.corrupt(x0, t, generator=rng(4))
    for row, clean, time in zip(xt, x0, t.tolist(), strict=True):
        counts = torch.bincount(clean * V + row, minlength=V * V).view(V, V)
        law = exact(SMALL, 0.0, time)
        for value in range(V):
            assert_counts_match(counts[value], law[value], name=f"t = {time:.2f}, x0 = {value}")


def test_corruption_is_independent_between_positions():
    x0 = torch.tensor([[1, 3]]).expand(30_000, -1)
    xt = SMALL.corrupt(x0, torch.full((30_000,), 0.5), generator=rng(5))
    law = exact(SMALL, 0.0, 0.5)
    pair = (law[1].unsqueeze(1) * law[3]).flatten()
    assert_counts_match(torch.bincount(xt[:, 0] * V + xt[:, 1], minlength=V * V), pair)


def test_positions_outside_valid_stay_and_may_hold_anything():
    x0 = torch.randint(0, V, (3, 40), generator=rng())
    x0[:, 30:] = 99
    valid = torch.arange(40).expand(3, -1) < 30
    xt = SMALL.corrupt(x0, torch.ones(3), valid=valid, generator=rng(6))
    assert torch.equal(xt[:, 30:], x0[:, 30:])
    assert bool((xt[:, :30] < V).all())
    assert not torch.equal(xt[:, :30], x0[:, :30])


def test_corruption_of_nothing():
    assert SMALL.corrupt(torch.empty(0, 3).long(), torch.empty(0)).shape == (0, 3)


# Teacher steps


def test_teacher_steps_follow_the_enumerated_posterior():
    logits = 1.5 * torch.randn(2, 2, V, generator=rng(7))
    xt = torch.tensor([[0, 3], [4, 2]])
    t, u = torch.tensor([0.9, 0.5]), torch.tensor([0.6, 0.05])
    xu = SMALL.teacher_step(xt, t, u, logits, 40_000, generator=rng(8))
    assert xu.shape == (2, 40_000, 2)
    for b in range(2):
        laws = [
            posterior(SMALL, logits[b, d].softmax(-1), int(xt[b, d]), float(u[b]), float(t[b]))
            for d in range(2)
        ]
        pairs = torch.bincount(xu[b, :, 0] * V + xu[b, :, 1], minlength=V * V)
        assert_counts_match(pairs, (laws[0].unsqueeze(1) * laws[1]).flatten(), name=f"pairs {b}")
        for d in range(2):
            assert_draws_match(xu[b, :, d], laws[d], name=f"example {b}, position {d}")


def test_draws_take_turns_among_the_teachers_components():
    logits = 2.0 * torch.randn(1, 3, 2, V, generator=rng(9))
    xt, t, u = torch.tensor([[1, 2]]), torch.tensor([0.8]), torch.tensor([0.3])
    # A number of draws that the components do not divide.
    xu = SMALL.teacher_step(xt, t, u, logits, 40_001, generator=rng(10))[0]
    for m in range(3):
        for d in range(2):
            law = posterior(SMALL, logits[0, m, d].softmax(-1), int(xt[0, d]), 0.3, 0.8)
            assert_draws_match(xu[m::3, d], law, name=f"component {m}, position {d}")


def test_more_components_than_draws_use_the_first():
    logits = torch.full((1, 4, 3, V), math.nan)
    logits[:, :2] = 0.0
    xt = torch.tensor([[0, 1, 2]])
    xu = SMALL.teacher_step(xt, torch.tensor([0.5]), torch.tensor([0.4]), logits, 2)
    assert xu.shape == (1, 2, 3)


def test_step_to_time_zero_draws_from_the_denoiser():
    logits = torch.randn(1, 1, V, generator=rng(11))
    xu = SMALL.teacher_step(
        torch.tensor([[2]]), torch.tensor([1.0]), torch.tensor([0.0]), logits, 30_000,
        generator=rng(12),
    )  # fmt: skip
    assert_draws_match(xu, logits[0, 0].softmax(-1))


def test_logistic_head_draws_as_its_logits_do():
    process = GaussianProcess(17, rate_sigma=1.0)
    head = LogisticHead(torch.randn(2, 6, generator=rng()), torch.zeros(2, 6), 17)
    xt = torch.randint(0, 17, (2, 6), generator=rng(1))
    t, u = torch.tensor([0.5, 0.7]), torch.tensor([0.49, 0.695])
    one, other = (
        process.teacher_step(xt, t, u, value, 8, generator=rng(2))
        for value in (head, head.logits())
    )
    assert torch.equal(one, other)


def test_pieces_of_positions_do_not_change_the_draws(monkeypatch):
    taken: list[Tensor] = []

    class CountingHead(TensorHead):
        def take(self, rows: Tensor) -> TensorHead:
            taken.append(rows)
            return super().take(rows)

    logits = torch.randn(2, 3, 9, V, generator=rng(13))
    arguments = (
        torch.randint(0, V, (2, 9), generator=rng(14)),
        torch.tensor([0.5, 0.9]),
        torch.tensor([0.2, 0.8]),
        CountingHead(logits),
        7,
    )
    whole = SMALL.teacher_step(*arguments, generator=rng(15))
    assert [rows.shape[-1] for rows in taken] == [9]
    taken.clear()
    monkeypatch.setattr(gaussian, "_PIECE", {"cpu": 1, "other": 1})
    monkeypatch.setattr(gaussian, "_FEWEST_POSITIONS", 2)
    assert torch.equal(SMALL.teacher_step(*arguments, generator=rng(15)), whole)
    assert [rows.shape[-1] for rows in taken] == [2, 2, 2, 2, 1]


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes():
                self.numel = max(self.numel, value.untyped_storage().nbytes() // 8)
        return result


def test_nothing_of_draws_times_positions_times_classes_exists(monkeypatch):
    draws, positions, classes = 64, 512, 17
    process = GaussianProcess(classes)
    head = LogisticHead(torch.zeros(1, positions), torch.zeros(1, positions), classes)
    xt = torch.zeros(1, positions, dtype=torch.int64)
    monkeypatch.setattr(gaussian, "_PIECE", {"cpu": 64 * classes, "other": 64 * classes})
    with Largest() as seen:
        process.teacher_step(xt, torch.tensor([0.5]), torch.tensor([0.49]), head, draws)
    assert 0 < seen.numel <= 2 * draws * positions  # the result, and nothing near · classes


def test_teacher_that_is_certain_of_the_impossible_leaves_the_forward_move():
    process = GaussianProcess(64, rate_sigma=1.0)
    logits = torch.full((1, 1, 64), -math.inf)
    logits[..., 60] = 0.0
    xt, t, u = torch.tensor([[3]]), torch.tensor([0.02]), torch.tensor([0.01])
    xu = process.teacher_step(xt, t, u, logits, 20_000, generator=rng(16))
    law = process.transitions.batched(u.double(), t.double())[0, :, 3]
    assert_draws_match(xu, law)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_teacher_steps_in_other_dtypes_and_under_autocast(dtype):
    logits = torch.randn(1, 4, V, generator=rng(17)).to(dtype)
    xt, t, u = torch.zeros(1, 4).long(), torch.tensor([0.9]), torch.tensor([0.2])
    plain = SMALL.teacher_step(xt, t, u, logits.float(), 50, generator=rng(18))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = SMALL.teacher_step(xt, t, u, logits, 50, generator=rng(18))
    # float64 rows are computed in float64, so that one draw in 1e6 may fall to the other side.
    assert torch.equal(plain, other)


def test_same_generator_gives_the_same_step():
    logits = torch.zeros(2, 3, V)
    xt, t = torch.zeros(2, 3).long(), torch.tensor([0.5, 0.6])
    steps = [SMALL.teacher_step(xt, t, t - 0.2, logits, 9, generator=rng(s)) for s in (1, 1, 2)]
    assert torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])


def test_teacher_step_of_nothing():
    empty = torch.empty(0)
    xu = SMALL.teacher_step(torch.empty(0, 3).long(), empty, empty, torch.empty(0, 3, V), 2)
    assert xu.shape == (0, 2, 3)


# Posterior steps


def test_positions_that_are_not_valid_keep_their_token():
    xt = torch.tensor([[0, -100, 2]])
    valid = torch.tensor([[True, False, True]])
    t, logits = torch.tensor([0.9]), torch.randn(1, 3, V, generator=rng(1))
    xu = SMALL.teacher_step(xt, t, t - 0.5, logits, 5, valid=valid, generator=rng(2))
    assert (xu[:, :, 1] == -100).all()
    known = SMALL.teacher_step(xt.clamp_min(0), t, t - 0.5, logits, 5, valid=None, generator=rng(2))
    assert torch.equal(xu[:, :, [0, 2]], known[:, :, [0, 2]])
    with pytest.raises(ValueError, match="valid must have shape"):
        SMALL.teacher_step(xt, t, t - 0.5, logits, 5, valid=valid[:, :2])


def test_posterior_steps_follow_bayes():
    x0, xt = torch.tensor([0, 2, 4, 1]), torch.tensor([3, 2, 0, 0])
    rows = 15_000
    xs = SMALL.posterior_step(
        x0.repeat(rows).view(rows, 4), xt.repeat(rows).view(rows, 4), 0.8, 0.35, seed=3
    )
    for d in range(4):
        onehot = torch.nn.functional.one_hot(x0[d], V)
        law = posterior(SMALL, onehot, int(xt[d]), 0.35, 0.8)
        assert_draws_match(xs[:, d], law, name=f"x0 = {x0[d]}, xt = {xt[d]}")


def test_posterior_step_to_time_zero_is_x0():
    x0 = torch.tensor([[0, 1, 2, 3, 4]])
    assert torch.equal(SMALL.posterior_step(x0, x0.flip(1), 0.7, 0.0, seed=1), x0)


def test_posterior_steps_depend_on_their_row_keys_alone(monkeypatch):
    x0 = torch.randint(0, V, (30, 4), generator=rng(19))
    xt = torch.randint(0, V, (30, 4), generator=rng(20))
    keys = torch.arange(120).view(30, 4) + 1000
    whole = SMALL.posterior_step(x0, xt, 0.8, 0.3, seed=9, step=4, row_keys=keys)
    monkeypatch.setattr(gaussian, "_PIECE", {"cpu": 7 * V, "other": 7 * V})
    part = SMALL.posterior_step(
        x0[7:9].flip(0), xt[7:9].flip(0), 0.8, 0.3, seed=9, step=4, row_keys=keys[7:9].flip(0)
    )
    assert torch.equal(part.flip(0), whole[7:9])
    again = SMALL.posterior_step(x0, xt, 0.8, 0.3, seed=9, step=4, row_keys=keys)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("law", ["target", "uniform"])
def test_initial_tokens_follow_their_law(law):
    tokens = SMALL.initial(3, 0, torch.arange(20_000), law)
    expected = SMALL.transitions.target if law == "target" else torch.ones(V)
    assert_draws_match(tokens, expected)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"rate_sigma": 0.0}, "rate_sigma must be greater than 0, got 0.0"),
        ({"rate_sigma": math.nan}, "rate_sigma must be finite, got nan"),
        ({"target_sigma": -1.0}, "target_sigma must be greater than 0, got -1.0"),
        ({"target_sigma": 20.0}, r"target_sigma must be at least num_classes / 12 = 21.33"),
        ({"time_base": 0.0}, "time_base must be greater than 0, got 0.0"),
        ({"time_exponential": 1.0}, "time_exponential must be greater than 1, got 1.0"),
        ({"t_min": 0.0}, r"t_min must be in \(0, 1\), got 0.0"),
        ({"min_step": 1.0}, r"min_step must be in \(0, 1\), got 1.0"),
        ({"t_min": 0.5, "min_step": 0.5}, "t_min \\+ min_step must be below 1"),
        ({"eps": 0.0}, r"eps must be in \(0, 1\), got 0.0"),
    ],
)
def test_values_of_the_process_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        GaussianProcess(**{"num_classes": 256, **change})


@pytest.mark.parametrize(
    "name", ["num_classes", "rate_sigma", "target_sigma", "time_base", "time_exponential", "eps"]
)
def test_kinds_of_the_process_are_checked(name):
    with pytest.raises(TypeError, match=f"{name} must be an? .*, got str 'a'"):
        GaussianProcess(**{"num_classes": 256, name: "a"})


X, T = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0.5, 0.6])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.float(), T), TypeError, "x0 must have dtype torch.int64"),
        ((X[0], T), ValueError, "x0 must have 2 dimensions"),
        ((X + V, T), ValueError, r"x0 must hold token ids in \[0, 5\), got 5"),
        ((X - 1, T), ValueError, r"x0 must hold token ids in \[0, 5\), got -1"),
        ((X, T[:1]), ValueError, r"t must have shape \(B,\) = \(2,\), got \(1,\)"),
        ((X, T * 0), ValueError, r"t must hold times in \(0, 1\], got 0.0"),
        ((X, T * 2), ValueError, r"t must hold times in \(0, 1\], got 1.2"),
        ((X, T * math.nan), ValueError, r"t must hold times in \(0, 1\], got nan"),
        ((X, T.long()), TypeError, "t must be floating point"),
        ((X, T.to("meta")), ValueError, "t must be on the device of the tokens"),
    ],
)
def test_corruption_checks_its_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        SMALL.corrupt(*arguments)


def test_corruption_checks_its_generator():
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator"):
        SMALL.corrupt(X, T, generator=3)


@pytest.mark.parametrize(
    ("valid", "error", "message"),
    [
        (X, TypeError, "valid must have dtype torch.bool"),
        (X[:, :2].bool(), ValueError, r"valid must have shape \(B, D\) = \(2, 3\), got \(2, 2\)"),
        ("all", TypeError, "valid must be a Tensor"),
        (X.bool().to("meta"), ValueError, "valid must be on the device of x0"),
    ],
)
def test_corruption_checks_valid(valid, error, message):
    with pytest.raises(error, match=message):
        SMALL.corrupt(X, T, valid=valid)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "batch must not be negative"),
        ((2.0,), TypeError, "batch must be an int"),
    ],
)
def test_times_check_the_batch(arguments, error, message):
    with pytest.raises(error, match=message):
        SMALL.sample_times(*arguments)


@pytest.mark.parametrize("name", ["low_t", "low_t_probability"])
def test_times_check_their_shares(name):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got 1.5"):
        SMALL.sample_times(2, **{name: 1.5})


@pytest.mark.parametrize(
    ("t", "step", "message"),
    [
        (T, 0.0, r"step must be in \(0, 1\], got 0.0"),
        (T, 1.5, r"step must be in \(0, 1\], got 1.5"),
        (torch.tensor([0.5, 0.01]), 0.1, "t must be greater than t_min = 0.01"),
        (T.sum(), 0.1, "t must have shape"),
    ],
)
def test_step_times_check_their_arguments(t, step, message):
    with pytest.raises(ValueError, match=message):
        SMALL.step_time(t, step)


LOGITS = torch.zeros(2, 3, V)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"xt": X.float()}, TypeError, "xt must have dtype torch.int64"),
        ({"xt": X + V}, ValueError, r"xt must hold token ids in \[0, 5\)"),
        ({"xt": X[0]}, ValueError, "xt must have 2 dimensions"),
        ({"t": T[:1]}, ValueError, r"t must have shape \(B,\)"),
        ({"u": T[:1]}, ValueError, r"u must have shape \(B,\)"),
        ({"u": 0.1}, TypeError, "u must be a Tensor"),
        ({"u": T}, ValueError, "u must hold times with 0 <= u < t"),
        ({"u": T - 1}, ValueError, "u must hold times with 0 <= u < t"),
        ({"u": T.to("meta")}, ValueError, "u must be on the device of xt"),
        ({"draws": 0}, ValueError, "draws must be at least 1, got 0"),
        ({"draws": 1.0}, TypeError, "draws must be an int"),
        ({"teacher_head": LOGITS[:1]}, ValueError, r"teacher_head must have shape \(B, D, V\)"),
        ({"teacher_head": LOGITS[..., :4]}, ValueError, "teacher_head must have shape"),
        ({"teacher_head": LOGITS.long()}, TypeError, "teacher_head must be floating point"),
        ({"teacher_head": LOGITS.to("meta")}, ValueError, "teacher_head must be on the device"),
        ({"teacher_head": LOGITS * math.nan}, ValueError, "teacher_head must hold numbers"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None"),
    ],
)
def test_teacher_steps_check_their_arguments(change, error, message):
    arguments = {"xt": X, "t": T, "u": T / 2, "teacher_head": LOGITS, "draws": 2, **change}
    with pytest.raises(error, match=message):
        SMALL.teacher_step(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": X + V}, ValueError, r"x0 must hold token ids in \[0, 5\)"),
        ({"xt": X[:1]}, ValueError, "xt must have shape"),
        ({"s": 0.9}, ValueError, "times must be 0 <= s < t <= 1, got s = 0.9 and t = 0.8"),
        ({"t": 1.5}, ValueError, "times must be 0 <= s < t <= 1"),
        ({"s": "a"}, TypeError, "s must be a number"),
        ({"row_keys": X[:1]}, ValueError, "row_keys must have shape"),
    ],
)
def test_posterior_steps_check_their_arguments(change, error, message):
    with pytest.raises(error, match=message):
        SMALL.posterior_step(**{"x0": X, "xt": X, "t": 0.8, "s": 0.3, "seed": 1, **change})


# In a distillation step


class TwoTones:
    """Rows of one low or one high tone, and the exact denoiser of such data."""

    levels = (2, 6)
    process = GaussianProcess(9, rate_sigma=1.0, target_sigma=9.0)

    def data(self, batch: int, positions: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(0, 2, (batch, 1), generator=generator)
        return torch.tensor(self.levels)[which].expand(-1, positions)

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        q = self.process.transitions.batched(0.0, t)[:, list(self.levels)]  # [R, 2, V]
        joint = q.gather(2, tokens.unsqueeze(1).expand(-1, 2, -1)).log().sum(-1).softmax(-1)
        logits = torch.full((*tokens.shape, 9), -20.0)
        logits[..., list(self.levels)] = joint.unsqueeze(1).log().clamp(min=-20.0).float()
        return logits


class Student(torch.nn.Module):
    """Two numbers per pixel from the pixels, the time and λ."""

    def __init__(self, positions: int):
        super().__init__()
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(positions + 2, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2 * positions)
        )
        with torch.no_grad():
            self.inner[-1].weight.mul_(0.1)

    def forward(self, tokens: Tensor, t: Tensor, latent: Tensor) -> LogisticHead:
        x = torch.cat([tokens / 4.0 - 1.0, t.unsqueeze(1), 4.0 * latent - 2.0], dim=1)
        mu, log_scale = self.inner(x).chunk(2, dim=1)
        return LogisticHead(mu, log_scale + 1.0, 9)


def test_distillation_steps_lower_the_loss():
    torch.manual_seed(0)
    world, positions, generator = TwoTones(), 4, rng(21)
    student = Student(positions)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    config = DistillConfig(
        components=8,
        teacher_step=1e-2,
        data_weight=1.0,
        component_weight=1.0,
        component_spread=0.01,
    )
    history = []
    for _ in range(100):
        x0 = world.data(16, positions, generator)
        output = distill_step(
            student, world, x0, process=world.process, config=config, generator=generator
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        assert output.xu is not None
        assert output.xu.shape == (16, 8, positions)
        assert bool(((output.u < output.t) & (output.u >= 0.01 - 1e-9)).all())
        assert output.terms is not None
        history.append([output.loss.detach(), output.terms.component.mean()])
    trace = torch.tensor(history)
    early, late = trace[:20].mean(0), trace[-20:].mean(0)
    # Measured: 0.7 of the loss and 0.45 of the component term remain.
    assert bool((late < 0.85 * early).all()), f"{early.tolist()} -> {late.tolist()}"


def test_initial_law_is_checked():
    with pytest.raises(ValueError, match="law must be one of 'target', 'uniform', got 'normal'"):
        SMALL.initial(0, 0, torch.arange(3), "normal")
