"""The torch backend, held to the float64 reference by what eager PyTorch reaches in the same dtype.

Eager is `naive_loss`: log_softmax and autograd over the logits that the head stands for.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loss_cases import loss_and_gradients, make_problem, naive_loss, run_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import di4c_fast
from di4c_fast import (
    Head,
    LinearHead,
    LogisticHead,
    TensorHead,
    streaming_sources,
    streaming_sweeps,
)
from di4c_fast.testing import assert_close_to_reference

FULL = {"mask_id": 3, "revealed": True, "padded": True, "weighted": True, "component_weight": 0.5}
WIDTH = 6

# What is allowed beside twice eager's error, where eager happens to be exact: a few roundings of
# the largest numbers there are, losses of some 10 nats and gradients of some tenths, and two
# roundings of the loss itself.
ROUNDING = 1.2e-7
ATOL = {
    torch.float32: {"loss": 4e-6, "gradient": 4e-7},
    # The loss is computed in float32 from the same rounded logits; gradients are rounded once.
    torch.bfloat16: {"loss": 4e-6, "gradient": 1e-5},
    torch.float16: {"loss": 4e-6, "gradient": 1e-6},
}


class Tanh(Head):
    """A head of somebody else: bounded logits, a scale per row and a bias for all rows."""

    def __init__(self, hidden: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None):
        if hidden.shape[:-1] != scale.shape or weight.shape[1] != hidden.shape[-1]:
            raise ValueError("shapes disagree")
        self.hidden, self.scale, self.weight, self.bias = hidden, scale, weight, bias

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def take(self, rows: Tensor) -> Tanh:
        hidden, scale = self.hidden.flatten(0, -2)[rows], self.scale.flatten()[rows]
        return Tanh(hidden, scale, self.weight, self.bias)

    def logits(self) -> Tensor:
        logits = self.scale.unsqueeze(-1) * torch.tanh(self.hidden @ self.weight.T)
        return logits if self.bias is None else logits + self.bias

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.hidden, self.scale, self.weight, self.bias)

    def with_tensors(self, tensors) -> Tanh:
        return Tanh(*tensors)


class Capped(LinearHead):
    """A subclass that computes its logits in another way."""

    def logits(self) -> Tensor:
        return 2 * torch.tanh(super().logits() / 2)


HEADS: dict[str, Callable[..., Head | Tensor]] = {
    "tensor": lambda logits: logits,
    "linear": LinearHead,
    "linear, bias": LinearHead,
    "linear, bias per position": LinearHead,
    "logistic": lambda mu, log_scale: LogisticHead(mu, log_scale, 8),
    "logistic, min": lambda mu, log_scale: LogisticHead(mu, log_scale, 8, clamp="min"),
    "user": Tanh,
    "user, no bias": lambda hidden, scale, weight: Tanh(hidden, scale, weight, None),
    "capped subclass": Capped,
}


def head_tensors(kind: str, leading: tuple[int, ...], vocabulary: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g, dtype=torch.float64)

    if kind == "tensor":
        return {"logits": 1.5 * normal(*leading, vocabulary)}
    if kind.startswith("logistic"):
        return {"mu": normal(*leading) / 2, "log_scale": 1 + normal(*leading) / 2}
    tensors = {"hidden": normal(*leading, WIDTH)}
    if kind.startswith("user"):
        tensors["scale"] = normal(*leading)
    tensors["weight"] = normal(vocabulary, WIDTH) / 2
    if kind in ("linear, bias", "user"):
        tensors["bias"] = normal(vocabulary)
    if kind == "linear, bias per position":
        tensors["bias"] = normal(leading[-1], vocabulary)
    return tensors


def convert(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def assert_within_bound(
    problem: dict[str, Any],
    kind: str = "tensor",
    dtype: torch.dtype = torch.float32,
    tensors: dict[str, Tensor] | None = None,
    reduction: str = "mean",
) -> None:
    """Loss and every gradient of the torch backend are as good as eager's."""
    batch, components, positions, vocabulary = problem["student"].shape
    if tensors is None:
        tensors = head_tensors(kind, (batch, components, positions), vocabulary)
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    rest = {n: convert(v, torch.float32) for n, v in problem.items() if n != "student"}

    def run(how: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = {n: convert(t, dtype or t.dtype).clone() for n, t in rounded.items()}
        if "log_weights" in rest:
            leaves["log_weights"] = convert(rest["log_weights"], dtype or torch.float32).clone()
        for leaf in leaves.values():
            leaf.requires_grad_()
        head = HEADS[kind](*(leaves[name] for name in rounded))
        call = {n: convert(v, dtype or torch.float32) for n, v in rest.items()}
        call |= {"student": head} | {n: v for n, v in leaves.items() if n == "log_weights"}
        if how == "eager":
            if isinstance(head, Head):
                call["student"] = head.logits()
            value = naive_loss(call)
            value = value.mean() if reduction == "mean" else value
        else:
            value = run_loss(call, backend=how, reduction=reduction)
        value.sum().backward()
        return {"loss": value.detach()} | {n: leaf.grad for n, leaf in leaves.items()}

    ours, eager = run("torch", None), run("eager", None)
    truth = run("reference", torch.float64)
    for name, value in ours.items():
        atol = ATOL[dtype if name in rounded else torch.float32]
        largest = 2 * ROUNDING * float(truth["loss"].abs().max())
        assert_close_to_reference(
            value,
            eager[name],
            truth[name],
            atol=max(atol["loss"], largest) if name == "loss" else atol["gradient"],
            name=f"{kind}: {name}",
        )


def chunked(monkeypatch: pytest.MonkeyPatch, count: int, components: int, vocabulary: int) -> None:
    """Chunks of `count` positions."""
    size = count * components * vocabulary * 4
    monkeypatch.setattr(streaming_sources, "CPU_CHUNK_BYTES", size)
    monkeypatch.setattr(streaming_sources, "LINEAR_MIN_ROWS", 1)


@pytest.fixture(params=["values", "direct", "logs"])
def path(request, monkeypatch) -> str:
    """The marginal terms from exponentials, or from logarithms for every range of values.

    "direct": logits are read, and gradients written, position by position as in large chunks.
    """
    if request.param == "logs":
        monkeypatch.setattr(streaming_sweeps.Evaluation, "_from_values", False)
    if request.param == "direct":
        monkeypatch.setattr(streaming_sources, "DIRECT_FROM", 1)
    return request.param


@pytest.mark.parametrize("control_variate", [True, False])
@pytest.mark.parametrize("kind", HEADS)
def test_every_head_is_within_the_bound(kind, path, control_variate):
    problem = make_problem(1, components=5, vocabulary=8, **FULL, control_variate=control_variate)
    assert_within_bound(problem, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["tensor", "linear", "linear, bias per position", "logistic"])
def test_half_precision_is_within_the_bound(kind, dtype, path):
    assert_within_bound(make_problem(2, components=5, vocabulary=8, **FULL), kind, dtype)


@pytest.mark.parametrize("vocabulary", [11, 1030])
@pytest.mark.parametrize("components", [1, 5])
@pytest.mark.parametrize("teacher_components", [None, 1, 3])
def test_sizes_are_within_the_bound(components, teacher_components, vocabulary, path):
    problem = make_problem(
        3,
        components=components,
        draws=components,
        vocabulary=vocabulary,
        teacher_components=teacher_components,
        **FULL,
    )
    assert_within_bound(problem)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"draws": None},
        {"weighted": True},
        {"mask_id": 0},
        {"mask_id": 10, "revealed": True},
        {"component_weight": 1.0, "teacher_weight": 0.0, "consistency_weight": 0.0},
        {"data_weight": 0.0, "teacher_weight": 2.0},
        {"data_weight": 0.0, "teacher_weight": 0.0, "consistency_weight": 0.3},
        {"teacher_weight": 0.0, "consistency_weight": 0.0},
        {"component_weight": torch.tensor([0.0, 2.0]), "data_weight": torch.tensor([0.3, 0.0])},
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_settings_are_within_the_bound(settings, reduction, path):
    assert_within_bound(make_problem(4, vocabulary=11, **settings), reduction=reduction)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("vocabulary", [8, 1030])
