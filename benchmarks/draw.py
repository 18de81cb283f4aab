"""One token per row of logits: all ways to draw it."""

from __future__ import annotations

import functools
import math
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from di4c_fast import Draw, LinearHead, sample
from di4c_fast.testing import assert_draws_match

from . import baselines
from .floors import Work, draw_floor
from .groups import BACKENDS, Check, Group, Noise, Variant, library

MULTINOMIAL = Variant("multinomial", "softmax, torch.multinomial")
VARIANTS = [
    MULTINOMIAL,
    Variant("gumbel-fp32", "Gumbel noise in fp32"),
    Variant("gumbel-fp32-compiled", "torch.compile of Gumbel noise in fp32"),
    Variant("gumbel-fp64", "Gumbel noise in fp64"),
    Variant("flashinfer", "FlashInfer sampling_from_logits"),
    *library("", ", token alone"),
    *library("-all", ", everything"),
]
WANT = ("log_prob", "logsumexp", "argmax", "max_log_prob", "entropy", "margin")
# Of log-probabilities; a linear head in half precision rounds its logits first.
LIMITS = {
    "logits": {"fp32": 1e-5, "bf16": 1e-5, "fp16": 1e-5},
    "linear": {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3},
}
BINS = 24


class Inputs(NamedTuple):
    head: Any  # Tensor (R, V) or LinearHead
    seed: int = 0


class Truth(NamedTuple):
    log_prob: Tensor  # (R', V) float64 of the first rows
    same: Inputs  # every row the same distribution
    probs: Tensor  # (V,) of that distribution, float64, on the CPU


class DrawGroup(Group):
    """Draw one token per row; "-all" with its log-probability and the statistics of the row."""

    copies = MappingProxyType(
        {"multinomial": 2.0, "gumbel-fp32": 4.0, "gumbel-fp64": 8.0, "flashinfer": 2.0}
    )

    def variants(self) -> list[Variant]:
        if self.case.note:
            return [MULTINOMIAL, *library("", ", token alone")]
        others = self.case.shape != "rows"  # Gumbel noise at one shape is enough
        return [v for v in VARIANTS if not (others and v.name.startswith("gumbel"))]

    def make_inputs(self, seed: int) -> Inputs:
        case, normal = self.case, Noise(self.case, seed).normal
        if case.head == "logits":
            return Inputs(normal(case.positions, case.vocabulary, scale=2.0), seed)
        weight = normal(case.vocabulary, case.width, scale=2.0 / math.sqrt(case.width))
        return Inputs(LinearHead(normal(case.positions, case.width), weight), seed)

    def input_bytes(self) -> int:
        case = self.case
        if case.head == "logits":
            return case.logits_bytes
        return case.torch_dtype.itemsize * case.width * (case.positions + case.vocabulary)

    def call(self, name: str, inputs: Inputs) -> Draw:
        self.calls += 1
        if name.split("-")[0] in BACKENDS:
            return self.draw(name, inputs, self.calls)
        with torch.no_grad():
            head = inputs.head
            logits = head.logits() if isinstance(head, LinearHead) else head
            if name == "flashinfer":
                import flashinfer

                return Draw(flashinfer.sampling.sampling_from_logits(logits.float()).long())
            plain = baselines.multinomial_draw
            if name.startswith("gumbel"):
                dtype = torch.float64 if "fp64" in name else torch.float32
                plain = functools.partial(baselines.gumbel_draw, dtype=dtype)
            return Draw(self.compiled(name, plain)(logits))

    def draw(self, name: str, inputs: Inputs, step: int) -> Draw:
        """A draw of this library; the same step gives the same tokens."""
        backend = name.removesuffix("-all")
        want = WANT if backend != name else ()
        return sample(inputs.head, seed=inputs.seed, step=step, want=want, backend=backend)

    # Checks --------------------------------------------------------------------------------------

    def truth(self, inputs: Inputs) -> Truth:
        head = inputs.head
        if isinstance(head, LinearHead):
            wide = head.hidden[:64].double() @ head.weight.double().T
            same: Any = LinearHead(head.hidden[:1].expand_as(head.hidden), head.weight)
        else:
            wide = head[:64].double()
            same = head[:1].expand_as(head).contiguous()
        return Truth(wide.log_softmax(-1), Inputs(same, inputs.seed + 1), wide[0].softmax(-1).cpu())

    def check(self, name: str, inputs: Inputs, truth: Truth) -> Check:
        """The exact distribution of rows that are all the same, and the log-probabilities."""
        found = self.call(name, inputs)
        token, error = found.token, None
        if bool(((token < 0) | (token >= self.case.vocabulary)).any()):
            return Check("a token is out of range")
        if found.log_prob is not None:
            rows = len(truth.log_prob)
            expected = truth.log_prob.gather(-1, token[:rows, None]).squeeze(-1)
            difference = (found.log_prob[:rows] - expected).abs() / expected.abs().clamp_min(1)
            error, limit = float(difference.max()), LIMITS[self.case.head][self.case.dtype]
            if not error <= limit:
                problem = f"log-probabilities are off by {error:.1e}, at most {limit:.0e} allowed"
                return Check(problem, error)
        token = self.call(name, truth.same).token
        bins, probs = _bins(truth.probs, min(BINS, self.case.positions // 16))
        try:
            assert_draws_match(bins[token.cpu()], probs, name=name)
        except AssertionError as failure:
            return Check(str(failure), error)
        return Check(None, error)

    def work(self) -> Work | None:
        return draw_floor(self.case)


def _bins(probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens in bins of about equal probability, most probable first: (V,), and (count,)."""
    order = probs.argsort(descending=True)
    cumulative = probs[order].cumsum(0)
    number = (cumulative * count).long().clamp_max(count - 1)
    bins = torch.empty_like(number)
    bins[order] = number
    return bins, torch.zeros(count, dtype=probs.dtype).index_add(0, bins, probs)
