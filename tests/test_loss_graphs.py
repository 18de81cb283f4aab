"""The loss as a node of a graph; dtypes and layouts; on the reference and the torch backend."""

from __future__ import annotations

import pytest
import torch
from loss_cases import TIGHT, loss_and_gradients, make_problem, naive_loss, run_loss
from loss_heads import CLOSE, EVERY, FAST, FULL
from torch import Tensor

import di4c_fast
from di4c_fast import LinearHead

# Graphs


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_repeated_backward_gives_the_same_gradient(backend, reduction):
    problem = make_problem(28, **FULL)
    student = problem["student"].clone().requires_grad_()
    log_weights = problem["log_weights"].clone().requires_grad_()
    leaves = {"student": student, "log_weights": log_weights}
    value = run_loss(problem | leaves, reduction=reduction, backend=backend).sum() * 3.0
    value.backward(retain_graph=True)
    once = [student.grad.clone(), log_weights.grad.clone()]
    value.backward(retain_graph=True)
    value.backward()
    thrice = [3 * gradient for gradient in once]
    torch.testing.assert_close([student.grad, log_weights.grad], thrice, **TIGHT)


def test_backward_without_retain_graph_cannot_be_repeated(backend):
    problem = make_problem(28)
    student = problem["student"].clone().requires_grad_()
    value = run_loss(problem | {"student": student}, backend=backend)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_gradients_returned_by_two_backwards_do_not_share_memory(backend):
    problem = make_problem(28)
    student = problem["student"].clone().requires_grad_()
    value = run_loss(problem | {"student": student}, backend=backend)
    (first,) = torch.autograd.grad(value, student, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, student, retain_graph=True)
    second.zero_()
    assert torch.equal(first, kept)
    (third,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(third, kept, **TIGHT)


def test_gradient_accumulates_and_flows_through_what_made_the_logits(backend):
    problem = make_problem(29, **FULL)
    expected = loss_and_gradients(problem, backend=backend)
    base = problem["student"].clone().requires_grad_()
    half = problem["log_weights"].clone().requires_grad_()
    for _ in range(2):
        value = run_loss(
            problem | {"student": base * 1.0, "log_weights": half + 0.0}, backend=backend
        )
        (value * 0.5).backward()
    torch.testing.assert_close(base.grad, expected["student"], **TIGHT)
    torch.testing.assert_close(half.grad, expected["log_weights"], **TIGHT)


def test_logits_changed_in_place_between_two_backwards_are_noticed_by_the_torch_backend():
    problem = make_problem(28)
    base = problem["student"].clone().requires_grad_()
    student = base * 1.0
    value = run_loss(problem | {"student": student}, backend="torch")
    value.backward(retain_graph=True)
    with torch.no_grad():
        student.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_arguments_are_left_as_they_were(backend):
    problem = make_problem(30, vocabulary=1030, **FULL)
    before = {n: v.clone() for n, v in problem.items() if isinstance(v, Tensor)}
    loss_and_gradients(problem, backend=backend)
    run_loss(problem | {"consistency_x": None}, backend=backend)
    torch.testing.assert_close({n: problem[n] for n in before}, before, rtol=0, atol=0)


SCORES = {
    "loss": lambda problem, student: run_loss(problem, student=student, backend="torch"),
    "correlation": lambda problem, student: di4c_fast.correlation(
        student, problem["x0"], backend="torch"
    ).sum(),
}


@pytest.mark.parametrize("score", SCORES)
def test_double_backward_raises_on_the_torch_backend(score):
    # Also where the upstream gradient has no graph, and where a first derivative would do beside.
    problem = make_problem(31)
    student = problem["student"].clone().requires_grad_()
    value = SCORES[score](problem, student)
    (gradient,) = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivative .* needs backend="reference"'):
        (gradient.pow(2).sum() + student.sum()).backward()


@pytest.mark.parametrize("score", SCORES)
def test_create_graph_alone_changes_no_gradient(score):
    problem = make_problem(31)
    student = problem["student"].clone().requires_grad_()
    gradients = [
        torch.autograd.grad(SCORES[score](problem, student), student, create_graph=graph)[0]
        for graph in (False, True)
    ]
    assert torch.equal(gradients[0], gradients[1])


def test_nothing_is_asked_of_inputs_without_a_graph(backend):
    problem = make_problem(32, **FULL)
    value = run_loss(problem, backend=backend)
    assert not value.requires_grad
    student = problem["student"].clone().requires_grad_()
    with torch.no_grad():
        value = run_loss(problem | {"student": student}, backend=backend)
    assert not value.requires_grad
    with torch.inference_mode():
        assert torch.equal(run_loss(problem | {"student": student}, backend=backend), value)


@pytest.mark.parametrize("needed", ["student", "log_weights"])
def test_one_gradient_alone_is_that_of_both_together(backend, needed):
    problem = make_problem(33, **FULL)
    both = loss_and_gradients(problem, backend=backend)
    alone = loss_and_gradients(problem, wanted=(needed,), backend=backend)
    torch.testing.assert_close(alone[needed], both[needed], **TIGHT)
    assert set(alone) == {"loss", needed}


def test_teacher_and_consistency_receive_no_gradient(backend):
    problem = make_problem(34, **FULL)
    leaves = {
        name: problem[name].clone().requires_grad_()
        for name in ("student", "teacher", "consistency")
    }
    run_loss(problem | leaves, backend=backend).backward()
    assert leaves["student"].grad is not None
    assert leaves["teacher"].grad is None
    assert leaves["consistency"].grad is None


def test_student_that_is_its_own_consistency_is_differentiated_once(backend):
    problem = make_problem(35, draws=3)
    student = problem["student"].clone().requires_grad_()
    run_loss(problem | {"student": student, "consistency": student}, backend=backend).backward()
    separate = problem | {"consistency": problem["student"].clone()}
    expected = loss_and_gradients(separate, backend=backend)["student"]
    torch.testing.assert_close(student.grad, expected, **TIGHT)


def test_tied_weight_receives_the_gradient_of_the_student_only(backend):
    problem = make_problem(36)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 4, generator=g, dtype=torch.float64)
    hidden = [torch.randn(2, n, 5, 4, generator=g, dtype=torch.float64) for n in (3, 1, 2)]

    def gradient(teacher_weight: Tensor, leaf: Tensor) -> Tensor:
        heads = {
            "student": LinearHead(hidden[0], leaf),
            "teacher": LinearHead(hidden[1], teacher_weight),
            "consistency": LinearHead(hidden[2], teacher_weight),
        }
        run_loss(problem | heads, backend=backend).backward()
        return leaf.grad

    shared = weight.clone().requires_grad_()
    torch.testing.assert_close(
        gradient(shared, shared), gradient(weight, weight.clone().requires_grad_()), **TIGHT
    )


