"""The triton backend as a whole, under the interpreter, against the dense formulation in fp64.

Deliberately broken copies of the code and the tests that caught them are listed in
`kernels/README.md`, section "Mutations".
"""

from __future__ import annotations

import math

import pytest
import torch
from fused_support import (
    SMALL_TILES,
    check_against_reference,
    converted,
    counting,
    evaluate,
    make_case,
    randn,
)

import di4c_fast
from di4c_fast import LinearHead, LogisticHead, TensorHead

fused = pytest.importorskip("di4c_fast.fused")
from di4c_fast.fused_heads import HeadSpec, padded  # noqa: E402
from di4c_fast.kernels.triton import tuning  # noqa: E402

from di4c_fast import fused_passes, fused_plan  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="run by test_fused_gpu on a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of masked lanes
    pytest.mark.usefixtures("poisoned_memory"),
]


def test_masked_language_with_every_term():
    check_against_reference(make_case(1))


def test_no_masks_and_vocabulary_in_one_tile():
    case = make_case(2, mask=False, components=4, vocabulary=32, positions=3)
    check_against_reference(case, tiles={"row_elements": 128})


def test_vocabulary_of_several_splits_and_draw_blocks():
    check_against_reference(
        make_case(3, batch=1, positions=2, vocabulary=521),
        tiles={
            "row_elements": 256,
            "forward_elements": 256,
            "backward_elements": 256,
            "split_columns": 128,
        },
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    # The interpreter truncates when it stores bf16, so its error may be twice a rounding.
    check_against_reference(make_case(4, dtype=dtype))


def test_teacher_mixture_is_averaged():
    check_against_reference(make_case(5, teachers=3))


def test_teacher_mixture_without_consistency():
    check_against_reference(make_case(6, teachers=2, draws=0))


def test_without_consistency_the_teacher_is_read_again():
    check_against_reference(make_case(7, draws=0))


def test_marginals_without_component_term():
    case = make_case(8, component=False)
    assert case["component_weight"] == 0.0
    check_against_reference(case)


def test_component_loops_when_components_exceed_a_tile():
    case = make_case(9, components=5, draws=5, teachers=3, batch=1, positions=3)
    check_against_reference(case, tiles={**SMALL_TILES, "component_tile": 2})


def test_without_control_variate():
    check_against_reference({**make_case(10), "control_variate": False})


def test_single_component_has_zero_correlation():
    outcome = check_against_reference(make_case(11, components=1, draws=1))
    assert torch.equal(outcome.terms[0].abs(), torch.zeros(2))


def test_draws_are_those_of_the_torch_backend():
    case = make_case(12, vocabulary=300, positions=3)
    del case["consistency_x"]
    values = []
    for backend in ("triton", "torch"):
        seeded = {**case, "generator": torch.Generator().manual_seed(5)}
        values.append(evaluate(seeded, backend))
    torch.testing.assert_close(values[0].loss, values[1].loss)
    torch.testing.assert_close(values[0].gradients, values[1].gradients)


def test_weight_of_zero_leaves_out_an_infinite_term():
    case = make_case(13)
    # No component can produce class 3, which the teacher wants: both teacher terms are infinite.
    case["student"][..., 3] = -torch.inf
    case["consistency"][..., 3] = -torch.inf
    for name in ("x0", "xt", "consistency_x", "xu"):
        case[name] = torch.where(case[name] == 3, 4, case[name])
    case["teacher_weight"] = torch.zeros(2)
    case["component_weight"] = torch.zeros(2)
    # In the dense formulation an infinite divergence makes the gradient of its weight NaN.
    outcome = check_against_reference(case, frozen=("log_weights",))
    assert torch.isinf(outcome.terms[1]).all()
    assert torch.isfinite(outcome.loss)


def test_impossible_components_and_columns():
    case = make_case(14, component=False)
    case["student"][:, 1, :, 2:9] = -torch.inf  # one component lacks some classes
    case["student"][:, :, 1, 5] = -torch.inf  # no component has class 5 at position 1
    case["teacher"][..., 5] = -torch.inf
    case["consistency"][..., 5] = -torch.inf
    case["consistency_x"] = torch.where(case["consistency_x"] == 5, 6, case["consistency_x"])
    case["xu"] = torch.where(case["xu"] == 5, 6, case["xu"])
    case["x0"][:, 0] = 4
    # The component term, infinite and without weight, makes the dense gradient of the weights NaN.
    check_against_reference(case, frozen=("log_weights",))


def test_target_that_no_component_has_is_left_out_of_the_correlation():
    case = make_case(15, teachers=0, component=False)
    case["xt"][:] = case["mask_id"]
    case["student"][:, :, 2, 7] = -torch.inf
    case["teacher"][..., 7] = -torch.inf
    case["x0"][:, 2] = 7
    case["consistency"][..., 7] = -torch.inf
    case["consistency_x"] = torch.where(case["consistency_x"] == 7, 6, case["consistency_x"])
    case["xu"] = torch.where(case["xu"] == 7, 6, case["xu"])
    outcome = check_against_reference(case)
    assert torch.isfinite(outcome.loss)


def test_positions_without_any_class_contribute_nothing():
    """Catches (`mutate_kernels.py`): positions without any class counted."""
    case = make_case(16)
    case["xt"][:] = case["mask_id"]
    case["student"][:, :, 1] = -torch.inf
    outcome = check_against_reference(case)
    assert torch.isfinite(outcome.loss)
    assert torch.equal(
        outcome.gradients["student"][:, :, 1], torch.zeros_like(case["student"][:, :, 1])
    )


def test_positions_without_any_class_contribute_nothing_to_a_log_likelihood():
    """Catches (`mutate_kernels.py`): positions without any class counted."""
    case = {**make_case(17), "control_variate": False}
    case["xt"][:] = case["mask_id"]
    case["student"][:, :, 1] = -torch.inf
    assert torch.isfinite(check_against_reference(case).loss)


def test_component_of_weight_zero():
    case = make_case(18)
    case["log_weights"][:, 1] = -torch.inf
    outcome = check_against_reference(case, frozen=("log_weights",))
    case["component_weight"] = 0.0
    assert torch.isfinite(outcome.loss)


def test_inactive_positions_have_exactly_zero_gradient():
    case = make_case(19)
    outcome = check_against_reference(case)
    inactive = case["xt"] != case["mask_id"]
    assert inactive.any()
    gradient = outcome.gradients["student"].transpose(1, 2)
    assert torch.count_nonzero(gradient[inactive]) == 0


def test_no_active_position():
    case = make_case(20)
    case["valid"] = torch.zeros_like(case["x0"], dtype=torch.bool)
    with tuning.override(**SMALL_TILES):
        outcome = evaluate(case, "triton")
    assert outcome.loss == 0
    assert torch.count_nonzero(outcome.gradients["student"]) == 0
    assert torch.isfinite(outcome.gradients["log_weights"]).all()


@pytest.mark.parametrize("sizes", [(0, 4), (2, 0)])
def test_empty_batch_and_empty_sequence(sizes):
    batch, positions = sizes
    outcome = evaluate(make_case(21, batch=batch, positions=positions), "triton")
    assert outcome.loss == 0
    assert outcome.gradients["student"].shape == (batch, 3, positions, 37)


def test_large_logits_and_one_hot_teacher():
    case = make_case(22, scale=200.0)
    case["teacher"] = torch.full_like(case["teacher"], -torch.inf)
    case["teacher"].scatter_(-1, case["x0"].unsqueeze(-1), 0.0)
    # Log-probabilities of hundreds of nats: relative rounding 1e-7, times a few thousand.
    check_against_reference(case, atol=1e-4)


def test_student_close_to_the_teacher():
    case = make_case(23, components=4)
    noise = 1e-3 * torch.randn(case["student"].shape, generator=torch.Generator().manual_seed(1))
    case["student"] = case["teacher"].unsqueeze(1) + noise
    case["data_weight"] = case["consistency_weight"] = 0.0
    case["component_weight"] = 0.0
    outcome = check_against_reference(case, atol=1e-7)
    assert 0 < outcome.gradients["student"].abs().max() < 1e-2


def test_expanded_transposed_and_strided_inputs():
    case = make_case(24, components=2)
    expected = dict(case)
    one = case["student"][:, :1].clone()
    expected["student"] = one.expand(-1, 2, -1, -1)
    transposed = case["teacher"].transpose(1, 2).contiguous().transpose(1, 2)  # V is not last
    buffer = torch.zeros(2, 2, 4, 40)
    buffer[..., :37] = case["consistency"]
    strided = {
        **case,
        "student": one.expand(-1, 2, -1, -1),
        "teacher": transposed,
        "consistency": buffer[..., :37],
    }
    check_against_reference(strided, expected={**expected, "student": expected["student"].clone()})


def test_gradient_keeps_the_padding_of_the_rows():
    case = make_case(25)
    buffer = torch.zeros(2, 3, 4, 64)
    buffer[..., :37] = case["student"]
    outcome = check_against_reference({**case, "student": buffer[..., :37]}, expected=case)
    assert outcome.gradients["student"].stride() == buffer.stride()


def test_reduction_none_weights_examples_by_their_upstream_gradient():
    case = {**make_case(26), "reduction": "none"}
    check_against_reference(case, upstream=torch.tensor([0.3, -2.0]))


def test_backward_may_run_twice():
    case = make_case(27)
    student = case.pop("student").requires_grad_()
    loss = di4c_fast.loss(student, **case, backend="triton")
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second)


