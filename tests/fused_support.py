"""Cases and comparisons for the tests of the triton backend.

The bound is the one of the project: our error is at most twice the error of the dense formulation
in the same dtype, plus a small absolute term. The truth is the dense formulation in fp64.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from di4c_fast.kernels.triton import tuning
from torch import Tensor

import di4c_fast
from di4c_fast import LinearHead, LogisticHead

# Small enough that every loop runs more than once at the shapes of the tests: several blocks per
# row, several splits, a tail.
SMALL_TILES = {
    "row_elements": 64,
    "marginal_elements": 64,
    "forward_elements": 64,
    "backward_elements": 64,
    "logistic_elements": 64,
    "split_columns": 32,
    "draw_elements": 128,
}

Case = dict[str, Any]


def randn(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_case(
    seed: int = 0,
    *,
    batch: int = 2,
    components: int = 3,
    teachers: int = 0,
    draws: int = 2,
    positions: int = 4,
    vocabulary: int = 37,
    mask: bool = True,
    dtype: torch.dtype = torch.float32,
    scale: float = 2.0,
    learned_weights: bool = True,
    component: bool = True,
) -> Case:
    """Arguments of `di4c_fast.loss`. `teachers` = 0 gives a teacher without that dimension."""
    g = torch.Generator().manual_seed(seed)
    mask_id = vocabulary - 1 if mask else None
    tokens = vocabulary - 1 if mask else vocabulary

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, tokens, shape, generator=g)

    def coin(chance: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=g) < chance

    leading = (batch, teachers) if teachers else (batch,)
    case: Case = {
        "student": randn(g, batch, components, positions, vocabulary, scale=scale).to(dtype),
        "teacher": randn(g, *leading, positions, vocabulary, scale=scale).to(dtype),
        "x0": ids(batch, positions),
        "data_weight": 0.7,
        "teacher_weight": torch.linspace(0.5, 1.5, batch),
        "consistency_weight": 0.8,
        "component_weight": torch.linspace(0.0, 0.6, batch) if component else 0.0,
        "reduction": "sum",
    }
    if learned_weights:
        case["log_weights"] = randn(g, batch, components).float()
    if draws:
        shape = (batch, draws, positions)
        case["consistency"] = randn(g, *shape, vocabulary, scale=scale).to(dtype)
        case["consistency_x"] = ids(*shape)
        # Targets that coincide, with x0 and with each other.
        case["consistency_x"][:, 0] = torch.where(
            coin(0.5, batch, positions), case["x0"], case["consistency_x"][:, -1]
        )
    if mask:
        case["mask_id"] = mask_id
        case["xt"] = torch.where(coin(0.6, batch, positions), mask_id, case["x0"])
        if draws:
            case["xu"] = torch.where(coin(0.5, *shape), mask_id, ids(*shape))
            shown = case["xu"] != mask_id
            case["consistency_x"] = torch.where(shown, case["xu"], case["consistency_x"])
    return case


def converted(case: Case, dtype: torch.dtype) -> Case:
    """Every floating tensor, those of heads included, in another dtype."""

    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if hasattr(value, "with_tensors"):
            return value.with_tensors([None if t is None else t.to(dtype) for t in value.tensors()])
        return value

    return {name: convert(value) for name, value in case.items()}


@dataclasses.dataclass
class Outcome:
    loss: Tensor
    terms: list[Tensor]
    gradients: dict[str, Tensor]


def evaluate(
    case: Case, backend: str, frozen: tuple[str, ...] = (), upstream: Tensor | None = None
) -> Outcome:
    """Loss, terms, and the gradient of every tensor behind the student and of the log-weights."""
    student, others = case["student"], {k: v for k, v in case.items() if k != "student"}
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        # Strides are part of the case, so the tensor itself becomes the leaf.
        fresh = tensor.detach()
        if name not in frozen:
            fresh.requires_grad_()
            leaves[name] = fresh
        return fresh

    if isinstance(student, Tensor):
        student = leaf("student", student)
    else:
        names = {LinearHead: ("hidden", "weight", "bias"), LogisticHead: ("mu", "log_scale")}
        tensors = [
            None if tensor is None else leaf(name, tensor)
            for name, tensor in zip(names[type(student)], student.tensors(), strict=True)
        ]
        student = student.with_tensors(tensors)
    if "log_weights" in others:
        others["log_weights"] = leaf("log_weights", others["log_weights"])
    loss, terms = di4c_fast.loss(student, **others, backend=backend, return_terms=True)
    values = list(leaves.values())
    grads = torch.autograd.grad(loss, values, grad_outputs=upstream) if values else ()
    return Outcome(
        loss.detach(), [t.detach() for t in terms], dict(zip(leaves, grads, strict=True))
    )


def assert_as_good(name: str, ours: Tensor, eager: Tensor, truth: Tensor, atol: float) -> None:
    """Our error against fp64 is at most twice that of the dense formulation, plus `atol`."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: {ours.dtype}, not {eager.dtype}"
    truth = truth.double()
    same = (ours.double() == truth) | ((ours != ours) & (truth != truth))
    error = torch.where(same, 0.0, (ours.double() - truth).abs())
    # Infinity minus infinity is no error if both are the same infinity.
    allowed = 2 * torch.where(eager.double() == truth, 0.0, (eager.double() - truth).abs())
    allowed = allowed.max() if allowed.numel() else allowed.sum()
    bad = ~(error <= allowed + atol)
    if bad.any():
        worst = int(torch.where(error != error, torch.inf, error).flatten().argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), ours.shape))
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} elements are off; the worst at {index}: "
            f"{ours.flatten()[worst]} instead of {truth.flatten()[worst]}, allowed "
            f"{float(allowed + atol):.3g}"
        )


