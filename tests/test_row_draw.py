"""The row-draw kernels by themselves, under the interpreter, against the reference.

Mutations and the tests that caught them: `kernels/README.md`.
"""

from __future__ import annotations

import math

import pytest
import torch

from di4c_fast import LogisticHead

pytest.importorskip("triton")
from di4c_fast.kernels.triton import tuning
from di4c_fast.kernels.triton.operands import Operand, logistic_operand, tensor_operand
from di4c_fast.kernels.triton.row_draw import (
    MAX_VOCABULARY,
    Results,
    Rows,
    Wanted,
    row_draw,
    scratch_bytes,
)

from di4c_fast.reference.draw import draw_ref

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="run by test_sample_gpu on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of masked lanes
    pytest.mark.usefixtures("poisoned_memory"),
]

# Two fp32 roundings of a number of size 10, and of a sum of a few hundred terms.
ATOL = 4e-6
EVERYTHING = Wanted(argmax=True, entropy=True, margin=True, raw=True)
# The interpreter's time goes with the number of programs, not of rows in one.
MANY_ROWS = {"sample_whole_elements": 2**14, "sample_joined_rows": 16}
# 256 columns per tile: rows of more than two blocks take two kernels and several programs.
SPLIT = {"sample_elements": 256}
INF = math.inf


def normal(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(
    logits,
    seed=5,
    step=0,
    *,
    unconditional=None,
    rows=None,
    row_keys=None,
    mask_id=None,
    temperature=1.0,
    gain=1.0,
    wanted=EVERYTHING,
    operand=None,
    **tiles,
):
    """Token, argmax and values (a dict) of logits (b, c, d, V), whose rows are all drawn."""
    operand = tensor_operand(logits) if operand is None else operand
    b, c, d = logits.shape[:3]
    total = b * c * d
    rows = Rows(0, total, (c, d)) if rows is None else rows
    results = Results(
        torch.full((total,), -7),
        torch.full((total if wanted.argmax else 0,), -7),
        torch.empty(len(wanted.values), total),
    )
    keys = torch.arange(total) if row_keys is None else row_keys
    with tuning.override(**{**MANY_ROWS, **tiles}):
        row_draw(
            operand,
            None if unconditional is None else tensor_operand(unconditional),
            rows,
            mask_id,
            temperature=temperature,
            gain=gain,
            row_keys=keys,
            seed=torch.tensor(seed),
            step=torch.tensor(step),
            wanted=wanted,
            results=results,
        )
    values = dict(zip(wanted.values, results.values, strict=True))
    return results.token, results.argmax, values


def expected(x, token, temperature=1.0):
    """The values in fp64 of rows x (R, V), whose tokens are given."""
    x = x.double()
    heat = torch.as_tensor(temperature, dtype=torch.float64).expand(len(x)).unsqueeze(-1)
    log_prob = (x / heat).log_softmax(-1)
    prob = log_prob.exp()
    largest = prob.sort(-1, descending=True).values
    at = token.unsqueeze(-1)
    return {
        "log_prob": log_prob.gather(1, at)[:, 0],
        "logsumexp": (x / heat).logsumexp(-1),
        "max_log_prob": log_prob.amax(-1),
        "prob": prob.gather(1, at)[:, 0],
        "entropy": -torch.where(prob > 0, prob * log_prob, 0.0).sum(-1),
        "margin": largest[:, 0] - largest[:, 1] if x.shape[1] > 1 else largest[:, 0],
        "raw_prob": x.softmax(-1).gather(1, at)[:, 0],
    }


def check(logits, seed=5, step=0, *, truth=None, temperature=1.0, row_keys=None, **arguments):
    """Tokens are the reference's, values those of fp64. `truth`: the logits behind the draw."""
    token, argmax, values = run(
        logits, seed, step, temperature=temperature, row_keys=row_keys, **arguments
    )
    x = (logits if truth is None else truth).flatten(0, -2)
    heat = temperature if isinstance(temperature, torch.Tensor) else torch.tensor(temperature)
    heat = heat.double().expand(len(x)).unsqueeze(-1)
    first = (x == x.amax(-1, keepdim=True)).int().argmax(-1)
    keys = torch.arange(len(x)) if row_keys is None else row_keys
    warm = torch.where(heat == 0, 1.0, heat)
    drawn = draw_ref((x.double() / warm).log_softmax(-1), seed, step=step, row_keys=keys)
    assert torch.equal(token, torch.where(heat[:, 0] == 0, first, drawn))
    if len(argmax):
        assert torch.equal(argmax, first)
    truths = expected(x, token, warm[:, 0])
    for name, value in values.items():
        torch.testing.assert_close(
            value.double(), truths[name], atol=ATOL, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    return token, argmax, values


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        (1, torch.float32),
        (2, torch.bfloat16),
        (127, torch.float32),
        (128, torch.float16),
        (129, torch.bfloat16),
        (507, torch.float16),
        (1025, torch.float32),
    ],
)
def test_rows_of_every_length_in_one_tile(vocabulary, dtype):
    check(normal(1, 2, 3, vocabulary).to(dtype), 2**40 + vocabulary)


