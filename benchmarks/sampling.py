"""Samplers from noise to tokens: masked ancestral, and LLaDA's confidence behind a prompt."""

from __future__ import annotations

import dataclasses
import itertools
import math
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from di4c_fast import backends
from di4c_fast.samplers import sample_confidence, sample_masked
from di4c_fast.testing import assert_draws_match

from . import baselines
from .floors import Work
from .groups import Check, Group, Noise, Variant, library
from .models import TiedModel, Transformer
from .parts import parts_of

LAW_STEPS, LAW_ROWS = 3, 6000
# Of what is chosen, relative to the largest logit. Two choices are compared, each with the rounding
# of a logit and of a logsumexp: 4 units of roundoff (2^-8, 2^-11). In fp32 sums over C weigh more.
LIMITS = {"fp32": 1e-5, "bf16": 2.0**-6, "fp16": 2.0**-9}


@dataclasses.dataclass
class Inputs:
    model: Any
    prompt: Tensor | None = None  # (B, P)


class SamplerGroup(Group):
    """Sample whole rows of tokens with a model."""

    rule: str
    copies = MappingProxyType({"naive": 5.0})

    def variants(self) -> list[Variant]:
        return [
            Variant("naive", f"naive loop: {self.rule}"),
            Variant("naive-compiled", "torch.compile of a step of the naive loop"),
            *library(),
        ]

    @property
    def mask_id(self) -> int:
        return self.case.vocabulary - 1

    def details(self, name: str, inputs: Inputs) -> dict[str, float]:
        named = [(inputs.model, "hidden", "model without head")]
        return parts_of(lambda: self.call(name, inputs), named, self.case.device)


# Ancestral ---------------------------------------------------------------------------------------


class AncestralGroup(SamplerGroup):
    """Masked ancestral sampling with a transformer."""

    rule = "full logits, softmax, noise for each token"

    def make_inputs(self, seed: int) -> Inputs:
        case = self.case
        torch.manual_seed(seed)
        with torch.device(case.device):
            model = Transformer(case.vocabulary, case.positions, case.width, case.layers)
        return Inputs(model.to(case.torch_dtype).eval())

    def input_bytes(self) -> int:
        return self.case.model_bytes

    def call(self, name: str, inputs: Inputs) -> Tensor:
        self.calls += 1
        sizes = (self.case.batch, self.case.positions)
        return self.sampled(name, inputs.model, sizes, self.mask_id, self.case.steps, self.calls)

    def sampled(
        self, name: str, model: Any, shape: tuple[int, int], mask_id: int, steps: int, seed: int
    ) -> Tensor:
        options: dict[str, Any] = {"mask_id": mask_id, "steps": steps, "device": self.case.device}
        if name.startswith("naive"):
            torch.manual_seed(seed)
            call = self.compiled(name, baselines.ancestral_call)
            return baselines.ancestral_sample(model, shape, call=call, **options)
        with backends.preferred(name):  # samplers take the best otherwise
            return sample_masked(getattr(model, "as_head", model), shape, seed=seed, **options)

    def truth(self, inputs: Inputs) -> tuple[PairModel, Tensor]:
        model = PairModel(self.case.device)
        return model, model.law(LAW_STEPS)

    def check(self, name: str, inputs: Inputs, truth: tuple[PairModel, Tensor]) -> Check:
        """Finished rows here, and on a model of two positions the exact law of the pair."""
        tokens = self.call(name, inputs)
        if bool(((tokens < 0) | (tokens >= self.mask_id)).any()):
            return Check("a position is still masked or out of range")
        model, law = truth
        pairs = self.sampled(name, model, (LAW_ROWS, 2), PairModel.mask_id, LAW_STEPS, seed=1)
        try:
            assert_draws_match(pairs[:, 0] * PairModel.mask_id + pairs[:, 1], law, name=name)
        except AssertionError as failure:
            return Check(str(failure))
        return Check(None)


class PairModel:
    """Two positions and three tokens; each token's logits depend on the other position."""

    mask_id = 3

    def __init__(self, device: str):
        generator = torch.Generator().manual_seed(5)
        # [position, token at the other position, logit]
        self.table = (torch.randn(2, 4, 4, generator=generator) * 1.5).to(device)

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        return torch.stack([self.table[0, tokens[:, 1]], self.table[1, tokens[:, 0]]], dim=1)

    def law(self, steps: int, t_min: float = 1e-5) -> Tensor:
        """The exact law of the ancestral loop over the 9 pairs, by following all 16 states."""
        probs = self.table.cpu().double()[..., :3].softmax(-1)  # [position, other, token]
        times = torch.linspace(1.0, t_min, steps + 1, dtype=torch.float64)
        moves = [(probs, float((t - s) / t)) for t, s in itertools.pairwise(times)]
        moves.append((F.one_hot(probs.argmax(-1), 3).double(), 1.0))
        states = torch.zeros(4, 4, dtype=torch.float64)
        states[3, 3] = 1.0
        for fill, unmask in moves:
            # [position, other, own, own at the next step]; a token that is known stays
            step = torch.eye(4, dtype=torch.float64).repeat(2, 4, 1, 1)
            step[:, :, 3] = torch.cat([fill * unmask, fill.new_full((2, 4, 1), 1 - unmask)], -1)
            states = torch.einsum("ab,bac,abd->cd", states, step[0], step[1])
        return states[:3, :3].flatten()


