"""The step of a canvas sampler from logits to new tokens, as DiffusionGemma has it."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from di4c_fast import sample
from di4c_fast.samplers.canvas import accepted

from . import baselines
from .draw import DrawGroup, Inputs, Truth
from .groups import BACKENDS, Check, Variant, library

TEMPERATURE, BOUND, MEAN_ENTROPY, CANVAS = 0.6, 0.1, 0.005, 256
LIMIT = 1e-4  # of entropies, relative to the largest: sums of 262144 terms in fp32


class Step(NamedTuple):
    """What a step leaves, and what it was made of."""

    canvas: Tensor  # (B, D) new tokens
    ended: Tensor  # (B,) bool
    token: Tensor  # (B·D,) the draws
    argmax: Tensor  # (B·D,)
    entropy: Tensor  # (B·D,)
    log_prob: None = None  # for the check of draws


class CanvasGroup(DrawGroup):
    """Draw, argmax and entropy of all rows; acceptance, new noise, and whether to stop.

    Rows are the positions of canvases of 256. That the sampler may take logits from a `LinearHead`
    is not used here: the logits are the input of every variant.
    """

    copies = MappingProxyType({"plain": 6.0})  # also probabilities, those of the entropy once more

    def variants(self) -> list[Variant]:
        plain = "softmax in fp32, multinomial, argmax, entropy twice, as in transformers"
        return [Variant("plain", plain), *library()]

    def call(self, name: str, inputs: Inputs) -> Step:
        self.calls += 1
        logits, rows, vocabulary = inputs.head, self.case.positions, self.case.vocabulary
        torch.manual_seed(self.calls)
        canvas = torch.zeros(rows, dtype=torch.int64, device=logits.device)
        canvas = canvas.view(-1, min(CANVAS, rows))  # the argmax of the step before as well
        if name not in BACKENDS:
            return Step(*baselines.canvas_step(logits, canvas, TEMPERATURE, BOUND, MEAN_ENTROPY))
        how = {"seed": inputs.seed, "step": self.calls, "backend": name}
        draw = sample(logits, temperature=TEMPERATURE, want=("argmax", "entropy"), **how)
        assert draw.argmax is not None
        assert draw.entropy is not None
        token, argmax, entropy = (
            x.view_as(canvas) for x in (draw.token, draw.argmax, draw.entropy)
        )
        noise = torch.randint_like(canvas, vocabulary)
        ended = (argmax == canvas).all(1) & (entropy.mean(1) < MEAN_ENTROPY)
        canvas = torch.where(accepted(entropy, BOUND), token, noise)
        return Step(canvas, ended, draw.token, draw.argmax, draw.entropy)

    def truth(self, inputs: Inputs) -> Truth:
        scaled = super().truth(Inputs(inputs.head[:64].double() / TEMPERATURE, inputs.seed))
        same = inputs.head[:1].expand_as(inputs.head).contiguous()
        return scaled._replace(same=Inputs(same, inputs.seed + 1))

    def check(self, name: str, inputs: Inputs, truth: Truth) -> Check:
        """The law of the draws, argmax and entropy of the first rows, what of it is accepted."""
        step, rows = self.call(name, inputs), len(truth.log_prob)
        if not torch.equal(step.argmax[:rows], inputs.head[:rows].argmax(-1)):
            return Check("the argmax is another")
        entropy = -(truth.log_prob.exp() * truth.log_prob).sum(-1)
        error = float((step.entropy[:rows] - entropy).abs().max() / entropy.max())
        if not error <= LIMIT:
            return Check(f"entropies are off by {error:.1e}, at most {LIMIT:.0e} allowed", error)
        kept = accepted(step.entropy.view_as(step.canvas), BOUND)
        if not torch.equal(step.canvas[kept], step.token.view_as(kept)[kept]):
            return Check("an accepted token is not that of the draw", error)
        return dataclasses.replace(super().check(name, inputs, truth), gradient_error=error)
