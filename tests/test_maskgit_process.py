"""The MaskGIT process: confident teacher steps, and whole distillation steps."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from process_cases import MASK, VOCAB, rng
from sampler_cases import reveal_law
from torch import nn

from di4c_fast.heads import LinearHead
from di4c_fast.processes import MaskGITProcess, maskgit
from di4c_fast.testing import assert_counts_match
from di4c_fast.training import DistillConfig, distill_step
from tools.own_head import OwnHead


def test_a_step_adds_to_the_ratio_and_ends_at_one():
    t = torch.tensor([1.0, 0.5, 0.05, 0.02])
    u = MaskGITProcess(MASK).step_time(t, 0.05)
    torch.testing.assert_close(u, torch.tensor([0.95, 0.45, 0.0, 0.0]))


def step(process, xt, t, u, head, draws, **arguments):
    return process.teacher_step(xt, torch.tensor(t), torch.tensor(u), head, draws, **arguments)


def test_an_even_grid_of_ratios_is_not_rounded_away():
    xt = torch.full((1, 20), MASK)
    for k in range(1, 20):
        process = MaskGITProcess(MASK, schedule="linear")
        xu = step(process, xt, [1.0], [k / 20], torch.zeros(1, 20, VOCAB), 1, generator=rng())
        assert int((xu == MASK).sum()) == k


def test_every_example_and_draw_reveals_exactly_its_count():
    positions, draws = 37, 6
    t = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.06, 0.04, 0.9])
    process = MaskGITProcess(MASK)
    x0 = torch.randint(0, MASK, (7, positions), generator=rng())
    xt = process.corrupt(x0, t, generator=rng(1))
    xt[6] = x0[6]
    xt[6, :2] = MASK  # fewer masks than the later ratio allows: nothing to do
    u = process.step_time(t, 0.05)
    logits = torch.randn(7, positions, VOCAB, generator=rng(2))
    xu = process.teacher_step(xt, t, u, logits, draws, generator=rng(3))
    assert xu.shape == (7, draws, positions)
    masked = (xt == MASK).sum(-1)
    for b in range(7):
        keep = math.ceil(math.acos(1 - float(u[b])) * 2 / math.pi * positions)
        expected = min(int(masked[b]), keep)
        assert (xu[b] == MASK).sum(-1).tolist() == [expected] * draws
    assert int((xu[4] == MASK).sum()) > 0
    assert not bool((xu[5] == MASK).any())
    known = (xt != MASK).unsqueeze(1).expand_as(xu)
    assert torch.equal(xu[known], xt.unsqueeze(1).expand_as(xu)[known])


def test_draws_have_the_exact_law_of_tokens_and_positions():
    """Two of three masked positions: tokens by softmax, positions by a Plackett-Luce order."""
    process = MaskGITProcess(MASK, schedule="linear", teacher_steps=None, gumbel_temperature=2.0)
    xt = torch.tensor([[MASK, 1, MASK, MASK]])
    logits = 1.5 * torch.randn(1, 4, VOCAB, generator=rng(4))
    draws = 40_000
    # ceil(4·0.25) = 1 remains masked; the factor at r = 0.25 is 2·0.75.
    xu = step(process, xt, [0.75], [0.25], logits, draws, generator=rng(5))[0]
    law = reveal_law(logits[0], xt[0].tolist(), MASK, 2, 1.5)
    powers = VOCAB ** torch.arange(3, -1, -1)
    expected = torch.zeros(VOCAB**4, dtype=torch.float64)
    for row, share in law.items():
        expected[int((torch.tensor(row) * powers).sum())] = share
    assert_counts_match(torch.bincount((xu * powers).sum(-1), minlength=VOCAB**4), expected)


def test_past_the_last_teacher_step_confidence_alone_decides():
    """The authors' factor would be negative at r = 0.95 and prefer unlikely tokens."""
    process = MaskGITProcess(MASK, schedule="linear", temperature=0.0, gumbel_temperature=50.0)
    xt = torch.full((1, 20), MASK)
    logits = torch.zeros(1, 20, VOCAB)
    logits[0, :, 0] = torch.linspace(1.0, 4.0, 20)
    xu = step(process, xt, [0.1], [0.05], logits, 50, generator=rng())
    expected = torch.tensor([MASK] + [0] * 19)
    assert bool((xu == expected).all())
    # Before that, at a factor of 50·(1 − 0.5·8/7), positions are nearly random.
    xu = step(process, xt, [0.5], [0.45], logits, 400, generator=rng())
    revealed = (xu[0] != MASK).sum(0)
    assert int(revealed.min()) > 0.3 * 400


