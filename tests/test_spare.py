"""Memory of gradients of logits on the CPU that is used a second time."""

from __future__ import annotations

import threading

import pytest
import torch
from loss_cases import make_problem

import di4c_fast
from di4c_fast import _spare, streaming_sources

SHAPE = torch.Size((2, 3, 5))
# Above COPY_ROWS_FROM: single rows are set to zero. Below: the whole tensor.
VOCABULARIES = [7, streaming_sources.COPY_ROWS_FROM + 1]


@pytest.fixture(autouse=True)
def nothing_spare():
    _spare.release()
    yield
    _spare.release()


def poisoned(shape: torch.Size, dtype: torch.dtype) -> int:
    """Leave memory full of NaN for the next gradient; its address."""
    tensor, fresh = _spare.gradient_memory(shape, dtype)
    assert fresh
    return tensor.fill_(torch.nan).data_ptr()


def gradient_of(problem: dict) -> torch.Tensor:
    leaf = problem["student"].clone().requires_grad_()
    loss = di4c_fast.loss(**{**problem, "student": leaf}, backend="torch")
    return torch.autograd.grad(loss, leaf)[0]


def test_fresh_memory_is_zero_and_freed_memory_comes_back():
    tensor, fresh = _spare.gradient_memory(SHAPE, torch.float32)
    assert fresh
    assert tensor.shape == SHAPE
    assert not tensor.any()
    address = tensor.data_ptr()
    del tensor
    again, fresh = _spare.gradient_memory(SHAPE, torch.float32)
    assert not fresh
    assert again.data_ptr() == address


@pytest.mark.parametrize(
    "keep",
    [
        lambda tensor: tensor[1:],
        lambda tensor: tensor.detach().numpy(),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: torch.utils.dlpack.to_dlpack(tensor),
        lambda tensor: memoryview(tensor.numpy()),
    ],
    ids=["slice", "numpy", "storage", "dlpack", "memoryview"],
)
def test_memory_that_anything_refers_to_is_not_used_again(keep):
    tensor, _ = _spare.gradient_memory(SHAPE, torch.float32)
    address = tensor.data_ptr()
    kept = keep(tensor)
    del tensor
    other, fresh = _spare.gradient_memory(SHAPE, torch.float32)
    assert fresh
    assert other.data_ptr() != address
    del kept


def test_memory_of_another_size_is_not_taken():
    poisoned(SHAPE, torch.float32)
    tensor, fresh = _spare.gradient_memory(SHAPE, torch.float64)
    assert fresh
    assert not tensor.any()


def test_as_many_bytes_in_another_dtype_are_taken():
    address = poisoned(torch.Size((10,)), torch.float64)
    tensor, fresh = _spare.gradient_memory(torch.Size((4, 5)), torch.float32)
    assert not fresh
    assert tensor.data_ptr() == address
    assert tensor.dtype == torch.float32


def test_at_most_one_gradient_is_kept_and_none_above_the_limit(monkeypatch):
    first = _spare.gradient_memory(SHAPE, torch.float32)[0]
    second = _spare.gradient_memory(SHAPE, torch.float32)[0]
    del first, second
    assert len(_spare._spare) == 1
    monkeypatch.setattr(_spare, "SPARE_BYTES", SHAPE.numel() * 4 - 1)
    _spare.release()
    tensor = _spare.gradient_memory(SHAPE, torch.float32)[0]
    del tensor
    assert not _spare._spare


def test_release_gives_the_memory_back():
    poisoned(SHAPE, torch.float32)
    assert len(_spare._spare) == 1
    _spare.release()
    assert _spare.gradient_memory(SHAPE, torch.float32)[1]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_earlier_gradient_leaves_no_trace(vocabulary, masked, reduction):
    settings = {"mask_id": 3, "revealed": True, "padded": True} if masked else {}
    problem = make_problem(vocabulary=vocabulary, dtype=torch.float32, **settings)

    def gradient() -> torch.Tensor:
        leaf = problem["student"].clone().requires_grad_()
        loss = di4c_fast.loss(**{**problem, "student": leaf}, backend="torch", reduction=reduction)
        return torch.autograd.grad(loss.sum(), leaf)[0]

    expected = gradient().clone()
    _spare.release()
    address = poisoned(problem["student"].shape, torch.float32)
    again = gradient()
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


def test_token_rows_leave_no_trace_either():
    problem = make_problem(vocabulary=VOCABULARIES[1], mask_id=3, dtype=torch.float32)

    def gradient() -> torch.Tensor:
        leaf = problem["student"].clone().requires_grad_()
        value = di4c_fast.correlation(
            leaf, problem["x0"].unsqueeze(1), xt=problem["xt"], mask_id=3, backend="torch"
        )
        return torch.autograd.grad(value.sum(), leaf)[0]

    expected = gradient().clone()
    _spare.release()
    address = poisoned(problem["student"].shape, torch.float32)
    again = gradient()
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


def test_the_gradients_of_two_losses_that_live_together_are_apart():
    problem = make_problem(dtype=torch.float32)
    first = gradient_of(problem)
    before = first.clone()
    second = gradient_of({**problem, "student": 2.0 * problem["student"]})
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, before)


def test_threads_do_not_share_memory():
    problems = [make_problem(seed, dtype=torch.float32) for seed in range(4)]
    expected = [gradient_of(problem).clone() for problem in problems]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(gradient_of(problems[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
