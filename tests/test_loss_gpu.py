"""The triton backend on a GPU: paper shapes, sizes beyond 2^31 elements, memory, half precision.

Run by `make gpu`. The dense formulation does not fit at paper shapes, so it is applied to a
subset of the examples' positions that carries the whole loss: `valid` leaves a few positions, and
the dense truth sees only those. Everything else that a shape does to a kernel (grids, strides,
splits, tails) stays.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from loss_cases import loss_and_gradients, make_problem
from loss_heads import FULL

import di4c_fast
from di4c_fast import Head, LinearHead, LogisticHead, TensorHead
from di4c_fast.testing import assert_close_to_reference

pytestmark = pytest.mark.gpu

GIB = 2**30
SANITIZER_SECONDS = 120
Case = dict[str, Any]
PAPER = {
    "language": {"batch": 1, "components": 16, "positions": 1024, "vocabulary": 50258},
    "image": {"batch": 2, "components": 32, "positions": 256, "vocabulary": 1025},
}


def converted(case: Case, dtype: torch.dtype) -> Case:
    """The case with its floating tensors, and those of its heads, in another dtype."""

    def to(value):
        if isinstance(value, Head):
            return value.with_tensors([None if x is None else to(x) for x in value.tensors()])
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().to(dtype) if floating else value

    return {name: to(value) for name, value in case.items()}


def evaluate(case: Case, backend: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and the gradients of the tensors behind the student."""
    case = dict(case)
    student = case.pop("student")
    head = student if isinstance(student, Head) else TensorHead(student)
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in head.tensors()]
    loss = di4c_fast.loss(head.with_tensors(leaves), **case, backend=backend)
    inputs = [leaf for leaf in leaves if leaf is not None]
    return loss.detach(), list(torch.autograd.grad(loss, inputs))


def check_small(device: str = "cuda", dtype: torch.dtype = torch.float32, **settings) -> None:
    """A small problem with every term on a device, against the float64 reference on the CPU."""
    problem = make_problem(1, **{**FULL, "vocabulary": 37, **settings})
    truth = loss_and_gradients(converted(converted(problem, dtype), torch.float64))
    rounded = converted(problem, dtype)
    rounded["log_weights"] = problem["log_weights"].float()
    moved = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in rounded.items()}
    ours = loss_and_gradients(moved, backend="triton")
    eager = loss_and_gradients(moved, backend="reference")
    atol = 4e-6 if dtype == torch.float32 else 1e-3
    for name, value in ours.items():
        assert_close_to_reference(value, eager[name], truth[name], atol=atol, name=name)


def paper_case(name: str, dtype: torch.dtype, kept: int, seed: int = 0) -> tuple[Case, Case]:
    """A case of a paper shape in which `kept` positions count, and the same cut down to those."""
    sizes = PAPER[name]
    batch, n, d, v = (sizes[k] for k in ("batch", "components", "positions", "vocabulary"))
    g = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=torch.float32).to(dtype)

    mask_id = v - 1 if name == "language" else None
    tokens = v - 1
    where = torch.randperm(d, generator=g, device="cuda")[:kept].sort().values
    valid = torch.zeros(batch, d, dtype=torch.bool, device="cuda")
    valid[:, where] = True
    case: Case = {
        "student": 3 * randn(batch, n, d, v),
        "teacher": 3 * randn(batch, d, v),
        "consistency": 3 * randn(batch, n, d, v),
        "x0": torch.randint(0, tokens, (batch, d), generator=g, device="cuda"),
        "consistency_x": torch.randint(0, tokens, (batch, n, d), generator=g, device="cuda"),
        "valid": valid,
        "data_weight": 0.7,
        "teacher_weight": 1.0,
        "consistency_weight": 0.9,
        "component_weight": 0.3,
        "reduction": "sum",
    }
    if mask_id is not None:
        xu = torch.randint(0, tokens, (batch, n, d), generator=g, device="cuda")
        hidden = torch.rand(batch, n, d, generator=g, device="cuda") < 0.5
        case["xu"] = torch.where(hidden, mask_id, xu)
        case["consistency_x"] = torch.where(hidden, case["consistency_x"], xu)
        case["mask_id"] = mask_id
    small = {
        key: value[..., where, :]
        if key in ("student", "teacher", "consistency")
        else value[..., where]
        if key in ("x0", "consistency_x", "xu")
        else value
        for key, value in case.items()
        if key != "valid"
    }
    return case, small


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("teacher_components", [None, 3])
def test_small_shapes(dtype, teacher_components):
    check_small(dtype=dtype, teacher_components=teacher_components)


@pytest.mark.parametrize("sizes", [{"components": 40, "draws": 40}, {"vocabulary": 5000}])
def test_many_components_and_columns(sizes):
    check_small(**sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(PAPER))
def test_paper_shapes(name, dtype):
    case, small = paper_case(name, dtype, kept=6)
    loss, (gradient,) = evaluate(case, "triton")
    eager_loss, (eager,) = evaluate(small, "reference")
    true_loss, (truth,) = evaluate(converted(small, torch.float64), "reference")
    where = case["valid"][0]
    assert_close_to_reference(loss, eager_loss, true_loss, atol=1e-4, name="loss")
    atol = 1e-6 if dtype == torch.float32 else 1e-4
    assert_close_to_reference(gradient[:, :, where], eager, truth, atol=atol, name="gradient")
    assert torch.count_nonzero(gradient[:, :, ~where]) == 0


