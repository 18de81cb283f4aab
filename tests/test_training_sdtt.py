"""The training drop-in for the fork of SDTT, on a stand-in with the names of `MultiRoundSDTT`."""

from __future__ import annotations

import math
import types
from collections import deque

import pytest
import torch
from dit_models import DIT, MASK, SDTT
from torch import nn
from training_cases import Steps, assert_same_gradients, dense_loss, gradients

from di4c_fast.integrations import sdtt
from di4c_fast.integrations.sdtt import accelerate_training

N, D = 4, 7
MIXED = torch.tensor([0.01, 0.4, 0.9])
X0 = torch.randint(MASK, (3, D), generator=torch.Generator().manual_seed(0))


class Trainable(SDTT):
    """The names that training touches besides."""

    def __init__(self, di4c_teacher: bool = False, dropout: float = 0.0, rank: int = 0, **config):
        super().__init__(student=True, time_conditioning=True, T=1024)
        self.teacher = [DIT(seed=1, student=di4c_teacher).eval()]
        self.backbone.dropout.p = dropout
        self.list_cnt, self.trainer = 0, types.SimpleNamespace(global_rank=rank)
        for name in ("distil", "data", "data_cor", "consis", "consis_cor"):
            setattr(self, f"{name}_list", deque())
        settings = {"alpha_t": "sigmoid", "alpha_const": 0.1, "distil_delta": 0.02}
        settings |= {"latent_bsize": N, "log_unif": False}
        self.config = types.SimpleNamespace(**{**settings, **config})
        self.asked: list[tuple] = []

    def _sample_t_like(self, x0, log_unif=False, distil_prob=0.3):
        self.asked.append((tuple(x0.shape), log_unif))
        return torch.full((len(x0),), 0.5)

    def di4c_loss(self, x0, t=None, attention_mask=None):
        return "original"


@pytest.fixture
def steps(monkeypatch):
    steps = Steps(MASK)
    monkeypatch.setattr(sdtt, "distill_step", steps)
    return steps


WEIGHTS = {
    "sigmoid": lambda t: 0.1 * torch.sigmoid(20 * (t - 0.5)),
    "linear": lambda t: 0.1 * t,
    "const": lambda t: torch.full_like(t, 0.1),
}


@pytest.mark.parametrize("times", [MIXED, MIXED[1:], MIXED[:1]], ids=["mixed", "high", "low"])
@pytest.mark.parametrize("alpha_t", list(WEIGHTS))
def test_the_loss_is_that_of_the_formula(steps, alpha_t, times):
    torch.manual_seed(1)
    module = Trainable(alpha_t=alpha_t, distil_delta=0.2)
    x0 = X0[: len(times)]
    with accelerate_training(module):
        module.di4c_loss(x0, times)
        steps.given = steps.output
        steps.consistency_x = torch.randint(MASK, (len(x0), N, D))
        value = module.di4c_loss(x0, times)
    low = (times < 0.2).float()
    weights = {"data_weight": WEIGHTS[alpha_t](times), "component_weight": low}
    weights |= {"consistency_weight": 1 - low}
    expected = dense_loss(steps, weights).mean()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (gradients(module.backbone, each) for each in (value, expected))
    assert_same_gradients(ours, theirs)


def test_one_time_is_asked_for_and_noise_levels_are_quantised_twice(steps):
    module = Trainable(log_unif=True)
    with accelerate_training(module):
        module.di4c_loss(X0)
    assert module.asked == [((1, D), True)]
    assert torch.equal(steps.output.t, torch.full((3,), 0.5))
    torch.testing.assert_close(steps.output.u, torch.full((3,), 0.5 - 1 / 1024))
    t = torch.tensor([1 / 1024, 0.5, 0.7])
    share = steps.options["process"].share(t)
    torch.testing.assert_close(share, 0.999 * (torch.floor(t * 1024) + 1) / 1024)
    levels = [call.sigma[0].exp() for call in module.backbone.calls[-2:]]  # at x_t and at x_u
    expected = [1 / (1 - 0.999 * k / 1024) for k in (513, 512)]
    torch.testing.assert_close(torch.stack(levels), torch.tensor(expected))


