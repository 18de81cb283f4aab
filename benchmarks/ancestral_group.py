"""Masked ancestral sampling from noise to tokens, with a transformer as the model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from di4c_fast.samplers import sample_masked
from di4c_fast.testing import assert_draws_match

from . import baselines
from .groups import Check, Group, Variant
from .models import Transformer

NAIVE = Variant("naive", "naive loop: full logits, softmax, noise for each token")
LIBRARY = Variant("di4c-fast", "di4c_fast.sample_masked", library=True)
LAW_STEPS, LAW_ROWS = 3, 6000


@dataclasses.dataclass
class Inputs:
    model: Transformer
    seed: int


class AncestralGroup(Group):
    """Sample whole rows of tokens."""

    def __init__(self, case: Any):
        super().__init__(case)
        self.calls = 0

    def variants(self) -> list[Variant]:
        return [NAIVE, LIBRARY]

    def make_inputs(self, seed: int) -> Inputs:
        case = self.case
        torch.manual_seed(seed)
        with torch.device(case.device):
            model = Transformer(case.vocabulary, case.positions, case.width, case.layers)
        return Inputs(model.to(case.torch_dtype).eval(), seed)

    def input_bytes(self) -> int:
        case = self.case
        parameters = 12 * case.layers * case.width**2 + 2 * case.vocabulary * case.width
        return parameters * case.torch_dtype.itemsize

    def call_bytes(self, name: str) -> int:
        case = self.case
        rows = case.batch * case.positions
        copies = 5 if name == "naive" else 1.0 / case.steps
        return int(rows * case.vocabulary * 4 * copies) + rows * case.width * 4 * 16

    def call(self, name: str, inputs: Inputs) -> Tensor:
        case, model = self.case, inputs.model
        self.calls += 1
        shape, mask_id = (case.batch, case.positions), case.vocabulary - 1
        if name == "naive":
            torch.manual_seed(self.calls)
            return baselines.ancestral_sample(
                model, shape, mask_id=mask_id, steps=case.steps, device=case.device
            )
        return sample_masked(
            model.as_head,
            shape,
            mask_id=mask_id,
            steps=case.steps,
            seed=self.calls,
            device=case.device,
        )

    # Checks --------------------------------------------------------------------------------------

    def truth(self, inputs: Inputs) -> tuple[_ToyModel, Tensor]:
        model = _ToyModel(self.case.device)
        return model, model.law(LAW_STEPS)

    def check(self, name: str, inputs: Inputs, truth: tuple[_ToyModel, Tensor]) -> Check:
        """Finished rows here, and on a model of two positions the exact law of the pair."""
        mask_id = self.case.vocabulary - 1
        tokens = self.call(name, inputs)
        if bool(((tokens < 0) | (tokens >= mask_id)).any()):
            return Check("a position is still masked or out of range")
        model, law = truth
        if name == "naive":
            torch.manual_seed(1)
            pairs = baselines.ancestral_sample(
                model, (LAW_ROWS, 2), mask_id=model.mask_id, steps=LAW_STEPS, device=model.device
            )
        else:
            pairs = sample_masked(
                model,
                (LAW_ROWS, 2),
                mask_id=model.mask_id,
                steps=LAW_STEPS,
                seed=1,
                device=model.device,
            )
        try:
            assert_draws_match(pairs[:, 0] * model.mask_id + pairs[:, 1], law, name=name)
        except AssertionError as failure:
            return Check(str(failure))
        return Check(None)


class _ToyModel:
    """Two positions and three tokens; each token's logits depend on the other position."""

    mask_id = 3

    def __init__(self, device: str):
        generator = torch.Generator().manual_seed(5)
        self.device = device
        # [position, token at the other position, logit]
        self.table = (torch.randn(2, 4, 4, generator=generator) * 1.5).to(device)

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        return torch.stack([self.table[0, tokens[:, 1]], self.table[1, tokens[:, 0]]], dim=1)

    def law(self, steps: int, t_min: float = 1e-5) -> Tensor:
        """The exact law of the ancestral loop over the 9 pairs, by following all 16 states."""
        states = torch.zeros(4, 4, dtype=torch.float64)
        states[3, 3] = 1.0
        probs = self.table.cpu().double()[..., :3].softmax(-1)  # [position, other, token]
        times = torch.linspace(1.0, t_min, steps + 1, dtype=torch.float64).tolist()
        for t, s in itertools.pairwise(times):
            states = _transition(states, lambda p, o: probs[p, o], (t - s) / t)
        best = torch.nn.functional.one_hot(probs.argmax(-1), 3).double()
        states = _transition(states, lambda p, o: best[p, o], 1.0)
        return states[:3, :3].flatten()


def _transition(states: Tensor, token: Callable[[int, int], Tensor], unmask: float) -> Tensor:
    """One step: each masked position is filled with probability `unmask`, both at once."""
    result = torch.zeros_like(states)
    for first in range(4):
        for second in range(4):
            moves = []
            for position, own, other in ((0, first, second), (1, second, first)):
                law = torch.zeros(4, dtype=torch.float64)
                if own == 3:
                    law[:3] = unmask * token(position, other)
                    law[3] = 1.0 - unmask
                else:
                    law[own] = 1.0
                moves.append(law)
            result += states[first, second] * moves[0][:, None] * moves[1][None, :]
    return result