def test_student_close_to_the_teacher_in_bf16():
    case, small = paper_case("image", torch.bfloat16, kept=16)
    for c in (case, small):
        c["data_weight"] = c["consistency_weight"] = c["component_weight"] = 0.0
        noise = 1e-2 * torch.randn(c["student"].shape, device="cuda")
        c["student"] = (c["teacher"].unsqueeze(1) + noise).to(torch.bfloat16)
    (ours,), (eager,) = (evaluate(small, backend)[1] for backend in ("triton", "reference"))
    (truth,) = evaluate(converted(small, torch.float64), "reference")[1]
    dense = (eager.double() - truth).norm()
    assert (ours.double() - truth).norm() <= 2 * dense + 1e-3 * truth.norm()


def test_more_than_two_to_the_31_elements():
    shape = (1, 16, 3000, 50258)  # 2.4e9 elements, 4.8 GB
    if torch.cuda.mem_get_info()[0] < 16 * GIB:
        pytest.skip("needs 16 GiB of free memory")
    student = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    case = {
        "teacher": torch.zeros(1, 1, 1, device="cuda", dtype=torch.bfloat16).expand(1, *shape[2:]),
        "x0": torch.zeros(1, shape[2], dtype=torch.int64, device="cuda"),
        "valid": torch.zeros(1, shape[2], dtype=torch.bool, device="cuda"),
        "reduction": "sum",
    }
    generator = torch.Generator("cuda").manual_seed(0)
    for place in (0, shape[2] - 1):
        student[0, :, place] = torch.randn(16, shape[3], device="cuda", generator=generator)
        case["valid"][0, place] = True
    head = TensorHead(student.requires_grad_() * 1, in_place_gradient=True)
    ends = [0, shape[2] - 1]
    expected = {
        "student": student.detach()[:, :, ends].clone(),
        "teacher": case["teacher"][:, ends],
        "x0": case["x0"][:, ends],
        "reduction": "sum",
    }
    loss = di4c_fast.loss(head, **case, backend="triton")
    (gradient,) = torch.autograd.grad(loss, student)
    true_loss, (truth,) = evaluate(converted(expected, torch.float64), "reference")
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient[:, :, ends].double(), truth, rtol=1e-2, atol=1e-5)
    assert torch.count_nonzero(gradient[:, :, 1 : shape[2] - 1]) == 0


def test_results_repeat_exactly():
    case, _ = paper_case("image", torch.bfloat16, kept=100)
    first, second = evaluate(case, "triton"), evaluate(case, "triton")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize("drawn", [False, True])