def test_double_backward_raises():
    case = make_case(28)
    student = case.pop("student").requires_grad_()
    loss = di4c_fast.loss(student, **case, backend="triton")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_gradient_in_place_takes_the_memory_of_the_logits():
    case = make_case(29)
    expected = evaluate(case, "triton")
    leaf = case.pop("student").requires_grad_()
    logits = leaf * 1.0
    before, version = logits.data_ptr(), logits._version
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    head = TensorHead(logits, in_place_gradient=True)
    loss = di4c_fast.loss(head, **case, backend="triton")
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    torch.testing.assert_close(gradient, expected.gradients["student"])
    assert seen == [before]
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_expanded_logits_are_not_overwritten():
    case = make_case(33, components=2, batch=1, positions=2)
    leaf = case.pop("student")[:, :1].requires_grad_()
    logits = (leaf * 1.0).expand(-1, 2, -1, -1)
    results = []
    for in_place in (False, True):
        head = TensorHead(logits, in_place_gradient=in_place)
        loss = di4c_fast.loss(head, **case, backend="triton")
        results.append(torch.autograd.grad(loss, leaf, retain_graph=True)[0])
    assert torch.equal(*results)


def test_in_place_gradient_of_many_components():
    case = make_case(30, components=5, batch=1)
    expected = evaluate(case, "triton")
    leaf = case.pop("student").requires_grad_()
    head = TensorHead(leaf * 1.0, in_place_gradient=True)
    with tuning.override(**{**SMALL_TILES, "component_tile": 2}):
        loss = di4c_fast.loss(head, **case, backend="triton")
        (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, expected.gradients["student"])


