"""What holds for every process: its times, what noise leaves alone, teacher steps, randomness."""

from __future__ import annotations

import pytest
import torch
from process_cases import MASK, PROCESSES, VOCAB, rng
from scipy import stats
from torch import Tensor

from di4c_fast.heads import LinearHead, LogisticHead
from di4c_fast.processes import MaskedProcess, MaskGITProcess, Process, gaussian, masked, maskgit
from di4c_fast.processes.reveal import SCHEDULES, masked_share
from di4c_fast.testing import P_VALUE, assert_frequency
from tools.own_head import OwnHead

with_masks = pytest.mark.parametrize("name", [name for name in PROCESSES if name != "gaussian"])
# The first training time; the loss's mask; the time of the component term.
FACTS = {"gaussian": (0.011, None, 0.01), "masked": (1e-5, MASK, None)}
PIECES = {"gaussian": (gaussian, "_PIECE", dict.fromkeys(("cpu", "other"), 1))}
PIECES |= {"masked": (masked, "_SMALL_PIECE", 1)}


@pytest.fixture(params=PROCESSES)
def name(request) -> str:
    return request.param


def step(name: str, xt: Tensor, t, u, head, draws: int = 4, seed: int = 0, **more) -> Tensor:
    times = [torch.as_tensor(x, dtype=torch.float32).expand(len(xt)) for x in (t, u)]
    return PROCESSES[name].teacher_step(xt, *times, head, draws, generator=rng(seed), **more)


def some_tokens(*shape: int, seed: int = 0, vocabulary: int = VOCAB) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=rng(seed))


def test_it_is_a_process(name):
    process = PROCESSES[name]
    assert isinstance(process, Process)
    _, loss_mask_id, component_time = FACTS.get(name, (None, None, None))
    assert process.loss_mask_id == loss_mask_id
    assert process.component_time == component_time


# Times


def assert_uniform(t: Tensor, low: float, high: float) -> None:
    assert float(t.min()) >= low - 1e-9  # float32
    assert float(t.max()) <= high
    assert stats.kstest((t.numpy() - low) / (high - low), "uniform").pvalue > P_VALUE


def test_times_are_uniform_below_and_above_the_low_time(name):
    process, first = PROCESSES[name], FACTS.get(name, (1e-5,))[0]
    t = process.sample_times(20_000, generator=rng())
    assert t.dtype == torch.float32
    assert t.shape == (20_000,)
    assert_uniform(t, first, 1.0)
    t = process.sample_times(40_000, low_t=0.02, low_t_probability=0.3, generator=rng(1))
    low = t < 0.02
    assert_frequency(int(low.sum()), len(t), 0.3)
    assert_uniform(t[low], first, 0.02)
    assert_uniform(t[~low], 0.02, 1.0)
    for probability in (0.0, 1.0):
        how = {"low_t": 0.25, "low_t_probability": probability, "generator": rng(2)}
        assert bool(((process.sample_times(1000, **how) < 0.25) == (probability == 1.0)).all())
    for stratified in (False, True):
        assert process.sample_times(0, stratified=stratified).shape == (0,)


def test_stratified_times_split_the_batch_and_keep_the_law_of_each_example(name):
    process, generator = PROCESSES[name], rng(4)
    for seed in range(20):
        how = {"low_t": 0.02, "low_t_probability": 0.3, "generator": rng(seed)}
        assert int((process.sample_times(10, stratified=True, **how) < 0.02).sum()) == 3
    times = [process.sample_times(4, stratified=True, generator=generator) for _ in range(4000)]
    for column in torch.stack(times).unbind(1):
        assert_uniform(column, FACTS.get(name, (1e-5,))[0], 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e-9, 1e-5, 1e-3, 0.2, 1.0])
def test_steps_from_times_of_any_dtype_end_before_them(name, dtype, length):
    t = torch.tensor([1.0, 0.9, 0.5, 0.011, 0.0101], dtype=dtype)
    t[4] = torch.nextafter(t[4].fill_(0.01), t[0]) if dtype == torch.float32 else t[3]
    least = 0.01 - 1e-9 if name == "gaussian" else 0.0  # t_min of the Gaussian in float32
    for seed in range(20):
        u = PROCESSES[name].step_time(t, length, generator=rng(seed))
        assert u.dtype == torch.promote_types(dtype, torch.float32)
        assert bool(((u < t) & (u >= least)).all())
    xu = PROCESSES[name].teacher_step(some_tokens(5, 3), t, u, torch.zeros(5, 3, VOCAB), 2)
    assert xu.shape == (5, 2, 3)


# Corruption


@pytest.mark.parametrize(
    "process", [MaskedProcess(MASK), *(MaskGITProcess(MASK, schedule=name) for name in SCHEDULES)]
)
def test_each_example_is_masked_at_the_share_of_its_own_time(process):
    t = torch.tensor([0.05, 0.3, 0.9, 1.0])
    x0 = torch.arange(4).repeat(5000).expand(4, -1)
    xt = process.corrupt(x0, t, generator=rng(5))
    noised = xt == MASK
    by_ratio = isinstance(process, MaskGITProcess)
    shares = masked_share(1 - t.double(), process.schedule) if by_ratio else t
    for row, share in zip(noised, shares.tolist(), strict=True):
        assert_frequency(int(row.sum()), row.numel(), share)
    assert bool(noised[3].all())
    assert torch.equal(xt[~noised], x0[~noised])