def test_only_the_draws_at_xu_are_made_in_eval_mode():
    module = Trainable(dropout=0.5).eval()
    with accelerate_training(module):
        module.di4c_loss(X0, MIXED[1:].mean().expand(3))
    at_t, at_u = module.backbone.calls[-2:]
    assert (at_t.training, at_u.training) == (True, False)
    assert module.backbone.training
    assert module.noise.training
    assert not module.teacher[0].training
    assert (len(module.teacher[0].calls[-1].tokens), len(at_t.tokens)) == (3, 3 * N)


def test_a_di4c_teacher_is_called_with_a_latent_per_component(steps):
    module = Trainable(di4c_teacher=True)
    with accelerate_training(module):
        value = module.di4c_loss(X0, MIXED)
    assert bool(value.isfinite())
    assert steps.options["config"].teacher_components == N
    assert len(module.teacher[0].calls[-1].tokens) == 3 * N


def test_compiled_students_draw_their_latent_themselves():
    module = Trainable()
    module.backbone._orig_mod = None
    with accelerate_training(module):
        value = module.di4c_loss(X0, MIXED)
    value.backward()
    assert all(p.grad is not None for p in module.backbone.latent_projection.parameters())


def test_a_student_that_has_been_replaced_is_the_new_one():
    module = Trainable()
    with accelerate_training(module):
        module.di4c_loss(X0, MIXED)
        module.backbone = DIT(seed=5, student=True)
        module.di4c_loss(X0, MIXED).backward()
    assert module.backbone.calls


@pytest.mark.parametrize("rank", [0, 1])
def test_the_deques_fill_every_50_steps(steps, capsys, rank):
    module = Trainable(rank=rank, distil_delta=0.2)
    names = ("distil_list", "data_list", "data_cor_list", "consis_list", "consis_cor_list")
    lists = [getattr(module, name) for name in names]
    seen = []
    with accelerate_training(module), torch.no_grad():
        for step in range(150):
            module.di4c_loss(X0[:, :2], MIXED)
            terms = [term.double() for term in steps.output.terms]
            data, teacher, consistency, marginal, component = terms
            low = torch.tensor([True, False, False])
            weighted = WEIGHTS["sigmoid"](MIXED) * data + teacher
            both = consistency + marginal
            five = component.where(low, 0), weighted, data, both, consistency
            seen.append([float(number.mean()) for number in five])
            assert [len(each) for each in lists] == [min((step + 1) // 50 * 50, 100)] * 5
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == (3 if rank == 0 else 0)
    for numbers, expected in zip(lists, zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(list(numbers), list(expected[50:]), rtol=1e-4, atol=1e-5)
    if rank == 0:
        means = [math.fsum(numbers) / 100 for numbers in lists]
        torch.testing.assert_close([float(x) for x in printed[-1].split()], means)


def test_the_handle_undoes_it_and_no_weight_changes_its_name():
    module = Trainable()
    names = list(module.state_dict())
    handle = accelerate_training(module)
    module.di4c_loss(X0, MIXED)
    assert list(module.state_dict()) == names
    handle.remove()
    assert module.di4c_loss(X0) == "original"


# Bad input


def test_another_version_is_named():
    module = Trainable()
    del module.config.distil_delta
    message = "without config.distil_delta; known to work: sony/di4c at ac61ff9f"
    with pytest.raises(TypeError, match=message):
        accelerate_training(module)
    with pytest.raises(
        TypeError, match=r"got Linear without backbone, .* known to work: sony/di4c"
    ):
        accelerate_training(nn.Linear(1, 1))
    assert module.di4c_loss(X0) == "original"