def test_double_precision_goes_to_the_torch_backend():
    case = converted(make_case(31), torch.float64)
    ours, truth = evaluate(case, "triton"), evaluate(case, "reference")
    torch.testing.assert_close(ours.loss, truth.loss)
    torch.testing.assert_close(ours.gradients, truth.gradients)


def test_nothing_is_kept_without_gradient():
    case = make_case(32)
    with counting(fused_passes, "mixture_forward"), torch.no_grad():
        plan = []
        original = fused_plan.Batch.plan
        fused_plan.Batch.plan = lambda *args: plan.append(original(*args)) or plan[-1]
        try:
            loss = di4c_fast.loss(case.pop("student"), **case, backend="triton")
        finally:
            fused_plan.Batch.plan = original
    assert not loss.requires_grad
    assert all((p.kept_teacher, p.kept_consistency, p.kept_logits) == (0, 0, 0) for p in plan)


# Distributions that do not all fit ---------------------------------------------------------------

TWO_ROWS = {"distribution_bytes": 1}  # the least: one row kept, one in turn


@pytest.fixture
def no_share(monkeypatch):
    monkeypatch.setattr(fused_plan, "DISTRIBUTION_SHARE", 0.0)


@pytest.mark.parametrize("teachers", [0, 2])
@pytest.mark.parametrize("mask", [True, False])
def test_distributions_beyond_the_room_are_formed_again(no_share, teachers, mask):
    case = make_case(33, teachers=teachers, mask=mask, positions=5)
    with counting(fused_passes, "marginal") as made:
        check_against_reference(case, tiles=TWO_ROWS)
    # Ten positions: one row is formed once, nine in forward and in backward.
    assert len(made) == (1 + 9 * 2) * (2 if teachers else 1)


