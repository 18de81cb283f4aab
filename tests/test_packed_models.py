"""Models of packed batches in steps and samplers: what their sequences give one by one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from distill_support import CONFIG, MASK, PROCESS, VOCAB, rng
from torch import nn

import di4c_fast
from di4c_fast.heads import LinearHead
from di4c_fast.models import LatentShift, PackedModel, pack, unpack
from di4c_fast.samplers import sample_masked
from di4c_fast.training import Distiller, distill_step

ENDS = torch.tensor([0, 4, 6, 7, 12])
TOKENS = torch.randint(MASK, (1, 12), generator=rng(3))
ROWS = unpack(TOKENS, ENDS)
S = len(ENDS) - 1
NEAR = {"rtol": 1e-10, "atol": 1e-12}


class Packed(nn.Module):
    """Positions of a sequence see each other through their mean, and λ and t of their own."""

    def __init__(self, latent: bool, seed: int, head: bool = True):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.out = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.latent = LatentShift(8, zero_init=False) if latent else None
        self.double()
        self.head, self.calls = head, []

    def forward(self, tokens, t, latent=None, *, cu_seqlens, label=None):
        self.calls.append(tuple(tokens.shape))
        lengths = cu_seqlens.diff()
        sequence = torch.arange(len(t)).repeat_interleave(lengths)
        rows = torch.zeros(len(t), 1, 8).double() + t.view(-1, 1, 1)
        if label is not None:
            rows = rows + label.view(-1, 1, 1)
        if self.latent is not None:
            rows = self.latent(rows, latent)
        h = self.embed(tokens[0])
        sums = torch.zeros(len(t), 8).double().index_add(0, sequence, h)
        mean = sums / lengths.clamp(min=1).unsqueeze(1)
        h = torch.tanh(h + mean[sequence] + rows[sequence, 0]).unsqueeze(0)
        return LinearHead(h, self.out.weight, self.out.bias) if self.head else self.out(h)


def models(head=True):
    return PackedModel(Packed(True, 0, head)), PackedModel(Packed(False, 1, head))


def test_unpack_and_pack_are_inverse():
    assert ROWS.tokens.shape == ROWS.valid.shape == (S, 5)
    assert ROWS.lengths.tolist() == [4, 2, 1, 5]
    again, ends = pack(ROWS.tokens, ROWS.lengths)
    assert torch.equal(again, TOKENS)
    assert torch.equal(ends, ENDS.int())
    wide = unpack(TOKENS, ENDS.int(), length=7, fill=MASK)
    assert wide.tokens.shape == (S, 7)
    assert (wide.tokens[~wide.valid] == MASK).all()
    with pytest.raises(ValueError, match="length must be at least the longest sequence, 5, got 4"):
        unpack(TOKENS, ENDS, length=4)


@pytest.mark.parametrize(("head", "at_once"), [(True, None), (False, None), (True, 2)])
def test_a_step_gives_what_steps_of_single_sequences_give(head, at_once):
    config = dataclasses.replace(CONFIG, backend="torch")
    label = torch.arange(S)
    student, teacher = models(head)
    output = distill_step(
        student,
        teacher,
        ROWS.tokens,
        valid=ROWS.valid,
        context={"lengths": ROWS.lengths, "label": label},
        process=PROCESS,
        config=config,
        generator=rng(1),
        t=torch.tensor([0.9, 0.7, 0.5, 0.8]),  # the third is low
        consistency_x=unpack(TOKENS, ENDS).tokens.unsqueeze(1).expand(S, 2, -1),
        components_at_once=at_once,
        xu=torch.full((S, 2, 5), MASK),
    )
    output.loss.backward()
    # No padding: 3 · 12 positions at x_t, 2 · 11 at x_u; pieces run again.
    assert sum(length for _, length in student.model.calls) == 58 + (at_once is not None) * 36
    alone, _ = models(head)
    total = 0.0
    for s, n in enumerate(ROWS.lengths.tolist()):
        own = {"t": output.t, "u": output.u, "latent": output.latent, "latent_u": output.latent_u}
        one = distill_step(
            alone,
            teacher,
            ROWS.tokens[s : s + 1, :n],
            context={"lengths": ROWS.lengths[s : s + 1], "label": label[s : s + 1]},
            process=PROCESS,
            config=config,
            xt=output.xt[s : s + 1, :n],
            xu=torch.full((1, 2, n), MASK),
            consistency_x=ROWS.tokens[s : s + 1, :n].unsqueeze(1).expand(1, 2, -1),
            **{name: value[s : s + 1] for name, value in own.items()},
        )
        torch.testing.assert_close([t[s : s + 1] for t in output.terms], list(one.terms), **NEAR)
        total = total + one.loss / S
    total.backward()
    torch.testing.assert_close(output.loss, total, **NEAR)
    pairs = zip(student.parameters(), alone.parameters(), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, **NEAR)


def test_a_distiller_trains_and_the_loss_takes_what_the_model_gives_packed():
    student, teacher = models()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller(student, teacher, optimizer, process=PROCESS, config=CONFIG)
    distiller.step(ROWS.tokens, valid=ROWS.valid, context={"lengths": ROWS.lengths})
    with torch.no_grad():
        # Components outermost, so that the head of all is one view.
        latent, ends = torch.rand(3 * S, 1).double(), ENDS.diff().repeat(3).cumsum(0)
        packed = student.model(
            TOKENS.repeat(1, 3), torch.ones(3 * S), latent,
            cu_seqlens=torch.cat([torch.zeros(1), ends]).long(),
        )  # fmt: skip
        head = LinearHead(packed.hidden.view(1, 3, 12, 8), packed.weight, packed.bias)
        ours = di4c_fast.mixture_log_prob(head, TOKENS, cu_seqlens=ENDS)
        rows = student(
            ROWS.tokens.repeat(3, 1), torch.ones(3 * S), latent, lengths=ROWS.lengths.repeat(3)
        )
        rows = di4c_fast.TensorHead(rows.logits().unflatten(0, (3, S)).transpose(0, 1))
        expected = di4c_fast.mixture_log_prob(rows, ROWS.tokens, valid=ROWS.valid)
    torch.testing.assert_close(ours, expected, **NEAR)


def test_a_sampler_fills_each_sequence_as_if_it_were_alone():
    student, _ = models()
    prompt = unpack(torch.full((1, 12), MASK), ENDS).tokens
    options = {"mask_id": MASK, "steps": 3, "latent_dim": 1, "seed": 5}
    latent = torch.rand(4, S, 1, generator=rng()).double()
    tokens = sample_masked(
        student, (S, 5), prompt=prompt, context={"lengths": ROWS.lengths}, latent=latent, **options
    )
    packed, ends = pack(tokens, ROWS.lengths)
    assert torch.equal(ends, ENDS.int())
    assert packed.max() < MASK
    assert (tokens[~ROWS.valid] == 0).all()
    s = 3  # of full length, so that its draws have the same keys
    alone = sample_masked(
        student, (1, 5), latent=latent[:, s : s + 1], first_sequence=s,
        context={"lengths": ROWS.lengths[s : s + 1]}, **options,
    )  # fmt: skip
    assert torch.equal(tokens[s : s + 1], alone)


def test_a_model_that_returns_other_positions_is_named():
    student = PackedModel(Packed(True, 0))
    student.model.forward = lambda *_, **__: torch.zeros(1, 3, VOCAB)
    given = ROWS.tokens, torch.ones(S), torch.rand(S, 1)
    with pytest.raises(ValueError, match=r"must return logits \(1, T, V\) with T = 12, got"):
        student(*given, lengths=ROWS.lengths)
    for wrong in (6, -1):
        with pytest.raises(ValueError, match=f"lengths must be from 0 to 5, got {wrong} at"):
            models()[0](*given, lengths=ROWS.lengths.clone().fill_(wrong))
    with pytest.raises(ValueError, match="lengths must leave a position in some row"):
        models()[0](*given, lengths=torch.zeros(S, dtype=torch.int64))