# Dtypes and layouts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_loss_is_in_float32_or_float64_and_gradients_in_the_dtype_of_their_tensor(backend, dtype):
    problem = make_problem(37, **FULL, dtype=dtype)
    problem["log_weights"] = problem["log_weights"].float()
    result = loss_and_gradients(problem, backend=backend)
    expected = torch.promote_types(dtype, torch.float32)
    assert result["loss"].dtype == expected
    assert result["student"].dtype == dtype
    assert result["log_weights"].dtype == torch.float32
    for reduction in ("sum", "none"):
        value, terms = run_loss(problem, reduction=reduction, return_terms=True, backend=backend)
        assert value.dtype == expected
        assert all(term.dtype == expected for term in terms)


@pytest.mark.parametrize("backend", EVERY)
def test_dtypes_of_teacher_and_consistency_may_differ(backend):
    problem = make_problem(38, **FULL, dtype=torch.float32)
    mixed = problem | {
        "teacher": problem["teacher"].double(),
        "consistency": problem["consistency"].bfloat16(),
    }
    rounded = problem | {"consistency": problem["consistency"].bfloat16().float()}
    torch.testing.assert_close(run_loss(mixed, backend=backend), run_loss(rounded, backend=backend))


def test_fp16_gradients_survive_below_the_loss_scale(backend):
    # At V = 4096 most gradients are below the smallest fp16 number; the upstream gradient of a
    # scaled loss lifts them above it.
    problem = make_problem(
        39, batch=1, vocabulary=4096, positions=2, draws=None, dtype=torch.float16, scale=3.0
    )
    student = problem["student"].clone().requires_grad_()
    (run_loss(problem | {"student": student}, backend=backend) * 2.0**16).backward()
    exact = {n: v.double() if v.is_floating_point() else v for n, v in problem.items()}
    truth = loss_and_gradients(exact)["student"] * 2.0**16
    lost = (student.grad == 0) & (truth.abs() > 1e-6)
    assert not lost.any()


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("linear", [False, True], ids=["tensor", "linear"])
def test_autocast_changes_nothing(backend, linear, autocast_dtype):
    problem = make_problem(40, **FULL, dtype=torch.float32)
    leaf = problem["student"]
    weight = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))

    def run(inside_backward: bool, autocast: bool) -> tuple[Tensor, Tensor]:
        student = leaf.clone().requires_grad_()
        head = LinearHead(student, weight) if linear else student
        with torch.autocast("cpu", dtype=autocast_dtype, enabled=autocast):
            value = run_loss(problem | {"student": head}, reduction="none", backend=backend).sum()
            if inside_backward:
                value.backward()
        if not inside_backward:
            value.backward()
        return value.detach(), student.grad

    expected = run(False, False)
    # Autograd of the reference multiplies in backward under whatever autocast is then on.
    for inside in (False, True) if backend == "torch" or not linear else (False,):
        for actual, value in zip(run(inside, True), expected, strict=True):
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-7)


