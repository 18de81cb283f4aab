"""The training drop-in for the fork of MaskGIT, on a stand-in with its names and signatures."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from training_cases import Steps, assert_same_gradients, dense_loss, gradients

from di4c_fast.heads import LinearHead
from di4c_fast.integrations import maskgit
from di4c_fast.integrations.maskgit import accelerate_training, as_model, distill_loss

SIDE, CODES, CLASSES, WIDTH, N = 3, 8, 4, 6, 4
D = SIDE * SIDE
R = torch.tensor([0.3, 0.97, 0.6])
Y, DROP = torch.tensor([0, 1, 2]), torch.tensor([False, True, False])
CODE = torch.randint(CODES, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))


class Transformer(nn.Module):
    """An embedding that serves as output layer, with a bias per position; λ as one more token."""

    def __init__(self, seed: int = 0, scale: float = 1.0, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.nclass, self.codebook_size, self.scale = CLASSES, CODES, scale
        self.tok_emb = nn.Embedding(CODES + 1 + CLASSES + 1, WIDTH)
        self.bias = nn.Parameter(torch.randn(D + 1, CODES + 1 + CLASSES + 1))
        self.latent = nn.Linear(1, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.last_layer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.dropout = nn.Dropout(dropout)
        self.calls: list[SimpleNamespace] = []

    def forward(self, codes, y=None, drop_label=None, return_attn=False, z=None) -> Tensor:
        self.calls.append(SimpleNamespace(codes=codes, z=z, training=self.training))
        label = torch.where(drop_label, CODES + 1 + CLASSES, y + CODES + 1)
        x = self.tok_emb(torch.cat([codes.flatten(1), label[:, None]], 1))
        if z is not None:
            x = torch.cat([x, self.latent(z)[:, None]], 1)
        x = self.dropout(torch.tanh(self.mix(x) + x.mean(1, keepdim=True)))
        x = self.last_layer(x)
        x = x if z is None else x[:, :-1]
        logits = torch.matmul(x, self.tok_emb.weight.T) + self.bias
        return self.scale * logits[:, :D, : CODES + 1]


class Codec:
    def encode(self, x: Tensor):
        return None, None, [None, None, ((x + 1) / 2 * CODES).round().long()]


class Trainer:
    """The names of the fork's `MaskGIT`."""

    def __init__(self, folder: str = "", student: bool = True, **args):
        self.vit, self.ae = Transformer(seed=0 if student else 1), Codec()
        self.codebook_size, self.patch_size, self.latent_dim = CODES, SIDE, 1
        settings = {"latent_bsize": N, "r_delta": 0.05, "alpha_t": "sigmoid", "alpha_const": 0.1}
        settings |= {"teacher_steps": 8, "mask_value": CODES, "sched_mode": "arccos", "step": 4}
        settings |= {"randomize": "linear", "r_temp": 4.5, "sm_temp": 1.0, "cfg_w": 3.0}
        settings |= {"vit_folder": folder, "is_master": True, "drop_label": 0.5, "grad_cum": 1}
        settings |= {"iter": 0, "global_epoch": 5, "device": "cpu", **args}
        self.args = SimpleNamespace(**settings)
        self.train_data = [(CODE / CODES, Y)] * 3
        self.optim = torch.optim.SGD(self.vit.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.saved: list[tuple] = []
        self.sampled: list[dict] = []

    def save_network(self, model, path, iter=None, optimizer=None, global_epoch=None):
        assert model is self.vit
        assert optimizer is self.optim
        self.saved.append((path, iter, global_epoch))

    def sample(self, **options):
        self.vit.eval()
        self.vit.train()
        self.sampled.append(options)
        return torch.zeros(len(options["labels"]), 3, 2, 2), [], []

    def train_di4c(self, teacher, log_iter=10000):
        return "original"

    def fit_di4c(self, teacher, num_epochs):
        return [self.train_di4c(teacher) for _ in range(num_epochs)]


def trainers(**args) -> tuple[Trainer, Trainer]:
    return Trainer(**args), Trainer(student=False)


@pytest.fixture
def steps(monkeypatch):
    steps = Steps()
    monkeypatch.setattr(maskgit, "distill_step", steps)
    return steps


# The network


@pytest.mark.parametrize("latent", [None, torch.rand(3, 1)], ids=["teacher", "student"])
def test_the_bias_per_position_and_the_tied_embedding_become_a_linear_head(latent):
    trainer = Trainer()
    more = () if latent is None else (latent,)
    call = as_model(trainer)
    head = call(CODE.flatten(1), R, *more, labels=Y, drop=DROP)
    assert isinstance(head, LinearHead)
    assert head.shape == (3, D, CODES + 1)
    expected = trainer.vit(CODE, Y, DROP, z=latent)
    torch.testing.assert_close(head.logits(), expected)
    weight = torch.randn(3, D, CODES + 1)
    ours = gradients(trainer.vit, (head.logits() * weight).sum())
    assert_same_gradients(ours, gradients(trainer.vit, (expected * weight).sum()))
    calls = len(trainer.vit.calls)
    as_model(trainer)(CODE.flatten(1), R, *more, labels=Y, drop=DROP)
    assert len(trainer.vit.calls) == calls + 1  # it is tried once


def test_networks_that_do_more_with_their_logits_give_all_of_them():
    trainer = Trainer()
    trainer.vit = Transformer(scale=2.0)
    logits = as_model(trainer)(CODE.flatten(1), R, labels=Y, drop=DROP)
    assert torch.equal(logits, trainer.vit(CODE, Y, DROP))
    assert trainer.vit.training


# The loss


@pytest.mark.parametrize("r", [R, R[:1], R[1:2]], ids=["mixed", "high", "low"])
@pytest.mark.parametrize("alpha_t", ["sigmoid", "linear", "const"])
def test_the_loss_is_that_of_the_formula(steps, alpha_t, r):
    trainer, teacher = trainers(alpha_t=alpha_t)
    t, batch = 1 - r, len(r)
    given = (trainer, teacher, CODE[:batch], Y[:batch], DROP[:batch])
    distill_loss(*given, t=t)
    steps.given, steps.consistency_x = steps.output, torch.randint(CODES, (batch, N, D))
    output = distill_loss(*given)
    factor = {"sigmoid": torch.sigmoid(20 * (0.5 - r)), "linear": t}.get(alpha_t, torch.ones(batch))
    low = (t < 0.05).float()
    weights = {"data_weight": 0.1 * factor, "component_weight": 20 * low}
    weights |= {"consistency_weight": 1 - low}
    expected = dense_loss(steps, weights).mean()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (gradients(trainer.vit, each) for each in (output.loss, expected))
    assert_same_gradients(ours, theirs)


def test_times_are_uniform_and_settings_reach_the_process(steps):
    trainer, teacher = trainers(sched_mode="cosine", sm_temp=2.0, teacher_steps=5, r_temp=3.0)
    distill_loss(trainer, teacher, CODE, Y, DROP)
    process = steps.options["process"]
    assert (process.schedule, process.temperature, process.teacher_steps) == ("cosine", 0.5, 5)
    assert (process.gumbel_temperature, process.exclude_mask) == (3.0, False)
    assert bool((steps.output.t > 0).all())
    assert bool((steps.output.t <= 1).all())


@pytest.mark.parametrize(("randomize", "follows"), [("random", False), ("none", True)])
def test_confidences_are_random_or_those_of_the_teacher(steps, randomize, follows):
    trainer, teacher = trainers(randomize=randomize)
    with torch.no_grad():
        teacher.vit.bias.zero_()[:2, 0] = 50.0  # certain of two positions
    r = torch.full((3,), 0.4)
    distill_loss(trainer, teacher, CODE, Y, DROP, t=1 - r, xt=torch.full((3, D), CODES))
    shown = (steps.output.xu != CODES).float().mean((0, 1))
    assert float(shown.min()) < 1.0
    assert bool((shown[:2] == 1.0).all()) == follows


def test_only_the_draws_at_xu_are_made_in_eval_mode():
    trainer, teacher = trainers()
    trainer.vit.dropout.p = 0.5
    distill_loss(trainer, teacher, CODE, Y, DROP, t=1 - R)
    assert [call.training for call in trainer.vit.calls[-2:]] == [True, False]
    assert [len(call.codes) for call in trainer.vit.calls[-2:]] == [3 * N, 2 * N]
    assert trainer.vit.training


# The loop


@pytest.fixture
def torchvision(monkeypatch):
    """The two functions of torchvision.utils that the loop uses."""
    utils, saved = ModuleType("torchvision.utils"), []
    utils.make_grid = lambda images, **options: (len(images), options)
    utils.save_image = lambda grid, path: saved.append((path, grid))
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.utils", utils)
    return saved


def test_an_epoch_steps_saves_samples_and_prints(tmp_path, steps, torchvision, capsys):
    folder = f"{tmp_path}/"
    trainer, teacher = trainers(folder=folder, iter=999)
    losses = []
    with accelerate_training(trainer):
        for _ in range(2):
            losses += trainer.fit_di4c(teacher, 1)
    assert trainer.args.iter == 1005
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "images"]
    assert trainer.saved == []
    ((path, (images, options)),) = torchvision
    assert (path, images) == (f"{folder}images/1000iter.jpg", 10)
    assert options == {"nrow": 5, "padding": 2, "normalize": True}
    (sampled,) = trainer.sampled
    assert sampled["teacher"] is teacher
    assert (sampled["w"], sampled["step"], sampled["nb_sample"]) == (3.0, 4, 10)
    assert sampled["labels"].tolist()[:9] == [1, 7, 282, 604, 724, 179, 681, 367, 635]
    (line,) = capsys.readouterr().out.splitlines()  # after step 1000
    assert len(line.split()) == 5
    assert all(isinstance(value, float) for value in losses)
    assert trainer.train_di4c(teacher) == "original"


