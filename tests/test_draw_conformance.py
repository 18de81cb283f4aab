"""Every backend of `sample`, held to the reference; a new one joins by its name in `FAST`."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch
from loss_heads import EVERY, FAST, available
from sample_cases import assert_near, assert_same_draw, draws_of_one_row, normal, streamed
from torch.utils.flop_counter import FlopCounterMode

from di4c_fast import LinearHead, LogisticHead, backends
from di4c_fast.draw import driver
from di4c_fast.draw.api import Draw, sample
from di4c_fast.draw.law import SAMPLE_BLOCK, token_uniforms
from di4c_fast.draw.request import STATISTICS
from di4c_fast.testing import assert_draws_match, assert_tail_mass, tail_logits
from tools.own_head import OwnHead

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of masked lanes
    pytest.mark.usefixtures("poisoned_memory"),
]
INF = math.inf
HOST = available("torch", "cpu")


@pytest.fixture(params=FAST)
def backend(request) -> str:
    return request.param


@contextlib.contextmanager
def tiles(backend: str, small: bool):
    """Small tiles of the kernels, in which several programs share a row; else large ones: the
    interpreter's time goes with the number of programs, not of rows in one."""
    if backend != "triton":
        yield
        return
    from di4c_fast.kernels.triton.tuning import override

    large = {"whole_elements": 2**15, "rows": 256, "joined_rows": 64}
    with override(row_draw={**large, "elements": 256} if small else large):
        yield


def drawn(logits, backend: str, *, small: bool = False, **arguments) -> Draw:
    with tiles(backend, small):
        return sample(logits, backend=backend, **arguments)


def check(logits, backend: str, *, small: bool = False, **arguments) -> Draw:
    arguments = {"seed": 3, "want": "all", **arguments}
    draw = drawn(logits, backend, small=small, **arguments)
    assert_near(draw, sample(logits, backend="reference", **arguments))
    return draw


PER_ROW = (torch.arange(30).view(2, 15) % 3) * 0.5
OTHER = normal(2, 15, 300, seed=1)
OPTIONS = [
    {},
    {"temperature": 0.0, "mask_id": 299},
    {"temperature": 0.7, "mask_id": 0},
    {"temperature": PER_ROW},
    {"temperature": 1e-30},
    {"guidance": (OTHER, 1.5), "mask_id": 299},
    {"guidance": (OTHER, PER_ROW), "temperature": PER_ROW},
    {"top_p": 0.8},
    {"top_k": 3, "temperature": 0.0},
    {"top_p": 0.9, "top_k": 20, "temperature": PER_ROW, "mask_id": 7},
    {"top_p": 0.9, "guidance": (OTHER, 0.5)},
    {"confidence_dtype": torch.bfloat16},
    {"confidence_dtype": torch.float64, "temperature": 0.7, "mask_id": 299},
    {"confidence_dtype": torch.float32, "top_p": 0.8, "temperature": PER_ROW},
    {"confidence_dtype": torch.bfloat16, "guidance": (OTHER, PER_ROW), "top_k": 9},
]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_every_option_agrees_with_the_reference(options, small, backend):
    draw = check(normal(2, 15, 300), backend, small=small, **options)
    assert draw.token.shape == (2, 15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, backend):
    logits = normal(20, 507).to(dtype)
    draw = check(logits, backend, temperature=0.9)
    assert draw.log_prob.dtype == torch.promote_types(dtype, torch.float32)
    # MaskGIT's models give fp32 for one call and bf16 for the other under autocast.
    check(logits, backend, guidance=(normal(20, 507, seed=1), 1.0), small=True)


@pytest.mark.parametrize("vocabulary", [1, 2, 127, 128, 129, 507, 1025])
def test_rows_of_every_length(vocabulary, backend):
    check(normal(7, vocabulary), backend)
    check(normal(7, vocabulary), backend, small=True, temperature=0.5)


@pytest.mark.parametrize("small", [False, True])
def test_maximum_in_every_block_ties_and_the_mask(small, backend):
    places = [0, 127, 128, 300, 511, 515]
    logits = normal(len(places), 516, scale=0.5)
    logits[torch.arange(len(places)), places] = 9.0
    draw = check(logits, backend, small=small)
    assert draw.argmax.tolist() == places
    logits[torch.arange(len(places)), 200] = 9.0  # the lowest id wins, and the margin is 0
    tied = check(logits, backend, small=small)
    assert tied.argmax.tolist() == [min(place, 200) for place in places]
    assert torch.count_nonzero(tied.margin[torch.tensor(places) != 200]) == 0
    hidden = check(logits, backend, small=small, mask_id=200)
    assert not bool((hidden.token == 200).any())