# Confidence --------------------------------------------------------------------------------------


class ConfidenceGroup(SamplerGroup):
    """Fill the masked part of whole rows of tokens, at temperature 0, behind a prompt."""

    rule = "logits of all positions, softmax, top-k"

    def counts(self) -> list[int]:
        """How many positions of each sequence every step fills."""
        share, rest = divmod(self.case.active_positions, self.case.steps)
        return [share + (step < rest) for step in range(self.case.steps)]

    def make_inputs(self, seed: int) -> Inputs:
        case, noise = self.case, Noise(self.case, seed)
        scale = 2.0 / math.sqrt(case.width)
        weight = noise.normal(case.vocabulary, case.width, scale=scale)
        model = TiedModel(weight, noise.normal(case.positions, case.width))
        return Inputs(model, noise.tokens(case.batch, case.positions - case.active_positions))

    def input_bytes(self) -> int:
        case = self.case
        return case.torch_dtype.itemsize * case.width * (case.positions + case.vocabulary)

    def call(self, name: str, inputs: Inputs, history: list[Tensor] | None = None) -> Tensor:
        case, model = self.case, inputs.model
        options: dict[str, Any] = {"mask_id": self.mask_id, "history": history}
        if name.startswith("naive"):
            options |= {"call": self.compiled(name, baselines.confidence_call)}
            return baselines.confidence_sample(
                model, self.start(inputs), counts=self.counts(), **options
            )
        shape = (case.batch, case.positions)
        options |= {"prompt": inputs.prompt, "steps": case.steps, "seed": 0}
        with backends.preferred(name):  # samplers take the best otherwise
            return sample_confidence(model.as_head, shape, **options)

    def start(self, inputs: Inputs) -> Tensor:
        assert inputs.prompt is not None
        return F.pad(inputs.prompt, (0, self.case.active_positions), value=self.mask_id)

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

    def check(self, name: str, inputs: Inputs, truth: None) -> Check:
        """Every step: the number of positions, their tokens and their order.

        Logits of different tokens round to the same number, and the order among them is nobody's
        mistake. So the logit of a chosen token may be less than the largest of its position, and
        the confidence of a chosen position less than that of one left masked, by the limit times
        the largest logit.
        """
        limit, counts, worst = LIMITS[self.case.dtype], self.counts(), 0.0
        history: list[Tensor] = []
        tokens = self.call(name, inputs, history)
        if len(history) != len(counts) + 1 or not torch.equal(history[0], self.start(inputs)):
            return Check(f"{len(history) - 1} steps from the prompt, {len(counts)} expected")
        if not torch.equal(history[-1], tokens):
            return Check("the tokens are not those after the last step")
        for step, (before, after) in enumerate(itertools.pairwise(history)):
            number = f"step {step + 1}"
            filled, masked = before != after, self.candidates(before)
            if bool((filled & ~masked).any()):
                return Check(f"{number} changes a token that was known, or of another block")
            if bool(((after < 0) | (after > self.mask_id)).any()):
                return Check(f"{number} gives a token out of range")
            numbers = sorted(set(filled.sum(1).tolist()))
            if numbers != [counts[step]]:
                return Check(f"{number} fills {numbers} positions, not {counts[step]}")
            logits = self.exact(inputs.model, before)  # (candidates, V - 1)
            top, scale = logits.amax(-1), logits.amax(-1).abs().max().clamp_min(1.0)
            own = logits.gather(-1, after[masked].clamp_max(self.mask_id - 1)[:, None])[:, 0]
            confidence = logits.new_full(before.shape, -torch.inf)
            confidence[masked] = top - logits.logsumexp(-1)
            left = confidence.masked_fill(filled, -torch.inf).amax(1)
            taken = confidence.masked_fill(~filled, torch.inf).amin(1)
            for lost, what in (
                ((top - own)[filled[masked]], "a token is {:.1e} below the argmax"),
                (left - taken, "a position left masked is {:.1e} more confident"),
            ):
                worst = max(worst, most := float((lost / scale).max()))
                if not most <= limit:
                    return Check(f"{number}: {what.format(most)}", worst)
        return Check(None, worst)

    def candidates(self, before: Tensor) -> Tensor:
        """(B, D) bool, the positions that a step chooses from."""
        return before == self.mask_id

    def exact(self, model: Any, tokens: Tensor) -> Tensor:
        """Float64 logits of the masked positions, without the mask's."""
        hidden = model.hidden(tokens)[tokens == self.mask_id].double()
        return hidden @ model.weight[: self.mask_id].double().T