@pytest.mark.parametrize("vocabulary", [257, 640, 1025])
def test_rows_that_several_programs_share(vocabulary):
    """Catches (`mutate_kernels.py`): blocks not scaled to the maximum of
    the row; entropy without the distance of a block to the maximum; step left out of the
    counter.
    """
    check(normal(2, 2, 2, vocabulary), seed=-3, step=2**32 - 1, **SPLIT)


def test_several_rows_per_program_and_a_partial_last_program():
    check(normal(1, 1, 7, 60), sample_whole_elements=512)
    check(normal(1, 1, 5, 300), sample_joined_rows=2, **SPLIT)


def test_results_do_not_depend_on_tiles():
    logits = normal(1, 2, 3, 700)
    whole = run(logits)
    for tiles in ({"sample_elements": 128}, SPLIT, {"sample_elements": 4096}):
        other = run(logits, **tiles)
        assert torch.equal(whole[0], other[0])
        assert torch.equal(whole[1], other[1])
        for name, value in whole[2].items():
            torch.testing.assert_close(value, other[2][name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("place", [0, 255, 256, 511, 513])
def test_maximum_in_every_block_and_in_the_tail(place):
    """Catches (`mutate_kernels.py`): last column of a partial block left out."""
    logits = normal(1, 1, 3, 514)
    logits[..., place] = 30.0
    _, argmax, _ = check(logits, **SPLIT)
    assert (argmax == place).all()


@pytest.mark.parametrize("tiles", [{}, SPLIT])
def test_the_lowest_id_wins_ties_and_the_margin_is_zero(tiles):
    """Catches (`mutate_kernels.py`): highest id wins ties; margin within
    the block of the maximum only.
    """
    logits = torch.zeros(1, 1, 5, 400)
    logits[0, 0, 0, [77, 200, 399]] = 2.0
    logits[0, 0, 1, [128, 129]] = 2.0
    logits[0, 0, 2, [127, 128]] = 2.0
    logits[0, 0, 3, 399] = 2.0
    _, argmax, values = check(logits, temperature=torch.zeros(5), **tiles)
    assert argmax.tolist() == [77, 128, 127, 399, 0]
    assert values["margin"][[0, 1, 2, 4]].tolist() == [0.0] * 4
    assert values["margin"][3] > 0.01


@pytest.mark.parametrize("tiles", [{}, SPLIT])
def test_the_mask_column_is_the_largest_and_has_no_part(tiles):
    """Catches (`mutate_kernels.py`): mask column beyond the first tile counted."""
    for mask_id in (0, 130, 399):
        logits = normal(1, 2, 3, 400)
        truth = logits.clone()
        truth[..., mask_id] = -INF
        for value in (50.0, INF, math.nan):
            logits[..., mask_id] = value
            check(logits, mask_id=mask_id, truth=truth, **tiles)


@pytest.mark.parametrize("tiles", [{}, SPLIT])
def test_blocks_and_rows_that_hold_mostly_excluded_tokens(tiles):
    logits = normal(1, 1, 4, 520)
    logits[0, 0, 0, 100:] = -INF  # whole blocks, the last one among them
    logits[0, 0, 1, :515] = -INF
    logits[0, 0, 2, torch.arange(520) != 300] = -INF
    logits[0, 0, 3, ::2] = -INF
    token, _, _ = check(logits, **tiles)
    assert token[2] == 300


@pytest.mark.parametrize("tiles", [{}, SPLIT])
@pytest.mark.parametrize("greedy", [False, True])
def test_rows_that_cannot_be_drawn_are_marked_and_others_are_not_touched(tiles, greedy):
    logits = normal(1, 1, 5, 400)
    good = logits[:, :, [2]].clone()
    logits[0, 0, 0] = -INF
    logits[0, 0, 1, 300] = math.nan
    logits[0, 0, 3, 399] = INF
    logits[0, 0, 4] = -INF
    logits[0, 0, 4, 7] = 3.0
    wanted = Wanted(greedy=greedy, argmax=True, entropy=True, margin=True, raw=True)
    token, argmax, values = run(
        logits, mask_id=7, wanted=wanted, temperature=0.0 if greedy else 1.0, **tiles
    )
    bad = torch.tensor([0, 1, 3, 4])
    assert (token[bad] == -1).all()
    assert (argmax[bad] == -1).all()
    assert all(value[bad].isnan().all() for value in values.values())
    alone = run(
        good,
        mask_id=7,
        wanted=wanted,
        temperature=0.0 if greedy else 1.0,
        row_keys=torch.tensor([2]),
        **tiles,
    )
    assert token[2] == alone[0][0]
    assert all(value[2] == alone[2][name][0] for name, value in values.items())


@pytest.mark.parametrize("tiles", [{}, SPLIT])
@pytest.mark.parametrize("temperature", [0.3, 2.5, torch.tensor([0.0, 0.5, 1.0, 1.0, 3.0, 0.0])])
def test_temperatures(tiles, temperature):
    """Catches (`mutate_kernels.py`): raw probability at the drawing temperature."""
    check(normal(1, 2, 3, 300), temperature=temperature, **tiles)


def test_a_tiny_temperature_gives_the_argmax():
    logits = normal(1, 1, 3, 300)
    token, argmax, values = run(logits, temperature=1e-38)
    assert torch.equal(token, argmax)
    assert values["prob"].tolist() == [1.0] * 3
    assert values["entropy"].tolist() == [0.0] * 3


@pytest.mark.parametrize("tiles", [{}, SPLIT])
@pytest.mark.parametrize("gain", [0.0, 2.5, torch.tensor([0.0, 1.0, 2.5, 4.0, 1.5, 0.5])])
def test_guidance(tiles, gain):
    """Catches (`mutate_kernels.py`): excluded tokens return with guidance."""
    logits, unconditional = normal(1, 2, 3, 300), normal(1, 2, 3, 300, seed=1)
    logits[..., 280:290] = -INF
    unconditional[..., 285] = -INF
    column = gain.view(1, 2, 3, 1) if isinstance(gain, torch.Tensor) else gain
    guided = unconditional + column * (logits - unconditional)
    truth = torch.where(logits == -INF, -INF, guided)
    # gain x the rounding of a difference of size 20
    check(logits, unconditional=unconditional, gain=gain, truth=truth, mask_id=None, **tiles)


def test_large_logits_neither_overflow_nor_vanish():
    logits = normal(1, 1, 4, 300) * 300.0 + 1e4
    token, _, values = run(logits)
    truth = expected(logits.flatten(0, -2), token)
    for name in ("logsumexp", "log_prob", "prob", "margin", "entropy"):
        torch.testing.assert_close(values[name].double(), truth[name], atol=1e-5, rtol=1e-6)
    lowest = torch.full((1, 1, 2, 300), torch.finfo(torch.float32).min)
    lowest[..., 200] = 0.0
    token, _, values = run(lowest, **SPLIT)
    assert token.tolist() == [200, 200]
    assert values["entropy"].tolist() == [0.0, 0.0]


def test_rows_of_any_strides_and_64_bit_offsets():
    base = normal(2, 3, 4, 300)
    check(base.transpose(1, 2))
    check(base[:, :1, :, :].expand(-1, 5, -1, -1), **SPLIT)
    check(normal(2, 3, 4, 320)[..., :300], **SPLIT)
    check(base[:, :, ::2])


def test_a_part_of_the_rows_in_a_buffer_of_slots():
    logits = normal(1, 1, 6, 300)
    chunk = logits[0, 0, 2:5].contiguous()
    operand = Operand(chunk, chunk, 1, 300, (300, 0, 0, 0))
    token, argmax, values = run(logits, rows=Rows(2, 3, (1, 6)), operand=operand)
    whole = run(logits)
    assert torch.equal(token[2:5], whole[0][2:5])
    assert (token[[0, 1, 5]] == -7).all()
    assert (argmax[[0, 1, 5]] == -7).all()
    for name, value in values.items():
        assert torch.equal(value[2:5], whole[2][name][2:5])
        assert value[[0, 1, 5]].isnan().all()


@pytest.mark.parametrize("field", ["", "argmax", "entropy", "margin", "raw", "greedy"])
@pytest.mark.parametrize("tiles", [{}, SPLIT])
def test_fields_do_not_depend_on_each_other(field, tiles):
    logits = normal(1, 1, 5, 300)
    everything = Wanted(greedy=field == "greedy", argmax=True, entropy=True, margin=True, raw=True)
    heat = 0.0 if field == "greedy" else 0.7
    one = Wanted(**({field: True} if field else {}))
    whole = run(logits, wanted=everything, temperature=heat, **tiles)
    alone = run(logits, wanted=one, temperature=heat, **tiles)
    assert torch.equal(whole[0], alone[0])
    if field == "argmax":
        assert torch.equal(whole[1], alone[1])
    for name, value in alone[2].items():
        assert torch.equal(value, whole[2][name]), name


@pytest.mark.parametrize("clamp", ["left", "min"])
@pytest.mark.parametrize("tiles", [{}, {"sample_elements": 256}])
def test_logistic_rows(clamp, tiles):
    mu, log_scale = normal(1, 2, 3, scale=0.5), normal(1, 2, 3, seed=1, scale=1.0)
    operand = logistic_operand(mu, log_scale, 300, 1e-6, clamp)
    x = LogisticHead(mu.double(), log_scale.double(), 300, clamp=clamp).logits()
    token, argmax, values = run(x.float(), operand=operand, temperature=0.8, **tiles)
    drawn = draw_ref((x.flatten(0, -2) / 0.8).log_softmax(-1), 5)
    assert torch.equal(token, drawn)
    truth = expected(x.flatten(0, -2), token, 0.8)
    for name, value in values.items():
        # The edges are fp32 differences of size 1, scaled by up to e^5.
        torch.testing.assert_close(value.double(), truth[name], atol=1e-4, rtol=1e-4)
    # Bins near the mode are almost equal: the argmax may be a neighbour.
    best = x.flatten(0, -2).amax(-1)
    at_argmax = x.flatten(0, -2).gather(1, argmax[:, None])[:, 0]
    torch.testing.assert_close(at_argmax, best, atol=1e-5, rtol=0)


def test_nothing_is_launched_without_rows():
    token, _, _ = run(torch.empty(1, 1, 0, 300))
    assert token.shape == (0,)


def test_too_many_columns_are_refused_and_scratch_is_counted():
    huge = torch.empty(1, device="meta").expand(1, 1, 1, MAX_VOCABULARY + 1)
    with pytest.raises(ValueError, match="at most 524288 columns"):
        run(torch.zeros(1, 1, 1, 1), operand=Operand(huge, huge, 1, huge.shape[-1], (0, 0, 0, 0)))
    assert scratch_bytes(50258, Wanted()) == 2 * 4 * 393
    assert scratch_bytes(50258, EVERYTHING) == 4 * 4 * 393
