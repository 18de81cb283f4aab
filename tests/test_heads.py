"""Heads: the logits they stand for, the rows they select, their gradients, their complaints."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from loss_cases import TIGHT
from loss_heads import BINS, HEADS, WIDTH, head_tensors
from wrong_arguments import Wrong, wrong

import di4c_fast
from di4c_fast import Head, LinearHead, LogisticHead, TensorHead
from di4c_fast.heads import as_head, decode_head

LEADING = (2, 3, 4)  # (B, N, D)
V, C = BINS, WIDTH
BUILT_IN = (*(kind for kind in HEADS if not kind.startswith("user")), "expanded", "transposed")


@pytest.fixture(params=(*BUILT_IN, "user"))
def kind(request) -> str:
    return request.param


def make(kind: str, leading=LEADING) -> Head:
    if kind in HEADS:
        return as_head(HEADS[kind](*head_tensors(kind, leading, V).values()))
    logits = head_tensors("tensor", leading, V)["logits"]
    if kind == "expanded":
        return TensorHead(logits[:1].expand_as(logits))
    return TensorHead(logits.movedim(-1, 0).contiguous().movedim(0, -1))


@pytest.fixture
def head(kind) -> Head:
    return make(kind)


def with_leaves(head: Head) -> tuple[Head, list[torch.Tensor]]:
    """The head over copies that ask for a gradient, and those."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in head.tensors()]
    return head.with_tensors(leaves), leaves


def test_shape_dtype_and_device_are_those_of_the_logits(head):
    logits = head.logits()
    assert head.shape == logits.shape == (*LEADING, V)
    assert head.dtype == logits.dtype == torch.float64
    assert head.device == logits.device
    assert f"shape={(*LEADING, V)}" in repr(head)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([5]),
        torch.tensor([[0, 23, 7], [7, 7, 12]]),
        torch.tensor(17),
        torch.zeros(0, 3, dtype=torch.int64),
        torch.arange(24).view(2, 3, 4),
    ],
    ids=["one", "repeated", "scalar", "none", "all"],
)
@pytest.mark.parametrize("leading", [LEADING, (24,)], ids=str)
def test_take_selects_rows_of_the_flattened_logits_and_of_taken_rows(kind, leading, rows):
    head = make(kind, leading)
    taken, expected = head.take(rows), head.logits().flatten(0, -2)[rows]
    assert taken.shape == (*rows.shape, V)
    torch.testing.assert_close(taken.logits(), expected, **TIGHT)
    if rows.ndim and rows.numel():
        again = torch.arange(-2, 2) % rows.numel()
        torch.testing.assert_close(
            taken.take(again).logits(), expected.flatten(0, -2)[again], **TIGHT
        )


def test_a_single_row_of_logits_is_row_zero():
    logits = torch.randn(V)
    assert torch.equal(TensorHead(logits).take(torch.tensor([0, 0])).logits(), logits.expand(2, V))


@pytest.mark.parametrize("row", [24, 1000, -1])
@pytest.mark.parametrize("kind", BUILT_IN)
def test_row_numbers_out_of_range_or_of_another_kind_raise(head, row):
    with pytest.raises(ValueError, match=rf"rows must be in \[0, 24\), got {row}"):
        head.take(torch.tensor([row])).logits()
    with pytest.raises(TypeError, match=r"rows must have dtype torch.int64, got torch.int32"):
        head.take(torch.tensor([1], dtype=torch.int32))
    with pytest.raises(TypeError, match=r"rows must be a Tensor, got list \[1\]"):
        head.take([1])


def test_tensors_and_with_tensors_are_inverse(head):
    tensors = head.tensors()
    doubled = head.with_tensors([None if t is None else 2 * t for t in tensors])
    back = doubled.with_tensors(tensors)
    assert all(a is b for a, b in zip(back.tensors(), tensors, strict=True))
    assert type(doubled) is type(head)
    assert torch.equal(back.logits(), head.logits())
    assert not torch.equal(doubled.logits(), head.logits())
    assert all(a is b for a, b in zip(head.tensors(), tensors, strict=True))


def test_detached_head_shares_memory_and_has_no_graph(kind):
    grown, _ = with_leaves(make(kind))
    assert grown.requires_grad
    assert grown.logits().requires_grad
    cut = grown.detach()
    assert not cut.requires_grad
    assert not cut.logits().requires_grad
    for ours, theirs in zip(cut.tensors(), grown.tensors(), strict=True):
        if ours is not None:
            assert ours.data_ptr() == theirs.data_ptr()


