"""The triton backend of `sample` as a whole, under the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from sample_cases import assert_near, draws_of_one_row, normal, streamed

import di4c_fast
from di4c_fast import LinearHead, LogisticHead
from di4c_fast.draw.api import Draw, sample
from di4c_fast.draw.request import STATISTICS
from di4c_fast.testing import assert_draws_match, assert_tail_mass, tail_logits

fused_sample = pytest.importorskip("di4c_fast.fused_sample")
from di4c_fast.kernels.triton import tuning  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="run by test_sample_gpu on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of masked lanes
    pytest.mark.usefixtures("poisoned_memory", "many_rows_per_program"),
]

INF = math.inf
SPLIT = {"sample_elements": 256}
LONG = {"sample_elements": 2**15}  # fewer programs


@pytest.fixture
def many_rows_per_program():
    """The interpreter's time goes with the number of programs, not of rows in one."""
    with tuning.override(sample_whole_elements=2**15, sample_rows=256, sample_joined_rows=64):
        yield


def fused(logits, *, tiles=None, **arguments) -> Draw:
    if tiles is None:
        return sample(logits, backend="triton", **arguments)
    with tuning.override(**tiles):
        return sample(logits, backend="triton", **arguments)


def check(logits, *, tiles=None, **arguments) -> Draw:
    arguments = {"seed": 3, "want": "all", **arguments}
    draw = fused(logits, tiles=tiles, **arguments)
    assert_near(draw, sample(logits, backend="reference", **arguments))
    return draw