def test_checkpoints_are_saved_under_the_names_of_the_repository(tmp_path, torchvision, capsys):
    trainer, teacher = trainers(folder=f"{tmp_path}/")
    with accelerate_training(trainer):
        trainer.train_di4c(teacher, log_iter=2)
    place = f"{tmp_path}/checkpoints"
    names = [(0, "current"), (2, "2iter"), (2, "current")]
    assert trainer.saved == [(f"{place}/{name}.pth", step, 5) for step, name in names]
    assert capsys.readouterr().out.count("\n") == 1


def test_other_processes_write_nothing(tmp_path, torchvision, capsys):
    trainer, teacher = trainers(folder=f"{tmp_path}/", is_master=False)
    with accelerate_training(trainer):
        trainer.train_di4c(teacher, log_iter=1)
    assert trainer.saved == trainer.sampled == torchvision == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("grad_cum", [1, 2])
def test_weights_move_by_clipped_steps_of_the_loss(tmp_path, monkeypatch, steps, grad_cum):
    args = {"folder": f"{tmp_path}/", "is_master": False, "grad_cum": grad_cum, "r_delta": 1.0}
    (trainer, teacher), (plain, _) = trainers(**args), trainers(**args)
    kept: list[tuple] = []

    def keep(*arguments, **options):
        kept.append((steps(*arguments, **options), options["context"]))
        return kept[-1][0]

    monkeypatch.setattr(maskgit, "distill_step", keep)
    with accelerate_training(trainer):
        mean = trainer.train_di4c(teacher)
    assert mean == pytest.approx(sum(out.loss.item() for out, _ in kept) / 3)
    monkeypatch.setattr(maskgit, "distill_step", steps)
    for index, (out, context) in enumerate(kept):
        steps.given = out
        value = distill_loss(plain, teacher, CODE, *context.values()).loss
        torch.testing.assert_close(value, out.loss, rtol=1e-5, atol=1e-5)
        if (index + 1) % grad_cum == 0:  # the others' gradients are dropped, as there
            plain.optim.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(plain.vit.parameters(), 1.0)
            plain.optim.step()
    torch.testing.assert_close(_weights(trainer), _weights(plain), rtol=1e-4, atol=1e-6)
    assert not any(map(torch.equal, _weights(trainer)[:1], _weights(Trainer())[:1]))
    assert trainer.scaler.get_scale() == 4.0