@pytest.mark.parametrize("mask_id", [0, 300, 599])
def test_the_mask_column_never_matters(mask_id, backend):
    logits = normal(5, 600)
    arguments = {"seed": 1, "mask_id": mask_id, "want": "all", "small": True}
    expected = drawn(logits, backend, **arguments)
    shorter = torch.cat([logits[:, :mask_id], logits[:, mask_id + 1 :]], 1)
    torch.testing.assert_close(expected.logsumexp, shorter.logsumexp(-1))
    assert (expected.token != mask_id).all()
    for value in (1e30, -INF, INF, math.nan):
        logits[:, mask_id] = value
        assert_same_draw(drawn(logits, backend, **arguments), expected)


@pytest.mark.parametrize("small", [False, True])
def test_rows_that_hold_mostly_excluded_tokens(small, backend):
    logits = torch.full((5, 516), -INF)
    for row, places in enumerate([(0,), (515,), (3, 400), (128, 255), (127, 128, 129)]):
        logits[row, list(places)] = torch.arange(float(len(places)))
    draw = check(logits, backend, small=small)
    assert bool(torch.isfinite(logits.gather(1, draw.token[:, None])).all())


def test_tokens_excluded_with_and_without_the_condition_stay_excluded(backend):
    logits, other = normal(6, 300), normal(6, 300, seed=1)
    logits[:, ::3] = -INF
    other[:, ::6] = -INF  # the difference of the two would be NaN
    draw = check(logits, backend, guidance=(other, 1.5))
    assert (draw.token % 3 != 0).all()


@pytest.mark.parametrize("offset", [-1e4, 1e4, 3e38])
def test_large_logits_neither_overflow_nor_vanish(offset, backend):
    short = torch.tensor([[0.0, 1.0, -2.0], [5.0, 5.0, 4.0]])
    for logits in (short, normal(4, 300)):
        check(logits + offset, backend)


@pytest.mark.parametrize(("vocabulary", "rows"), [(27, 800), (1025, 96)])
def test_tokens_are_those_of_the_torch_backend_over_many_rows(vocabulary, rows, backend):
    logits = normal(rows, vocabulary)
    for step in (0, 2**32 - 1):
        arguments = {"seed": -5, "step": step, "row_keys": torch.arange(rows) * -(2**33)}
        found = drawn(logits, backend, **arguments).token
        assert found.equal(streamed(logits, **arguments).token)


def test_draws_follow_the_softmax(backend):
    logits = normal(140, scale=1.5)
    draw = drawn(logits.expand(6000, -1), backend, seed=17, temperature=1.3, want=())
    assert_draws_match(draw.token, (logits.double() / 1.3).softmax(-1))


@pytest.mark.parametrize(("gap", "rows"), [(16, 30_000), (18, 100_000), (20, 300_000)])
def test_tails_keep_their_mass_in_fp32(gap, rows):
    """168, 76 and 31 draws of the 50 000 tail tokens expected; coarse noise gives 0.08 of it."""
    assert_tail_mass(lambda logits: draws_of_one_row(logits[0], rows, seed=gap), gap, rows)


@pytest.mark.parametrize(("gap", "rows"), [(6.0, 20_000), (12.0, 300_000)])
def test_tails_within_one_block_keep_their_mass(gap, rows):
    """The exponential race alone: 127 tail tokens beside the likely one."""
    tail = SAMPLE_BLOCK - 1
    assert_tail_mass(lambda logits: draws_of_one_row(logits[0], rows, seed=1), gap, rows, tail=tail)


@pytest.mark.parametrize(("gap", "rows"), [(16, 6000), (18, 20_000), (20, 40_000)])
def test_tails_are_those_of_the_law(gap, rows, backend):
    """Rows in which the law, whose tails are exact, draws one of 50 000 unlikely tokens."""
    logits, _ = tail_logits(gap)
    truth = draws_of_one_row(logits, rows, seed=gap)
    tail = (truth != 0).nonzero()[:5, 0]
    assert len(tail) >= 2
    keys = torch.cat([tail, torch.arange(1)])
    ours = drawn(logits.expand(len(keys), -1), backend, seed=gap, row_keys=keys, want=()).token
    assert ours.equal(truth[keys])


