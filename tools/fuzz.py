"""Random problems on every backend, compared with the reference: a search for differences.

    python -m tools.fuzz --backend torch --kind loss --cases 5000 --seed 0 --minutes 5

Kinds: loss, mixture_log_prob, correlation (values, terms and all gradients), sample (tokens and
statistics), samplers (whole sequences). A case is a function of its number, backend and kind.
Each difference that rounding does not explain is one line with the command that repeats it
(`--only NUMBER`), and the exit code is 1.

Numbers of the loss are judged as in the tests: the error against the reference in float64 is at
most twice that of the reference in the same dtype, plus a few roundings of the largest numbers
that are added up. Tokens must be equal, except where logits moved by one rounding draw others, too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from di4c_fast import (
    Head,
    LinearHead,
    LogisticHead,
    backends,
    correlation,
    loss,
    mixture_log_prob,
    sample,
    samplers,
)
from di4c_fast.testing import assert_close_to_reference

Case = dict[str, Any]
NEG_INF = float("-inf")
BACKENDS = ("torch", "triton", "cpu")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Rounding errors allowed per number that is added up, beside twice the reference's own.
ROUNDINGS = 4


class Capped(Head):
    """A head of one's own: the logits of a linear layer between -5 and 5."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.hidden, self.weight = hidden, weight

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def take(self, rows: Tensor) -> Capped:
        return Capped(self.hidden.flatten(0, -2)[rows], self.weight)

    def logits(self) -> Tensor:
        return 5 * torch.tanh(self.hidden @ self.weight.T / 5)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.hidden, self.weight)

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> Capped:
        hidden, weight = tensors
        assert hidden is not None
        assert weight is not None
        head = Capped(hidden, weight)
        head.budget_bytes = self.budget_bytes
        return head


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "padded": lambda x: F.pad(x, (0, 3))[..., : x.shape[-1]],
    "columns": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "positions first": lambda x: x.movedim(-2, 0).contiguous().movedim(0, -2),
    "expanded": lambda x: x[:1].expand(x.shape),
}
KINDS_OF_HEADS = ("tensor", "tensor", "tensor", "linear", "positional", "logistic", "own")


