"""The op of the loss: torch.compile, opcheck, strides, gradients in place, where it runs."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from loss_cases import loss_and_gradients, make_problem, run_loss
from loss_heads import FAST, FULL, HEADS, head_tensors
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import di4c_fast
from di4c_fast import LinearHead, TensorHead
from di4c_fast.loss import op

KINDS = ["tensor", "linear, capped", "logistic"]


@pytest.fixture(params=FAST)
def backend(request) -> str:
    return request.param


def single_problem(seed: int, **settings):
    return make_problem(seed, dtype=torch.float32, vocabulary=8, **FULL, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drawn", [False, True])
def test_compiled_training_step_gives_the_same_numbers(kind, drawn, backend):
    problem = single_problem(80)
    if drawn:
        problem["consistency_x"] = None
    tensors = [t.float() for t in head_tensors(kind, (2, 3, 5), 8).values()]

    def step(*values: Tensor) -> Tensor:
        call = problem | {"student": HEADS[kind](*values)}
        return run_loss(call, backend=backend)

    torch.compiler.reset()  # every case compiles the same code object anew
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        torch.manual_seed(0)
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [False, True])
def test_op_passes_opcheck(kind, rows, backend, monkeypatch):
    problem = single_problem(81)
    leaves = [t.float().requires_grad_() for t in head_tensors(kind, (2, 3, 5), 8).values()]
    spy = mock.Mock(wraps=op.mixture)
    monkeypatch.setattr(op, "mixture", spy)
    with FlopCounterMode(display=False):  # a mode sees the op, an eager call needs none
        if rows:
            di4c_fast.correlation(HEADS[kind](*leaves), problem["x0"], backend=backend)
        else:
            run_loss(problem | {"student": HEADS[kind](*leaves)}, backend=backend)
    monkeypatch.undo()
    ((tensors, *rest),) = (call.args for call in spy.call_args_list)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.mixture, ([t.detach() for t in tensors], *rest), test_utils=checks)
    torch.library.opcheck(op.mixture, (tensors, *rest), test_utils=checks)


def test_traced_calls_give_the_same_bits_as_eager_ones(backend):
    problem = single_problem(85)
    expected = loss_and_gradients(problem, backend=backend)
    with FlopCounterMode(display=False):
        traced = loss_and_gradients(problem, backend=backend)
    torch.testing.assert_close(traced, expected, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"components": 40}, {"padded": False, "mask_id": None}])
def test_gradient_in_place_takes_the_memory_of_the_logits(backend, settings):
    options = {**FULL, **settings}
    if options["mask_id"] is None:
        options["revealed"] = False
    problem = make_problem(29, dtype=torch.float32, vocabulary=8, **options)
    expected = loss_and_gradients(problem, backend=backend)["student"]
    leaf = problem.pop("student").clone().requires_grad_()
    logits = leaf * 1.0
    before, version = logits.data_ptr(), logits._version
    seen: list[int] = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    head = TensorHead(logits, in_place_gradient=True)
    loss = run_loss(problem | {"student": head}, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    assert seen == [before]
    assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_expanded_logits_are_not_overwritten(backend):
    problem = single_problem(33, components=2, batch=1)
    leaf = problem.pop("student")[:, :1].clone().requires_grad_()
    logits = (leaf * 1.0).expand(-1, 2, -1, -1)
    results = []
    for in_place in (False, True):
        head = TensorHead(logits, in_place_gradient=in_place)
        loss = run_loss(problem | {"student": head}, backend=backend)
        results.append(torch.autograd.grad(loss, leaf, retain_graph=True)[0])
    assert torch.equal(*results)


def test_gradient_in_place_of_logits_that_another_argument_shares_is_refused():
    problem = single_problem(34, components=2, batch=1)
    logits = torch.randn(1, 3, 5, 8)
    shared = {"student": TensorHead(logits[:, :2].contiguous(), in_place_gradient=True)}
    shared["teacher"] = shared["student"].logits()[:, 0]
    with pytest.raises(ValueError, match="in_place_gradient=True would overwrite teacher"):
        run_loss(problem | shared | {"log_weights": None})


def test_gradient_keeps_the_padding_of_the_rows(backend):
    problem = single_problem(25)
    buffer = torch.zeros(2, 3, 5, 12)
    buffer[..., :8] = problem["student"]
    leaf = buffer[..., :8].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(run_loss(problem | {"student": leaf}, backend=backend), leaf)
    assert gradient.stride() == buffer.stride()


def test_double_precision_is_computed_in_double_precision(backend):
    problem = make_problem(31, vocabulary=8, **FULL)
    expected = loss_and_gradients(problem, backend="reference")
    actual = loss_and_gradients(problem, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_same_bits_for_one_and_for_two_threads(backend):
    problem = single_problem(35, positions=40, components=4)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(loss_and_gradients(problem, backend=backend))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_tensors_of_a_sharded_parameter_are_named(backend):
    problem = single_problem(36)
    head = LinearHead(torch.randn(2, 3, 5, 6), torch.randn(8, 6))
    head = head.with_tensors((head.hidden[..., :0], head.weight[:, :0], None))
    with pytest.raises(ValueError, match="a tensor behind student is empty"):
        run_loss(problem | {"student": head}, backend=backend)


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match='backend="triton" cannot run: the tensors are on the'):
        run_loss(single_problem(90), backend="triton")


def test_forward_mode_is_refused(backend):
    problem = single_problem(82)
    student = problem.pop("student")

    def value(logits: Tensor) -> Tensor:
        return run_loss(problem | {"student": logits}, backend=backend)

    with pytest.raises(RuntimeError, match="no forward-mode derivatives"):
        torch.func.jvp(value, (student,), (torch.ones_like(student),))


def test_targets_may_come_from_inference_mode(backend):
    problem = single_problem(83)
    expected = loss_and_gradients(problem, backend=backend)
    with torch.inference_mode():
        targets = {name: problem[name].clone() for name in ("teacher", "consistency", "x0")}
    actual = loss_and_gradients(problem | targets, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_gradient_in_place_compiles_to_one_that_is_not(backend):
    problem = single_problem(84)
    student = problem["student"].requires_grad_()

    def value(logits: Tensor) -> Tensor:
        head = TensorHead(logits * 1.0, in_place_gradient=True)
        return run_loss(problem | {"student": head}, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(student), student)
    (expected,) = torch.autograd.grad(value(student), student)
    torch.testing.assert_close(gradient, expected)


def test_a_packed_batch_compiles_to_the_same_numbers():
    problem = single_problem(85, batch=1, positions=9, log_weights=torch.zeros(4, 3))
    student, ends = problem.pop("student").requires_grad_(), torch.tensor([0, 3, 3, 4, 9])

    def value(student: Tensor, ends: Tensor) -> Tensor:
        return run_loss({"student": student, **problem}, cu_seqlens=ends, backend="torch")

    torch.compiler.reset()
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(student, ends), student)
    (expected,) = torch.autograd.grad(value(student, ends), student)
    torch.testing.assert_close(gradient, expected)