def _weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach() for p in trainer.vit.parameters()]


def test_a_gradient_that_is_not_finite_is_skipped_by_the_scaler(tmp_path):
    trainer, teacher = trainers(folder=f"{tmp_path}/", is_master=False)
    trainer.vit.mix.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = [weight.clone() for weight in _weights(trainer)]
    with accelerate_training(trainer):
        trainer.train_di4c(teacher)
    assert all(map(torch.equal, _weights(trainer), before))
    assert trainer.scaler.get_scale() == 0.5


# Bad input


def test_another_version_is_named():
    trainer, teacher = trainers()
    del trainer.args.r_delta
    message = "without args.r_delta; known to work: sony/di4c at ac61ff9f"
    with pytest.raises(TypeError, match=message):
        accelerate_training(trainer)
    with pytest.raises(TypeError, match="without r_delta; known to work"):
        distill_loss(trainer, teacher, CODE, Y, DROP)
    with pytest.raises(TypeError, match=r"teacher must have .* got Transformer without vit"):
        distill_loss(trainer, teacher.vit, CODE, Y, DROP)


def test_random_tokens_in_place_of_masks_are_refused():
    trainer, teacher = trainers(mask_value=-1)
    with pytest.raises(ValueError, match=r"args\.mask_value must be at least 1, got -1"):
        distill_loss(trainer, teacher, CODE, Y, DROP)
