"""Every backend of the loss, held to the float64 reference by what eager PyTorch reaches.

Eager is `naive_loss`: log_softmax and autograd over the logits that the head stands for. A new
backend joins by its name in `loss_heads.FAST`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_cases import loss_and_gradients, make_problem, run_loss
from loss_heads import (
    CLOSE,
    EVERY,
    FAST,
    FULL,
    HEADS,
    Tanh,
    assert_within_bound,
    head_tensors,
    single,
)
from torch import Tensor

import di4c_fast
from di4c_fast import Head, LinearHead, LogisticHead, TensorHead

HOST = FAST[::2]  # where the interpreter would take minutes: torch and cpu
NEG_INF = float("-inf")


@pytest.fixture(params=FAST)
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("control_variate", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_every_head_is_within_the_bound(kind, backend, control_variate):
    problem = make_problem(1, components=5, vocabulary=8, **FULL, control_variate=control_variate)
    assert_within_bound(problem, backend, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", ["tensor", "linear", "linear, bias per position", "linear, capped", "logistic"]
)
def test_half_precision_is_within_the_bound(kind, dtype, backend):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates where it should round to bf16")
    assert_within_bound(make_problem(2, components=5, vocabulary=8, **FULL), backend, kind, dtype)


@pytest.mark.parametrize(
    ("components", "teacher_components", "vocabulary"),
    [(1, None, 11), (5, 1, 1030), (5, 3, 11), (1, 3, 1030), (33, None, 19), (40, 35, 130)],
)
def test_sizes_are_within_the_bound(components, teacher_components, vocabulary, backend):
    problem = make_problem(
        3,
        components=components,
        draws=components,
        vocabulary=vocabulary,
        teacher_components=teacher_components,
        **FULL,
    )
    assert_within_bound(problem, backend)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"draws": None},
    {"weighted": True},
    {"mask_id": 0},
    {"mask_id": 10, "revealed": True},
    {"padded": True},
    {"component_weight": 1.0, "teacher_weight": 0.0, "consistency_weight": 0.0},
    {"data_weight": 0.0, "teacher_weight": 2.0},
    {"data_weight": 0.0, "teacher_weight": 0.0, "consistency_weight": 0.3},
    {"teacher_weight": 0.0, "consistency_weight": 0.0},
    {"component_weight": torch.tensor([0.0, 2.0]), "data_weight": torch.tensor([0.3, 0.0])},
    {"teacher_weight": torch.tensor([0.5, 2.0]), "consistency_weight": torch.tensor([1.5, 0.0])},
    {"positions": 1, "batch": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_settings_are_within_the_bound(settings, reduction, backend):
    assert_within_bound(make_problem(4, vocabulary=11, **settings), backend, reduction=reduction)


@pytest.mark.parametrize("kind", ["linear", "linear, capped", "logistic", "user"])
@pytest.mark.parametrize("budget_bytes", [1, 33_000])
def test_several_chunks_are_within_the_bound(kind, budget_bytes, backend):
    # 64 rows are the least at a time: 16 positions of 4 components, of 60. With 1 byte nothing is
    # kept between the sweeps, with 33,000 the q of two chunks.
    problem = make_problem(5, batch=3, components=4, positions=20, vocabulary=8, **FULL)
    assert_within_bound(problem, backend, kind, budget_bytes=budget_bytes)


@pytest.mark.parametrize("gap", [60.0, 95.0, 101.0, 150.0, 1000.0])
@pytest.mark.parametrize("whole", [False, True], ids=["one component", "all components"])
def test_probabilities_that_underflow_are_within_the_bound(gap, whole, backend):
    # Around 87 nats below the peak probabilities are denormal, beyond 103 they are zero.
    problem = make_problem(7, components=3, vocabulary=8, component_weight=0.5, weighted=True)
    logits = problem["student"].clone()
    if whole:
        logits[..., :3] -= gap
    else:
        logits[:, 1, :, :3] -= gap
    assert_within_bound(problem, backend, tensors={"logits": logits})
    without = problem | {"component_weight": 0.0}
    assert_within_bound(without, backend, tensors={"logits": logits})


@pytest.mark.parametrize("offset", [30.0, 1e3, -1e4, 1e5])
def test_large_offsets_of_the_logits_are_within_the_bound(offset, backend):
    problem = make_problem(8, components=3, vocabulary=8, **FULL)
    rounded = (problem["student"] + offset).float().double()
    assert_within_bound(problem, backend, tensors={"logits": rounded})


def test_one_logit_may_be_far_above_the_others_in_any_column(backend):
    columns = torch.tensor([0, 9, 18, 35, 36])
    problem = make_problem(23, batch=1, vocabulary=37, component_weight=0.5)
    for name in ("student", "teacher", "consistency"):
        problem[name] = problem[name] + 120 * torch.eye(37)[columns]  # beyond the range of exp
    for name in ("x0", "consistency_x"):
        problem[name] = columns.expand_as(problem[name])
    assert_equals_reference(problem, backend)


@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_large_offsets_of_targets_change_neither_draws_nor_loss(offset, backend):
    # Beyond the range of exp, on either side: such logits have to be shifted first.
    problem = make_problem(8, components=3, vocabulary=8, dtype=torch.float32, **FULL)
    problem["consistency_x"] = None

    def value(shift: float) -> Tensor:
        moved = {name: problem[name] + shift for name in ("teacher", "consistency")}
        generator = torch.Generator().manual_seed(0)
        return run_loss(problem | moved, generator=generator, backend=backend)

    # Adding 200 rounds logits to 2^-17.
    torch.testing.assert_close(value(offset), value(0.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converged_student_is_within_the_bound(dtype, backend):
    # Near the optimum gradients are small differences of large numbers.
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates where it should round to bf16")
    problem = make_problem(9, components=3, teacher_components=3, vocabulary=40, data_weight=0.0)
    problem["consistency_weight"] = 0.0
    g = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(problem["teacher"].shape, generator=g, dtype=torch.float64)
    rounded = (problem["teacher"] + noise).to(dtype).double()
    assert_within_bound(problem, backend, dtype=dtype, tensors={"logits": rounded})


def assert_equals_reference(problem, backend, wanted=("student", "log_weights"), **tolerance):
    """Loss and gradients in fp32 against those of the reference in fp64."""
    expected = loss_and_gradients(problem, wanted, backend="reference", reduction="none")
    actual = loss_and_gradients(single(problem), wanted, backend=backend, reduction="none")
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].double(), value, **(tolerance or CLOSE), msg=lambda m, n=name: f"{n}: {m}"
        )
    return actual


def test_columns_of_minus_infinity_have_zero_gradient_and_the_value_of_the_reference(backend):
    problem = make_problem(10, components=4, vocabulary=9, **FULL)
    student = problem["student"].clone()
    student[:, 1, :, 5] = NEG_INF  # one component
    student[..., 6] = NEG_INF  # all of them, and neither teacher nor targets want it
    student[:, 2, 0] = NEG_INF  # a row without a class, at a position that always counts
    for name in ("teacher", "consistency"):
        problem[name][..., 6] = NEG_INF
    problem["teacher"][..., 5] = NEG_INF
    for name in ("x0", "consistency_x", "xu"):
        problem[name] = torch.where(problem[name] == 6, 7, problem[name])
    problem |= {"student": student, "component_weight": 0.0}
    actual = assert_equals_reference(problem, backend)
    assert all(torch.isfinite(value).all() for value in actual.values())
    assert torch.count_nonzero(actual["student"][student == NEG_INF]) == 0


@pytest.mark.parametrize("control_variate", [True, False])
def test_impossible_targets_and_dead_positions_are_those_of_the_reference(backend, control_variate):
    problem = make_problem(11, components=3, vocabulary=9, component_weight=0.5, weighted=True)
    student = problem["student"].clone()
    student[0, :, 1, problem["x0"][0, 1]] = NEG_INF  # no component can produce it
    student[0, 0, 2, problem["x0"][0, 2]] = NEG_INF  # one cannot
    student[1, :, 3] = NEG_INF  # a position without any class
    problem |= {"student": student, "control_variate": control_variate}
    problem["teacher"][student[:, 0] == NEG_INF] = NEG_INF
    problem["consistency"] = problem["consistency"].masked_fill(
        (student == NEG_INF).any(1, keepdim=True), NEG_INF
    )
    assert_equals_reference(problem, backend)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("content", [300.0, NEG_INF, float("inf"), float("nan")])
def test_what_the_mask_column_holds_does_not_change_a_bit(content, backend):
    problem = single(make_problem(22, **FULL))
    other = dict(problem)
    for name in ("student", "teacher", "consistency"):
        other[name] = problem[name].clone()
        other[name][..., 3] = content
    expected = loss_and_gradients(problem, backend=backend)
    actual = loss_and_gradients(other, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_teacher_rows_without_a_class_have_the_gradient_of_the_reference(backend):
    problem = make_problem(12, teacher_components=3, component_weight=0.7, **{"weighted": True})
    problem["teacher"][0, 1, 2] = NEG_INF  # one of three
    problem["teacher"][1, :, 1] = NEG_INF  # all of them
    problem["consistency"][1, 0, 3] = NEG_INF
    assert_equals_reference(problem, backend)


def test_one_hot_teachers_and_components_of_weight_zero(backend):
    problem = make_problem(13, components=3, component_weight=0.5, weighted=True)
    one_hot = torch.full_like(problem["teacher"], NEG_INF)
    problem["teacher"] = one_hot.scatter(-1, problem["x0"].unsqueeze(-1), 0.0)
    problem["log_weights"][0, 1] = NEG_INF
    expected = assert_equals_reference(problem, backend)
    assert torch.count_nonzero(expected["student"][0, 1]) == 0


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize(("log_weight", "expected"), [(-1e3, math.inf), (NEG_INF, None)])
def test_an_infinite_divergence_counts_unless_its_weight_is_zero(log_weight, expected, backend):
    # exp(-1000) is 0 in every dtype, but the weight is not.
    problem = make_problem(13, components=3, weighted=True, component_weight=0.5)
    problem["log_weights"][0, 1] = log_weight
    problem["student"][0, 1, 2, 3] = NEG_INF
    value = run_loss(single(problem), backend=backend, reduction="none")
    assert torch.isfinite(value[1])
    assert value[0] == expected if expected else torch.isfinite(value[0])
    problem["teacher"][0, 1] = float("nan")
    assert torch.isnan(run_loss(single(problem), backend=backend, reduction="none")[0])


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("name", ["student", "teacher", "consistency"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_in_give_nan_out(backend, name, value):
    problem = make_problem(14, components=3, dtype=torch.float32, component_weight=0.5)
    for place in ((0, 1, 2), (0, 1, 2, 3)):
        broken = problem[name].clone()
        row = broken if name == "teacher" else broken[:, 0]
        if len(place) == 3:
            row[place] = value
        else:
            row[place[0], place[1]] = value
        result = run_loss(problem | {name: broken}, backend=backend, reduction="none")
        assert torch.isnan(result[0]), place
        assert torch.isfinite(result[1])


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
def test_nan_beside_an_impossible_target_is_nan(function, backend):
    logits = torch.randn(1, 3, 2, 7, generator=torch.Generator().manual_seed(4))
    logits[0, 0, 1] = float("nan")
    logits[0, 1:, 1, 2] = -float("inf")
    assert function(logits, torch.tensor([[0, 2]]), backend=backend).isnan().all()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("components", [3, 33])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_distribution_hides_a_student_without_a_sum(value, components, backend):
    # q is 0 in every class, or in all but one that is impossible.
    problem = make_problem(14, batch=3, components=components, vocabulary=7, component_weight=0.5)
    problem["student"][:2, 1, 2, 3] = value
    problem["student"][1, :, 2, 4] = NEG_INF
    for name in ("teacher", "consistency"):
        problem[name][0, ..., 2, :] = NEG_INF
        problem[name][1, ..., 2, :4] = NEG_INF
        problem[name][1, ..., 2, 5:] = NEG_INF
    _, terms = run_loss(single(problem), backend=backend, reduction="none", return_terms=True)
    for name in ("teacher_marginal", "consistency_marginal", "component"):
        term = getattr(terms, name)
        assert term[:2].isnan().all(), name
        assert term[2].isfinite(), name
    less = single(problem) | {"consistency": None, "consistency_x": None, "backend": backend}
    _, terms = run_loss(less, return_terms=True)
    assert terms.consistency_marginal.eq(0).all()
    _, terms = run_loss(less, control_variate=False, return_terms=True)
    assert terms.teacher_marginal.eq(0).all()


@pytest.mark.parametrize("backend", EVERY)
def test_nan_where_nothing_counts_changes_no_value_and_no_gradient(backend):
    problem = make_problem(14, components=3, dtype=torch.float32, **FULL)
    ignored = ~problem["valid"] | (problem["xt"] != problem["mask_id"])
    shown = ignored.unsqueeze(1) | (problem["xu"] != problem["mask_id"])
    assert 0 < int(ignored.sum()) < int(shown.sum())
    masks = {"student": ignored.unsqueeze(1), "teacher": ignored, "consistency": shown}
    broken = {n: problem[n].masked_fill(m.unsqueeze(-1), float("nan")) for n, m in masks.items()}
    expected = loss_and_gradients(problem, backend=backend)
    actual = loss_and_gradients(problem | broken, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    drawn = problem | broken | {"consistency_x": None, "generator": torch.Generator()}
    assert torch.isfinite(run_loss(drawn, backend=backend))


@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
@pytest.mark.parametrize("kind", HEADS)
def test_token_rows_of_every_head_are_those_of_the_reference(kind, function, backend):
    problem = make_problem(15, batch=3, components=4, vocabulary=8, **FULL)
    tensors = head_tensors(kind, (3, 4, 5), 8)
    upstream = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).clone().requires_grad_() for t in tensors.values()]
        log_weights = problem["log_weights"].to(dtype).clone().requires_grad_()
        value = function(
            HEADS[kind](*leaves),
            problem["consistency_x"],
            xt=problem["xt"],
            mask_id=3,
            valid=problem["valid"],
            log_weights=log_weights,
            backend=backend,
        )
        value.backward(upstream.to(dtype))
        return [value.detach(), log_weights.grad, *(leaf.grad for leaf in leaves)]

    expected = run("reference", torch.float64)
    for actual, truth in zip(run(backend, torch.float32), expected, strict=True):
        torch.testing.assert_close(actual.double(), truth, **CLOSE)
    if backend == "torch":
        actual = run(backend, torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", HOST)
def test_long_joint_likelihoods_keep_their_accuracy(backend):
    # A sum of 1024 terms in fp32 would round at 2^-24 of some thousand nats; weights that do not
    # sum to 1 would show in the gradient.
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 4, 1024, 5, generator=g)
    x = torch.randint(5, (1, 1024), generator=g)

    def run(backend: str, logits: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        value = di4c_fast.mixture_log_prob(leaf, x, backend=backend)
        value.sum().backward()
        return value.detach().double(), leaf.grad.double()

    value, gradient = run(backend, logits)
    true_value, true_gradient = run("reference", logits.double())
    eager = logits.clone().requires_grad_()
    picked = eager.log_softmax(-1).gather(-1, x[:, None, :, None].expand(-1, 4, -1, -1))
    (picked.sum((2, 3)) - torch.log(torch.tensor(4.0))).logsumexp(1).sum().backward()
    eager_error = (eager.grad.double() - true_gradient).norm() / true_gradient.norm()
    error = (gradient - true_gradient).norm() / true_gradient.norm()
    assert error <= eager_error / 2
    torch.testing.assert_close(value, true_value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["linear", "logistic", "user"])
def test_teacher_and_consistency_may_be_heads(kind, backend):
    problem = make_problem(16, batch=3, components=4, vocabulary=8, **FULL)
    for name, leading in (("teacher", (3, 2, 5)), ("consistency", (3, 2, 5))):
        tensors = head_tensors(kind, leading, 8)
        problem[name] = HEADS[kind](*(t.float() for t in tensors.values()))
    problem = single(problem)
    for drawn in (problem, problem | {"consistency_x": None}):
        results = [
            loss_and_gradients(drawn, backend=b, generator=torch.Generator().manual_seed(1))
            for b in (backend, "reference")
        ]
        torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("bias_rows", [False, True])
def test_each_gradient_of_a_linear_head_alone_is_that_of_all_together(needed, bias_rows, backend):
    problem = single(make_problem(17, vocabulary=8, **FULL))
    kind = "linear, bias per position" if bias_rows else "linear, bias"
    tensors = {n: t.float() for n, t in head_tensors(kind, (2, 3, 5), 8).items()}

    def run(*names: str) -> dict[str, Tensor | None]:
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in tensors.items()}
        run_loss(problem | {"student": LinearHead(**leaves)}, backend=backend).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    alone, together = run(needed), run(*tensors)
    torch.testing.assert_close(alone[needed], together[needed], rtol=1e-6, atol=1e-7)
    assert [name for name, gradient in alone.items() if gradient is not None] == [needed]


@pytest.mark.parametrize("backend", HOST)
def test_weight_gradient_of_many_chunks_in_half_precision_is_summed_in_float32(backend):
    # A sum in half precision over 48 chunks would lose what is below 1/256 of it.
    dtype = torch.bfloat16
    problem = single(make_problem(18, batch=2, positions=512, vocabulary=8, draws=None))
    tensors = head_tensors("linear", (2, 3, 512), 8)
    rounded = {n: t.to(dtype) for n, t in tensors.items()}

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        leaves = {n: t.to(dtype).requires_grad_() for n, t in rounded.items()}
        head = LinearHead(**leaves, budget_bytes=1)
        run_loss(problem | {"student": head}, backend=backend).backward()
        return leaves["weight"].grad.double()

    truth = gradient(torch.float64, "reference")
    error = (gradient(dtype, backend) - truth).norm() / truth.norm()
    assert error < 1.5e-2  # logits, hidden gradient and result are rounded to 2^-9 each


def test_inactive_positions_have_zero_gradient_in_poisoned_memory(backend, poisoned_memory):
    problem = single(make_problem(21, batch=3, components=3, vocabulary=11, **FULL))
    problem["xt"][1] = problem["x0"][1]  # an example without any active position
    active = problem["valid"] & (problem["xt"] == problem["mask_id"])
    assert active.any(1).tolist() == [True, False, True]
    gradient = loss_and_gradients(problem, backend=backend)["student"]
    assert torch.isfinite(gradient).all()
    by_position = torch.count_nonzero(gradient, (1, 3))
    assert (by_position > 0).equal(active)


def test_gradients_of_no_active_position_can_be_written_to(backend):
    problem = single(make_problem(21, batch=2, components=3, vocabulary=8, **FULL))
    problem["xt"] = problem["x0"].clamp(max=problem["mask_id"] - 1)
    leaves = head_tensors("linear", (2, 3, problem["x0"].shape[1]), 8)
    leaves = {name: tensor.float().requires_grad_() for name, tensor in leaves.items()}
    loss = run_loss(problem | {"student": LinearHead(**leaves)}, backend=backend)
    for gradient in torch.autograd.grad(loss, [*leaves.values()]):
        assert torch.count_nonzero(gradient) == 0
        gradient.add_(torch.ones_like(gradient))  # which zeros without memory refuse
        assert gradient.is_contiguous()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
def test_no_rows_at_all(backend, function):
    logits = torch.randn(2, 3, 5, 7, requires_grad=True)
    log_weights = torch.randn(2, 3, requires_grad=True)
    x = torch.zeros(2, 0, 5, dtype=torch.int64)
    value = function(logits, x, log_weights=log_weights, backend=backend)
    assert value.shape == (2, 0)
    value.sum().backward()
    assert torch.count_nonzero(logits.grad) == 0
    assert torch.count_nonzero(log_weights.grad) == 0


@pytest.mark.parametrize("backend", FAST)
def test_a_head_of_ones_own_streams_a_few_rows_at_a_time(backend):
    g = torch.Generator().manual_seed(0)
    tensors = {n: t.float() for n, t in head_tensors("user", (2, 4, 40), 8).items()}
    head = Tanh(**{n: t.requires_grad_() for n, t in tensors.items()})
    head.budget_bytes = 1
    teacher = torch.randn(2, 40, 8, generator=g)
    x0 = torch.randint(8, (2, 40), generator=g)
    run_loss({"student": head, "teacher": teacher, "x0": x0}, backend=backend).backward()
    rows = 2 * 4 * 40
    asked = [taken.numel() for taken in head.taken]
    assert max(asked) <= 64  # of 320: a matrix product of fewer is not worth its call
    assert rows <= sum(asked) <= 3 * rows  # each sweep, and the gradient's own


@pytest.mark.parametrize("backend", HOST)
def test_kept_logits_of_a_head_of_ones_own_are_computed_within_the_budget(backend):
    tensors = {n: t.float() for n, t in head_tensors("user", (2, 4, 400), 8).items()}
    head = Tanh(**{n: t.requires_grad_() for n, t in tensors.items()})
    row = 64 * 4  # bytes; rows are padded
    head.budget_bytes = 2 * 4 * 400 * row * 5 // 4  # all logits are kept
    x = torch.randint(8, (2, 1, 400), generator=torch.Generator().manual_seed(0))
    di4c_fast.correlation(head, x, backend=backend).sum().backward()
    asked = [taken.numel() for taken in head.taken]
    # What such a head computes is in memory of its own beside that of the logits which are kept.
    assert max(asked) * row <= head.budget_bytes // 2


def test_built_in_heads_are_final():
    for kind in (TensorHead, LinearHead, LogisticHead):
        with pytest.raises(
            TypeError, match=r"Mine cannot subclass .*Head, .*subclass di4c_fast.Head"
        ):
            type("Mine", (kind,), {})
    assert issubclass(type("Mine", (Head,), {}), Head)
