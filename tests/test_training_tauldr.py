"""The training drop-in for the fork of tauLDR, on stand-ins with its names and signatures."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from torch import Tensor, nn
from training_cases import Steps, assert_same_gradients, dense_loss, gradients

from di4c_fast.heads import LogisticHead
from di4c_fast.integrations import tauldr
from di4c_fast.integrations.tauldr import accelerate_training

S, SHAPE, D, N = 8, (1, 2, 3), 6, 4


class Image(nn.Module):
    """An image model with a Gaussian rate: `net` gives locations and scales."""

    S, rate_sigma, Q_sigma, time_base, time_exponential = S, 1.2, 4.0, 0.3, 100.0
    device, data_shape, fix_logistic, lam_raw_dim = "cpu", SHAPE, False, 1

    def __init__(self, latent: bool, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(int(latent))
        calls: list[types.SimpleNamespace] = []

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.mix = nn.Linear(D + 1 + latent, 2 * D)
                self.dropout = nn.Dropout(dropout)

            def forward(self, x, times, lams=None):
                calls.append(types.SimpleNamespace(rows=len(x), training=self.training))
                given = [x.flatten(1) / S - 0.5, times[:, None], *([lams] if latent else [])]
                out = self.mix(torch.cat([part.to(self.mix.weight) for part in given], 1))
                return self.dropout(out).view(-1, 2, *SHAPE[1:])

        self.net, self.calls = Net(), calls


class DistilChain:
    def __init__(self, time_schedule=None, use_cv=True, **times):
        self.min_time, self.min_distil_time, self.max_distil_time = 0.01, 0.001, 0.01
        self.time_schedule, self.use_cv = time_schedule, use_cv
        vars(self).update(times)

    def calc_loss(self, minibatch, state, writer=None, eval=False):
        return "original"


@pytest.fixture
def losses():
    module = types.ModuleType("losses")
    module.DistilChain = type("DistilChain", (DistilChain,), {"calc_loss": DistilChain.calc_loss})
    return module


@pytest.fixture
def steps(monkeypatch):
    steps = Steps()
    monkeypatch.setattr(tauldr, "distill_step", steps)
    return steps


def state(rows: int = N, **options) -> dict:
    return {"model": Image(True, **options), "teacher": Image(False), "distil_batch_size": rows}


def batch(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(S, (size, *SHAPE), generator=generator, dtype=torch.int32)


COEFFICIENTS = {
    None: torch.ones_like,
    "zero": torch.zeros_like,
    "sigmoid": lambda t: torch.sigmoid(20 * (t - 0.5)),
    "linear": lambda t: t,
}


def expected_parts(steps: Steps, schedule, use_cv: bool) -> list[Tensor]:
    """Data, component and consistency losses of the batch by the dense formula."""
    out, options = steps.output, {"control_variate": use_cv}
    low = Steps()  # the component pass: an example per component, with one λ each
    low.student, low.teacher, low.options = steps.student, steps.teacher, {}
    low.x0, t = steps.x0.repeat_interleave(N, 0), out.t_min.flatten()
    latent = out.latent_min.view(len(t), 1, 1)
    changes = {"t": t, "u": t, "xt": out.x_min.flatten(0, 1), "xu": None, "latent": latent}
    low.output = dataclasses.replace(out, **changes)

    def part(at: Steps, **weights) -> Tensor:
        zero = dict.fromkeys(("data_weight", "teacher_weight", "consistency_weight"), 0.0)
        return dense_loss(at, {**zero, **weights}, **options)

    return [
        part(steps, teacher_weight=1.0, data_weight=COEFFICIENTS[schedule](out.t)),
        part(low, component_weight=1.0).view(-1, N).mean(1),
        part(steps, consistency_weight=1.0),
    ]


@pytest.mark.parametrize("schedule", list(COEFFICIENTS))
@pytest.mark.parametrize("use_cv", [True, False])
def test_the_loss_is_that_of_the_formula(losses, steps, schedule, use_cv):
    chain, now = losses.DistilChain(schedule, use_cv), state()
    with accelerate_training(losses):
        chain.calc_loss(batch(3), now, None)
        steps.given, steps.consistency_x = steps.output, torch.randint(S, (3, N, D))
        value = chain.calc_loss(batch(3), now, None)
        parts = expected_parts(steps, schedule, use_cv)
        four = chain.calc_loss(batch(3), now, eval=True)
    expected = sum(parts).mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    model = now["model"]
    ours, theirs = (gradients(model, each) for each in (value, expected))
    assert_same_gradients(ours, theirs)
    means = [part.mean().detach() for part in parts]
    torch.testing.assert_close(list(four[:3]), means, rtol=1e-4, atol=1e-4)
    _, _, both, correlation = four
    assert (float(both) == float(correlation)) != use_cv


def test_pixels_are_logistic_heads_and_images_are_flattened(losses, steps):
    with accelerate_training(losses):
        losses.DistilChain().calc_loss(batch(3), state())
    assert torch.equal(steps.x0, batch(3).flatten(1).long())
    head = steps.student(steps.x0, torch.ones(3), torch.rand(3, 1))
    assert isinstance(head, LogisticHead)
    assert head.shape == (3, D, S)


@pytest.mark.parametrize(
    ("size", "rows", "kept"), [(50, 4, 32), (32, 4, 32), (3, 60, 2), (2, 200, 1)]
)
def test_batches_are_cut_to_128_rows(losses, steps, size, rows, kept):
    with accelerate_training(losses), torch.no_grad():
        losses.DistilChain().calc_loss(batch(size), state(rows))
    assert len(steps.x0) == kept
    there = {tuple(row) for row in batch(size).flatten(1).tolist()}
    assert {tuple(row) for row in steps.x0.tolist()} <= there


def test_steps_are_log_uniform_and_times_uniform_above_them(losses, steps):
    chain = losses.DistilChain(min_time=0.2, min_distil_time=0.01, max_distil_time=0.3)
    now, lengths, places = state(1), [], []
    with accelerate_training(losses), torch.no_grad():
        for _ in range(40):
            chain.calc_loss(batch(100), now)
            t, u = steps.output.t, steps.output.u
            lengths.append(torch.log((t - u) / 0.01) / torch.log(torch.tensor(30.0)))
            places.append((u - 0.2) / (0.8 - (t - u)))
    for values in (torch.cat(lengths), torch.cat(places)):
        assert -1e-4 < float(values.min()) < 0.01 < 0.99 < float(values.max()) < 1 + 1e-4
        assert abs(float(values.mean()) - 0.5) < 5 * (1 / 12 / 4000) ** 0.5


def test_networks_stay_in_the_mode_that_they_are_in(losses):
    now = state(dropout=0.5)
    now["teacher"].eval()
    with accelerate_training(losses):
        losses.DistilChain().calc_loss(batch(2), now)
    model, teacher = now["model"], now["teacher"]
    assert [call.training for call in model.calls] == [True] * 3
    assert [call.training for call in teacher.calls] == [False] * 2
    assert [call.rows for call in teacher.calls] == [2, 2 * N]
    assert all(call.rows == 2 * N for call in model.calls)


def test_the_handle_undoes_it(losses):
    with accelerate_training(losses):
        assert isinstance(losses.DistilChain().calc_loss(batch(1), state()), Tensor)
    assert losses.DistilChain().calc_loss(batch(1), state()) == "original"


# Bad input


def test_another_version_is_named(losses):
    with pytest.raises(TypeError, match=r"losses must have .* without DistilChain\.calc_loss"):
        accelerate_training(types.ModuleType("losses"))
    chain = losses.DistilChain()
    del chain.use_cv
    message = "DistilChain without use_cv; known to work: sony/di4c at ac61ff9f"
    with accelerate_training(losses), pytest.raises(TypeError, match=message):
        chain.calc_loss(batch(1), state())