def test_no_host_sync(drawn):
    case, _ = paper_case("image", torch.bfloat16, kept=100)
    if drawn:
        del case["consistency_x"]
        case["generator"] = torch.Generator("cuda").manual_seed(3)
    evaluate(case, "triton")  # compiled before the check
    student = case.pop("student").requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = di4c_fast.loss(student, **case, backend="triton")
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_token_rows(function: Any, device: str = "cuda") -> None:
    """Values of token rows and their gradients, against the float64 reference on the CPU."""
    g = torch.Generator().manual_seed(4)
    student = 2 * torch.randn(2, 5, 6, 37, generator=g)
    weights, x = torch.randn(2, 5, generator=g), torch.randint(36, (2, 3, 6), generator=g)
    xt = torch.where(torch.rand(2, 6, generator=g) < 0.6, 36, 0)
    upstream = torch.randn(2, 3, generator=g)

    def run(backend: str, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [part.to(device, dtype).requires_grad_() for part in (student, weights)]
        rows = function(
            leaves[0], x.to(device), xt=xt.to(device), mask_id=36, log_weights=leaves[1],
            backend=backend,
        )  # fmt: skip
        gradients = torch.autograd.grad(rows, leaves, upstream.to(device, dtype))
        return [rows.detach(), *gradients]

    truth = run("reference", "cpu", torch.float64)
    eager, ours = (run(name, device, torch.float32) for name in ("reference", "triton"))
    for name, *values in zip(("rows", "student", "log_weights"), ours, eager, truth, strict=True):
        assert_close_to_reference(*values, atol=4e-6, name=name)


@pytest.mark.parametrize("function", [di4c_fast.correlation, di4c_fast.mixture_log_prob])
def test_token_rows_and_their_gradients(function):
    check_token_rows(function)


@pytest.mark.parametrize("name", PAPER)
def test_draws_are_those_of_the_torch_backend(name):
    case, _ = paper_case(name, torch.float32, kept=20)  # of language with tokens that are shown
    del case["consistency_x"]
    losses = []
    for backend in ("triton", "torch"):
        generator = torch.Generator("cuda").manual_seed(3)
        losses.append(di4c_fast.loss(**case, generator=generator, backend=backend).detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-3)


def peak_above_inputs(function) -> int:
    function()  # compiled, and its caches filled
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize(("in_place", "limit"), [(False, 1.1), (True, 0.1)])
def test_peak_memory_at_the_language_shape(in_place, limit):
    # The gradient is as large as the logits. One fp32 row of q_u per position would be 2/16 of it,
    # so a part of them is formed twice.
    case, _ = paper_case("language", torch.bfloat16, kept=512)
    student = case.pop("student")
    size = student.numel() * student.element_size()

    def step() -> None:
        leaf = student.detach().requires_grad_()
        # A non-leaf view of the same memory: what a model's output is to the loss.
        logits = leaf.view_as(leaf)
        head = TensorHead(logits, in_place_gradient=in_place)
        loss = di4c_fast.loss(head, **case, backend="triton")
        torch.autograd.grad(loss, logits)

    assert peak_above_inputs(step) <= limit * size


def linear_language(requires: tuple[bool, bool]) -> Case:
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda").to(torch.bfloat16)

    weight = 0.1 * randn(50258, 768)
    hidden = randn(1, 16, 1024, 768)
    x0 = torch.randint(0, 50257, (1, 1024), generator=g, device="cuda")
    hide = torch.rand(1, 1024, generator=g, device="cuda") < 0.5
    return {
        "student": LinearHead(
            hidden.requires_grad_(requires[0]), weight.clone().requires_grad_(requires[1])
        ),
        "teacher": LinearHead(randn(1, 1024, 768), weight),
        "consistency": LinearHead(randn(1, 16, 1024, 768), weight),
        "x0": x0,
        "xt": torch.where(hide, 50257, x0),
        "mask_id": 50257,
    }


def test_linear_head_stays_within_a_gibibyte():
    case = linear_language((True, True))
    student = case.pop("student")

    def step() -> None:
        loss = di4c_fast.loss(student, **case, backend="triton")
        torch.autograd.grad(loss, [student.hidden, student.weight])

    assert peak_above_inputs(step) <= GIB


@pytest.mark.parametrize("budget", [None, 8 << 20])  # one chunk; several, whose dW add up in place
def test_linear_head_agrees_with_its_logits(budget):
    case = linear_language((True, True))
    for name in ("student", "teacher", "consistency"):
        head = case[name]
        hidden = head.hidden.detach()[..., :24, :].clone()
        case[name] = LinearHead(hidden, head.weight.detach(), budget_bytes=budget)
    case["x0"], case["xt"] = case["x0"][:, :24], case["xt"][:, :24]
    case["consistency_x"] = case["x0"].unsqueeze(1).expand(-1, 16, -1)
    ours, eager = evaluate(case, "triton")[1], evaluate(case, "reference")[1]
    truth = evaluate(converted(case, torch.float64), "reference")[1]
    for mine, dense, exact in zip(ours, eager, truth, strict=True):
        assert (mine.double() - exact).norm() <= 2 * (dense.double() - exact).norm()


@pytest.mark.parametrize("clamp", ["left", "min"])
def test_pixel_shape_never_holds_the_bins_of_the_student(clamp):
    g = torch.Generator("cuda").manual_seed(0)
    batch, n, d, v = 8, 16, 3072, 256

    def head(*leading: int) -> LogisticHead:
        mu = torch.randn(*leading, d, generator=g, device="cuda").mul_(0.5)
        log_scale = torch.randn(*leading, d, generator=g, device="cuda")
        return LogisticHead(mu, log_scale, v, clamp=clamp)

    student, teacher, consistency = head(batch, n), head(batch), head(batch, n)
    x0 = torch.randint(0, v, (batch, d), generator=g, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in student.tensors()]

    def step() -> list[torch.Tensor]:
        loss = di4c_fast.loss(student, teacher, x0, consistency=consistency, backend="triton")
        return list(torch.autograd.grad(loss, leaves))

    # Bins exist for a chunk of positions, and q takes one row per position: 1/16 of all bins.
    assert peak_above_inputs(step) < 0.5 * 4 * batch * n * d * v
    assert all(torch.isfinite(gradient).all() for gradient in step())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_a_device_that_is_not_the_current_one():
    check_small("cuda:1")


def test_compiled_step_on_the_gpu():
    case, _ = paper_case("image", torch.float32, kept=20)
    student = case.pop("student")

    def step(logits: torch.Tensor) -> torch.Tensor:
        return di4c_fast.loss(logits * 1.5, **case, backend="triton")

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = student.detach().clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


def test_graph_capture():
    case, _ = paper_case("image", torch.bfloat16, kept=100)
    student = case.pop("student").requires_grad_()

    def step() -> torch.Tensor:
        loss = di4c_fast.loss(student, **case, backend="triton")
        return torch.autograd.grad(loss, student)[0]

    expected = step().clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool):
    program = (
        "import torch, test_loss_gpu, test_tuning\n"
        "from di4c_fast.kernels.triton import tuning\n"
        "with tuning.override(**test_tuning.SMALL):\n"
        "    test_loss_gpu.check_small()\n"
        "torch.cuda.synchronize()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    run = subprocess.run(
        [*command, sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=SANITIZER_SECONDS,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
