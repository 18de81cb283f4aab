"""The MaskGIT drop-ins, on stand-ins with the signatures and attributes of the repositories."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from wrong_arguments import Wrong, wrong

from di4c_fast.integrations.maskgit import (
    ConfidenceSampler,
    accelerate_di4c,
    accelerate_valeoai,
)
from di4c_fast.processes.reveal import reveal_counts

SIDE, CODES, CLASSES = 4, 8, 3
POSITIONS = SIDE * SIDE


class Network(nn.Module):
    """forward(codes (B, h, w), label, drop_label[, z]) to (B, h·w, codes + 1), by label alone."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.nclass = CLASSES
        torch.manual_seed(seed)
        self.table = nn.Parameter(2 * torch.randn(CLASSES + 1, CODES + 1))
        self.calls: list[SimpleNamespace] = []

    def forward(self, codes: Tensor, y: Tensor, drop: Tensor, z: Tensor | None = None) -> Tensor:
        assert codes.shape[1:] == (SIDE, SIDE)
        self.calls.append(SimpleNamespace(rows=len(y), y=y, drop=drop, z=z, training=self.training))
        label = torch.where(drop, self.nclass, y)
        return self.table[label].unsqueeze(1).expand(-1, POSITIONS, -1)


class Decoder:
    def decode_code(self, code: Tensor) -> Tensor:
        assert int(code.min()) >= 0
        assert int(code.max()) < CODES
        return code.float().unsqueeze(1)


class ViTTrainer:
    """The names of the first version and of the fork."""

    def __init__(self, network: Network, **args):
        self.vit, self.ae = network, Decoder()
        self.codebook_size, self.patch_size, self.latent_dim = CODES, SIDE, 1
        self.args = SimpleNamespace(device="cpu", mask_value=CODES, **args)

    def sample(self, *arguments, **options):
        return "original"


class TodaysTrainer:
    """The names of today's version."""

    def __init__(self, sampler, use_ema: bool = False):
        self.vit, self.ae, self.sampler = Network(), Decoder(), sampler
        self.ema = Network(1)
        self.input_size = SIDE
        self.args = SimpleNamespace(
            device="cpu", mask_value=CODES, codebook_size=CODES, use_ema=use_ema
        )


LABELS = torch.tensor([0, 1, 2])


def test_the_fork_samples_through_the_package():
    trainer = ViTTrainer(Network(), is_student=True)
    with accelerate_di4c(trainer):
        images, codes, masks = trainer.sample(nb_sample=3, labels=LABELS, step=4, w=6)
    assert images.shape == (3, 1, SIDE, SIDE)
    assert len(codes) == len(masks) == 4
    left = torch.stack([mask.sum((-1, -2)) for mask in masks])
    revealed = -torch.diff(left, dim=0, prepend=torch.full((1, 3), POSITIONS)).T
    assert revealed.tolist() == [reveal_counts(4, POSITIONS)] * 3
    assert torch.equal(images[:, 0].long(), codes[-1])
    assert int(codes[-1].max()) < CODES


def test_the_fork_draws_a_latent_per_step_shared_by_both_halves():
    network = Network()
    trainer = ViTTrainer(network, is_student=True)
    with accelerate_di4c(trainer):
        trainer.sample(nb_sample=3, labels=LABELS, step=3)
    assert [call.rows for call in network.calls] == [3, 6, 6]  # the first weight is 0
    for call in network.calls:
        assert call.z.shape == (call.rows, 1)
        assert torch.equal(call.z[:3], call.z[-3:])
        assert not bool(call.drop[:3].any())
        assert not call.training
        assert torch.equal(call.y[:3], LABELS)
    assert all(bool(call.drop[3:].all()) for call in network.calls)
    assert not torch.equal(network.calls[0].z, network.calls[1].z[:3])
    assert network.training


def test_a_teacher_that_is_no_student_is_called_without_a_latent():
    network = Network()
    trainer = ViTTrainer(network, is_student=False)
    with accelerate_di4c(trainer):
        trainer.sample(nb_sample=3, labels=LABELS, step=2, w=0)
    assert [call.z for call in network.calls] == [None, None]


def test_the_teacher_of_the_fork_gives_the_unconditional_logits():
    student, teacher = Network(0), Network(1)
    trainer = ViTTrainer(student, is_student=True)
    with accelerate_di4c(trainer):
        trainer.sample(nb_sample=3, labels=LABELS, step=3, teacher=SimpleNamespace(vit=teacher))
    assert [call.rows for call in student.calls] == [3, 3, 3]
    assert not any(bool(call.drop.any()) for call in student.calls)
    assert [call.rows for call in teacher.calls] == [3, 3]
    assert all(bool(call.drop.all()) and call.z is None for call in teacher.calls)
    assert not any(call.training for call in teacher.calls)
    assert teacher.training


def test_one_step_of_the_fork_works():
    trainer = ViTTrainer(Network(), is_student=True)
    with accelerate_di4c(trainer):
        _, codes, masks = trainer.sample(nb_sample=2, labels=LABELS[:2], step=1)
    assert len(codes) == 1
    assert float(masks[0].sum()) == 0


def test_the_softmax_temperature_multiplies_the_logits():
    network = Network()
    trainer = ViTTrainer(network)
    with accelerate_di4c(trainer):
        _, codes, _ = trainer.sample(nb_sample=3, labels=LABELS, sm_temp=1e4, w=0, step=2)
    best = network.table[:CLASSES, :CODES].argmax(-1)
    assert bool((codes[-1] == best.view(3, 1, 1)).all())