class Draws:
    """What is random in a case."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def true(self, probability: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < probability

    def tokens(self, shape: tuple[int, ...], classes: int, mask_id: int | None) -> Tensor:
        tokens = torch.randint(
            classes - (mask_id is not None), shape, generator=self.generator, dtype=torch.int64
        )
        return tokens if mask_id is None else tokens + (tokens >= mask_id).long()

    def logits(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Logits with a property that has broken something before, or none."""
        x = self.normal(*shape) * self.pick(0.1, 1.5, 1.5, 8.0)
        match self.pick("", "", "", "offset", "low", "flat", "peak", "excluded", "dead"):
            case "offset":
                x += self.pick(30.0, 1e3, *((-1e4, 1e5) if dtype != torch.float16 else ()))
            case "low":
                x[..., : 1 + shape[-1] // 3] -= self.pick(60.0, 95.0, 150.0, 1000.0)
            case "flat":
                x.zero_()
            case "peak":
                x[..., -1] += 40.0
            case "excluded":
                x[self.true(0.1, *shape)] = NEG_INF
            case "dead":
                x[self.true(0.1, *shape[:-1])] = NEG_INF
        return x.to(dtype)

    def head(self, kind: str, leading: tuple[int, ...], classes: int, dtype: torch.dtype) -> Case:
        """The tensors of a head and how to make it."""
        options: Case = {}
        if kind == "tensor":
            tensors = {"logits": self.logits(*leading, classes, dtype=dtype)}
        elif kind == "logistic":
            tensors = {
                "mu": self.pick(0.5, 0.5, 5.0) * self.normal(*leading),
                "log_scale": self.pick(0.0, 1.0, 2.0) + self.normal(*leading) / 2,
            }
            options = {"eps": self.pick(1e-6, 1e-6, 0.0), "clamp": self.pick("left", "min")}
        else:
            width = self.pick(1, 3, 6)
            tensors = {
                "hidden": self.pick(0.3, 1.5) * self.normal(*leading, width),
                "weight": self.normal(classes, width),
            }
            if kind == "positional":
                tensors["bias"] = self.normal(leading[-1], classes)
            elif kind == "linear" and self.chance(0.5):
                tensors["bias"] = self.normal(classes)
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        layouts = list(LAYOUTS)[: 4 if leading[0] == 0 or self.chance(0.7) else 5]
        return {
            "kind": kind,
            "tensors": tensors,
            "options": options,
            "layout": self.pick("contiguous", *layouts),
            "budget": self.pick(None, None, 1, 5000),
        }


def make_head(recipe: Case, tensors: dict[str, Tensor], classes: int) -> Tensor | Head:
    first, *rest = tensors.values()
    first = LAYOUTS[recipe["layout"]](first)
    kind = recipe["kind"]
    if kind == "tensor":
        return first
    if kind == "logistic":
        return LogisticHead(first, LAYOUTS[recipe["layout"]](rest[0]), classes, **recipe["options"])
    head: Head = Capped(first, *rest) if kind == "own" else LinearHead(first, *rest)
    head.budget_bytes = recipe["budget"]
    return head


# The loss and the likelihoods.


def loss_case(kind: str, seed: int, small: bool) -> Case:
    d = Draws(seed)
    dtype = d.pick(*(t for t in DTYPES if not small or t in (torch.float32, torch.float16)))
    batch, components = d.pick(0, 1, 2, 2, 3), d.pick(1, 2, 3, 5, 5, 33)
    positions, classes = d.pick(1, 2, 5, 7), d.pick(2, 3, 8, 17, 130)
    if not small and d.chance(0.1):
        positions, classes, components = d.pick((1024, 5, 4), (40, 1030, 3), (300, 2, 2))
    rows = d.pick(1, 2, 3, components)
    mask_id = d.pick(None, 0, classes - 1, classes // 2)
    shape = (batch, positions)
    case: Case = {
        "dtype": dtype,
        "classes": classes,
        "student": d.head(d.pick(*KINDS_OF_HEADS), (batch, components, positions), classes, dtype),
        "shared": {"mask_id": mask_id},
        "reduction": d.pick("mean", "sum", "none"),
        "upstream": d.normal(batch),
    }
    shared = case["shared"]
    if mask_id is not None and d.chance(0.9):
        xt = d.tokens(shape, classes, mask_id)
        shared["xt"] = torch.where(d.true(d.pick(0.0, 0.6, 0.9, 1.0), *shape), mask_id, xt)
    if d.chance(0.3):
        shared["valid"] = d.true(d.pick(0.0, 0.7), *shape)
    if d.chance(0.5):
        shared["log_weights"] = d.pick(0.5, 3.0) * d.normal(batch, components)
        if components > 1 and d.chance(0.2):
            shared["log_weights"][:, -1] = NEG_INF
    if kind != "loss":
        case["x"] = d.tokens((batch, d.pick(0, 1, rows), positions), classes, mask_id)
        case["upstream"] = d.normal(*case["x"].shape[:2])
        return case
    m = d.pick(0, 1, 3)
    teacher = (batch, m, positions) if m else shape
    case["teacher"] = d.head(d.pick("tensor", *KINDS_OF_HEADS), teacher, classes, dtype)
    student = case["student"]["tensors"].get("logits")
    if student is not None and case["teacher"]["kind"] == "tensor" and not m and d.chance(0.2):
        near = student.mean(1, dtype=torch.float64) + 0.01 * d.normal(*shape, classes)
        case["teacher"]["tensors"]["logits"] = near.to(dtype)
    x0 = d.tokens(shape, classes, mask_id)
    if case["teacher"]["kind"] == "tensor" and not m and d.chance(0.1):
        near = torch.full((*shape, classes), NEG_INF, dtype=dtype)
        case["teacher"]["tensors"]["logits"] = near.scatter(-1, x0.unsqueeze(-1), 0.0)
    case["x0"] = x0
    if d.chance(0.7):
        case["consistency"] = d.head(
            d.pick("tensor", *KINDS_OF_HEADS), (batch, rows, positions), classes, dtype
        )
        xu = d.tokens((batch, rows, positions), classes, mask_id)
        shared["consistency_x"] = xu
        if "xt" in shared and d.chance(0.5):
            shared["xu"] = torch.where(d.true(0.5, *xu.shape), mask_id, xu)
    for name, usual in zip(
        ("data", "teacher", "consistency", "component"), (1, 1, 1, 0), strict=True
    ):
        value = d.pick(float(usual), float(usual), 0.0, 0.3, 2.0)
        shared[f"{name}_weight"] = value * d.true(0.7, batch).double() if d.chance(0.2) else value
    shared["control_variate"] = d.chance(0.8)
    return case


def run_loss(kind: str, case: Case, backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Values, terms and gradients; with `dtype` everything is computed in it."""

    def head(name: str) -> tuple[Any, dict[str, Tensor]]:
        recipe = case.get(name)
        if recipe is None:
            return None, {}
        leaves = {n: t.to(dtype or t.dtype).clone() for n, t in recipe["tensors"].items()}
        for leaf in leaves.values():
            leaf.requires_grad_(name == "student")
        return make_head(recipe, leaves, case["classes"]), leaves

    work = dtype or torch.promote_types(case["dtype"], torch.float32)
    shared: Case = {
        n: v.to(work) if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in case["shared"].items()
    }
    student, leaves = head("student")
    assert student is not None
    if "log_weights" in shared:
        leaves["log_weights"] = shared["log_weights"] = shared["log_weights"].clone()
        leaves["log_weights"].requires_grad_()
    found: dict[str, Tensor] = {}
    if kind == "loss":
        value, terms = loss(
            student,
            head("teacher")[0],
            case["x0"],
            consistency=head("consistency")[0],
            reduction=case["reduction"],
            backend=backend,
            return_terms=True,
            **shared,
        )
        found |= terms._asdict()
    else:
        function = {"mixture_log_prob": mixture_log_prob, "correlation": correlation}[kind]
        value = function(student, case["x"], backend=backend, **shared)
    upstream = case["upstream"].to(value.dtype)
    upstream = upstream if value.ndim else upstream.new_tensor(-1.5)
    value.backward(upstream)
    found["value"] = value.detach()
    found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}  # type: ignore[misc]
    return found


def largest(*values: Tensor | None) -> float:
    """The largest finite absolute value, at least 1."""
    finite = [v.detach().double().abs().nan_to_num(0, 0, 0) for v in values if v is not None]
    return max([1.0, *(float(v.amax()) for v in finite if v.numel())])


def terms_size(kind: str, case: Case) -> float:
    """How large the numbers are that the loss adds up: joint log-likelihoods and targets' own."""
    tensors = {n: t.double() for n, t in case["student"]["tensors"].items()}
    student = make_head(case["student"], tensors, case["classes"])
    names = ("xt", "valid", "mask_id", "log_weights")
    shared = {n: v for n, v in case["shared"].items() if n in names}
    rows = [case["x"]] if kind != "loss" else [case["x0"], case["shared"].get("consistency_x")]
    return largest(
        *(
            mixture_log_prob(student, x, backend="reference", **shared)
            for x in rows
            if x is not None
        )
    )


def check_loss(kind: str, seed: int, backend: str, small: bool) -> None:
    case = loss_case(kind, seed, small)
    ours = run_loss(kind, case, backend, None)
    eager = run_loss(kind, case, "reference", None)
    truth = run_loss(kind, case, "reference", torch.float64)
    used = ours["value"].dtype
    rounding = ROUNDINGS * torch.finfo(used).eps
    size = max(terms_size(kind, case), largest(*(v for n, v in truth.items() if "of" not in n)))
    weights = [v for n, v in case["shared"].items() if n.endswith("_weight")]
    factor = largest(*(torch.as_tensor(w) for w in weights)) * largest(case["upstream"])
    finite = bool(truth["value"].isfinite().all())
    for name, value in ours.items():
        if name.startswith("gradient"):
            if not finite:  # the gradient of an infinite loss is not defined
                continue
            allowed = rounding * size * factor * largest(truth[name])
            # One rounding of the result to its dtype.
            allowed += torch.finfo(value.dtype).eps * largest(truth[name])
        else:
            allowed = rounding * size
        # Double precision has no truth above it: the reference rounds as well.
        allowed *= 16 if used == torch.float64 else 1
        assert_close_to_reference(value, eager[name], truth[name], atol=allowed, name=name)


# Draws.


def sample_case(seed: int, small: bool) -> tuple[Tensor, Case]:
    d = Draws(seed)
    dtype = d.pick(*DTYPES)
    rows, classes = d.pick(0, 1, 5, 20), d.pick(1, 2, 27, 129, 300, *(() if small else (1025,)))
    logits = d.logits(rows, classes, dtype=dtype)
    dead = (logits == NEG_INF).all(-1)
    logits[dead] = 0
    arguments: Case = {"seed": d.random.getrandbits(40), "step": d.pick(0, 1, 2**32 - 1)}
    if d.chance(0.6):
        arguments["temperature"] = d.pick(0.0, 0.7, 1.5, d.true(0.7, rows) * 0.8)
    if d.chance(0.3):
        arguments["top_p"] = d.pick(0.1, 0.8, 0.99, 1.0)
    if d.chance(0.3):
        arguments["top_k"] = d.pick(1, 3, classes, 1000)
    if d.chance(0.3):
        other = d.normal(rows, classes).to(dtype)
        arguments["guidance"] = (other, d.pick(0.0, 1.5, d.normal(rows).abs().float()))
    if classes > 1 and d.chance(0.4):
        mask_id = d.pick(0, classes - 1)
        only = logits.clone()
        only[:, mask_id] = NEG_INF
        logits[(only == NEG_INF).all(-1)] = 0
        arguments["mask_id"] = mask_id
    if d.chance(0.3):
        arguments["row_keys"] = torch.randperm(rows, generator=d.generator) * 2**33 - 7
    return logits, arguments


def same_rows(one: Any, other: Any, size: float) -> Tensor:
    """Which rows of two draws agree; statistics within the rounding of a few hundred operations."""
    agree = one.token == other.token
    for name, value in one._asdict().items():
        expected = getattr(other, name)
        if value.dtype != torch.int64:
            coarse = 1e5 if value.dtype == torch.float64 else 1.0
            close = torch.isclose(
                value.double(),
                expected.double(),
                rtol=1e-5 / coarse,
                atol=3e-6 * size / coarse,
                equal_nan=True,
            )
            agree &= close
        else:
            agree &= value == expected
    return agree


def check_sample(kind: str, seed: int, backend: str, small: bool) -> None:
    logits, arguments = sample_case(seed, small)
    arguments["want"] = "all"
    ours = sample(logits, backend=backend, **arguments)
    truth: Any = sample(logits, backend="reference", **arguments)
    # Guidance and temperature multiply the logits and with them their rounding.
    size = largest(truth.log_prob, truth.max_log_prob) * (8 if "guidance" in arguments else 1)
    wrong = ~same_rows(ours, truth, size)
    work = torch.promote_types(logits.dtype, torch.float32)
    for number in range(8):
        if not bool(wrong.any()):
            return
        noise = Draws(number).normal(*logits.shape) * torch.finfo(work).eps
        # Half precision cannot hold the change; its values are computed with in fp32.
        moved = logits.to(work) * (1 + noise.to(work)) + noise.to(work)
        wrong &= same_rows(sample(moved, backend="reference", **arguments), truth, size)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        fields = [
            f"{n} {v[row].item():.9g} != {t[row].item():.9g}"
            for (n, v), t in zip(ours._asdict().items(), truth, strict=True)
            if v[row] != t[row]
        ]
        raise AssertionError(f"{int(wrong.sum())} rows differ; row {row}: {', '.join(fields)}")


# Samplers.


@contextlib.contextmanager
def chosen(backend: str) -> Iterator[None]:
    """Samplers take the best backend of a CPU; make that one the given."""
    backends.register("cpu", f"di4c_fast.passes.{backend}", float64=backend == "torch")
    try:
        yield
    finally:
        backends.register("cpu", "di4c_fast.passes.cpu", _not_cpu)


def _not_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"the tensors are on {device.type}, not on a CPU"


def check_samplers(kind: str, seed: int, backend: str, small: bool) -> None:
    """A head's sequences on a backend are those of its dense logits on the torch backend."""
    d = Draws(seed)
    classes, positions, width = d.pick(3, 11, 130), d.pick(1, 6, 12), 4
    mask = classes - 1
    table, weight = d.normal(classes, width).float(), 2 * d.normal(classes, width).float()
    form = d.pick("tensor", "linear", "own")
    warm = {"temperature": d.pick(0.0, 0.8, 1.0), "top_p": d.pick(None, 0.9)}
    warm |= {"top_k": d.pick(None, 2)}
    masked = {"mask_id": mask, "vocab_size": classes}
    name, options = d.pick(
        ("sample_masked", {**masked, **warm, "active_only": d.chance(0.5)}),
        ("sample_analytic", masked),
        ("sample_uniform_state", {"vocab_size": classes}),
        ("sample_maskgit", {**masked, **warm, "resample": d.chance(0.5)}),
        ("sample_confidence", {**masked, **warm, "rule": d.pick("low_confidence", "entropy")}),
        ("sample_confidence", {**masked, **warm, "rule": "topk_margin", "guidance_scale": 0.0}),
    )
    options = {"steps": d.pick(1, 2, positions), "seed": seed, **options}
    batch = d.pick(1, 3)

    def run(form: str, backend: str, noise: float = 0.0) -> Tensor:
        def model(tokens: Tensor, t: Tensor) -> Tensor | Head:
            place = torch.linspace(-1, 1, positions).view(-1, 1) + noise
            h = torch.tanh(table[tokens] + table[tokens].roll(1, 1) + place) * (1 + noise)
            own = Capped(h, weight)
            if form == "linear":
                return LinearHead(h, weight)
            return own if form == "own" else (own.logits() if capped else h @ weight.T)

        with chosen(backend):
            return getattr(samplers, name)(model, (batch, positions), **options)

    capped = form == "own"
    ours, truth = run(form, backend), run("tensor", "torch")
    if ours.equal(truth):
        return
    # A near-tie shows by a change of the size of one rounding.
    if any(not run("tensor", "torch", n * 1.2e-7).equal(truth) for n in (-3, -2, -1, 1, 2, 3)):
        return
    raise AssertionError(f"{name}, {form}: {int((ours != truth).sum())} tokens differ")


CHECKS: dict[str, Callable[[str, int, str, bool], None]] = {
    "loss": check_loss,
    "mixture_log_prob": check_loss,
    "correlation": check_loss,
    "sample": check_sample,
    "samplers": check_samplers,
}


def difference(kind: str, seed: int, backend: str) -> str | None:
    """What differs in one case, in a line; None if nothing does."""
    small = backend == "triton" and not torch.cuda.is_available()
    try:
        CHECKS[kind](kind, seed, backend, small)
    except Exception as error:  # a crash is a difference as well
        text = " ".join(str(error).split())
        return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="default: all that run here")
    parser.add_argument("--kind", choices=CHECKS, help="default: all")
    parser.add_argument("--cases", type=int, default=1000, help="of each kind on each backend")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--minutes", type=float, default=5.0, help="at most, in all")
    parser.add_argument("--only", type=int, help="run this case alone")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of masked lanes
    cpu = torch.device("cpu")
    wanted = []
    for name in [options.backend] if options.backend else BACKENDS:
        reason = backends.unavailable(name, cpu)
        if reason is None:
            wanted += [(name, k) for k in ([options.kind] if options.kind else CHECKS)]
        else:
            print(f"{name} does not run: {reason}")
    first = options.seed if options.only is None else options.only
    cases = options.cases if options.only is None else 1
    end = time.monotonic() + 60 * options.minutes
    done = found = 0
    for seed in range(first, first + cases):
        if time.monotonic() > end:
            break
        for name, kind in wanted:
            message = difference(kind, seed, name)
            done += 1
            if message is not None:
                found += 1
                command = f"python -m tools.fuzz --backend {name} --kind {kind} --only {seed}"
                print(f"{command}  # {message}", flush=True)
    print(f"{done} cases, {found} differences")
    return 1 if found or not done else 0


if __name__ == "__main__":
    sys.exit(main())