@pytest.mark.parametrize("kind", ["tensor", "linear, bias per position", "user"])
def test_several_chunks_are_within_the_bound(kind, vocabulary, count, path, monkeypatch):
    problem = make_problem(5, batch=3, components=5, positions=4, vocabulary=vocabulary, **FULL)
    chunked(monkeypatch, count, 5, vocabulary)
    assert_within_bound(problem, kind)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("drawn", [False, True], ids=["given-draws", "own-draws"])
@pytest.mark.parametrize("kind", ["tensor", "linear", "linear, bias per position", "user"])
def test_chunk_size_and_what_is_kept_do_not_matter(kind, drawn, dtype, monkeypatch):
    vocabulary = 8
    problem = make_problem(6, batch=3, components=4, vocabulary=vocabulary, **FULL)
    if drawn:
        problem["consistency_x"] = None
    tensors = head_tensors(kind, (3, 4, 5), vocabulary)
    problem["student"] = None

    def run() -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors.values()]
        head = HEADS[kind](*leaves)
        generator = torch.Generator().manual_seed(0)
        value = run_loss(
            problem | {"student": head}, reduction="none", generator=generator, backend="torch"
        )
        value.sum().backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    expected = run()
    # Half precision rounds the shares of shared tensors chunk by chunk.
    tolerance = {"rtol": 1e-12, "atol": 1e-12}
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 2e-2, "atol": 2e-3}
    for count in (1, 2, 5, 100):
        chunked(monkeypatch, count, 4, vocabulary)
        for keep, direct in itertools.product((0, 1 << 30), (1, 1 << 30)):
            with monkeypatch.context() as patch:
                _keep_at_most(patch, keep)
                patch.setattr(streaming_sources, "DIRECT_FROM", direct)
                for actual, value in zip(run(), expected, strict=True):
                    torch.testing.assert_close(actual, value, **tolerance)


