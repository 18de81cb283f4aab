"""Guidance of the MaskGIT sampler: the formula, its weight at every step, and what is called."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from di4c_fast.samplers import sample_maskgit
from di4c_fast.testing import assert_counts_match


class LabelModel:
    """Logits by label alone; remembers its calls."""

    def __init__(self, tables: Tensor):
        self.tables, self.calls = tables, []

    def __call__(self, tokens, t, label):
        self.calls.append((tokens, t, label))
        return self.tables[label].unsqueeze(1).expand(-1, tokens.shape[1], -1)


@pytest.mark.parametrize(("schedule", "weights"), [("linear", [0, 1, 2]), ("constant", [2, 2, 2])])
def test_guided_logits_are_the_formula(schedule, weights):
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(2, 5, generator=generator)
    model = LabelModel(tables)
    label = torch.zeros(4000, dtype=torch.int64)
    history: list[Tensor] = []
    sample_maskgit(
        model,
        (4000, 3),
        mask_id=4,
        steps=3,
        schedule=[1, 1, 1],
        context={"label": label},
        unconditional={"label": label + 1},
        guidance=2.0,
        guidance_schedule=schedule,
        randomize="random",
        seed=1,
        history=history,
    )
    for step, w in enumerate(weights):
        logits = (1 + w) * tables[0] - w * tables[1]
        logits[4] = -math.inf
        new = history[step + 1][(history[step + 1] != 4) & (history[step] == 4)]
        counts = torch.bincount(new, minlength=5)
        assert_counts_match(counts, logits.double().softmax(-1))
    # Weight 0 costs no unconditional half.
    assert [len(call[0]) for call in model.calls] == [4000 if w == 0 else 8000 for w in weights]


def test_one_step_is_the_first_step_without_guidance_unless_it_is_constant():
    tables = torch.tensor([[5.0, 0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0, 0.0]])
    label = torch.zeros(8, dtype=torch.int64)
    for schedule, token, rows in (("linear", 0, 8), ("constant", 1, 16)):
        model = LabelModel(tables)
        tokens = sample_maskgit(
            model,
            (8, 4),
            mask_id=4,
            steps=1,
            temperature=0.0,
            context={"label": label},
            unconditional={"label": label + 1},
            guidance=3.0,
            guidance_schedule=schedule,
            seed=0,
        )
        assert bool((tokens == token).all())
        assert [len(call[0]) for call in model.calls] == [rows]


def test_both_halves_share_the_latent_and_the_tokens():
    seen = []

    def model(tokens, t, latent, label):
        seen.append((tokens, t, latent, label))
        return torch.zeros(*tokens.shape, 5)

    label = torch.arange(3)
    sample_maskgit(
        model,
        (3, 4),
        mask_id=4,
        steps=2,
        latent_dim=2,
        context={"label": label},
        unconditional={"label": label + 10},
        guidance=1.0,
        guidance_schedule="constant",
        seed=0,
    )
    for tokens, t, latent, labels in seen:
        assert torch.equal(tokens[:3], tokens[3:])
        assert torch.equal(latent[:3], latent[3:])
        assert labels.tolist() == [0, 1, 2, 10, 11, 12]
        assert t.shape == (6,)
    assert not torch.equal(seen[0][2], seen[1][2])


def test_another_model_gives_the_unconditional_logits_without_latent():
    calls = []

    def student(tokens, t, latent):
        return torch.tensor([2.0, 1.0, 0.0, 0.0]).expand(*tokens.shape, 4)

    def teacher(tokens, t, label):
        calls.append(label)
        return torch.tensor([2.0, 0.5, 0.0, 0.0]).expand(*tokens.shape, 4)

    tokens = sample_maskgit(
        student,
        (3, 2),
        mask_id=3,
        steps=2,
        latent_dim=1,
        temperature=0.0,
        guidance=3.0,
        guidance_schedule="constant",
        guidance_model=teacher,
        unconditional={"label": torch.arange(3)},
        seed=0,
    )
    # (1 + 3)(2, 1) − 3(2, 0.5) = (2, 2.5): guidance turns the argmax round.
    assert bool((tokens == 1).all())
    assert [label.tolist() for label in calls] == [[0, 1, 2]] * 2