@pytest.mark.parametrize(("asked", "taken"), [(1, 2), (5, 5), (7, 7), (9, 9), (10, 10), (100, 10)])
def test_the_room_for_distributions_is_used_and_never_exceeded(no_share, monkeypatch, asked, taken):
    case = make_case(34, positions=5, component=False)
    whole = evaluate(case, "triton")
    kept: list[int] = []
    in_turn = [0]
    make_plan, rows_of = fused_plan.make_plan, fused_passes._Distributions._get

    def planned(*args):
        plan = make_plan(*args)
        kept.append(plan.kept_consistency)
        return plan

    def rows(self, name, visit):
        in_turn.append(visit.slots)
        return rows_of(self, name, visit)

    monkeypatch.setattr(fused_plan, "make_plan", planned)
    monkeypatch.setattr(fused_passes._Distributions, "_get", rows)
    with tuning.override(distribution_bytes=asked * 4 * padded(37)):
        outcome = evaluate(case, "triton")
    assert kept[0] + max(in_turn) == taken
    torch.testing.assert_close(outcome.loss, whole.loss)
    torch.testing.assert_close(outcome.gradients, whole.gradients)


def test_gradient_in_place_with_distributions_formed_again(no_share):
    case = make_case(35)
    expected = evaluate(case, "triton")
    leaf = case.pop("student").requires_grad_()
    head = TensorHead(leaf * 1.0, in_place_gradient=True)
    with tuning.override(**TWO_ROWS):
        loss = di4c_fast.loss(head, **case, backend="triton")
        (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, expected.gradients["student"])


def test_the_share_of_the_logits_bounds_the_distributions_at_the_language_shape():
    request = fused_plan.Request(50257, True, True, True, True, 1.0, True)
    tensor, sizes = HeadSpec("tensor"), (1, 16, 1024, 50258)
    arguments = (request, tensor, tensor, tensor, sizes, 1, 16, 2, torch.device("cpu"))
    plan = fused_plan.make_plan(*arguments)
    logits = 16 * 1024 * 50258 * 2
    row = 4 * padded(50258)
    assert 0.08 * logits < (plan.first + plan.chunk) * row <= 0.09 * logits
    assert plan.kept_consistency == plan.first
    assert plan.kept_teacher == 0
    assert plan.first + 2 * plan.chunk >= 1024  # three chunks


# Heads ----------------------------------------------------------------------------------------


def linear_case(seed: int, bias: str = "vector", width: int = 6, **sizes: int) -> dict:
    case = make_case(seed, **sizes)
    g = torch.Generator().manual_seed(seed + 1000)
    batch, components, positions, vocabulary = case["student"].shape
    weight = randn(g, vocabulary, width).float()
    shape = {"vector": (vocabulary,), "rows": (positions, vocabulary)}.get(bias)
    offset = None if shape is None else randn(g, *shape).float()

    def head(number: int) -> LinearHead:
        hidden = randn(g, batch, number, positions, width).float()
        return LinearHead(hidden, weight, offset)

    case["student"] = head(components)
    if "consistency" in case:
        case["consistency"] = head(case["consistency"].shape[1])
    teacher = randn(g, batch, positions, width).float()
    case["teacher"] = LinearHead(teacher, randn(g, vocabulary, width).float(), None)
    return case


def with_budget(case: dict, budget: int) -> dict:
    student = case["student"]
    hidden, weight, bias = student.tensors()
    return {**case, "student": LinearHead(hidden, weight, bias, budget_bytes=budget)}


