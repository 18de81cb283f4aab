"""Random problems on every backend, compared with the reference: a search for differences.

    python -m tools.fuzz --backend torch --kind loss --cases 5000 --seed 0 --minutes 5

Kinds: loss, mixture_log_prob, correlation (values, terms and all gradients), sample (tokens and
statistics), samplers (whole sequences). A case is a function of its number and kind; those of
triton, which runs here in its interpreter (TRITON_INTERPRET=1 in the environment), are smaller.
Each difference that rounding does not explain is one line with the command that repeats it
(`--only NUMBER`), and the exit code is 1.

Numbers of the loss are judged as in the tests: the largest error against the reference in float64
is at most twice that of the reference in the same dtype, plus a few roundings of the largest sum
over positions. The same dtype may be lucky, so where that does not do, it may also be twice what
the truth itself changes by if every log-probability (and every logit that a head has to compute)
moves by one rounding. Tokens must be equal, except where such moved logits draw others, too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from di4c_fast import (
    Head,
    LinearHead,
    backends,
    correlation,
    loss,
    mixture_log_prob,
    sample,
    samplers,
)
from di4c_fast.draw import driver
from di4c_fast.draw.request import SampleRequest
from di4c_fast.reference import draw as reference
from di4c_fast.testing import assert_close_to_reference

from .fuzz_cases import Case, Draws, loss_case, make_head, sample_case, sampler_case
from .own_head import Capped

BACKENDS = ("torch", "triton", "cpu")
# Rounding errors allowed per number that is added up, beside twice the reference's own.
ROUNDINGS = 4
MOVES = 8  # how often the truth is computed from moved logits
WEIGHTS = {
    "data_correlation": "data",
    "teacher_marginal": "teacher",
    "consistency_correlation": "consistency",
    "consistency_marginal": "consistency",
    "component": "component",
}


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# The loss and the likelihoods.


def moved(logits: Tensor, computed: bool, dtype: torch.dtype, draws: Draws) -> Tensor:
    """Logits whose log-probabilities moved by one rounding; `computed`: the logits as well."""
    work = torch.promote_types(dtype, torch.float32)
    exact = logits.detach().double()
    size = torch.finfo(work).eps * exact.log_softmax(-1).abs()
    if computed:
        size = size + torch.finfo(dtype).eps * exact.abs()
    return logits + (draws.normal(*logits.shape) * size).nan_to_num(0.0, 0.0, 0.0)


def run_loss(
    kind: str, case: Case, backend: str, dtype: torch.dtype | None, move: Draws | None = None
) -> dict[str, Tensor]:
    """Values, terms and gradients; with `dtype` all is computed in it, with `move` from moved
    logits."""

    def head(name: str) -> tuple[Any, dict[str, Tensor]]:
        recipe = case.get(name)
        if recipe is None:
            return None, {}
        leaves = {n: t.to(dtype or t.dtype).clone() for n, t in recipe["tensors"].items()}
        for number, leaf in enumerate(leaves.values()):
            leaf.requires_grad_(name == "student" and number != case["frozen"])
        # The gradient may go over logits that autograd has, not over a leaf.
        given = {n: t * 1 if recipe.get("in_place") else t for n, t in leaves.items()}
        made = make_head(recipe, given)
        if move is not None:
            dense = made.logits() if isinstance(made, Head) else made
            made = moved(dense, recipe["kind"] != "tensor", case["dtype"], move)
        return made, leaves

    work = dtype or torch.promote_types(case["dtype"], torch.float32)
    shared: Case = {n: v.to(work) if is_floating(v) else v for n, v in case["shared"].items()}
    student, leaves = head("student")
    if "log_weights" in shared:
        leaf = shared["log_weights"].clone().requires_grad_()
        leaves["log_weights"] = shared["log_weights"] = leaf
        if move is not None:
            eps = torch.finfo(torch.promote_types(case["dtype"], torch.float32)).eps
            shared["log_weights"] = leaf * (1 + eps * move.normal(*leaf.shape))
    found: dict[str, Tensor] = {}
    if kind == "loss":
        if backend != "reference" and "draw_seed" in case:
            shared["generator"] = torch.Generator().manual_seed(case["draw_seed"])
            del shared["consistency_x"]
        made = [head(name)[0] for name in ("teacher", "consistency")]
        shared |= {"consistency": made[1], "reduction": case["reduction"], "backend": backend}
        # The reference always gives the terms, which say how large things are.
        if case["terms"] or backend == "reference":
            value, terms = loss(student, made[0], case["x0"], return_terms=True, **shared)
            found |= terms._asdict()
        else:
            value = loss(student, made[0], case["x0"], **shared)
    else:
        function = {"mixture_log_prob": mixture_log_prob, "correlation": correlation}[kind]
        value = function(student, case["x"], backend=backend, **shared)
    found["value"] = value.detach()
    if value.requires_grad:
        upstream = case["upstream"].to(value.dtype)
        value.backward(upstream if value.ndim else upstream.new_tensor(-1.5))
        found |= {f"gradient of {n}": x.grad for n, x in leaves.items() if x.grad is not None}
    return found


def largest(*values: Any) -> float:
    """The largest finite absolute value, at least 1."""
    finite = [torch.as_tensor(v).detach().double().abs().nan_to_num(0, 0, 0) for v in values]
    return max([1.0, *(float(v.amax()) for v in finite if v.numel())])


def defined_examples(case: Case, found: dict[str, Tensor]) -> Tensor:
    """(B,) the examples whose gradient is defined: no term is NaN, none that counts infinite."""
    if "component" not in found:
        finite = found["value"].isfinite()
        return finite.all(-1) if finite.ndim == 2 else finite
    defined = torch.ones(len(case["upstream"]), dtype=torch.bool)
    for term, weight in WEIGHTS.items():
        left_out = torch.as_tensor(case["shared"][f"{weight}_weight"]) == 0
        defined &= found[term].isfinite() | (left_out & ~found[term].isnan())
    return defined


@functools.lru_cache(3)  # one case of each kind, for all backends
def loss_truth(kind: str, seed: int, small: bool) -> tuple[Case, dict[str, Tensor]]:
    case = loss_case(kind, seed, small)
    return case, run_loss(kind, case, "reference", torch.float64)


def check_loss(kind: str, seed: int, backend: str, small: bool) -> None:
    case, truth = loss_truth(kind, seed, small)
    ours = run_loss(kind, case, backend, None)
    expected = {n for n in truth if n in ours or n.startswith("gradient")}
    assert ours.keys() == expected, f"{sorted(ours)} instead of {sorted(expected)}"
    # What is added up: logarithms of V and N at every position, and the terms.
    _, components, positions, *_ = next(iter(case["student"]["tensors"].values())).shape
    size = positions * (1 + math.log(case["student"]["classes"]) + math.log(components))
    size += largest(*(v for n, v in truth.items() if not n.startswith("gradient")))
    weight = largest(*(w for n, w in case["shared"].items() if n.endswith("_weight")))
    examples = len(case["upstream"]) if case.get("reduction") == "sum" else 1
    shared = {"weight", "bias"}  # of all examples
    if case["student"]["layout"] == "expanded":
        shared |= case["student"]["tensors"].keys()

    def judge(eager: dict[str, Tensor], size: float, changes: dict[str, float]) -> None:
        defined = defined_examples(case, truth) & defined_examples(case, eager)
        for name, value in ours.items():
            mine, same, exact = value, eager[name], truth[name]
            atol = ROUNDINGS * torch.finfo(ours["value"].dtype).eps * size
            if name.startswith("gradient"):
                if name.split()[-1] not in shared:
                    mine, same, exact = mine[defined], same[defined], exact[defined]
                elif not bool(defined.all()):
                    continue
                atol *= weight * largest(case["upstream"])
                # And one rounding of the result to its dtype.
                atol += torch.finfo(value.dtype).eps * largest(exact)
            else:  # Probabilities that underflow in one dtype do not in the other.
                exact = torch.where(same.isfinite() == exact.isfinite(), exact, same.double())
                atol *= weight * examples if name == "value" else 1
            atol += 2 * changes.get(name, 0.0)
            assert_close_to_reference(mine, same, exact, atol=atol, name=name)

    with contextlib.suppress(AssertionError):  # most cases are close to the truth itself
        return judge(
            {n: v.to(ours[n].dtype if n in ours else v.dtype) for n, v in truth.items()}, size, {}
        )
    eager = run_loss(kind, case, "reference", None)
    with contextlib.suppress(AssertionError):
        return judge(eager, size, {})
    return judge(eager, size + joint_size(kind, case), changes_of_moved(kind, case, truth))


def joint_size(kind: str, case: Case) -> float:
    """How large the joint log-likelihoods are."""
    tensors = {n: t.double() for n, t in case["student"]["tensors"].items()}
    student, shared = make_head(case["student"], tensors), case["shared"]
    options = {n: shared[n] for n in ("xt", "valid", "mask_id", "log_weights") if n in shared}
    rows = [case["x"]] if kind != "loss" else [case["x0"], shared.get("consistency_x")]
    return largest(
        *(
            mixture_log_prob(student, x, backend="reference", **options)
            for x in rows
            if x is not None
        )
    )


def changes_of_moved(kind: str, case: Case, truth: dict[str, Tensor]) -> dict[str, float]:
    """How much the truth changes at most where all logits move by one rounding."""
    changes = dict.fromkeys(truth, 0.0)
    for number in range(MOVES):
        found = run_loss(kind, case, "reference", torch.float64, Draws(number))
        for name, value in found.items():
            change = (value - truth[name]).abs().nan_to_num(0.0, 0.0, 0.0)
            changes[name] = max([changes[name], *change.flatten().tolist()])
    return changes


# Draws.


def same_rows(one: Any, other: Any, size: float) -> Tensor:
    """Which rows of two draws agree; statistics within the rounding of a few hundred operations."""
    agree = one.token == other.token
    for value, expected in zip(one, other, strict=True):
        if value is None:
            continue
        if value.dtype != torch.int64:
            eps = torch.finfo(value.dtype).eps
            close = torch.isclose(
                value.double(),
                expected.double(),
                rtol=64 * eps,
                atol=24 * eps * size,
                equal_nan=True,
            )
            agree &= close
        else:
            agree &= value == expected
    return agree


def run_sample(logits: Tensor | Head, backend: str, arguments: Case) -> Any:
    try:
        return sample(logits, backend=backend, **arguments)
    except ValueError as error:  # rows that nothing can be drawn from
        return str(error)


@functools.lru_cache(1)
def sample_truth(seed: int, small: bool) -> tuple[Tensor | Head, Tensor, Case, Any]:
    recipe, arguments = sample_case(seed, small)
    head = make_head(recipe, recipe["tensors"])
    dense = head.logits() if isinstance(head, Head) else head
    return head, dense, arguments, run_sample(dense, "reference", arguments)


def check_sample(kind: str, seed: int, backend: str, small: bool) -> None:
    head, dense, arguments, truth = sample_truth(seed, small)
    ours = run_sample(head, backend, arguments)
    if isinstance(truth, str) or isinstance(ours, str):
        assert ours == truth, f"{ours!r} instead of {truth!r}"
        return
    assert [v is None for v in ours] == [v is None for v in truth]
    # Guidance and temperature multiply the logits and with them their rounding.
    size = largest(*(v for v in truth if is_floating(v))) * (8 if "guidance" in arguments else 1)
    wrong = ~same_rows(ours, truth, size)
    work = torch.promote_types(dense.dtype, torch.float32)
    for number in range(MOVES):
        if not bool(wrong.any()):
            return
        # Half precision cannot hold the change; its values are computed with in fp32.
        noise = (Draws(number).normal(*dense.shape) * torch.finfo(work).eps).to(work)
        changed = run_sample(dense.to(work) * (1 + noise) + noise, "reference", arguments)
        wrong &= same_rows(changed, truth, size)
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        fields = [
            f"{n} {v[tuple(at)].item():.9g} != {t[tuple(at)].item():.9g}"
            for (n, v), t in zip(ours._asdict().items(), truth, strict=True)
            if v is not None and v[tuple(at)] != t[tuple(at)]
        ]
        raise AssertionError(f"{int(wrong.sum())} rows differ; row {at}: {', '.join(fields)}")


# Samplers.


@contextlib.contextmanager
def drawn_by(backend: str) -> Iterator[None]:
    """Samplers take the backend that is best here; make that one the given."""
    rows = driver.sample_rows

    def of_backend(request: SampleRequest, _: str) -> dict[str, Tensor]:
        return reference.sample_rows(request) if backend == "reference" else rows(request, backend)

    with mock.patch.object(driver, "sample_rows", of_backend):
        yield


def run_sampler(case: Case, backend: str, noise: float = 0.0) -> Tensor:
    """Sequences of a small model, whose head the reference draws from as dense logits."""
    table, weight = case["table"], case["weight"]
    place = torch.linspace(-1, 1, case["shape"][1]).view(-1, 1)

    def model(tokens: Tensor, t: Tensor, latent: Tensor | None = None) -> Tensor | Head:
        h = table[tokens] + table[tokens].roll(1, 1) + place + t.view(-1, 1, 1)
        if latent is not None:
            h = h + latent[:, :1, None] * place
        h = torch.tanh(h) * (1 + noise)
        head = Capped(h, weight) if case["form"] == "own" else LinearHead(h, weight)
        dense = backend == "reference" or case["form"] == "tensor"
        return head.logits() if dense else head

    with drawn_by(backend):
        return getattr(samplers, case["name"])(model, case["shape"], **case["options"])


@functools.lru_cache(1)
def sampler_truth(seed: int, small: bool) -> tuple[Case, Tensor]:
    case = sampler_case(seed, small)
    return case, run_sampler(case, "reference")


def check_samplers(kind: str, seed: int, backend: str, small: bool) -> None:
    """A head's sequences on a backend are those of the reference from its dense logits."""
    case, truth = sampler_truth(seed, small)
    ours = run_sampler(case, backend)
    # A near-tie shows by a change of the size of one rounding.
    near = (run_sampler(case, "reference", n * 1.2e-7) for n in (-3, -2, -1, 1, 2, 3))
    if ours.equal(truth) or any(not tokens.equal(truth) for tokens in near):
        return
    count = int((ours != truth).sum())
    raise AssertionError(
        f"{case['name']}, {case['form']}, {case['options']}: {count} tokens differ"
    )