def test_requires_grad_looks_at_every_tensor():
    assert not make("linear, bias").requires_grad
    for i in range(3):
        tensors = list(make("linear, bias").tensors())
        tensors[i].requires_grad_()
        assert LinearHead(*tensors).requires_grad


def test_linear_head_is_the_linear_layer():
    head = make("linear, bias")
    expected = F.linear(head.hidden, head.weight, head.bias)
    torch.testing.assert_close(head.logits(), expected, **TIGHT)
    per_position = make("linear, bias per position")
    expected = F.linear(per_position.hidden, per_position.weight) + per_position.bias
    torch.testing.assert_close(per_position.logits(), expected, **TIGHT)
    capped = make("linear, capped")
    expected = 1.5 * torch.tanh((F.linear(capped.hidden, capped.weight) + capped.bias) / 1.5)
    torch.testing.assert_close(capped.logits(), expected, **TIGHT)


def test_linear_head_takes_a_slice_of_a_larger_embedding():
    table = torch.randn(2 * V, C)
    hidden = torch.randn(3, C)
    head = LinearHead(hidden, table[V:])
    torch.testing.assert_close(head.logits(), hidden @ table[V:].T)


def test_linear_head_computes_in_the_dtype_of_hidden():
    hidden = torch.randn(3, C, dtype=torch.bfloat16)
    weight, bias = torch.randn(V, C), torch.randn(V)
    head = LinearHead(hidden, weight, bias)
    assert head.dtype == torch.bfloat16
    assert head.logits().dtype == torch.bfloat16
    expected = F.linear(hidden, weight.bfloat16(), bias.bfloat16())
    assert torch.equal(head.logits(), expected)


def test_gradients_of_taken_rows_reach_the_tensors(kind):
    rows = torch.tensor([[3, 8], [3, 21]])
    weights = torch.randn(2, 2, V, dtype=torch.float64)

    def gradients(select) -> list[torch.Tensor]:
        head, leaves = with_leaves(make(kind))
        (select(head) * weights).sum().backward()
        return [leaf.grad for leaf in leaves if leaf is not None]

    ours = gradients(lambda head: head.take(rows).logits())
    expected = gradients(lambda head: head.logits().flatten(0, -2)[rows])
    torch.testing.assert_close(ours, expected, **TIGHT)


# The discretised logistic


def exact_logistic_log_mass(mu: float, log_scale: float, count: int) -> torch.Tensor:
    """log(F(right) - F(left)) of every bin by way of Python's floats of high precision."""
    scale = math.exp(log_scale - 2.0)
    values = []
    for v in range(count):
        left = float((Fraction(2 * v, count) - 1 - Fraction(mu)) / Fraction(scale))
        right = float((Fraction(2 * v + 2, count) - 1 - Fraction(mu)) / Fraction(scale))
        # F(b) - F(a) = F(b) F(-a) (1 - e^(a-b)), each factor by its own stable logarithm.
        values.append(
            -math.log1p(math.exp(-right)) if right > 0 else right - math.log1p(math.exp(right))
        )
        values[-1] += (
            -math.log1p(math.exp(left)) if left < 0 else -left - math.log1p(math.exp(-left))
        )
        values[-1] += math.log(-math.expm1(left - right))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("clamp", ["left", "min"])