@pytest.mark.parametrize("lead", [-0.1, 0.1])
def test_small_random_numbers_keep_their_precision_in_the_race(lead, backend):
    """Keys with numbers u for which log(1 - u) in fp32 is wrong by 15% or more."""
    keys = torch.tensor([19979, 97112, 167984, 186970, 211538, 240907])
    uniforms = token_uniforms(5, 0, keys, torch.zeros_like(keys), torch.float32)
    u, column = uniforms.min(1)
    assert ((1 - (1 - u)) / u - 1).abs().min() > 0.15
    rival = (column + 1) % 128
    logs = (-torch.log1p(-uniforms.double())).log().gather(1, torch.stack([column, rival], 1))
    logits = torch.full((len(keys), 128), -INF)
    logits[torch.arange(len(keys)), column] = 0.0
    logits[torch.arange(len(keys)), rival] = (logs[:, 1] - logs[:, 0] + lead).float()
    token = drawn(logits, backend, seed=5, row_keys=keys).token
    assert token.equal(rival if lead > 0 else column)


def test_the_tail_of_a_row_keeps_its_mass(backend):
    """248 draws of the tail expected, from 8 of 9 blocks and from the block of the likely token."""
    assert_tail_mass(lambda rows: drawn(rows, backend, seed=3, want=()).token, 9.0, 2000, tail=1023)


@pytest.mark.parametrize("vocabulary", [100, 1025])
def test_rows_give_the_same_draw_in_any_batch_and_order(vocabulary, backend):
    # Whatever the batch, the sums of a row are over blocks of 128 in one order.
    logits = normal(37, vocabulary)
    keys = torch.arange(37) * 1_000_003
    arguments = {"seed": 5, "step": 2, "temperature": 0.9, "want": "all"}
    whole = drawn(logits, backend, row_keys=keys, **arguments)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    shuffled = drawn(logits[order], backend, row_keys=keys[order], **arguments)
    assert_same_draw(shuffled, Draw(*(value[order] for value in whole)))
    alone = drawn(logits[9], backend, row_keys=keys[9], **arguments)
    assert_same_draw(alone, Draw(*(value[9] for value in whole)))


def test_strides_do_not_change_a_draw(backend):
    logits = normal(6, 5, 300)
    expected = drawn(logits, backend, seed=5, want="all")
    padded = torch.full((6, 5, 320), math.nan)[..., :300]
    padded.copy_(logits)
    transposed = logits.transpose(0, 2).contiguous().transpose(0, 2)
    interleaved = torch.stack([logits, logits + 1], -1)[..., 0]
    swapped = logits.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (padded, transposed, interleaved, swapped):
        assert not view.is_contiguous()
        assert_same_draw(drawn(view, backend, seed=5, want="all"), expected)
    row = logits[:1, :1].expand(6, 5, -1)
    assert_same_draw(
        drawn(row, backend, seed=5, want="all"),
        drawn(row.contiguous(), backend, seed=5, want="all"),
    )


def test_seeds_steps_and_keys_all_matter(backend):
    logits = torch.zeros(50, 300)

    def tokens(**arguments):
        return drawn(logits, backend, **arguments).token

    base = tokens(seed=1, step=0)
    assert base.equal(tokens(seed=1, step=0, row_keys=torch.arange(50)))
    assert base.equal(tokens(seed=torch.tensor(1), step=torch.tensor(0)))
    for other in (
        tokens(seed=2),
        tokens(seed=1 + 2**40),
        tokens(seed=1, step=1),
        tokens(seed=1, row_keys=torch.arange(50) + 50),
        tokens(seed=1, row_keys=torch.arange(50) + 2**40),
    ):
        assert (base != other).sum() > 40
    equal_keys = tokens(seed=1, row_keys=torch.zeros(50, dtype=torch.int64))
    assert (equal_keys == equal_keys[0]).all()


def test_a_head_is_asked_for_its_rows_in_groups_under_the_budget(backend):
    logits = normal(10, 50, 300)
    head = OwnHead(logits)
    draw = drawn(head, backend, seed=1, budget_bytes=80 * 300 * 4, want="all")
    assert_same_draw(draw, drawn(logits, backend, seed=1, want="all"))
    assert head.computed == [80] * 6 + [20]
    head.computed.clear()
    drawn(head, backend, seed=1, budget_bytes=1)
    assert max(head.computed) == 64  # products of fewer rows would waste the weights they read