# fp32: the dense formulation's own errors at these sizes are near 1e-7; the absolute term covers
# cases in which it happens to be exact. Half precision: one rounding of a gradient of size 1.
ATOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check_against_reference(
    case: Case,
    *,
    tiles: dict[str, int] | None = None,
    frozen: tuple[str, ...] = (),
    atol: float | None = None,
    upstream: Tensor | None = None,
    expected: Case | None = None,
    terms_atol: float = 1e-5,
) -> Outcome:
    """Compare loss, terms and gradients of the triton backend with the dense formulation.

    `expected` is the case for the dense formulation, where that needs another head.
    """
    dense = case if expected is None else expected
    truth = evaluate(
        converted(dense, torch.float64),
        "reference",
        frozen,
        None if upstream is None else upstream.double(),
    )
    eager = evaluate(dense, "reference", frozen, upstream)
    with tuning.override(**(SMALL_TILES if tiles is None else tiles)):
        ours = evaluate(case, "triton", frozen, upstream)
    student = dense["student"]
    bound = ATOL[student.dtype] if atol is None else atol

    def check_term(name: str, mine: Tensor, dense_term: Tensor, true: Tensor) -> None:
        # Sums of up to thousands of nats end in one rounding to fp32: 2^-23 relative.
        finite = torch.where(torch.isfinite(true), true, 0.0)
        size = float(finite.abs().max()) if true.numel() else 0.0
        assert_as_good(name, mine, dense_term, true, terms_atol + 2.4e-7 * size)

    check_term("loss", ours.loss, eager.loss, truth.loss)
    names = di4c_fast.LossTerms._fields
    for name, mine, dense_term, true in zip(
        names, ours.terms, eager.terms, truth.terms, strict=True
    ):
        check_term(name, mine, dense_term, true)
    assert ours.gradients.keys() == truth.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert_as_good(
            f"gradient of {name}", gradient, eager.gradients[name], truth.gradients[name], bound
        )
    return ours


@contextlib.contextmanager
def counting(module: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Record the arguments of every call of `module.name`."""
    calls: list[tuple[Any, ...]] = []
    original: Callable[..., Any] = getattr(module, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    setattr(module, name, spy)
    try:
        yield calls
    finally:
        setattr(module, name, original)