# The fast backends in float32, held by the reference, at a size for the interpreter.
SINGLE = [pytest.param(*p.values, torch.float32, 8, marks=p.marks) for p in FAST]
DOUBLE = [(name, torch.float64, size) for name in ("reference", "torch") for size in (7, 1031)]
in_both_precisions = pytest.mark.parametrize(("backend", "dtype", "vocabulary"), DOUBLE + SINGLE)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)
    wide[..., 1:-2] = tensor
    return {
        "transposed": tensor.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": wide[..., 1:-2],
        "strided": tensor.repeat_interleave(2, -1)[..., ::2],
        "columns": tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
        "positions first": tensor.transpose(-2, 0).contiguous().transpose(-2, 0),
    }


@in_both_precisions
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1)))
def test_strides_do_not_matter(backend, dtype, vocabulary, layout):
    problem = make_problem(41, vocabulary=vocabulary, **FULL, dtype=dtype)
    truth, bound = (backend, TIGHT) if dtype == torch.float64 else ("reference", CLOSE)
    expected = loss_and_gradients(problem, backend=truth)
    student = problem["student"].clone().requires_grad_()
    other = problem | {name: layouts(problem[name])[layout] for name in ("teacher", "consistency")}
    other["consistency_x"] = problem["consistency_x"].transpose(0, 2).contiguous().transpose(0, 2)
    other["xt"] = problem["xt"].t().contiguous().t()
    view = layouts(student)[layout]
    value = run_loss(other | {"student": view}, backend=backend)
    value.backward()
    torch.testing.assert_close(value.detach(), expected["loss"], **bound)
    torch.testing.assert_close(student.grad, expected["student"], **bound)


@in_both_precisions
def test_expanded_inputs_are_as_good_as_copies(backend, dtype, vocabulary):
    problem = make_problem(42, batch=1, components=1, vocabulary=vocabulary, **FULL, dtype=dtype)
    truth, bound = (backend, TIGHT) if dtype == torch.float64 else ("reference", CLOSE)
    row = problem["student"]
    leaf = row.clone().requires_grad_()
    shared = {
        name: problem[name].expand(3, *problem[name].shape[1:])
        for name in ("teacher", "consistency", "x0", "xt", "xu", "valid", "consistency_x")
    }
    shared |= {"log_weights": problem["log_weights"].expand(3, 2), "component_weight": 0.5}
    shared |= {"mask_id": 3}
    value = run_loss(shared | {"student": leaf.expand(3, 2, -1, -1)}, backend=backend)
    value.backward()
    copied = {n: v.contiguous() if isinstance(v, Tensor) else v for n, v in shared.items()}
    copied["student"] = row.expand(3, 2, -1, -1).contiguous()
    expected = loss_and_gradients(copied, wanted=("student",), backend=truth)
    torch.testing.assert_close(value.detach(), expected["loss"], **bound)
    torch.testing.assert_close(leaf.grad, expected["student"].sum((0, 1), True), **bound)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 127, 128, 129, 507, 1023, 1025])
def test_any_vocabulary_size_works(backend, vocabulary):
    problem = make_problem(43, vocabulary=vocabulary, component_weight=0.5)
    torch.testing.assert_close(
        run_loss(problem, reduction="none", backend=backend), naive_loss(problem), **TIGHT
    )