@pytest.mark.parametrize(("mu", "log_scale"), [(0.1, 1.0), (-0.9, 0.0), (0.95, -1.0), (0.0, 4.0)])
def test_logistic_logits_are_the_logarithms_of_the_bins(mu, log_scale, clamp):
    # eps = 1e-6 is what separates them where a bin has little mass.
    head = LogisticHead(
        torch.tensor([mu], dtype=torch.float64),
        torch.tensor([log_scale], dtype=torch.float64),
        64,
        clamp=clamp,
    )
    exact = exact_logistic_log_mass(mu, log_scale, 64)
    heavy = exact > math.log(1e-3)
    assert heavy.any()
    torch.testing.assert_close(head.logits()[0][heavy], exact[heavy], rtol=0, atol=2e-3)
    without = LogisticHead(head.mu, head.log_scale, 64, eps=0.0, clamp=clamp)
    torch.testing.assert_close(without.logits()[0], exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("clamp", ["left", "min"])
def test_logistic_logits_are_the_form_of_the_sources(clamp):
    mu = torch.linspace(-0.9, 0.9, 5, dtype=torch.float64)
    log_scale = torch.linspace(-1.0, 3.0, 5, dtype=torch.float64)
    edges = torch.linspace(-1, 1, 17, dtype=torch.float64)
    scaled = (edges - mu[:, None]) * torch.exp(2 - log_scale)[:, None]
    left, right = scaled[:, :-1], scaled[:, 1:]

    def log_minus_exp(a, b):
        return a + torch.log1p(1e-6 - torch.exp(b - a))

    expected = log_minus_exp(F.logsigmoid(right), F.logsigmoid(left))
    if clamp == "min":
        expected = torch.minimum(expected, log_minus_exp(F.logsigmoid(-left), F.logsigmoid(-right)))
    actual = LogisticHead(mu, log_scale, 16, clamp=clamp).logits()
    # The form of the sources cancels to 1e-16 / 1e-6.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_logistic_logits_are_symmetric_with_the_minimum_of_both_forms():
    mu, log_scale = torch.tensor([0.3], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    there = LogisticHead(mu, log_scale, 32, clamp="min").logits()
    back = LogisticHead(-mu, log_scale, 32, clamp="min").logits().flip(-1)
    torch.testing.assert_close(there, back, **TIGHT)


@pytest.mark.parametrize("eps", [1e-6, 0.0])
@pytest.mark.parametrize("clamp", ["left", "min"])
def test_logistic_logits_and_gradients_are_finite_for_any_location_and_scale(clamp, eps):
    mu = torch.tensor([-30.0, -1.0, 0.0, 0.99, 40.0]).repeat(4, 1).requires_grad_()
    log_scale = torch.tensor([[-8.0], [-1.0], [3.0], [12.0]]).expand(4, 5).clone().requires_grad_()
    logits = LogisticHead(mu, log_scale, 256, eps=eps, clamp=clamp).logits()
    assert torch.isfinite(logits).all()
    logits.log_softmax(-1)[..., 7].sum().backward()
    assert torch.isfinite(mu.grad).all()
    assert torch.isfinite(log_scale.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logistic_logits_of_half_precision_numbers_are_computed_in_float32(dtype):
    mu, log_scale = torch.tensor([0.25], dtype=dtype), torch.tensor([0.5], dtype=dtype)
    head = LogisticHead(mu, log_scale, 16)
    assert head.dtype == dtype
    assert head.logits().dtype == torch.float32
    exact = LogisticHead(mu.double(), log_scale.double(), 16).logits()
    torch.testing.assert_close(head.logits().double(), exact, rtol=2e-6, atol=2e-6)


# Complaints

FLOATING = "floating point (float64, float32, bfloat16 or float16)"
h, w, mu = torch.randn(2, 3, C), torch.randn(V, C), torch.zeros(2)
integers, far = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, device="meta")
WRONG = [
    (lambda: TensorHead([1.0]), TypeError, "logits must be a Tensor, got list [1.0]"),
    (lambda: TensorHead(integers), TypeError, f"logits must be {FLOATING}, got torch.int64"),
    (
        lambda: TensorHead(mu.to(torch.float8_e4m3fn)),
        TypeError,
        f"logits must be {FLOATING}, got torch.float8_e4m3fn",
    ),
    (lambda: TensorHead(mu[0]), "logits must have at least 1 dimensions, got shape ()"),
    (
        lambda: as_head("x", "teacher"),
        TypeError,
        "teacher must be a Tensor of logits or a Head, got str 'x'",
    ),
    (lambda: LinearHead(integers, w), TypeError, f"hidden must be {FLOATING}, got torch.int64"),
    (lambda: LinearHead(h, None), TypeError, "weight must be a Tensor, got NoneType None"),
    (lambda: LinearHead(mu, w), "hidden must have at least 2 dimensions, got shape (2"),
    (lambda: LinearHead(h, w[None]), f"weight must have 2 dimensions, got shape (1, {V}, {C})"),
    (
        lambda: LinearHead(h, w.T),
        f"weight must have shape (V, C) with C = {C}, the last size of hidden (2, 3, {C}), "
        f"got ({C}, {V})",
    ),
    (lambda: LinearHead(h, w.to("meta")), "weight must be on the device of hidden (cpu), got meta"),
    (
        lambda: LinearHead(h, w, w[:, 0].to("meta")),
        "bias must be on the device of hidden (cpu), got meta",
    ),
    (
        lambda: LinearHead(h, w, torch.zeros(2, V)),
        f"bias must have shape (V,) = ({V},) or (D, V) = (3, {V}), got (2, {V})",
    ),
    (lambda: LinearHead(h, w, integers), TypeError, f"bias must be {FLOATING}, got torch.int64"),
    (lambda: LinearHead(h, w, budget_bytes=0), "budget_bytes must be at least 1, got 0"),
    (lambda: LinearHead(h, w, softcap=0), "softcap must be in [1e-9, 1e9], got 0"),
    (lambda: LinearHead(h, w, softcap=-30.0), "softcap must be in [1e-9, 1e9], got -30.0"),
    (lambda: LinearHead(h, w, softcap=1e39), "softcap must be in [1e-9, 1e9], got 1e+39"),
    (lambda: LinearHead(h, w, softcap=math.inf), "softcap must be finite, got inf"),
    (lambda: LinearHead(h, w, softcap="30"), TypeError, "softcap must be a number, got str '30'"),
    (lambda: LogisticHead(integers, mu, 4), TypeError, f"mu must be {FLOATING}, got torch.int64"),
    (lambda: LogisticHead(mu, 0.5, 4), TypeError, "log_scale must be a Tensor, got float 0.5"),
    (
        lambda: LogisticHead(mu, torch.zeros(3), 4),
        "log_scale must have the shape of mu (2,), got (3,)",
    ),
    (
        lambda: LogisticHead(h[..., 0], far, 4),
        "log_scale must be on the device of mu (cpu), got meta",
    ),
    (lambda: LogisticHead(mu, mu, 4.0), TypeError, "num_classes must be an int, got float 4.0"),
    (lambda: LogisticHead(mu, mu, True), TypeError, "num_classes must be an int, got bool True"),
    (lambda: LogisticHead(mu, mu, 1), "num_classes must be at least 2, got 1"),
    (lambda: LogisticHead(mu, mu, 4, eps=-0.1), "eps must be in [0, 1), got -0.1"),
    (lambda: LogisticHead(mu, mu, 4, eps=math.nan), "eps must be finite, got nan"),
    (
        lambda: LogisticHead(mu, mu, 4, clamp="right"),
        "clamp must be one of 'left', 'min', got 'right'",
    ),
]


@wrong(WRONG)
def test_wrong_arguments_are_named(wrong: Wrong):
    with wrong.raises():
        wrong.what()


def test_rows_are_loaded_and_single_logits_found(head):
    every = head.logits().flatten(0, -2)
    rows = torch.tensor([[0, 5, 23], [7, 1, 2]])
    tokens = torch.tensor([[1, 2, 0], [3, 1, 2]])
    prepared = head.prepared()
    out = torch.empty(2, 3, 64, dtype=prepared.chunk_dtype)[..., : every.shape[-1]]
    prepared.load(rows, out)
    assert prepared.chunk_dtype == head.prepared_dtype
    torch.testing.assert_close(out, every[rows].to(out.dtype), rtol=1e-5, atol=1e-5)
    found = head.logits_at(rows, tokens)
    torch.testing.assert_close(found.float(), every[rows, tokens].float(), rtol=1e-5, atol=1e-5)


def test_excluded_columns_are_minus_infinity_in_every_view(kind):
    head = make(kind).exclude(torch.tensor([1, 3]))
    rows = torch.tensor([4, 9])
    for logits in (head.logits().flatten(0, -2)[rows], head.take(rows).logits()):
        assert bool((logits[:, [1, 3]] == float("-inf")).all())
        assert bool(torch.isfinite(logits[:, [0, 2]]).all())
    at = head.logits_at(rows, torch.tensor([1, 2]))
    assert at[0] == float("-inf")
    assert torch.isfinite(at[1])
    assert not set(di4c_fast.sample(head, seed=0).token.flatten().tolist()) & {1, 3}


def test_heads_are_split_and_unflattened(head):
    first, rest = head.split(1)
    assert torch.equal(torch.cat([first.logits(), rest.logits()]), head.logits())
    size = head.shape[0]
    assert torch.equal(head.unflatten(1, size).logits()[0], head.logits())


@pytest.mark.parametrize("kind", BUILT_IN)
def test_heads_travel_as_text_and_tensors(head):
    for sent in (head, head.take(torch.tensor([3, 1, 20]))):
        arrived = decode_head(sent.encode(), sent.tensors())
        assert type(arrived) is type(sent)
        assert torch.equal(arrived.logits(), sent.logits())


def test_gradient_of_rows_is_that_of_autograd(head):
    rows = torch.tensor([3, 0, 17, 5])
    live, leaves = with_leaves(head)
    upstream = torch.randn(4, head.shape[-1], generator=torch.Generator().manual_seed(0))
    (live.take(rows).logits() * upstream.to(head.dtype)).sum().backward()
    sums = head.new_gradients([leaf is not None for leaf in leaves])
    for part in (slice(0, 1), slice(1, 4)):
        logits = head.take(rows[part]).logits().to(head.work_dtype)
        head.add_gradient(sums, rows[part], upstream[part].to(head.work_dtype), logits)
    for total, leaf in zip(sums, leaves, strict=True):
        if leaf is not None:
            torch.testing.assert_close(total, leaf.grad.to(total.dtype), rtol=2e-5, atol=2e-5)