PER_ROW = (torch.arange(30).view(2, 15) % 3) * 0.5
OPTIONS = [
    {},
    {"temperature": 0.0, "mask_id": 299},
    {"temperature": 0.7, "mask_id": 0},
    {"temperature": PER_ROW},
    {"guidance": (normal(2, 15, 300, seed=1), 1.5), "mask_id": 299},
    {"guidance": (normal(2, 15, 300, seed=1), PER_ROW), "temperature": PER_ROW},
    {"top_p": 0.8},
    {"top_k": 3, "temperature": 0.0},
    {"top_p": 0.9, "top_k": 20, "temperature": PER_ROW, "mask_id": 7},
    {"top_p": 0.9, "guidance": (normal(2, 15, 300, seed=1), 0.5)},
    {"confidence_dtype": torch.bfloat16},
    {"confidence_dtype": torch.float64, "temperature": 0.7, "mask_id": 299},
    {"confidence_dtype": torch.float32, "top_p": 0.8, "temperature": PER_ROW},
    {
        "confidence_dtype": torch.bfloat16,
        "guidance": (normal(2, 15, 300, seed=1), PER_ROW),
        "top_k": 9,
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_every_option_agrees_with_the_reference(options):
    draw = check(normal(2, 15, 300), **options)
    assert draw.token.shape == (2, 15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32(dtype):
    logits = normal(20, 507).to(dtype)
    draw = check(logits, temperature=0.9)
    assert draw.log_prob.dtype == torch.float32
    # MaskGIT's models give fp32 for one call and bf16 for the other under autocast.
    check(logits, guidance=(normal(20, 507, seed=1), 1.0), tiles=SPLIT)


def test_fp64_logits_and_rows_without_end_go_to_the_torch_backend(monkeypatch):
    logits = normal(5, 300)
    expected = streamed(logits.double(), seed=1, want="all")
    double = fused(logits.double(), seed=1, want="all")
    assert all(a.equal(b) for a, b in zip(double, expected, strict=True))
    monkeypatch.setattr(fused_sample, "MAX_VOCABULARY", 299)
    expected = streamed(logits, seed=1, want="all")
    wide = fused(logits, seed=1, want="all")
    assert all(a.equal(b) for a, b in zip(wide, expected, strict=True))


@pytest.mark.parametrize(
    ("vocabulary", "rows", "tiles"), [(27, 800, None), (1025, 96, None), (1025, 16, SPLIT)]
)
def test_tokens_are_those_of_the_torch_backend_over_many_rows(vocabulary, rows, tiles):
    logits = normal(rows, vocabulary)
    for step in (0, 2**32 - 1):
        arguments = {"seed": -5, "step": step, "row_keys": torch.arange(rows) * -(2**33)}
        assert fused(logits, tiles=tiles, **arguments).token.equal(
            streamed(logits, **arguments).token
        )


def test_draws_follow_the_softmax():
    logits = normal(140, scale=1.5)
    draw = fused(logits.expand(6000, -1), seed=17, temperature=1.3, want=())
    assert_draws_match(draw.token, (logits.double() / 1.3).softmax(-1))


@pytest.mark.parametrize(("gap", "rows"), [(16, 6000), (18, 20_000), (20, 40_000)])
def test_tails_are_those_of_the_torch_backend(gap, rows):
    """Rows in which that backend, whose tails are exact, draws one of 50 000 unlikely tokens."""
    logits, _ = tail_logits(gap)
    drawn = draws_of_one_row(logits, rows, seed=gap)
    tail = (drawn != 0).nonzero()[:5, 0]
    assert len(tail) >= 2
    keys = torch.cat([tail, torch.arange(1)])
    ours = fused(logits.expand(len(keys), -1), tiles=LONG, seed=gap, row_keys=keys, want=()).token
    assert ours.equal(drawn[keys])


def test_the_tail_of_a_row_keeps_its_mass():
    """248 draws of the tail expected, from 8 of 9 blocks and from the block of the likely token."""
    assert_tail_mass(lambda rows: fused(rows, seed=3, want=()).token, 9.0, 2000, tail=1023)


def test_rows_give_the_same_draw_in_any_batch_and_order():
    logits = normal(21, 1025)
    keys = torch.arange(21) * 1_000_003
    arguments = {"seed": 5, "step": 2, "temperature": 0.9, "want": "all"}
    for tiles in (None, SPLIT):
        whole = fused(logits, row_keys=keys, tiles=tiles, **arguments)
        order = torch.randperm(21, generator=torch.Generator().manual_seed(1))
        shuffled = fused(logits[order], row_keys=keys[order], tiles=tiles, **arguments)
        alone = fused(logits[9], row_keys=keys[9], tiles=tiles, **arguments)
        for name, value, other, single in zip(Draw._fields, whole, shuffled, alone, strict=True):
            assert other.equal(value[order]), name
            assert single.equal(value[9]), name


def test_strides_do_not_change_a_draw():
    logits = normal(3, 4, 300)
    expected = streamed(logits, seed=5, want="all")
    padded = torch.full((3, 4, 320), math.nan)[..., :300]
    padded.copy_(logits)
    transposed = logits.transpose(0, 1).contiguous().transpose(0, 1)
    along_v = logits.transpose(0, 2).contiguous().transpose(0, 2)
    interleaved = torch.stack([logits, logits + 1], -1)[..., 0]
    for view in (padded, transposed, along_v, interleaved):
        assert not view.is_contiguous()
        assert_near(fused(view, seed=5, want="all"), expected)
    row = logits[:1, :1]
    assert_near(
        fused(row.expand(3, 4, -1), seed=5, want="all"),
        streamed(row.expand(3, 4, -1).contiguous(), seed=5, want="all"),
    )
    # Four leading dimensions that do not merge, together with others that do.
    strange = normal(2, 2, 2, 2, 50).permute(3, 1, 0, 2, 4)
    check(strange)
    check(strange.contiguous(), guidance=(strange, 1.0))


def test_leading_dimensions_merge_where_every_tensor_steps_evenly():
    three = fused_sample._three_strides
    assert three((6, 5), [(300, 300 * 6)]) == ((1, 6, 5), [(0, 300, 1800)])
    assert three((2, 3, 4), [(12, 4, 1), (0, 0, 1)]) == ((1, 6, 4), [(0, 4, 1), (0, 0, 1)])
    assert three((), []) == ((1, 1, 1), [])
    assert three((2, 2, 2, 2), [(1, 8, 2, 32)]) is None


def test_seeds_and_steps_are_numbers_or_tensors():
    logits = torch.zeros(50, 300)
    base = fused(logits, seed=1, step=0).token
    assert base.equal(fused(logits, seed=torch.tensor(1), step=torch.tensor(0)).token)
    assert base.equal(fused(logits, seed=1 + 2**64, step=2**32).token)
    for other in ({"seed": 2}, {"seed": 1 + 2**40}, {"seed": 1, "step": 1}):
        assert (base != fused(logits, **other).token).sum() > 40
    top = 2**64 - 1
    assert fused(logits, seed=top).token.equal(streamed(logits, seed=-1).token)


@pytest.mark.parametrize("bias", [None, "vector", "positions"])
def test_linear_heads_are_multiplied_chunk_by_chunk(bias):
    """Catches (`mutate_kernels.py`): chunks of a linear head drawn from the first."""
    hidden, weight = normal(3, 50, 16, scale=1.0), normal(300, 16, seed=1, scale=1.0)
    offset = {"vector": normal(300, seed=2), "positions": normal(50, 300, seed=2)}.get(bias)
    head = LinearHead(hidden, weight, offset, budget_bytes=64 * 320 * 4)
    with pytest.MonkeyPatch.context() as patch:
        counts = []
        original = fused_sample.row_draw

        def spy(*args, **kwargs):
            counts.append(args[2].count)
            original(*args, **kwargs)

        patch.setattr(fused_sample, "row_draw", spy)
        draw = fused(head, seed=1, mask_id=299, want="all")
    assert counts == [64, 64, 22]
    assert_near(draw, streamed(head.logits(), seed=1, mask_id=299, want="all"))
    taken = head.take(torch.tensor([[149, 3], [60, 60]]))
    assert_near(fused(taken, seed=1, want="all"), streamed(taken.logits(), seed=1, want="all"))
    filtered = fused(head, seed=1, top_p=0.9, want="all")
    assert_near(filtered, streamed(head.logits(), seed=1, top_p=0.9, want="all"))


@pytest.mark.parametrize("clamp", ["left", "min"])
def test_logistic_heads_keep_their_bins_in_registers(clamp):
    mu, log_scale = normal(2, 20, scale=0.5), normal(2, 20, seed=1, scale=0.5)
    head = LogisticHead(mu, log_scale, 256, clamp=clamp)

    class NoLogits(LogisticHead):
        def logits(self):
            raise AssertionError("the bins must not be in memory")

    draw = fused(NoLogits(mu, log_scale, 256, clamp=clamp), seed=1, want=("log_prob", "entropy"))
    expected = streamed(head.logits(), seed=1, want=("log_prob", "entropy"))
    assert draw.token.equal(expected.token)
    # The edges are fp32 differences of size 1, scaled by up to e^3.
    torch.testing.assert_close(draw.log_prob, expected.log_prob, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(draw.entropy, expected.entropy, atol=2e-5, rtol=2e-5)
    views = LogisticHead(mu.t().contiguous().t(), log_scale, 256, clamp=clamp)
    assert fused(views, seed=1).token.equal(expected.token)


def test_a_logistic_head_without_eps_is_turned_into_logits():
    head = LogisticHead(normal(20, scale=0.5) - 40.0, normal(20, seed=1), 60, eps=0.0)
    assert_near(fused(head, seed=1, want="all"), streamed(head, seed=1, want="all"))


def test_guidance_takes_heads_of_two_kinds():
    hidden, weight = normal(2, 40, 8, scale=1.0), normal(300, 8, seed=1, scale=1.0)
    head, other = LinearHead(hidden, weight), normal(40, 2, 300, seed=3).transpose(0, 1)
    dense = head.logits()
    for first, second, logits in ((head, other, (dense, other)), (other, head, (other, dense))):
        draw = fused(first, guidance=(second, 2.0), seed=1, want="all", budget_bytes=1)
        assert_near(draw, streamed(logits[0], guidance=(logits[1], 2.0), seed=1, want="all"))


class PlainHead(di4c_fast.heads.Head):
    """A head of a kind that the kernels do not know."""

    def __init__(self, logits):
        self.inner = logits

    shape = property(lambda self: self.inner.shape)
    dtype = property(lambda self: self.inner.dtype)
    device = property(lambda self: self.inner.device)

    def take(self, rows):
        return PlainHead(self.inner.flatten(0, -2)[rows])

    def logits(self):
        return self.inner

    def tensors(self):
        return (self.inner,)

    def with_tensors(self, tensors):
        return PlainHead(tensors[0])


def test_heads_of_other_kinds_are_asked_for_their_logits_in_groups():
    logits = normal(3, 50, 300)
    draw = fused(PlainHead(logits), seed=1, want="all", budget_bytes=1)
    assert_near(draw, streamed(logits, seed=1, want="all"))


def test_rows_beyond_the_scratch_memory_are_drawn_in_turn():
    logits = normal(9, 700)
    tiles = {**SPLIT, "sample_scratch_bytes": 3 * 4 * 4 * 6}
    assert_near(
        fused(logits, seed=1, want="all", tiles=tiles), streamed(logits, seed=1, want="all")
    )


def test_empty_batches_and_single_tokens():
    for arguments in ({}, {"top_p": 0.5}, {"confidence_dtype": torch.bfloat16}):
        draw = fused(torch.empty(0, 4, 300), seed=0, want="all", **arguments)
        expected = streamed(torch.empty(0, 4, 300), seed=0, want="all", **arguments)
        for value, other in zip(draw, expected, strict=True):
            assert value.shape == other.shape
            assert value.dtype == other.dtype
    draw = fused(torch.tensor([5.0]), seed=0, want="all")
    assert draw.token.shape == ()
    assert [float(value) for value in draw] == [0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", STATISTICS)
def test_only_the_wanted_fields_come_back(name):
    logits = normal(8, 300)
    for arguments in ({"temperature": 0.5}, {"top_k": 9}, {"confidence_dtype": torch.bfloat16}):
        alone = fused(logits, seed=1, want=name, **arguments)
        assert [n for n in STATISTICS if getattr(alone, n) is not None] == [name]
        everything = fused(logits, seed=1, want="all", **arguments)
        assert getattr(alone, name).equal(getattr(everything, name))


@pytest.mark.parametrize("arguments", [{}, {"top_p": 0.9}, {"temperature": 0.0}])
def test_bad_rows_are_named_or_marked(arguments):
    logits = normal(2, 3, 140)
    logits[1, 0, 77] = math.nan
    logits[1, 2] = -INF
    with pytest.raises(ValueError, match=r"logits must not hold NaN, got it in row \(1, 0\) at 77"):
        fused(logits, seed=0, **arguments)
    draw = fused(logits, seed=0, want="all", check=False, **arguments)
    bad = torch.tensor([[False] * 3, [True, False, True]])
    for value in draw:
        marked = value.isnan() if value.is_floating_point() else value == -1
        assert marked.equal(bad)
    logits[1, 0, 77] = 0.0
    with pytest.raises(ValueError, match=r"logits allow no token in row \(1, 2\)"):
        fused(logits, seed=0, **arguments)


def test_nothing_is_differentiable_and_logits_stay_untouched():
    logits = normal(5, 300).requires_grad_()
    before = logits.detach().clone()
    for arguments in ({}, {"top_p": 0.5, "mask_id": 3}, {"confidence_dtype": torch.float32}):
        draw = fused(logits, seed=0, want="all", temperature=0.4, **arguments)
        assert not any(value.requires_grad for value in draw)
    assert logits.equal(before)


@pytest.mark.parametrize("kind", ["tensor", "linear", "logistic", "guided"])
def test_a_compiled_call_gives_the_same_draws(kind):
    logits, other = normal(2, 6, 300), normal(2, 6, 300, seed=1)
    weight, hidden = normal(300, 8), normal(2, 6, 8, seed=1)
    seed, step = torch.tensor(4), torch.tensor(2)

    def draw(first, second):
        if kind == "linear":
            head = LinearHead(hidden + first[..., :8], weight)
        elif kind == "logistic":
            head = LogisticHead(first[..., 0] * 0.1, second[..., 0], 90)
        else:
            head = first * 1.5
        guidance = (second * 2.0, 1.5) if kind == "guided" else None
        draw = sample(
            head, seed=seed, step=step, guidance=guidance, temperature=0.8, want="all",
            backend="triton", check=False,
        )  # fmt: skip
        return tuple(draw)

    eager = draw(logits, other)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")(logits, other)
    for value, expected in zip(compiled, eager, strict=True):
        assert value.equal(expected)


@pytest.mark.parametrize("kind", ["tensor", "linear", "logistic"])
def test_the_op_passes_opcheck(kind, monkeypatch):
    heads = {
        "tensor": normal(2, 3, 140),
        "linear": LinearHead(normal(2, 3, 8), normal(140, 8), normal(3, 140)),
        "logistic": LogisticHead(normal(2, 3), normal(2, 3), 16),
    }
    recorded = []
    op = fused_sample.draw_rows

    def spy(*args):
        recorded.append(args)
        return op(*args)

    monkeypatch.setattr(fused_sample, "draw_rows", spy)
    fused(heads[kind], seed=1, want="all", temperature=torch.rand(2, 3))
    (arguments,) = recorded
    torch.library.opcheck(
        op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_cpu_tensors_outside_the_interpreter_raise(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match='backend="triton" cannot run: the tensors are on the'):
        fused(torch.zeros(2, 3))