@pytest.mark.parametrize("bias", ["none", "vector", "rows"])
def test_linear_heads_in_one_chunk(bias):
    check_against_reference(linear_case(40, bias))


@pytest.mark.parametrize("bias", ["vector", "rows"])
def test_linear_heads_chunk_by_chunk_without_keeping_anything(bias):
    """Catches (`mutate_kernels.py`): weight gradient of the last chunk only."""
    case = with_budget(linear_case(41, bias), 1)
    tiles = {**SMALL_TILES, "minimum_rows": 3}
    with counting(fused_passes, "mixture_forward") as calls:
        check_against_reference(case, tiles=tiles)
    assert len(calls) > 2


def test_linear_heads_keep_what_the_budget_allows():
    case = linear_case(42)
    row = 4 * 64  # bytes of a padded row
    # A position has 3 + 1 + 2 rows of logits and 2 of distributions. Six positions make a chunk
    # of half the budget; all distributions fit beside it, and the student's logits of six.
    case = with_budget(case, row * 72)
    plans = []
    original = fused_plan.make_plan
    fused_plan.make_plan = lambda *args: plans.append(original(*args)) or plans[-1]
    try:
        with counting(fused_passes, "marginal") as made:
            check_against_reference(case, tiles={**SMALL_TILES, "minimum_rows": 1})
    finally:
        fused_plan.make_plan = original
    assert len(made) == 2 * 2  # two chunks, both distributions, none of them a second time
    assert plans[0] == fused_plan.Plan(6, 8, 8, 6)


def test_linear_gradients_are_the_same_whatever_the_budget():
    """Catches (`mutate_kernels.py`): weight gradient of the last chunk only."""
    tiles = {**SMALL_TILES, "minimum_rows": 1}
    outcomes = []
    with tuning.override(**tiles):
        for budget in (1, 6000, 10**6):
            outcomes.append(evaluate(with_budget(linear_case(43), budget), "triton"))
    for outcome in outcomes[1:]:
        torch.testing.assert_close(outcome.loss, outcomes[0].loss)
        torch.testing.assert_close(outcome.gradients, outcomes[0].gradients)


def test_linear_backward_may_run_twice_with_kept_logits():
    """Catches (`mutate_kernels.py`): kept logits overwritten."""
    case = linear_case(44)
    student = case.pop("student")
    hidden = student.hidden.requires_grad_()
    head = student.with_tensors([hidden, student.weight, student.bias])
    loss = di4c_fast.loss(head, **case, backend="triton")
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


def test_frozen_head_computes_no_weight_gradient():
    from di4c_fast import fused_heads

    with counting(fused_heads, "_accumulate_product") as products:
        outcome = check_against_reference(linear_case(45), frozen=("weight", "bias"))
    assert products == []
    assert set(outcome.gradients) == {"hidden", "log_weights"}


def test_frozen_body_computes_no_hidden_gradient():
    outcome = check_against_reference(linear_case(46), frozen=("hidden", "log_weights"))
    assert set(outcome.gradients) == {"weight", "bias"}


def test_linear_teacher_and_consistency_with_a_plain_student():
    case = linear_case(47)
    case["student"] = make_case(47)["student"]
    tiles = {**SMALL_TILES, "minimum_rows": 2, "budget_bytes": 1}
    check_against_reference(case, tiles=tiles)


def test_plain_teacher_with_a_linear_student_and_no_consistency():
    case = linear_case(48, draws=0)
    case["teacher"] = make_case(48)["teacher"]
    check_against_reference(case, tiles={**SMALL_TILES, "minimum_rows": 2, "budget_bytes": 1})


def test_linear_head_visits_active_rows_only():
    case = linear_case(49)
    active = int((case["xt"] == case["mask_id"]).sum())
    from di4c_fast import fused_heads

    rows = []
    original = fused_heads.Source.logits_into

    def spy(self, index, out):
        rows.append(index.numel())
        original(self, index, out)

    fused_heads.Source.logits_into = spy
    try:
        with torch.no_grad():
            di4c_fast.loss(case.pop("student"), **case, backend="triton")
    finally:
        fused_heads.Source.logits_into = original
    assert rows == [active] * 3  # student, teacher, consistency


