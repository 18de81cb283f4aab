"""One token per row of logits: all ways to draw it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from di4c_fast import LinearHead
from di4c_fast.draw.api import Draw, sample
from di4c_fast.testing import assert_draws_match

from . import baselines
from .floors import Work, draw_floor
from .groups import Check, Group, Variant

MULTINOMIAL = Variant("multinomial", "softmax, torch.multinomial, gather")
GUMBEL_32 = Variant("gumbel-fp32", "Gumbel noise in fp32")
GUMBEL_64 = Variant("gumbel-fp64", "Gumbel noise in fp64")
GUMBEL_COMPILED = Variant("gumbel-fp32-compiled", "torch.compile of Gumbel noise in fp32")
FLASHINFER = Variant("flashinfer", "FlashInfer sampling_from_logits (token alone)")
STREAMING = Variant("torch", "di4c_fast torch", library=True)
STREAMING_ALL = Variant("torch-all", "di4c_fast torch, with argmax and entropy", library=True)
CPU = Variant("cpu", "di4c_fast cpu", library=True)
CPU_ALL = Variant("cpu-all", "di4c_fast cpu, with argmax and entropy", library=True)
TRITON = Variant("triton", "di4c_fast triton", library=True)
TRITON_ALL = Variant("triton-all", "di4c_fast triton, with argmax and entropy", library=True)
VARIANTS = [
    MULTINOMIAL,
    GUMBEL_32,
    GUMBEL_64,
    GUMBEL_COMPILED,
    FLASHINFER,
    STREAMING,
    STREAMING_ALL,
    CPU,
    CPU_ALL,
    TRITON,
    TRITON_ALL,
]
# Of log-probabilities; a linear head in half precision rounds its logits first.
LIMITS = {
    "logits": {"fp32": 1e-5, "bf16": 1e-5, "fp16": 1e-5},
    "linear": {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3},
}
BINS = 24
# fp32 copies of the logits at the worst moment.
COPIES = {"multinomial": 2.0, "gumbel-fp32": 4.0, "gumbel-fp64": 8.0, "flashinfer": 2.0}


@dataclasses.dataclass
class Inputs:
    head: Any  # Tensor (R, V) or LinearHead
    seed: int = 0

    def logits(self) -> Tensor:
        return self.head.logits() if isinstance(self.head, LinearHead) else self.head


@dataclasses.dataclass
class Truth:
    log_prob: Tensor  # (R', V) float64 of the first rows
    same: Inputs  # every row the same distribution
    probs: Tensor  # (V,) of that distribution, float64, on the CPU


class DrawGroup(Group):
    """Draw one token per row, with its log-probability."""

    def __init__(self, case: Any):
        super().__init__(case)
        self.compiled: Callable[..., Any] | None = None
        self.calls = 0

    def variants(self) -> list[Variant]:
        return VARIANTS

    def unavailable(self, name: str) -> str | None:
        return super().unavailable(name.removesuffix("-all"))

    def reset(self) -> None:
        super().reset()
        self.compiled = None

    def make_inputs(self, seed: int) -> Inputs:
        case = self.case
        device, dtype = torch.device(case.device), case.torch_dtype
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

        if case.head == "logits":
            return Inputs(normal(case.positions, case.vocabulary).mul_(2.0), seed)
        weight = normal(case.vocabulary, case.width).mul_(2.0 / math.sqrt(case.width))
        return Inputs(LinearHead(normal(case.positions, case.width), weight), seed)

    def input_bytes(self) -> int:
        case = self.case
        if case.head == "logits":
            return case.logits_bytes
        return case.torch_dtype.itemsize * case.width * (case.positions + case.vocabulary)

    def call_bytes(self, name: str) -> int:
        copies = COPIES.get(name.removesuffix("-compiled"), 0.5)
        logits = self.case.positions * self.case.vocabulary * 4
        head = 1 << 29 if self.case.head == "linear" else 0
        return int(copies * logits) + head

    def call(self, name: str, inputs: Inputs) -> Any:
        self.calls += 1
        if name in ("torch", "torch-all", "cpu", "cpu-all", "triton", "triton-all"):
            return self.draw(name, inputs, self.calls)
        with torch.no_grad():
            logits = inputs.logits()
            if name == "multinomial":
                return baselines.multinomial_draw(logits)
            if name == "gumbel-fp32":
                return baselines.gumbel_draw(logits, torch.float32)
            if name == "gumbel-fp64":
                return baselines.gumbel_draw(logits, torch.float64)
            if name == "gumbel-fp32-compiled":
                if self.compiled is None:
                    self.compiled = torch.compile(baselines.gumbel_draw, dynamic=False)
                return self.compiled(logits, torch.float32)
            import flashinfer

            return flashinfer.sampling.sampling_from_logits(logits.float()), None

    def draw(self, name: str, inputs: Inputs, step: int) -> Draw:
        """A draw of this library; the same step gives the same tokens."""
        want = ("log_prob", "argmax", "entropy") if name.endswith("-all") else ("log_prob",)
        backend = name.removesuffix("-all")
        return sample(inputs.head, seed=inputs.seed, step=step, want=want, backend=backend)

    # Checks --------------------------------------------------------------------------------------

    def truth(self, inputs: Inputs) -> Truth:
        rows = min(self.case.positions, 64)
        if isinstance(inputs.head, LinearHead):
            hidden, weight = inputs.head.hidden, inputs.head.weight
            wide = hidden[:rows].double() @ weight.double().T
            same: Any = LinearHead(hidden[:1].expand_as(hidden), weight)
            row = wide[0]
        else:
            wide = inputs.head[:rows].double()
            same = inputs.head[:1].expand_as(inputs.head).contiguous()
            row = wide[0]
        return Truth(wide.log_softmax(-1), Inputs(same, inputs.seed + 1), row.softmax(-1).cpu())

    def check(self, name: str, inputs: Inputs, truth: Truth) -> Check:
        token, log_prob = _unpack(self.call(name, inputs))
        rows = truth.log_prob.shape[0]
        limit = LIMITS[self.case.head][self.case.dtype]
        error = None
        if bool(((token < 0) | (token >= self.case.vocabulary)).any()):
            return Check("a token is out of range", limit=limit)
        if log_prob is not None:
            expected = truth.log_prob.gather(-1, token[:rows, None]).squeeze(-1)
            difference = (log_prob[:rows].double() - expected).abs() / expected.abs().clamp_min(1)
            error = float(difference.max())
            if not error <= limit:
                problem = f"log-probabilities are off by {error:.1e}, at most {limit:.0e} allowed"
                return Check(problem, error, limit=limit)
        token, _ = _unpack(self.call(name, truth.same))
        bins, probs = _bins(truth.probs, min(BINS, self.case.positions // 16))
        try:
            assert_draws_match(bins[token.cpu()], probs, name=name)
        except AssertionError as failure:
            return Check(str(failure), error, limit=limit)
        return Check(None, error, limit=limit)

    def work(self) -> Work | None:
        return draw_floor(self.case)


def _unpack(result: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(result, Draw):
        return result.token, result.log_prob
    token, log_prob = result
    return token.long(), log_prob


def _bins(probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens in bins of about equal probability, most probable first: (V,), and (count,)."""
    order = probs.argsort(descending=True)
    cumulative = probs[order].cumsum(0)
    number = (cumulative * count).long().clamp_max(count - 1)
    bins = torch.empty_like(number)
    bins[order] = number
    return bins, torch.zeros(count, dtype=probs.dtype).index_add(0, bins, probs)