def test_equal_confidences_reveal_the_lowest_positions():
    process = MaskGITProcess(MASK, schedule="linear", temperature=0.0, gumbel_temperature=0.0)
    xt = torch.tensor([[MASK, 0, MASK, MASK, MASK]])
    xu = step(process, xt, [0.8], [0.4], torch.zeros(1, 5, VOCAB), 3, generator=rng())
    assert xu[0].tolist() == [[0, 0, 0, MASK, MASK]] * 3


def test_logits_are_computed_once_per_masked_position_for_all_draws(monkeypatch):
    monkeypatch.setattr(maskgit, "_PIECE", 3 * VOCAB)
    xt = torch.tensor([[MASK, 0, MASK, MASK], [1, 1, MASK, 0], [MASK, MASK, MASK, MASK]])
    head = OwnHead(torch.randn(3, 4, VOCAB, generator=rng()))
    # The second example keeps its one mask, so that it needs no token.
    step(MaskGITProcess(MASK), xt, [1.0] * 3, [0.2, 0.9, 0.2], head, 7, generator=rng())
    rows = torch.cat(head.taken).tolist()
    assert rows == [0, 2, 3, 8, 9, 10, 11]
    assert max(piece.numel() for piece in head.taken) == 3


def test_the_mask_is_drawn_on_request_only():
    logits = torch.zeros(1, 50, VOCAB)
    logits[..., MASK] = 10.0
    xt = torch.full((1, 50), MASK)
    for exclude in (True, False):
        process = MaskGITProcess(MASK, exclude_mask=exclude)
        xu = step(process, xt, [0.05], [0.0], logits, 4, generator=rng())
        assert bool((xu == MASK).any()) is not exclude
    narrow = torch.zeros(1, 50, MASK)
    xu = step(
        MaskGITProcess(MASK, exclude_mask=False), xt, [0.5], [0.0], narrow, 2, generator=rng()
    )
    assert int(xu.max()) < MASK


def test_valid_counts_only_its_own_positions():
    xt = torch.full((2, 20), MASK)
    valid = torch.zeros(2, 20, dtype=torch.bool)
    valid[0, :10] = True
    valid[1] = True
    process = MaskGITProcess(MASK, schedule="linear")
    logits = torch.zeros(2, 20, VOCAB)
    xu = step(process, xt, [1.0, 1.0], [0.5, 0.5], logits, 3, valid=valid, generator=rng())
    assert bool((xu[0, :, 10:] == MASK).all())
    assert (xu == MASK).sum(-1).tolist() == [[15] * 3, [10] * 3]


# Distillation

CONFIG = DistillConfig(components=4, teacher_step=0.05, component_weight=20.0, low_t=0.05,
                       low_t_probability=0.05)  # fmt: skip
distil = functools.partial(distill_step, process=MaskGITProcess(MASK), config=CONFIG)