@pytest.mark.parametrize("arguments", [{}, {"top_p": 0.9}, {"mask_id": 500, "want": "all"}])
def test_groups_do_not_change_a_draw(monkeypatch, arguments, backend):
    hidden, weight = normal(70, 8, scale=1.0), normal(513, 8, seed=1, scale=1.0)
    head = LinearHead(hidden, weight)
    expected = drawn(head, backend, seed=5, **arguments)
    monkeypatch.setattr(driver, "MIN_GROUP_ROWS", 16)
    found = drawn(head, backend, seed=5, budget_bytes=1, **arguments)
    for name, value, other in zip(Draw._fields, found, expected, strict=True):
        if value is not None:  # matrix products of other shapes round in other ways
            torch.testing.assert_close(value, other, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("bias", "cap"), [(None, None), ("vector", None), ("positions", None), ("vector", 2.0)]
)
def test_linear_heads_give_the_draws_of_their_logits(bias, cap, backend):
    hidden, weight = normal(3, 70, 16, scale=1.0), normal(300, 16, seed=1, scale=1.0)
    offset = {"vector": normal(300, seed=2), "positions": normal(70, 300, seed=2)}.get(bias)
    head = LinearHead(hidden, weight, offset, softcap=cap, budget_bytes=64 * 300 * 4)
    draw = drawn(head, backend, seed=1, mask_id=299, want="all")
    assert_near(draw, drawn(head.logits(), backend, seed=1, mask_id=299, want="all"))
    assert draw.token.shape == (3, 70)


@pytest.mark.parametrize("clamp", ["left", "min"])
def test_logistic_heads_give_the_draws_of_their_logits(clamp, backend):
    mu, log_scale = normal(4, 90, scale=0.5), normal(4, 90, seed=1, scale=0.5)
    head = LogisticHead(mu, log_scale, 64, clamp=clamp)
    arguments = {"seed": 1, "want": "all", "budget_bytes": 1}
    assert_near(drawn(head, backend, **arguments), drawn(head.logits(), backend, **arguments))


def test_guidance_takes_heads_of_two_kinds(backend):
    hidden, weight = normal(2, 70, 8, scale=1.0), normal(300, 8, seed=1, scale=1.0)
    head, other = LinearHead(hidden, weight), OwnHead(normal(2, 70, 300, seed=3))
    arguments = {"seed": 1, "want": "all", "budget_bytes": 1}
    draw = drawn(head, backend, guidance=(other, 2.0), **arguments)
    dense = drawn(head.logits(), backend, guidance=(other.first, 2.0), **arguments)
    assert_near(draw, dense)


