"""Confidence sampling block by block with a model that keeps keys and values, and without them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from di4c_fast import backends
from di4c_fast.samplers import loop, sample_confidence

from .groups import FUSED, Check, Variant, library
from .models import CachedTransformer
from .parts import parts_of
from .sampling import ConfidenceGroup, Inputs

BLOCKS = 2


class CachedGroup(ConfidenceGroup):
    """Fill the masked part of whole rows of tokens in blocks, at temperature 0, behind a prompt."""

    window = "all"  # of the variant that is checked
    exact_model: CachedTransformer | None = None
    begin = -1  # of the block that is checked, and its keys
    kept: list[Tensor]

    def variants(self) -> list[Variant]:
        return [
            *library("", ", no cache", FUSED),
            *library("-suffix", ", from the block on", FUSED),
            *library("-block", ", the block", FUSED),
        ]

    @property
    def block_length(self) -> int:
        return self.case.active_positions // BLOCKS

    def counts(self) -> list[int]:
        steps = self.case.steps // BLOCKS
        share, rest = divmod(self.block_length, steps)
        return [share + (step < rest) for step in range(steps)] * BLOCKS

    def make_inputs(self, seed: int) -> Inputs:
        case = self.case
        torch.manual_seed(seed)
        with torch.device(case.device):
            model = CachedTransformer(case.vocabulary, case.positions, case.width, case.layers)
        size = (case.batch, case.positions - case.active_positions)
        prompt = torch.randint(self.mask_id, size, device=case.device)
        return Inputs(model.to(case.torch_dtype).eval(), prompt)

    def input_bytes(self) -> int:
        return self.case.model_bytes

    def work(self) -> None:
        return None

    def call(self, name: str, inputs: Inputs, history: list[Tensor] | None = None) -> Tensor:
        case, (backend, _, window) = self.case, name.partition("-")
        options: dict[str, Any] = {"mask_id": self.mask_id, "history": history, "seed": 0}
        options |= {"prompt": inputs.prompt, "steps": case.steps, "window": window or "all"}
        with backends.preferred(backend):  # samplers take the best otherwise
            return sample_confidence(
                inputs.model,
                (case.batch, case.positions),
                block_length=self.block_length,
                **options,
            )

    def details(self, name: str, inputs: Inputs) -> dict[str, float]:
        named = [(inputs.model, "hidden", "model without head"), (loop, "sample", "head and draws")]
        return parts_of(lambda: self.call(name, inputs), named, self.case.device)

    def check(self, name: str, inputs: Inputs, truth: None) -> Check:
        self.window, self.begin = name.partition("-")[2] or "all", -1
        self.exact_model = copy.deepcopy(inputs.model).double()
        return super().check(name, inputs, truth)

    def block(self, before: Tensor) -> tuple[int, int]:
        """The first block that has masked positions, [begin, end)."""
        start = self.case.positions - self.case.active_positions
        left = int((before[0] == self.mask_id).nonzero()[0]) - start
        begin = start + left // self.block_length * self.block_length
        return begin, begin + self.block_length

    def candidates(self, before: Tensor) -> Tensor:
        place = torch.arange(self.case.positions, device=before.device)
        return (before == self.mask_id) & (place < self.block(before)[1])

    @torch.no_grad()
    def exact(self, model: Any, tokens: Tensor) -> Tensor:
        """With the keys of the other positions as they were at the first call of the block."""
        begin, end = self.block(tokens)
        start, stop = begin, self.case.positions if self.window == "suffix" else end
        if begin != self.begin or self.window == "all":
            self.begin, self.kept, start, stop = begin, [], 0, self.case.positions
        assert self.exact_model is not None
        hidden = self.exact_model.hidden(tokens[:, start:stop], start, self.kept)
        hidden = hidden[self.candidates(tokens)[:, start:stop]]
        return hidden @ self.exact_model.output.weight[: self.mask_id].T