class TinyModel(nn.Module):
    """Embeddings, one mixing layer over all positions and a head; λ and a label where given."""

    def __init__(self, positions: int, latent: bool, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        width = 24
        self.token = nn.Embedding(VOCAB, width)
        self.place = nn.Parameter(0.3 * torch.randn(positions, width))
        self.label = nn.Embedding(3, width)
        self.mix = nn.Linear(positions * width, positions * width)
        self.latent = nn.Linear(4, width) if latent else None
        self.head = nn.Linear(width, VOCAB)

    def forward(self, tokens, t, latent=None, label=None):
        h = self.token(tokens) + self.place
        if label is not None:
            h = h + self.label(label).unsqueeze(1)
        if self.latent is not None:
            angle = 2 * math.pi * latent
            waves = [angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()]
            h = h + self.latent(torch.cat(waves, -1)).unsqueeze(1)
        h = h + torch.tanh(self.mix(h.flatten(1))).view_as(h)
        return LinearHead(h, self.head.weight, self.head.bias)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_distillation_step_with_mixed_times_gives_each_example_its_terms(backend):
    positions = 6
    student, teacher = TinyModel(positions, True, 1), TinyModel(positions, False, 2)
    x0 = torch.randint(0, MASK, (4, positions), generator=rng())
    config = dataclasses.replace(CONFIG, backend=backend)
    t, context = torch.tensor([0.9, 0.03, 0.5, 0.01]), {"label": torch.tensor([0, 1, 2, 0])}
    out = distil(student, teacher, x0, config=config, t=t, context=context, generator=rng(7))
    assert out.low.tolist() == [False, True, False, True]
    terms = out.terms
    assert terms is not None
    assert bool((terms.component[[1, 3]] > 0).all())
    assert terms.consistency_marginal[[1, 3]].tolist() == [0, 0]
    assert bool((terms.consistency_marginal[[0, 2]] > 0).all())
    # All positions count, also the many that are known at t = 0.01.
    assert bool((terms.teacher_marginal > 0.1).all())
    assert out.xu is not None
    assert bool((out.xu[[0, 2]] != MASK).any())
    out.loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_loss_of_a_step_is_the_formula_of_the_paper():
    """One low and one high example against the terms written out."""
    positions, n = 3, 4
    student, teacher = TinyModel(positions, True, 3), TinyModel(positions, False, 4)
    x0 = torch.tensor([[0, 1, 2], [3, 2, 1]])
    t = torch.tensor([0.6, 0.02])
    latent = torch.rand(2, n, 1, generator=rng(1))
    out = distil(student, teacher, x0, t=t, latent=latent, generator=rng(2))
    assert out.terms is not None
    rows = out.xt.repeat_interleave(n, 0)
    logp = student(rows, t, out.latent.flatten(0, 1)).logits().log_softmax(-1)
    logp = logp.view(2, n, positions, VOCAB)
    marginal = logp.logsumexp(1) - math.log(n)
    target = teacher(out.xt, t).logits().softmax(-1)
    kl = (target * (target.log() - marginal)).sum((-1, -2))
    component = (target.unsqueeze(1) * (target.log().unsqueeze(1) - logp)).sum((-1, -2)).mean(1)
    at = x0.unsqueeze(-1)
    joint = logp.gather(-1, at.unsqueeze(1).expand(-1, n, -1, -1)).squeeze(-1).sum(-1)
    correlation = marginal.gather(-1, at).squeeze(-1).sum(-1) - joint.logsumexp(-1) + math.log(n)
    weight = 0.1 * torch.sigmoid(20 * (t - 0.5))
    terms = out.terms
    expected = weight * correlation + kl
    consistency = terms.consistency_correlation + terms.consistency_marginal
    expected = expected + torch.stack([consistency[0], 20 * component[1]])
    torch.testing.assert_close(terms.component[1], component[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.teacher_marginal, kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.mean(), rtol=1e-4, atol=1e-5)


def test_the_loss_falls_when_a_student_overfits_one_batch():
    positions = 4
    student, teacher = TinyModel(positions, True, 5), TinyModel(positions, False, 6)
    x0 = torch.randint(0, MASK, (16, positions), generator=rng(3))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, betas=(0.9, 0.96))
    generator = rng(4)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        out = distil(student, teacher, x0, generator=generator, return_terms=False)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    first, last = sum(losses[:10]) / 10, sum(losses[-30:]) / 30
    assert last < 0.25 * first, (first, last)