@pytest.mark.parametrize("backend", EVERY)
def test_empty_batches_and_single_tokens(backend):
    for arguments in ({}, {"top_p": 0.5}, {"confidence_dtype": torch.bfloat16}):
        draw = drawn(torch.empty(0, 4, 300), backend, seed=0, want="all", **arguments)
        expected = sample(torch.empty(0, 4, 300), seed=0, want="all", **arguments)
        for value, other in zip(draw, expected, strict=True):
            assert value.shape == other.shape
            assert value.dtype == other.dtype
    draw = drawn(torch.tensor([5.0]), backend, seed=0, want="all")
    assert draw.token.shape == ()
    assert [float(value) for value in draw] == [0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", STATISTICS)
def test_only_the_wanted_fields_come_back(name, backend):
    logits, rounded = normal(8, 300), {"confidence_dtype": torch.bfloat16}
    for arguments in ({}, {"temperature": 0.5}, {"temperature": 0.5, "top_k": 9}, rounded):
        alone = drawn(logits, backend, seed=1, want=name, **arguments)
        assert [n for n in STATISTICS if getattr(alone, n) is not None] == [name]
        everything = drawn(logits, backend, seed=1, want="all", **arguments)
        assert getattr(alone, name).equal(getattr(everything, name))
        assert alone.token.equal(everything.token)


@pytest.mark.parametrize("arguments", [{}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_bad_rows_are_named_or_marked(arguments, backend):
    logits = normal(2, 3, 140)
    expected = drawn(logits, backend, seed=0, want="all", **arguments)
    logits[1, 0, 77] = math.nan
    logits[1, 2] = -INF
    with pytest.raises(ValueError, match=r"logits must not hold NaN, got it in row \(1, 0\) at 77"):
        drawn(logits, backend, seed=0, **arguments)
    draw = drawn(logits, backend, seed=0, want="all", check=False, **arguments)
    bad = torch.tensor([[False] * 3, [True, False, True]])
    for value, before in zip(draw, expected, strict=True):
        marked = value.isnan() if value.is_floating_point() else value == -1
        assert marked.equal(bad)
        assert value[~bad].equal(before[~bad])
    logits[1, 0, 77] = 0.0
    with pytest.raises(ValueError, match=r"logits allow no token in row \(1, 2\)"):
        drawn(logits, backend, seed=0, **arguments)


@pytest.mark.parametrize("backend", EVERY)
def test_unconditional_logits_without_a_token_raise(backend):
    guidance = (torch.full((2, 9), -INF), 1.0)
    with pytest.raises(ValueError, match="guidance leaves no distribution in row"):
        drawn(normal(2, 9), backend, seed=0, guidance=guidance)


def test_nothing_is_differentiable_and_logits_stay_untouched(backend):
    logits = normal(5, 300).requires_grad_()
    before = logits.detach().clone()
    for arguments in ({}, {"top_p": 0.5, "mask_id": 3}, {"confidence_dtype": torch.float32}):
        draw = drawn(logits, backend, seed=0, want="all", temperature=0.4, **arguments)
        assert not any(value.requires_grad for value in draw)
    assert logits.equal(before)


def head_of(kind: str, first: torch.Tensor, second: torch.Tensor):
    if kind == "linear":
        return LinearHead(first[..., :8], second.flatten(0, 1)[:, :8].repeat(25, 1), softcap=4.0)
    if kind == "logistic":
        return LogisticHead(first[..., 0] * 0.1, second[..., 0], 90)
    return first * 1.5


@pytest.mark.parametrize("kind", ["tensor", "linear", "logistic", "guided"])
def test_a_compiled_call_gives_the_same_draws(kind, backend):
    logits, other = normal(2, 6, 300), normal(2, 6, 300, seed=1)
    seed, step = torch.tensor(4), torch.tensor(2)

    def draw(first, second):
        guidance = (second * 2.0, 1.5) if kind == "guided" else None
        arguments = {"temperature": 0.8, "want": "all", "check": False, "guidance": guidance}
        head = head_of(kind, first, second)
        return tuple(sample(head, seed=seed, step=step, backend=backend, **arguments))

    torch.compiler.reset()
    eager = draw(logits, other)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")(logits, other)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["tensor", "linear", "logistic"])
def test_the_op_passes_opcheck(kind, backend, monkeypatch):
    op = driver.sample_op
    spy = mock.Mock(wraps=op)
    monkeypatch.setattr(driver, "sample_op", spy)
    logits, other = normal(2, 6, 300), normal(2, 6, 300, seed=1)
    temperature = torch.rand(2, 6)
    options = {"seed": 1, "want": "all", "temperature": temperature}
    with FlopCounterMode(display=False):  # a mode sees the op, an eager call needs none
        traced = drawn(head_of(kind, logits, other), backend, **options)
    eager = drawn(head_of(kind, logits, other), backend, **options)
    assert all(value.equal(expected) for value, expected in zip(eager, traced, strict=True))
    (arguments,) = (call.args for call in spy.call_args_list)
    torch.library.opcheck(
        op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_tiles_and_scratch_memory_do_not_change_a_draw():
    pytest.importorskip("triton")
    from di4c_fast.kernels.triton.tuning import override

    logits = normal(9, 700)
    expected = streamed(logits, seed=1, want="all")
    for fields in (
        {"elements": 256, "scratch_bytes": 3 * 4 * 4 * 6},
        {"elements": 512, "warps": 2, "joined_rows": 1},
        {"elements": 4096, "rows": 1},
    ):
        with override(row_draw=fields):
            assert_near(sample(logits, seed=1, want="all", backend="triton"), expected)


def test_rows_wider_than_a_kernel_holds_are_drawn_all_the_same(backend):
    # The Triton kernels hold 4096 blocks of a row at most.
    logits = torch.full((2, 2**19 + 1), -INF)
    logits[:, [5, 2**19]] = torch.tensor([0.0, 9.0])
    draw = drawn(logits, backend, seed=1, want=("argmax", "log_prob"))
    assert draw.argmax.tolist() == [2**19, 2**19]
    assert draw.token.equal(streamed(logits, seed=1).token)


def test_auto_warns_where_a_gpu_cannot_run_the_kernels(monkeypatch):
    # `loss` and `sample` ask the same function which backend runs.
    monkeypatch.setattr(backends, "unavailable", lambda name, device: f"too old for {name}")
    device = torch.device("cuda")
    with pytest.warns(UserWarning, match="auto.*torch backend, which is slower: too old for tri"):
        assert backends.resolve("auto", device, torch.float32) == "torch"