def _keep_at_most(patch: pytest.MonkeyPatch, size: int) -> None:
    original = streaming_sources.Room.__init__
    patch.setattr(streaming_sources.Room, "__init__", lambda self, _: original(self, size))


def test_chunks_cover_every_active_position_once():
    b = torch.arange(7) // 3
    d = torch.arange(7) % 3
    parts = list(streaming_sources.chunks(b, d, 3))
    assert [part.size for part in parts] == [3, 3, 1]
    assert [part.start for part in parts] == [0, 3, 6]
    assert torch.equal(torch.cat([part.b for part in parts]), b)
    assert torch.equal(torch.cat([part.d for part in parts]), d)
    assert list(streaming_sources.chunks(b[:0], d[:0], 3)) == []


@pytest.mark.parametrize(
    ("cut", "sizes"),
    [
        (0, [3, 3, 1]),
        (2, [2, 3, 2]),
        (3, [3, 3, 1]),
        (5, [3, 2, 2]),
        (7, [3, 3, 1]),
        (9, [3, 3, 1]),
    ],
)
def test_chunks_end_where_the_room_for_exponentials_does(cut, sizes):
    parts = list(streaming_sources.chunks(torch.arange(7), torch.arange(7), 3, cut))
    assert [part.size for part in parts] == sizes
    assert torch.equal(torch.cat([part.b for part in parts]), torch.arange(7))
    assert [part.index for part in parts] == list(range(len(sizes)))


@pytest.mark.parametrize("gap", [60.0, 95.0, 101.0, 150.0, 1000.0])
@pytest.mark.parametrize("whole", [False, True], ids=["one component", "all components"])
def test_probabilities_that_underflow_are_within_the_bound(gap, whole):
    # Around 87 nats below the peak probabilities are denormal, beyond 103 they are zero.
    problem = make_problem(7, components=3, vocabulary=8, component_weight=0.5, weighted=True)
    logits = problem["student"].clone()
    if whole:
        logits[..., :3] -= gap
    else:
        logits[:, 1, :, :3] -= gap
    assert_within_bound(problem, tensors={"logits": logits})
    assert_within_bound(problem | {"component_weight": 0.0}, tensors={"logits": logits})


@pytest.mark.parametrize("offset", [30.0, 1e3, 1e5])
def test_large_offsets_of_the_logits_are_within_the_bound(offset, path):
    problem = make_problem(8, components=3, vocabulary=8, **FULL)
    assert_within_bound(problem, tensors={"logits": problem["student"] + offset})