def test_weight_gradient_of_half_precision_is_accumulated_in_fp32():
    case = linear_case(50, "vector", batch=1, positions=16)
    for name in ("student", "teacher", "consistency"):
        head = case[name]
        case[name] = head.with_tensors([None if t is None else t.half() for t in head.tensors()])
    # One chunk per position: sixteen roundings of dW instead of one would show.
    tiles = {**SMALL_TILES, "minimum_rows": 1, "budget_bytes": 1}
    # Logits of size 5 are rounded to half precision by both: 2e-3 each.
    check_against_reference(case, tiles=tiles, atol=4e-3, terms_atol=4e-3)


def logistic_case(seed: int, clamp: str, **sizes: int) -> dict:
    case = make_case(seed, mask=False, **sizes)
    g = torch.Generator().manual_seed(seed + 2000)
    batch, components, positions, vocabulary = case["student"].shape

    def head(*leading: int) -> LogisticHead:
        mu = randn(g, *leading, positions, scale=0.7).float()
        log_scale = randn(g, *leading, positions).float()
        return LogisticHead(mu, log_scale, vocabulary, clamp=clamp)

    case["student"] = head(batch, components)
    if "consistency" in case:
        case["consistency"] = head(batch, case["consistency"].shape[1])
    case["teacher"] = head(batch)
    return case


@pytest.mark.parametrize("clamp", ["left", "min"])
@pytest.mark.parametrize("draws", [0, 2])
def test_logistic_heads(clamp, draws):
    case = logistic_case(60, clamp, vocabulary=24, draws=draws)
    # The fp32 form of the head loses digits by cancellation, so it is no measure; 1e-4 of
    # gradients of size 1 to 10 is what fp32 leaves of differences of edges scaled by e^2 to e^5.
    check_against_reference(case, atol=1e-4)


def test_logistic_heads_with_components_in_several_tiles():
    case = logistic_case(61, "left", vocabulary=24, components=5, batch=1)
    check_against_reference(case, tiles={**SMALL_TILES, "component_tile": 2}, atol=1e-4)


def test_logistic_gradient_is_zero_at_positions_that_do_not_count():
    case = logistic_case(62, "left", vocabulary=16)
    case["valid"] = torch.tensor([[True, False, True, True], [False, False, True, False]])
    outcome = check_against_reference(case, atol=1e-4)
    for name in ("mu", "log_scale"):
        gradient = outcome.gradients[name].transpose(1, 2)
        assert torch.count_nonzero(gradient[~case["valid"]]) == 0


def test_plain_teacher_for_a_logistic_student():
    case = logistic_case(63, "left", vocabulary=24)
    case["teacher"] = make_case(63, mask=False, vocabulary=24)["teacher"]
    check_against_reference(case, atol=1e-4)


# Token rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
@pytest.mark.parametrize("kind", ["tensor", "linear", "logistic"])
def test_token_rows(function, kind):
    makers = {
        "tensor": lambda: make_case(70),
        "linear": lambda: linear_case(70),
        "logistic": lambda: logistic_case(70, "left", vocabulary=24),
    }
    case = makers[kind]()
    g = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 20, (2, 3, 4), generator=g)
    upstream = torch.randn(2, 3, generator=g)
    active = torch.tensor([[True, True, False, True], [True, False, True, True]])

    def run(dtype: torch.dtype, backend: str):
        changed = converted(case, dtype)
        student = changed["student"]
        tensors = [student] if isinstance(student, torch.Tensor) else list(student.tensors())
        leaves = [t.detach().clone().requires_grad_() for t in tensors if t is not None]
        if isinstance(student, torch.Tensor):
            student = leaves[0]
        else:
            filled = iter(leaves)
            student = student.with_tensors([t if t is None else next(filled) for t in tensors])
        weights = changed["log_weights"].detach().clone().requires_grad_()
        value = function(
            student,
            rows,
            mask_id=case.get("mask_id"),
            valid=active,
            log_weights=weights,
            backend=backend,
        )
        grads = torch.autograd.grad(value, [*leaves, weights], grad_outputs=upstream.to(dtype))
        return [value.detach(), *grads]

    truth = run(torch.float64, "reference")
    with tuning.override(**SMALL_TILES):
        ours = run(torch.float32, "triton")
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), true, atol=2e-4, rtol=1e-4)


