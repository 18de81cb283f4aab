"""Row statistics and draws of the Triton kernels, one kernel at a time, under the interpreter.

Mutations and the tests that caught them: `kernels/README.md`.
"""

from __future__ import annotations

import pytest
import torch

from di4c_fast import LogisticHead

pytest.importorskip("triton")
from di4c_fast.kernels.triton import tuning
from di4c_fast.kernels.triton.draw import draw
from di4c_fast.kernels.triton.operands import (
    Visit,
    chunk_operand,
    logistic_operand,
    order_positions,
    tensor_operand,
)
from di4c_fast.kernels.triton.row_statistics import row_statistics

from di4c_fast.reference.draw import draw_ref

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="run by test_fused_gpu on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned_memory"),
]

# Two fp32 roundings of a number of size 10, and of a sum of a few hundred terms.
ATOL = 4e-6


def statistics(logits, tokens=None, mask_id=None, visit=None, xu=None, **tiles):
    """lse (B, D, N) and picked (B, D, J, N) of logits (B, N, D, V)."""
    batch, components, positions, _ = logits.shape
    lse = torch.empty(batch * positions, components)
    picked = None
    if tokens is not None:
        picked = torch.empty(batch * positions, tokens.shape[1], components)
    visit = Visit(batch * positions) if visit is None else visit
    with tuning.override(**{"row_elements": 64, **tiles}):
        row_statistics(
            tensor_operand(logits),
            visit,
            positions,
            mask_id,
            lse,
            tokens=tokens,
            picked=picked,
            xu=xu,
        )
    lse = lse.view(batch, positions, components)
    return lse, None if picked is None else picked.view(batch, positions, -1, components)


def expected_statistics(logits, tokens, mask_id=None):
    logits = logits.double()
    if mask_id is not None:
        logits = logits.index_fill(-1, torch.tensor(mask_id), -torch.inf)
    lse = logits.logsumexp(-1).permute(0, 2, 1)
    index = tokens.transpose(1, 2).unsqueeze(1).expand(-1, logits.shape[1], -1, -1)
    picked = logits.gather(-1, index).permute(0, 2, 3, 1) - lse.unsqueeze(2)
    return lse, picked


def check(logits, tokens, mask_id=None, **tiles):
    ours = statistics(logits, tokens, mask_id, **tiles)
    truth = expected_statistics(logits, tokens, mask_id)
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, atol=ATOL, rtol=4e-7)