@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_large_offsets_of_targets_change_neither_draws_nor_loss(offset, path):
    # Beyond the range of exp, on either side: such logits have to be shifted first.
    problem = make_problem(8, components=3, vocabulary=8, dtype=torch.float32, **FULL)
    problem["consistency_x"] = None

    def value(shift: float) -> torch.Tensor:
        moved = {name: problem[name] + shift for name in ("teacher", "consistency")}
        generator = torch.Generator().manual_seed(0)
        return run_loss(problem | moved, generator=generator, backend="torch")

    # Adding 200 rounds logits to 2^-17.
    torch.testing.assert_close(value(offset), value(0.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("offset", [-15.0, 30.0])
def test_underflow_beside_large_logits_is_within_the_bound(offset):
    # The first exponentials are in range, and their logarithms would round as the offset does.
    problem = make_problem(7, components=3, vocabulary=8, weighted=True)
    for name in ("x0", "consistency_x"):  # no target is among them
        problem[name] = problem[name].clamp_min(3)
    logits = problem["student"].clone()
    logits[..., :3] -= 110.0
    assert_within_bound(problem, tensors={"logits": logits + offset})


def test_converged_student_is_within_the_bound(path):
    # Near the optimum gradients are small differences of large numbers.
    problem = make_problem(9, components=3, teacher_components=3, vocabulary=40, data_weight=0.0)
    problem["consistency_weight"] = 0.0
    g = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(problem["teacher"].shape, generator=g, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = (problem["teacher"] + noise).to(dtype).double()
        assert_within_bound(problem, dtype=dtype, tensors={"logits": rounded})


def test_columns_of_minus_infinity_have_zero_gradient_and_the_value_of_the_reference(path):
    problem = make_problem(10, components=4, vocabulary=9, **FULL)
    student = problem["student"].clone()
    student[:, 1, :, 5] = float("-inf")  # one component
    student[..., 6] = float("-inf")  # all of them, and neither teacher nor targets want it
    student[:, 2, 1] = float("-inf")  # a row without a class
    for name in ("teacher", "consistency"):
        problem[name][..., 6] = float("-inf")
    problem["teacher"][..., 5] = float("-inf")
    for name in ("x0", "consistency_x", "xu"):
        problem[name] = torch.where(problem[name] == 6, 7, problem[name])
    problem |= {"student": student, "component_weight": 0.0}
    expected = loss_and_gradients(problem, backend="reference")
    actual = loss_and_gradients(problem, backend="torch")
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all()
        torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12)
    assert torch.count_nonzero(actual["student"][student == float("-inf")]) == 0


@pytest.mark.parametrize("function", [di4c_fast.mixture_log_prob, di4c_fast.correlation])
@pytest.mark.parametrize("kind", HEADS)
def test_token_rows_of_every_head_equal_the_reference(kind, function, monkeypatch):
    problem = make_problem(11, batch=3, components=4, vocabulary=8, **FULL)
    chunked(monkeypatch, 2, 4, 8)
    tensors = head_tensors(kind, (3, 4, 5), 8)
    upstream = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(backend: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors.values()]
        log_weights = problem["log_weights"].clone().requires_grad_()
        value = function(
            HEADS[kind](*leaves),
            problem["consistency_x"],
            xt=problem["xt"],
            mask_id=3,
            valid=problem["valid"],
            log_weights=log_weights,
            backend=backend,
        )
        value.backward(upstream)
        return [value.detach(), log_weights.grad, *(leaf.grad for leaf in leaves)]

    for actual, expected in zip(run("torch"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "logistic", "user"])
def test_teacher_and_consistency_may_be_heads(kind, monkeypatch):
    problem = make_problem(12, batch=3, components=4, vocabulary=8, **FULL)
    chunked(monkeypatch, 2, 4, 8)
    for name, leading in (("teacher", (3, 2, 5)), ("consistency", (3, 2, 5))):
        problem[name] = HEADS[kind](*head_tensors(kind, leading, 8).values())
    for drawn in (problem, problem | {"consistency_x": None}):
        results = [
            loss_and_gradients(drawn, backend=b, generator=torch.Generator().manual_seed(1))
            for b in ("torch", "reference")
        ]
        for name, value in results[0].items():
            torch.testing.assert_close(value, results[1][name], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("bias_rows", [False, True])
def test_each_gradient_of_a_linear_head_alone_is_that_of_all_together(needed, bias_rows):
    problem = make_problem(13, vocabulary=8, **FULL)
    kind = "linear, bias per position" if bias_rows else "linear, bias"
    tensors = head_tensors(kind, (2, 3, 5), 8)

    def run(*names: str) -> dict[str, Tensor | None]:
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in tensors.items()}
        head = LinearHead(**leaves)
        run_loss(problem | {"student": head}, backend="torch").backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    alone, together = run(needed), run(*tensors)
    torch.testing.assert_close(alone[needed], together[needed], rtol=1e-12, atol=1e-12)
    assert [name for name, gradient in alone.items() if gradient is not None] == [needed]


def test_weight_gradient_of_many_chunks_in_half_precision_is_summed_in_float32(monkeypatch):
    # A sum in bf16 over 64 chunks would lose what is below 1/256 of it: errors near 1e-1.
    problem = make_problem(14, batch=1, positions=64, vocabulary=8, draws=None)
    chunked(monkeypatch, 1, 3, 8)
    tensors = head_tensors("linear", (1, 3, 64), 8)
    rounded = {n: t.bfloat16() for n, t in tensors.items()}

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        leaves = {n: t.to(dtype).requires_grad_() for n, t in rounded.items()}
        run_loss(problem | {"student": LinearHead(**leaves)}, backend=backend).backward()
        return leaves["weight"].grad.double()

    truth = gradient(torch.float64, "reference")
    error = (gradient(torch.bfloat16, "torch") - truth).norm() / truth.norm()
    assert error < 1.5e-2  # logits, hidden gradient and result are rounded to 2^-9 each


# What is computed and held


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


def test_linear_head_never_holds_all_logits(monkeypatch):
    components, vocabulary, positions = 8, 256, 128
    chunked(monkeypatch, 4, components, vocabulary)
    problem = linear_problem(positions, vocabulary, components)
    everything = components * vocabulary * positions * 4
    with watched() as seen:
        run_loss(problem, backend="torch").backward()
    assert seen.largest <= everything / 12
    assert seen.peak <= everything / 2
    student = problem["student"]
    rows = di4c_fast.correlation
    with watched() as seen:
        rows(student, problem["x0"], backend="torch").sum().backward()
    assert seen.largest <= everything / 12
    assert seen.peak <= everything / 4


def test_memory_of_a_linear_head_does_not_grow_by_rows_of_the_vocabulary(monkeypatch):
    # More positions cost their hidden gradient and numbers per target token, not even half a row.
    components, vocabulary = 8, 4096
    chunked(monkeypatch, 4, components, vocabulary)
    peaks = []
    for positions in (96, 192):
        problem = linear_problem(positions, vocabulary, components)
        with watched() as seen:
            run_loss(problem, backend="torch").backward()
        peaks.append(seen.peak)
    assert peaks[1] - peaks[0] <= 96 * vocabulary * 4 / 2


def test_budget_of_a_linear_head_bounds_its_chunks(monkeypatch):
    monkeypatch.setattr(streaming_sources, "LINEAR_MIN_ROWS", 1)
    problem = linear_problem(64)
    sizes = []
    for budget in (1 << 16, 1 << 18):
        student = LinearHead(*problem["student"].tensors(), budget_bytes=budget)
        with watched() as seen:
            value = run_loss(problem | {"student": student}, backend="torch")
        assert seen.largest <= budget
        sizes.append((seen.largest, value.item()))
    assert sizes[0][0] < sizes[1][0]
    assert sizes[0][1] == pytest.approx(sizes[1][1], rel=1e-6)


def test_memory_above_the_inputs_is_at_most_a_quarter_more_than_the_gradient(monkeypatch):
    # What does not grow with the problem is made small, so that what does can be seen.
    monkeypatch.setattr(streaming_sources, "CPU_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(streaming_sweeps, "DRAW_NUMBERS", 1 << 16)
    g = torch.Generator().manual_seed(0)
    student = torch.randn(1, 16, 128, 4096, generator=g, requires_grad=True)
    teacher = torch.randn(1, 128, 4096, generator=g)
    x0 = torch.randint(4095, (1, 128), generator=g)
    xt = torch.where(torch.rand(1, 128, generator=g) < 0.6, 4095, x0)
    with watched() as seen:
        di4c_fast.loss(
            student, teacher, x0, consistency=student, xt=xt, mask_id=4095, backend="torch"
        ).backward()
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
    teacher = LinearHead(torch.randn(1, 512, 4, generator=g), weight)
    x0 = torch.zeros(1, 512, dtype=torch.int64)
    with watched() as seen:
        value = di4c_fast.loss(
            LinearHead(hidden, weight), teacher, x0, valid=valid, backend="torch"
        )
        value.backward()
    # Sixteen rows of logits and no more, beside the gradient of all hidden states.
    assert seen.largest <= max(4 * 16 * 64 * 4, hidden.nbytes)
    assert seen.peak <= hidden.nbytes + 6 * (4 * 16 * 64 * 4)


def test_graph_holds_no_second_copy_of_the_inputs_and_lets_them_go():
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
    monkeypatch.setattr(streaming_sources, "CPU_CHUNK_BYTES", 1 << 20)
    row = torch.randn(1, 1, 256, 1024)
    student = row.expand(4, 4, -1, -1)
    x0 = torch.zeros(4, 256, dtype=torch.int64)
    with watched() as seen:
        di4c_fast.loss(student, row[:, 0].expand(4, -1, -1), x0, backend="torch")
    assert seen.peak <= 4 * row.nbytes


def test_sources_are_chosen_by_the_exact_type_of_the_head():
    def source(head: Head) -> type:
        return type(streaming_sources.make_source(head, torch.float32))

    hidden, weight = torch.randn(1, 1, 2, 3), torch.randn(4, 3)
    assert source(TensorHead(torch.randn(1, 1, 2, 4))) is streaming_sources.TensorSource
    assert source(LinearHead(hidden, weight)) is streaming_sources.LinearSource
    assert source(Capped(hidden, weight)) is streaming_sources.AutogradSource
