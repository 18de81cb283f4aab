"""What the suites over all backends do not ask of the C++ passes: every instruction set, threads,
unaligned memory, rounding, and how much memory they take."""

from __future__ import annotations

import pytest
import torch
from loss_cases import loss_and_gradients, make_problem, run_loss
from loss_heads import CLOSE, FULL, HEADS, assert_within_bound, head_tensors
from sample_cases import assert_near, assert_same_draw, normal

from benchmarks.memory import MemoryUnknown, peak_in_this_process
from di4c_fast import TensorHead, backends
from di4c_fast.draw.api import sample
from di4c_fast.passes import cpu

REASON = backends.unavailable("cpu", torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

MIB = 1 << 20
# Around the widths of the vectors (4, 8, 16), of their unrolled loops (64), of the blocks of a draw
# (128) and of the loss (1024).
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 1023, 1025, 2050)


@pytest.fixture(params=cpu.SETS)
def instruction_set(request, monkeypatch):
    monkeypatch.setenv("DI4C_FAST_CPU", request.param)
    cpu._library.cache_clear()
    if cpu.instruction_set() != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    monkeypatch.undo()
    cpu._library.cache_clear()


def full_problem(seed, **settings):
    return make_problem(seed, dtype=torch.float32, **(FULL | settings))


# Every instruction set ----------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_losses_of_every_width_are_within_the_bound(instruction_set, width):
    full = FULL if width > 4 else {"weighted": True, "component_weight": 0.5}
    sizes = {"components": 3, "teacher_components": 2, "vocabulary": width}
    assert_within_bound(make_problem(width, **sizes, **full), "cpu")


@pytest.mark.parametrize("width", [5, 129, 1025, 2050])
def test_losses_that_draw_their_targets_are_those_of_the_reference(instruction_set, width):
    problem = full_problem(6, vocabulary=width, consistency_x=None)
    found, expected = (
        loss_and_gradients(problem, backend=name, generator=torch.Generator().manual_seed(1))
        for name in ("cpu", "reference")
    )
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["tensor", "linear", "logistic"])
def test_half_precision_is_within_the_bound(instruction_set, kind, dtype):
    problem = make_problem(2, components=5, vocabulary=8, **FULL)
    assert_within_bound(problem, "cpu", kind, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision_are_rounded_once(instruction_set, dtype):
    problem = full_problem(3, components=5, vocabulary=1031)
    # Numbers of every size, denormals of fp16 included.
    problem["student"] = (problem["student"] * 4).to(dtype)
    expected = loss_and_gradients(problem | {"student": problem["student"].float()}, backend="cpu")
    found = loss_and_gradients(problem, backend="cpu")
    assert found["loss"].equal(expected["loss"])
    assert found["student"].equal(expected["student"].to(dtype))


@pytest.mark.parametrize("gap", [60.0, 101.0, 1000.0])
def test_probabilities_that_underflow_are_within_the_bound(instruction_set, gap):
    problem = make_problem(7, components=3, vocabulary=37, component_weight=0.5, weighted=True)
    logits = problem["student"].clone()
    logits[:, 1, :, :3] -= gap
    logits[..., 20:24] -= gap
    assert_within_bound(problem, "cpu", tensors={"logits": logits})


@pytest.mark.parametrize("width", WIDTHS)
def test_draws_of_every_width_are_those_of_the_reference(instruction_set, width):
    logits, other = normal(20, width), normal(20, width, seed=1)
    hidden = None if width == 1 else width - 1
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for options in (
            {},
            {"temperature": 0.7, "mask_id": hidden},
            {"temperature": 0.0},
            {"guidance": (other.to(dtype), 1.5), "mask_id": hidden},
        ):
            arguments = {"seed": 5, "want": "all", **options}
            draw = sample(logits.to(dtype), backend="cpu", **arguments)
            assert_near(draw, sample(logits.to(dtype), backend="reference", **arguments))


# Threads ------------------------------------------------------------------------------------------


@pytest.fixture
def with_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["tensor", "logistic"])
def test_same_bits_of_the_loss_for_any_number_of_threads(with_threads, kind):
    # 16384 logits are a thread's share: here they are those of 4 positions of 60.
    vocabulary = 8 if kind == "logistic" else 1031
    positions = 4000 if kind == "logistic" else 30
    problem = full_problem(1, components=4, positions=positions, vocabulary=vocabulary)
    tensors = head_tensors(kind, (2, 4, positions), vocabulary)

    def run(threads: int) -> list[torch.Tensor]:
        with_threads(threads)
        leaves = [tensor.float().requires_grad_() for tensor in tensors.values()]
        value = run_loss(problem | {"student": HEADS[kind](*leaves)}, backend="cpu")
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    expected = run(1)
    for threads in (2, 3, 7):
        for value, other in zip(run(threads), expected, strict=True):
            assert value.equal(other)