def test_impossible_token_row_is_minus_infinity_without_gradient():
    student = torch.zeros(1, 2, 3, 5)
    student[..., 4] = -math.inf
    student.requires_grad_()
    rows = torch.tensor([[[0, 4, 1], [0, 1, 2]]])
    value = di4c_fast.mixture_log_prob(student, rows, backend="triton")
    assert value[0, 0] == -math.inf
    (gradient,) = torch.autograd.grad(value, student, grad_outputs=torch.tensor([[1.0, 0.0]]))
    assert torch.count_nonzero(gradient) == 0


# Compilation and registration -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensor", "linear", "logistic"])
def test_compiled_training_step_gives_the_same_numbers(kind):
    makers = {
        "tensor": lambda: make_case(80),
        "linear": lambda: linear_case(80),
        "logistic": lambda: logistic_case(80, "left", vocabulary=24),
    }
    case = makers[kind]()
    student = case.pop("student")
    tensors = [student] if isinstance(student, torch.Tensor) else list(student.tensors())

    def step(*values: torch.Tensor) -> torch.Tensor:
        head = values[0] if isinstance(student, torch.Tensor) else student.with_tensors(values)
        return di4c_fast.loss(head, **case, backend="triton")

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("kind", ["tensor", "no room", "linear", "logistic"])
def test_ops_pass_opcheck(kind, monkeypatch):
    makers = {
        "tensor": lambda: make_case(81, batch=1, positions=2, components=2),
        "no room": lambda: make_case(81, batch=1, positions=4, components=2, teachers=2),
        "linear": lambda: linear_case(81, batch=1, positions=2, components=2),
        "logistic": lambda: logistic_case(
            81, "left", vocabulary=16, batch=1, positions=2, components=2
        ),
    }
    case = makers[kind]()
    if kind == "no room":  # some rows of q_u and q_T are kept, some are not
        monkeypatch.setattr(fused_plan, "DISTRIBUTION_SHARE", 0.0)
        monkeypatch.setattr(tuning, "_overrides", [tuning.LaunchParameters(**TWO_ROWS)])
    recorded = {}

    def record(name: str):
        op = getattr(fused, name)

        def spy(*args):
            recorded[name] = (op, args)
            return op(*args)

        return spy

    originals = {name: getattr(fused, name) for name in ("mixture_loss", "token_row_values")}
    try:
        for name in originals:
            setattr(fused, name, record(name))
        evaluate(case, "triton")
        di4c_fast.correlation(case["student"], case["x0"], backend="triton")
    finally:
        for name, op in originals.items():
            setattr(fused, name, op)
    for op, args in recorded.values():
        torch.library.opcheck(
            op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


# Bad input ------------------------------------------------------------------------------------


def test_empty_weight_is_named():
    weight = torch.zeros(0, 6)
    head = LinearHead.__new__(LinearHead)
    head.hidden, head.weight, head.bias = torch.zeros(1, 2, 3, 6), weight, None
    head.budget_bytes, head._positions = None, None
    with pytest.raises(ValueError, match="weight"):
        fused.split_head(head)


def test_cpu_tensors_outside_the_interpreter_raise(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    case = make_case(90)
    with pytest.raises(RuntimeError, match="CPU"):
        di4c_fast.loss(case.pop("student"), **case, backend="triton")


def test_launch_parameters_are_checked():
    with pytest.raises(ValueError, match="forward_elements"):
        tuning.LaunchParameters(forward_elements=100)
    with pytest.raises(ValueError, match="row_warps"):
        tuning.LaunchParameters(row_warps=0)


def test_configuration_file_with_unknown_field_is_refused(tmp_path):
    path = tmp_path / "some_gpu.json"
    path.write_text('{"_measured": "never", "forward_warps": 4}')
    assert tuning.load_config(path) == {"forward_warps": 4}
    path.write_text('{"warps": 4}')
    with pytest.raises(ValueError, match="warps"):
        tuning.load_config(path)
