"""What the loss computes and holds: sizes of tensors, rows of work, memory that is given back.

Watched on the torch backend, whose passes are tensor operations that can be seen; chunks are the
driver's, the same for every backend.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loss_cases import make_problem, run_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import di4c_fast
from di4c_fast import LinearHead, memory
from di4c_fast.passes import torch as torch_passes


class Allocations(TorchDispatchMode):
    """The sizes of the tensors that operations make, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.shapes: set[tuple[int, ...]] = set()
        self.live = self.peak = 0
        self._owners: dict[int, int] = {}
        self._foreign: dict[int, Tensor] = {}  # what was there before; held, so that ids stay

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in args:
            if isinstance(tensor, Tensor):
                key = tensor.untyped_storage()._cdata
                if key not in self._owners:
                    self._foreign.setdefault(key, tensor.detach())
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._foreign:
            return
        self.largest = max(self.largest, min(storage.nbytes(), tensor.nbytes))
        if storage.nbytes() >= tensor.nbytes:  # not expanded
            self.shapes.add(tuple(tensor.shape))
        key, size = storage._cdata, storage.nbytes()
        if key not in self._owners:
            self._owners[key] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self._owners[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        if key in self._owners:
            self._owners[key] -= 1
            if self._owners[key] == 0:
                del self._owners[key]
                self.live -= size


@contextlib.contextmanager
def watched() -> Iterator[Allocations]:
    with Allocations() as mode:
        yield mode


def linear_problem(positions: int, vocabulary: int = 256, components: int = 8) -> dict[str, Any]:
    """Linear heads for student, teacher and consistency: nobody holds logits."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, 4, generator=g)
    heads = {
        name: LinearHead(torch.randn(1, n, positions, 4, generator=g), weight)
        for name, n in (("student", components), ("teacher", 1), ("consistency", components))
    }
    heads["student"] = LinearHead(
        heads["student"].hidden.requires_grad_(), weight.clone().requires_grad_()
    )
    x0 = torch.randint(vocabulary, (1, positions), generator=g)
    # Draws are given: 128 random numbers for each would be as many as this small vocabulary has.
    draws = torch.randint(vocabulary, (1, components, positions), generator=g)
    return heads | {"x0": x0, "consistency_x": draws, "component_weight": 0.5}


def chunks_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Chunks of `size` bytes, small beside the problem, so that what grows with it can be seen."""
    monkeypatch.setattr(torch_passes, "chunk_bytes", lambda device: size)


def test_linear_head_never_holds_all_logits():
    components, vocabulary, positions = 8, 256, 1024
    problem = linear_problem(positions, vocabulary, components)
    heads = {
        name: LinearHead(*problem[name].tensors(), budget_bytes=1 << 20)
        for name in ("student", "teacher", "consistency")
    }
    everything = components * vocabulary * positions * 4
    with watched() as seen:
        run_loss(problem | heads, backend="torch").backward()
    assert seen.largest <= everything / 7
    assert seen.peak <= everything / 2
    with watched() as seen:
        di4c_fast.correlation(heads["student"], problem["x0"], backend="torch").sum().backward()
    assert seen.largest <= everything / 7
    assert seen.peak <= everything / 2


def test_memory_of_a_linear_head_does_not_grow_by_rows_of_the_vocabulary():
    # More positions cost their hidden gradient and numbers per target token, not even half a row.
    components, vocabulary = 8, 4096
    peaks = []
    for positions in (96, 192):
        problem = linear_problem(positions, vocabulary, components)
        for name in ("student", "teacher", "consistency"):
            problem[name] = LinearHead(*problem[name].tensors(), budget_bytes=1 << 20)
        with watched() as seen:
            run_loss(problem, backend="torch").backward()
        peaks.append(seen.peak)
    assert peaks[1] - peaks[0] <= 96 * vocabulary * 4 / 2


def test_budget_of_a_linear_head_bounds_its_chunks():
    problem = linear_problem(64)
    sizes = []
    for budget in (1 << 18, 1 << 20):
        student = LinearHead(*problem["student"].tensors(), budget_bytes=budget)
        with watched() as seen:
            value = run_loss(problem | {"student": student}, backend="torch")
        assert seen.largest <= budget
        sizes.append((seen.largest, value.item()))
    assert sizes[0][0] < sizes[1][0]
    assert sizes[0][1] == pytest.approx(sizes[1][1], rel=1e-6)


def test_memory_above_the_inputs_is_at_most_a_quarter_more_than_the_gradient(monkeypatch):
    chunks_of(monkeypatch, 1 << 20)
    g = torch.Generator().manual_seed(0)
    student = torch.randn(1, 16, 128, 4096, generator=g, requires_grad=True)
    teacher = torch.randn(1, 128, 4096, generator=g)
    x0 = torch.randint(4095, (1, 128), generator=g)
    draws = torch.randint(4095, (1, 16, 128), generator=g)
    xt = torch.where(torch.rand(1, 128, generator=g) < 0.6, 4095, x0)
    with watched() as seen:
        given = {"consistency": student, "consistency_x": draws, "xt": xt, "mask_id": 4095}
        di4c_fast.loss(student, teacher, x0, **given, backend="torch").backward()
    assert seen.peak <= 1.25 * student.nbytes


def test_nothing_of_the_size_of_the_logits_is_made_without_a_gradient():
    student = torch.randn(1, 4, 2048, 1024, requires_grad=True)
    teacher = torch.randn(1, 2048, 1024)
    x0 = torch.zeros(1, 2048, dtype=torch.int64)
    calls = {
        "no_grad": (torch.no_grad(), student),
        "inference_mode": (torch.inference_mode(), student),
        "detached": (contextlib.nullcontext(), student.detach()),
    }
    for name, (context, logits) in calls.items():
        with context, watched() as seen:
            di4c_fast.loss(logits, teacher, x0, backend="torch")
        assert seen.peak < student.nbytes / 1.5, name


def test_frozen_output_layer_costs_no_weight_gradient():
    problem = linear_problem(16)
    student = problem["student"]
    shape = tuple(student.weight.shape)
    for trained in (True, False):
        weight = student.weight.detach().clone().requires_grad_(trained)
        # Teacher and consistency as tensors: their heads would touch a weight of that shape.
        problem |= {"teacher": torch.zeros(1, 16, 256), "consistency": torch.zeros(1, 8, 16, 256)}
        with watched() as seen:
            head = LinearHead(student.hidden, weight)
            run_loss(problem | {"student": head}, backend="torch").backward()
        assert (shape in seen.shapes) == trained


def test_positions_that_do_not_count_cost_no_work():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, 512, 4, generator=g, requires_grad=True)
    weight = torch.randn(64, 4, generator=g)
    valid = torch.zeros(1, 512, dtype=torch.bool)
    valid[:, 100:116] = True
    # A budget of one byte: nothing is kept between the sweeps.
    teacher = LinearHead(torch.randn(1, 512, 4, generator=g), weight, budget_bytes=1)
    student = LinearHead(hidden, weight, budget_bytes=1)
    x0 = torch.zeros(1, 512, dtype=torch.int64)
    with watched() as seen:
        value = di4c_fast.loss(student, teacher, x0, valid=valid, backend="torch")
        value.backward()
    # Sixteen rows of logits and no more, beside the gradient of all hidden states.
    rows = 4 * 16 * 64 * 4
    assert seen.largest <= max(rows, hidden.nbytes)
    assert seen.peak <= hidden.nbytes + 10 * rows