def test_same_bits_of_a_draw_for_any_number_of_threads(with_threads):
    logits = normal(203, 1031)

    def run(threads: int):
        with_threads(threads)
        return sample(logits, seed=1, temperature=0.8, mask_id=7, want="all", backend="cpu")

    expected = run(1)
    for threads in (2, 3, 7):
        assert_same_draw(run(threads), expected)


# Memory -------------------------------------------------------------------------------------------


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers elsewhere: at addresses that no vector is aligned to."""
    if layout == "offset":
        buffer = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
        return buffer[1:].view(x.shape).copy_(x)
    if layout == "padded":
        buffer = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
        return buffer[..., 2:-1].copy_(x)
    if layout == "swapped":
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "columns first":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x[:1, :1].expand(x.shape)


LAYOUTS = ["offset", "padded", "swapped", "columns first", "expanded"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_place_of_the_logits_in_memory_does_not_change_a_bit(layout, dtype):
    problem = full_problem(4, components=3, teacher_components=2, vocabulary=131)
    names = ("student", "teacher", "consistency")
    problem |= {name: laid_out(problem[name].to(dtype), layout) for name in names}

    def run(problem):
        student = problem["student"].detach().requires_grad_()
        value = run_loss(problem | {"student": student}, backend="cpu")
        return value.detach(), torch.autograd.grad(value, student)[0]

    expected = run(problem | {name: problem[name].contiguous() for name in names})
    for value, other in zip(run(problem), expected, strict=True):
        assert value.equal(other)
    logits, other = (laid_out(normal(2, 3, 131, seed=n).to(dtype), layout) for n in (1, 2))
    arguments = {"seed": 1, "want": "all", "backend": "cpu"}
    assert_same_draw(
        sample(logits, guidance=(other, 1.0), **arguments),
        sample(logits.contiguous(), guidance=(other.contiguous(), 1.0), **arguments),
    )


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_visit_gives_zeros(batch):
    problem = full_problem(5, batch=2)
    problem["valid"] = torch.zeros_like(problem["valid"])
    problem = {n: v[:batch] if isinstance(v, torch.Tensor) else v for n, v in problem.items()}
    found = loss_and_gradients(problem, backend="cpu", reduction="sum")
    for value in found.values():
        assert torch.count_nonzero(value) == 0
    assert found["student"].shape == problem["student"].shape


@pytest.mark.parametrize("call", ["value", "value and gradient", "draw"])
def test_memory_does_not_grow_with_the_logits_but_by_their_gradient(call):
    def peak(positions: int) -> int:
        g = torch.Generator().manual_seed(0)
        student = torch.randn(1, 8, positions, 4097, generator=g)
        teacher = torch.randn(1, positions, 4097, generator=g)
        tokens = torch.randint(4096, (1, 8, positions), generator=g)
        problem = {"teacher": teacher, "x0": tokens[:, 0], "student": student}
        problem |= {"consistency": student.clone(), "consistency_x": tokens, "xt": tokens[:, 1]}
        problem |= {"mask_id": 4096, "component_weight": 0.5}
        problem["xt"] = problem["xt"].masked_fill(torch.rand(1, positions, generator=g) < 0.6, 4096)
        if call == "draw":
            return peak_in_this_process(lambda: sample(student, seed=1, want="all", backend="cpu"))
        if call == "value":
            return peak_in_this_process(lambda: run_loss(problem, backend="cpu"))
        student.requires_grad_()
        return peak_in_this_process(lambda: run_loss(problem, backend="cpu").backward())

    try:
        peak(1)  # what a first call sets up
    except MemoryUnknown as error:
        pytest.skip(str(error))
    few, many = peak(64), peak(512)
    logits = 8 * 448 * 4097 * 4
    # Numbers per row and target; with a gradient also rows of q and q_T, kept for the second sweep.
    allowed = 0.04 + 1.25 * (call == "value and gradient")
    assert many - few <= allowed * logits
    assert few <= logits / 7 * (call == "value and gradient") + 6 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_large_gradients_are_those_written_in_place(backend, dtype):
    """Large ones are written past the caches, into memory that still holds the last gradient."""
    vocabulary = (1 << 17) + 1  # of odd rows
    settings = {
        "vocabulary": vocabulary,
        "components": 4,
        "positions": 20,
        "batch": 1,
        "mask_id": 3,
    }
    expected = []
    for seed in (1, 2):
        problem = make_problem(seed, dtype=dtype, **settings)
        student = problem.pop("student")
        logits = TensorHead(student.clone().requires_grad_(), in_place_gradient=True)
        run_loss(problem | {"student": logits}, backend=backend).backward()
        expected.append(logits.logits().detach())
    for seed, gradient in zip((1, 2), expected, strict=True):
        problem = make_problem(seed, dtype=dtype, **settings)
        leaf = problem.pop("student").requires_grad_()
        run_loss(problem | {"student": leaf}, backend=backend).backward()
        assert leaf.grad.equal(gradient)
        assert bool((problem["xt"] != problem["mask_id"]).any())
        del leaf, problem  # the next one gets this memory