CHECKS: dict[str, Callable[[str, int, str, bool], None]] = {
    "loss": check_loss,
    "mixture_log_prob": check_loss,
    "correlation": check_loss,
    "sample": check_sample,
    "samplers": check_samplers,
}


def difference(kind: str, seed: int, backend: str) -> str | None:
    """What differs in one case, in a line; None if nothing does."""
    try:
        CHECKS[kind](kind, seed, backend, backend == "triton")
    except Exception as error:  # a crash is a difference as well
        text = " ".join(str(error).split())
        return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"
    return None


@dataclasses.dataclass
class Tally:
    """What was done of a kind on a backend."""

    cases: int = 0
    found: int = 0
    seconds: float = 0.0

    def add(self, backend: str, kind: str, seed: int) -> None:
        start = time.monotonic()
        message = difference(kind, seed, backend)
        self.seconds += time.monotonic() - start
        self.cases += 1
        if message is not None:
            self.found += 1
            command = f"python -m tools.fuzz --backend {backend} --kind {kind} --only {seed}"
            print(f"{command}  # {message}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, help="default: all that run here")
    parser.add_argument("--kind", choices=CHECKS, help="default: all")
    parser.add_argument("--cases", type=int, default=1000, help="of each kind on each backend")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--minutes", type=float, default=5.0, help="at most, in all")
    parser.add_argument("--only", type=int, help="run this case alone")
    options = parser.parse_args(arguments)
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
    tally = {at: Tally() for at in wanted}
    with contextlib.suppress(KeyboardInterrupt):  # what was done is told all the same
        for seed in range(first, first + cases):
            if time.monotonic() > end:
                break
            for name, kind in wanted:
                tally[name, kind].add(name, kind, seed)
    for at, t in tally.items():
        rate = t.cases / max(t.seconds, 1e-9)
        print(f"{' '.join(at)}: {t.cases} cases, {t.found} differences, {rate:.1f} cases/s")
    found, done = (sum(getattr(t, n) for t in tally.values()) for n in ("found", "cases"))
    return 1 if found or not done else 0


if __name__ == "__main__":
    sys.exit(main())