def test_positions_outside_valid_stay_and_may_hold_anything(name):
    valid = torch.arange(50).expand(3, -1) < 40
    x0 = some_tokens(3, 50, vocabulary=MASK)
    x0[:, 40:45] = MASK
    x0[:, 45:] = -100
    xt = PROCESSES[name].corrupt(x0, torch.ones(3), valid=valid, generator=rng(6))
    assert torch.equal(xt[:, 40:], x0[:, 40:])
    if name == "gaussian":
        assert bool(((xt[:, :40] >= 0) & (xt[:, :40] < VOCAB)).all())
        assert not torch.equal(xt[:, :40], x0[:, :40])
    else:
        assert bool((xt[:, :40] == MASK).all())
    # And in a step: others are drawn as if these held a token.
    head = torch.randn(3, 50, VOCAB, generator=rng(1))
    xu = step(name, xt, 0.9, 0.1, head, valid=valid)
    assert torch.equal(xu[:, :, 40:], xt[:, None, 40:].expand(-1, 4, -1))
    if not name.startswith("maskgit"):  # whose counts follow `valid`
        known = torch.where(valid, xt, 0)
        assert torch.equal(xu[:, :, :40], step(name, known, 0.9, 0.1, head)[:, :, :40])


def test_the_generator_alone_decides(name):
    x0, t = some_tokens(2, 30, vocabulary=MASK), torch.tensor([0.4, 0.6])
    first, again, other = (PROCESSES[name].corrupt(x0, t, generator=rng(s)) for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    logits = torch.randn(2, 30, VOCAB, generator=rng(), requires_grad=True)
    xt = torch.full((2, 30), MASK)
    first, again, other = (step(name, xt, 1.0, 0.5, logits, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad
    assert bool((xt == MASK).all())


def test_nothing_comes_of_an_empty_batch(name):
    nothing, times = torch.empty(0, 3, dtype=torch.int64), torch.empty(0)
    assert PROCESSES[name].corrupt(nothing, times).shape == (0, 3)
    assert step(name, nothing, times, times, torch.empty(0, 3, VOCAB), 2).shape == (0, 2, 3)


# Teacher steps


@with_masks
def test_tokens_that_are_there_stay_and_cost_nothing(name):
    xt, head = some_tokens(2, 40, seed=11), OwnHead(torch.randn(2, 40, VOCAB))
    xt[:, ::2] = MASK
    xu = step(name, xt, 0.9, 0.1, head, 5)
    known = (xt != MASK).unsqueeze(1).expand_as(xu)
    assert torch.equal(xu[known], xt.unsqueeze(1).expand_as(xu)[known])
    assert 0 < int((xu == MASK).sum()) < int((~known).sum())
    assert bool((xt.flatten()[torch.cat(head.taken)] == MASK).all())
    head.taken.clear()
    xu = step(name, torch.where(xt == MASK, 0, xt), 1.0, 0.0, head)
    assert torch.equal(xu, torch.where(xt == MASK, 0, xt).unsqueeze(1).expand_as(xu))
    assert head.taken == []


@with_masks
@pytest.mark.parametrize("draws", [2, 3, 5])
def test_draw_k_follows_component_k_of_the_teacher(name, draws):
    components = 3
    # Component m of example b always gives token (m + b) mod 4, and would rather give the mask.
    wanted = (torch.arange(components) + torch.arange(2).unsqueeze(1)) % 4
    logits = torch.full((2, components, 6, VOCAB), -1e9)
    logits.scatter_(3, wanted.view(2, components, 1, 1).expand(-1, -1, 6, 1), 0.0)
    logits[..., MASK] = 50.0
    xu = step(name, torch.full((2, 6), MASK), 1.0, 0.0, logits, draws)
    expected = wanted[:, torch.arange(draws) % components]
    assert torch.equal(xu, expected.unsqueeze(-1).expand_as(xu))


def test_heads_and_pieces_do_not_change_the_draws(name, monkeypatch):
    # In float64, where no draw hangs on the rounding of a product.
    hidden = torch.randn(2, 9, 3, generator=rng(13)).double()
    weight, bias = torch.randn(VOCAB, 3, generator=rng(14)).double(), torch.randn(9, VOCAB).double()
    head, xt = LinearHead(hidden, weight, bias), some_tokens(2, 9, seed=15)
    xt[0] = MASK
    for kind in (head, LogisticHead(hidden[..., 0], hidden[..., 1], VOCAB)):
        whole = step(name, xt, 1.0, 0.3, kind, 7)
        assert torch.equal(step(name, xt, 1.0, 0.3, kind.logits(), 7), whole)
    whole = step(name, xt, 1.0, 0.3, head, 7)
    monkeypatch.setattr(*PIECES.get(name, (maskgit, "_PIECE", 4 * VOCAB)))
    assert torch.equal(step(name, xt, 1.0, 0.3, head, 7), whole)