def test_graph_lets_the_inputs_go_after_backward():
    problem = make_problem(15, vocabulary=64, dtype=torch.float32)
    for score in (
        lambda student: run_loss(problem | {"student": student}, backend="torch"),
        lambda student: di4c_fast.correlation(student, problem["x0"], backend="torch").sum(),
    ):
        student = problem["student"].clone().requires_grad_()
        logits = student * 1.0
        alive = weakref.ref(logits)
        value = score(logits)
        del logits
        value.backward()
        assert alive() is None
        assert value.grad_fn is not None


def test_expanded_logits_are_not_copied_whole(monkeypatch):
    chunks_of(monkeypatch, 1 << 20)
    row = torch.randn(1, 1, 256, 1024)
    student = row.expand(4, 4, -1, -1)
    x0 = torch.zeros(4, 256, dtype=torch.int64)
    with watched() as seen:
        di4c_fast.loss(student, row[:, 0].expand(4, -1, -1), x0, backend="torch")
    assert seen.peak <= 4 * row.nbytes


@pytest.mark.parametrize("size", [1, 3000, 1 << 30])
def test_chunk_size_does_not_matter(monkeypatch, size):
    problem = make_problem(6, batch=3, components=4, vocabulary=8, mask_id=3, revealed=True)
    problem["consistency_x"] = None
    chunks_of(monkeypatch, size)

    def run(backend: str) -> list[Tensor]:
        leaf = problem["student"].clone().requires_grad_()
        generator = torch.Generator().manual_seed(0)
        call = problem | {"student": leaf}
        value = run_loss(call, reduction="none", generator=generator, backend=backend)
        value.sum().backward()
        return [value.detach(), leaf.grad]

    for actual, expected in zip(run("torch"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_memory_is_used_again_and_given_back():
    memory.empty_cache()
    sizes = {"dtype": torch.float32, "device": torch.device("cpu")}
    first = memory.empty((3 << 18,), **sizes)
    first.fill_(1.0)
    place = first.data_ptr()
    part = first[5:]
    del first
    other = memory.empty((3 << 18,), **sizes)
    assert other.data_ptr() != place  # a view still holds it
    del part
    again, clean = memory.empty_strided((500, 512), (1400, 2), **sizes)
    assert again.data_ptr() == place
    assert not clean
    del again
    fresh, clean = memory.empty_strided((1 << 18,), (1,), **sizes)  # a third of the block
    assert clean
    assert not fresh.any()
    memory.empty_cache()
    assert memory.empty_strided((3 << 18,), (1,), **sizes)[1]


def test_waiting_memory_is_bounded(monkeypatch):
    memory.empty_cache()
    monkeypatch.setattr(memory, "LIMIT", 5 << 20)
    sizes = {"dtype": torch.uint8, "device": torch.device("cpu")}
    blocks = [memory.empty((2 << 20,), **sizes) for _ in range(4)]
    newest = [block.data_ptr() for block in blocks[2:]]
    while blocks:
        del blocks[0]
    kept = [memory.empty((2 << 20,), **sizes) for _ in range(2)]
    assert sorted(block.data_ptr() for block in kept) == sorted(newest)


def test_gradient_of_a_weight_takes_no_memory_before_its_first_product():
    head = LinearHead(torch.randn(2, 3, 4), torch.randn(5000, 4))
    with Allocations() as watch:
        sums = head.new_gradients([True, True, False])
    assert sums[1].shape == (5000, 4)
    assert watch.peak < head.weight.nbytes // 10
