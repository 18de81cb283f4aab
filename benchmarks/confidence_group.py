"""Confidence sampling behind a prompt (LLaDA's rule): the head of a large language model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from di4c_fast import LinearHead
from di4c_fast.samplers import sample_confidence

from . import baselines
from .floors import Work
from .groups import Check, Group, Variant

NAIVE = Variant("naive", "naive loop: logits of all positions, softmax, top-k")
LIBRARY = Variant("di4c-fast", "di4c_fast.sample_confidence", library=True)
# Of what is chosen, relative to the largest logit. Two choices are compared, each with the rounding
# of a logit and of a logsumexp: 4 units of roundoff (2^-8, 2^-11). In fp32 sums over C weigh more.
LIMITS = {"fp32": 1e-5, "bf16": 2.0**-6, "fp16": 2.0**-9}
WEIGHT_BLOCK = 4096  # rows of the weight that are float64 at a time


@dataclasses.dataclass
class Inputs:
    model: ToyModel
    prompt: Tensor  # (B, P)


@dataclasses.dataclass
class Exact:
    """What float64 logits say of every masked position; elsewhere best = 0 and the rest -inf."""

    best: Tensor  # (B, D), the token of the largest logit
    top: Tensor  # (B, D), that logit
    log_prob: Tensor  # (B, D), the logarithm of its probability


class ConfidenceGroup(Group):
    """Fill the masked part of whole rows of tokens, at temperature 0."""

    def variants(self) -> list[Variant]:
        return [NAIVE, LIBRARY]

    @property
    def mask_id(self) -> int:
        return self.case.vocabulary - 1

    def counts(self) -> list[int]:
        """How many positions of each sequence every step fills."""
        share, rest = divmod(self.case.active_positions, self.case.steps)
        return [share + (step < rest) for step in range(self.case.steps)]

    def make_inputs(self, seed: int) -> Inputs:
        case = self.case
        generator = torch.Generator(case.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(
                *shape, generator=generator, device=case.device, dtype=case.torch_dtype
            )

        weight = normal(case.vocabulary, case.width).mul_(2.0 / math.sqrt(case.width))
        model = ToyModel(weight, normal(case.positions, case.width))
        size = (case.batch, case.positions - case.active_positions)
        prompt = torch.randint(self.mask_id, size, generator=generator, device=case.device)
        return Inputs(model, prompt)

    def input_bytes(self) -> int:
        case = self.case
        return case.torch_dtype.itemsize * case.width * (case.positions + case.vocabulary)

    def call_bytes(self, name: str) -> int:
        case = self.case
        hidden = 8 * case.batch * case.positions * case.width * case.torch_dtype.itemsize
        if name == "naive":
            return hidden + int(2.2 * case.logits_bytes)
        # A chunk of the head's logits, twice, or those of all masked positions.
        return hidden + min(8 * case.batch * case.active_positions * case.vocabulary, 1 << 28)

    def call(self, name: str, inputs: Inputs) -> Tensor:
        return self.sampled(name, inputs, None)

    def sampled(self, name: str, inputs: Inputs, history: list[Tensor] | None) -> Tensor:
        case, model = self.case, inputs.model
        options: dict[str, Any] = {"mask_id": self.mask_id, "steps": case.steps}
        if name == "naive":
            return baselines.confidence_sample(
                model, inputs.prompt, positions=case.positions, history=history, **options
            )
        return sample_confidence(
            model.as_head,
            (case.batch, case.positions),
            prompt=inputs.prompt,
            seed=0,
            history=history,
            **options,
        )

    def work(self) -> Work:
        """The product of the positions that are still masked, the weight read at each step."""
        case = self.case
        left = [case.active_positions - done for done in itertools.accumulate([0, *self.counts()])]
        rows = case.batch * sum(left[:-1])
        weight = case.vocabulary * case.width
        return Work(
            case.torch_dtype.itemsize * (case.steps * weight + rows * case.width),
            2 * rows * weight,
        )

    # Checks --------------------------------------------------------------------------------------

    def truth(self, inputs: Inputs) -> Tensor | None:
        """The tokens by the rule from float64 logits; None in half precision.

        There logits of different tokens round to the same number, and the order among them is
        nobody's mistake: `check` holds every choice against float64 within a limit instead.
        """
        if self.case.dtype != "fp32":
            return None
        tokens = self.start(inputs)
        for count in self.counts():
            exact = self.exact(inputs.model, tokens)
            chosen = exact.log_prob.topk(count, dim=-1).indices
            tokens = tokens.scatter(-1, chosen, exact.best.gather(-1, chosen))
        return tokens

    def check(self, name: str, inputs: Inputs, truth: Tensor | None) -> Check:
        """Every step: the number of positions, their tokens and their order; in fp32 all tokens."""
        limit = LIMITS[self.case.dtype]
        history: list[Tensor] = []
        tokens = self.sampled(name, inputs, history)
        problem, worst = self.follow(inputs, history, tokens, limit)
        if truth is None:
            return Check(problem, worst, limit=limit)
        if problem is None and not torch.equal(tokens, truth):
            wrong = int((tokens != truth).sum())
            problem = f"{wrong} of {truth.numel()} tokens are not those of float64 logits"
        return Check(problem)

    def follow(
        self, inputs: Inputs, history: list[Tensor], tokens: Tensor, limit: float
    ) -> tuple[str | None, float]:
        """What is wrong with the steps that a variant took, if anything, and its worst choice.

        The logit of a chosen token may be less than the largest of its position, and the
        confidence of a chosen position less than that of one left masked, by `limit` times the
        largest logit.
        """
        counts, worst = self.counts(), 0.0
        if len(history) != len(counts) + 1 or not torch.equal(history[0], self.start(inputs)):
            return f"{len(history) - 1} steps from the prompt, {len(counts)} expected", worst
        if not torch.equal(history[-1], tokens):
            return "the tokens are not those after the last step", worst
        for step, (before, after) in enumerate(itertools.pairwise(history)):
            filled, masked = before != after, before == self.mask_id
            if bool((filled & ~masked).any()):
                return f"step {step + 1} changes a token that was known", worst
            if bool(((after < 0) | (after > self.mask_id)).any()):
                return f"step {step + 1} gives a token out of range", worst
            numbers = sorted(set(filled.sum(1).tolist()))
            if numbers != [counts[step]]:
                return f"step {step + 1} fills {numbers} positions, not {counts[step]}", worst
            exact = self.exact(inputs.model, before)
            scale = exact.top[masked].abs().max().clamp_min(1.0)
            own = self.logits_at(inputs.model, before, filled, after[filled])
            lost = float(((exact.top[filled] - own) / scale).max())
            worst = max(worst, lost)
            if not lost <= limit:
                return f"step {step + 1}: a token is {lost:.1e} below the argmax", worst
            left = exact.log_prob.masked_fill(filled, -torch.inf).amax(1)
            taken = exact.log_prob.masked_fill(~filled, torch.inf).amin(1)
            lost = float(((left - taken) / scale).max())
            worst = max(worst, lost)
            if not lost <= limit:
                return (
                    f"step {step + 1}: a position left masked is {lost:.1e} more confident",
                    worst,
                )
        return None, worst

    def start(self, inputs: Inputs) -> Tensor:
        active = self.case.active_positions
        return F.pad(inputs.prompt, (0, active), value=self.mask_id)

    def exact(self, model: ToyModel, tokens: Tensor) -> Exact:
        """The choices of one step, from float64 products of the model's hidden states."""
        masked = tokens == self.mask_id
        hidden = model.hidden(tokens)[masked].double()
        rows = len(hidden)
        top = hidden.new_full((rows,), -torch.inf)
        best = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
        total = top.clone()
        for first in range(0, self.mask_id, WEIGHT_BLOCK):
            block = model.weight[first : min(first + WEIGHT_BLOCK, self.mask_id)]
            logits = hidden @ block.double().T
            value, place = logits.max(-1)
            best = torch.where(value > top, place + first, best)
            top = torch.maximum(top, value)
            total = torch.logaddexp(total, logits.logsumexp(-1))
        dense = torch.full(tokens.shape, -torch.inf, dtype=torch.float64, device=tokens.device)
        return Exact(
            torch.zeros_like(tokens).masked_scatter(masked, best),
            dense.masked_scatter(masked, top),
            dense.masked_scatter(masked, top - total),
        )

    def logits_at(self, model: ToyModel, tokens: Tensor, rows: Tensor, at: Tensor) -> Tensor:
        """One float64 logit for each of the chosen rows."""
        return (model.hidden(tokens)[rows].double() * model.weight[at].double()).sum(-1)


class ToyModel:
    """(tokens (B, D), t (B,)) -> logits (B, D, V): embeddings tied to the head, and no layers.

    A position sees its own token, its neighbours and its place, so that what a step fills changes
    what comes after it. The head is all that costs. `as_head` is a `LinearHead` of the same
    numbers.
    """

    def __init__(self, weight: Tensor, place: Tensor):
        self.weight = weight  # (V, C), entries of size 2 / sqrt(C)
        self.place = place  # (D, C), entries of size 1

    def hidden(self, tokens: Tensor) -> Tensor:
        # With the channels turned by one, no token predicts itself or its neighbours.
        x = F.layer_norm(self.weight[tokens], self.weight.shape[1:]).roll(1, -1)
        x = x + x.roll(1, 1) + x.roll(-1, 1) + self.place
        return F.layer_norm(x, self.weight.shape[1:])

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.weight)

    def as_head(self, tokens: Tensor, t: Tensor) -> LinearHead:
        return LinearHead(self.hidden(tokens), self.weight)