def test_own_counts_and_given_codes_are_respected():
    trainer = ViTTrainer(Network())
    init = torch.full((3, SIDE, SIDE), CODES)
    init[:, 0] = 5
    with accelerate_di4c(trainer):
        _, codes, masks = trainer.sample(
            init, nb_sample=3, labels=LABELS, sched_mode=[4, 4, 8], w=0
        )
    assert [float(mask[0].sum()) for mask in masks] == [8, 4, 0]
    assert all(bool((code[:, 0] == 5).all()) for code in codes)
    assert int((init == CODES).sum()) == 3 * (POSITIONS - SIDE)


def test_the_mask_is_drawn_and_clamped_on_request_only():
    network = Network()
    with torch.no_grad():
        network.table[:, CODES] = 30.0
    trainer = ViTTrainer(network)
    with accelerate_di4c(trainer, exclude_mask=False):
        images, codes, _ = trainer.sample(nb_sample=3, labels=LABELS, step=2, w=0)
    assert bool((codes[-1] == CODES).all())
    assert bool((images == CODES - 1).all())
    with accelerate_di4c(trainer):
        _, codes, _ = trainer.sample(nb_sample=3, labels=LABELS, step=2, w=0)
    assert int(codes[-1].max()) < CODES


def test_labels_are_drawn_where_there_are_none():
    network = Network()
    trainer = ViTTrainer(network)
    with accelerate_di4c(trainer):
        images, _, _ = trainer.sample(nb_sample=7, step=2)
    assert images.shape[0] == 7
    assert network.calls[0].y.shape == (7,)
    assert int(network.calls[0].y.max()) < CLASSES


def test_the_first_version_follows_its_own_counts():
    trainer = ViTTrainer(Network())
    with accelerate_valeoai(trainer):
        _, _, masks = trainer.sample(nb_sample=3, labels=LABELS, step=4)
    left = [POSITIONS, *(int(mask[0].sum()) for mask in masks)]
    counts = reveal_counts(4, POSITIONS, "arccos", "valeoai_v1")
    assert [a - b for a, b in itertools.pairwise(left)] == counts


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_sampler_of_today_is_replaced_with_its_settings(use_ema):
    original = SimpleNamespace(
        sm_temp=1, w=2.0, randomize="linear", step=5, r_temp=1.5, sched_mode="cosine"
    )
    trainer = TodaysTrainer(original, use_ema)
    with accelerate_valeoai(trainer):
        assert "Steps: 5" in str(trainer.sampler)
        assert trainer.sampler.r_temp == 1.5
        images, codes, masks = trainer.sampler(trainer=trainer, nb_sample=3, labels=LABELS)
    assert trainer.sampler is original
    assert images.shape == (3, 1, SIDE, SIDE)
    assert float(images.max()) <= 1.0
    left = [POSITIONS, *(int(mask[0].sum()) for mask in masks)]
    counts = reveal_counts(5, POSITIONS, "cosine", "valeoai")
    assert [a - b for a, b in itertools.pairwise(left)] == counts
    # Filled positions are drawn anew at every step.
    assert any(
        bool((before != after)[before != CODES].any())
        for before, after in itertools.pairwise(codes)
    )
    used, unused = (trainer.ema, trainer.vit) if use_ema else (trainer.vit, trainer.ema)
    assert len(used.calls) == 5
    assert unused.calls == []


def test_a_sampler_of_ones_own_is_called_as_the_original():
    trainer = TodaysTrainer(None)
    trainer.sampler = ConfidenceSampler(w=0, step=3)
    images, codes, _ = trainer.sampler(trainer, None, 3, LABELS, False)
    assert images.shape[0] == 3
    assert int(codes[-1].max()) < CODES


# Bad input


@pytest.mark.parametrize("accelerate", [accelerate_di4c, accelerate_valeoai])
def test_what_is_no_trainer_is_named(accelerate):
    with pytest.raises(TypeError, match="trainer must have the attributes vit, ae"):
        accelerate(SimpleNamespace(vit=1))
    with pytest.raises(TypeError, match="exclude_mask must be True or False"):
        accelerate(ViTTrainer(Network()), exclude_mask=1)


def test_another_sampler_than_the_confidence_sampler_is_named():
    trainer = TodaysTrainer(SimpleNamespace(w=4, step=32))
    with pytest.raises(TypeError, match=r"a ConfidenceSampler, must .* without sm_temp, rando"):
        accelerate_valeoai(trainer)


@wrong(
    [
        ({"sm_temp": 0}, ValueError, "sm_temp must be in (0, inf), got 0"),
        ({"labels": LABELS[:2]}, ValueError, "labels must have shape (nb_sample,) = (3,)"),
        ({"labels": [0, 1, 2]}, TypeError, "labels must be a Tensor"),
        ({"init_code": LABELS}, ValueError, "init_code must have shape (nb_sample, 4, 4)"),
        ({"init_code": 3}, TypeError, "init_code must be a Tensor"),
        ({"sched_mode": "cubic"}, ValueError, "schedule must be one of"),
        ({"r_temp": -1}, ValueError, "gumbel_temperature must be finite and at least 0"),
        ({}, ValueError, "args.mask_value must be at least 0, got -1"),
    ]
)
def test_wrong_arguments_of_a_sample_are_named(wrong: Wrong):
    trainer = ViTTrainer(Network())
    if not wrong.what:
        trainer.args.mask_value = -1
    with accelerate_di4c(trainer), wrong.raises():
        trainer.sample(**{"nb_sample": 3, "labels": LABELS, **wrong.what})