def random_logits(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_tokens(*shape, below, seed=1):
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocabulary", [1, 31, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_every_length(vocabulary, dtype):
    """Catches (`mutate_kernels.py`): wrong stride; dropped rescale; missing tail mask."""
    logits = random_logits(2, 3, 4, vocabulary).to(dtype)
    check(logits, random_tokens(2, 2, 4, below=vocabulary))


def test_several_rows_per_program():
    check(random_logits(2, 3, 5, 13), random_tokens(2, 2, 5, below=13), row_elements=128)


def test_more_targets_than_a_tile():
    check(random_logits(1, 2, 2, 40), random_tokens(1, 35, 2, below=40), row_elements=128)


@pytest.mark.parametrize("place", [0, 63, 64, 127, 128, 129])
def test_maximum_in_every_block_and_in_the_tail(place):
    logits = random_logits(1, 2, 2, 130)
    logits[..., place] = 60.0
    check(logits, torch.full((1, 1, 2), place))


def test_large_logits_neither_overflow_nor_vanish():
    logits = 1e4 * random_logits(1, 2, 3, 70)
    check(logits, logits[:, 0].argmax(-1).unsqueeze(1))


def test_mask_column_is_excluded_and_has_no_probability():
    """Catches (`mutate_kernels.py`): mask column counted."""
    logits = random_logits(1, 2, 3, 70)
    logits[..., 5] = 50.0
    check(logits, random_tokens(1, 2, 3, below=5), mask_id=5)
    _, picked = statistics(logits, torch.full((1, 1, 3), 5), 5)
    assert torch.isneginf(picked).all()


def test_rows_without_any_class_are_minus_infinity():
    logits = random_logits(1, 2, 3, 70)
    logits[:, 1] = -torch.inf
    lse, picked = statistics(logits, random_tokens(1, 2, 3, below=70))
    assert torch.isneginf(lse[..., 1]).all()
    assert torch.isneginf(picked[..., 1]).all()
    assert torch.isfinite(lse[..., 0]).all()


def test_strided_and_expanded_logits():
    base = random_logits(2, 4, 3, 70)
    tokens = random_tokens(2, 1, 4, below=70)
    check(base.transpose(1, 2), tokens)
    check(base[:, :, :1].transpose(1, 2).expand(-1, 5, -1, -1), tokens)
    check(random_logits(2, 3, 4, 80)[..., :70], tokens)


def test_only_active_positions_are_written():
    logits = random_logits(2, 3, 4, 70)
    tokens = random_tokens(2, 2, 4, below=70)
    active = torch.tensor([[True, False, True, True], [False, False, True, False]])
    rows, count = order_positions(active)
    lse, picked = statistics(logits, tokens, visit=Visit(8, 0, rows, count))
    truth = expected_statistics(logits, tokens)
    torch.testing.assert_close(lse[active].double(), truth[0][active], atol=ATOL, rtol=4e-7)
    torch.testing.assert_close(picked[active].double(), truth[1][active], atol=ATOL, rtol=4e-7)
    assert lse[~active].isnan().all()
    assert picked[~active].isnan().all()


def test_a_chunk_of_positions_in_a_buffer_of_its_own():
    logits = random_logits(2, 3, 4, 70)
    active = torch.tensor([[True, False, True, True], [True, False, True, True]])
    rows, count = order_positions(active)
    index = rows[2:6]
    chunk = logits[index // 4, :, index % 4].contiguous()
    lse = torch.empty(8, 3)
    with tuning.override(row_elements=64):
        row_statistics(chunk_operand(chunk), Visit(4, 2, rows, count), 4, None, lse)
    written = torch.zeros(8, dtype=torch.bool)
    written[index] = True
    truth = logits.double().logsumexp(-1).permute(0, 2, 1).reshape(8, 3)
    torch.testing.assert_close(lse[written].double(), truth[written], atol=ATOL, rtol=4e-7)
    assert lse[~written].isnan().all()


def test_order_of_positions_puts_active_ones_first_and_keeps_their_order():
    active = torch.tensor([[False, True, True], [False, False, True]])
    rows, count = order_positions(active)
    assert int(count) == 3
    assert rows.tolist() == [1, 2, 5, 0, 3, 4]


def test_rows_that_show_a_token_are_left_out():
    logits = random_logits(1, 3, 4, 70)
    xu = torch.tensor([[[69, 1, 69, 2], [0, 69, 3, 4], [69, 69, 69, 69]]])
    lse, _ = statistics(logits, mask_id=69, xu=xu)
    hidden = (xu == 69).transpose(1, 2)
    truth = logits[..., :69].double().logsumexp(-1).transpose(1, 2)
    torch.testing.assert_close(lse[hidden].double(), truth[hidden], atol=ATOL, rtol=4e-7)
    assert lse[~hidden].isnan().all()


@pytest.mark.parametrize("clamp", ["left", "min"])
def test_logistic_rows(clamp):
    g = torch.Generator().manual_seed(2)
    mu = torch.randn(1, 2, 3, generator=g)
    log_scale = torch.randn(1, 2, 3, generator=g)
    tokens = random_tokens(1, 4, 3, below=20)
    lse, picked = torch.empty(3, 2), torch.empty(3, 4, 2)
    operand = logistic_operand(mu, log_scale, 20, 1e-6, clamp)
    with tuning.override(row_elements=16):
        row_statistics(operand, Visit(3), 3, None, lse, tokens=tokens, picked=picked)
    logits = LogisticHead(mu.double(), log_scale.double(), 20, clamp=clamp).logits()
    truth = expected_statistics(logits, tokens)
    # The edges are fp32 differences of size 1, scaled by up to e^5.
    torch.testing.assert_close(lse.double(), truth[0][0], atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(picked.double(), truth[1][0], atol=3e-5, rtol=1e-5)


# Draws ----------------------------------------------------------------------------------------


def drawn(logits, seed, mask_id=None, xu=None, operand=None, **tiles):
    batch, draws, positions, _ = logits.shape
    lse = torch.empty(batch * positions, draws)
    tokens = torch.zeros(batch, draws + 1, positions, dtype=torch.int64)
    operand = tensor_operand(logits) if operand is None else operand
    with tuning.override(**{"draw_elements": 256, **tiles}):
        draw(operand, Visit(batch * positions), positions, mask_id, seed, lse, tokens, xu=xu)
    assert torch.equal(tokens[:, 0], torch.zeros_like(tokens[:, 0]))  # x0 is not ours
    return tokens[:, 1:], lse.view(batch, positions, draws)


@pytest.mark.parametrize(("vocabulary", "seed"), [(20, 0), (128, 2**40 + 7), (300, 2**62 + 5)])
def test_draws_are_those_of_the_reference(vocabulary, seed):
    """Catches (`mutate_kernels.py`): draw does not rescale."""
    logits = random_logits(1, 3, 4, vocabulary)
    tokens, lse = drawn(logits, torch.tensor(seed))
    assert torch.equal(tokens, draw_ref(logits.double().log_softmax(-1), seed))
    truth = logits.double().logsumexp(-1).transpose(1, 2)
    torch.testing.assert_close(lse.double(), truth, atol=ATOL, rtol=4e-7)


def test_draws_do_not_depend_on_tiles():
    logits, seed = random_logits(1, 2, 2, 300), torch.tensor(11)
    first = drawn(logits, seed, draw_elements=128)[0]
    assert torch.equal(first, drawn(logits, seed, draw_elements=1024)[0])


def test_draws_keep_shown_tokens_and_never_take_the_mask():
    """Catches (`mutate_kernels.py`): draw does not rescale."""
    logits = random_logits(1, 3, 4, 300)
    logits[..., 7] = 50.0
    xu = torch.tensor([[[7, 1, 7, 2], [0, 7, 3, 4], [7, 7, 7, 7]]])
    tokens, _ = drawn(logits, torch.tensor(3), mask_id=7, xu=xu)
    shown = xu != 7
    assert torch.equal(tokens[shown], xu[shown])
    assert (tokens != 7).all()
    masked = logits.index_fill(-1, torch.tensor(7), -torch.inf).double().log_softmax(-1)
    assert torch.equal(tokens[~shown], draw_ref(masked, 3)[~shown])


def test_draw_of_a_row_without_any_class_is_token_zero():
    logits = random_logits(1, 2, 3, 140)
    logits[:, 1] = -torch.inf
    tokens, lse = drawn(logits, torch.tensor(3))
    assert (tokens[:, 1] == 0).all()
    assert torch.isneginf(lse[..., 1]).all()


def test_draws_of_logistic_rows():
    """Catches (`mutate_kernels.py`): draw does not rescale."""
    g = torch.Generator().manual_seed(4)
    mu, log_scale = torch.randn(1, 2, 3, generator=g), torch.randn(1, 2, 3, generator=g)
    logits = LogisticHead(mu.double(), log_scale.double(), 150).logits()
    operand = logistic_operand(mu, log_scale, 150, 1e-6, "left")
    tokens, _ = drawn(logits, torch.tensor(9), operand=operand, logistic_elements=128)
    assert torch.equal(tokens, draw_ref(logits.log_softmax(-1), 9))
