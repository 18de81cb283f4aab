"""The distiller: accumulation, clipping, skipped steps, metrics, and arguments that are wrong."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from distill_support import (
    CONFIG,
    MASK,
    MIXED,
    PROCESS,
    VOCAB,
    X0,
    B,
    D,
    Recorder,
    UniformNoise,
    rng,
)
from torch import nn

from di4c_fast.loss.problem import LossTerms
from di4c_fast.processes import MaskedProcess
from di4c_fast.training import EMA, DistillConfig, Distiller, data_weights, distill_step

T = torch.tensor(MIXED)


def make(optimizer=torch.optim.SGD, process=PROCESS, config=CONFIG, lr=0.1, seed=0, **options):
    student, teacher = Recorder(True), Recorder(False, seed=1)
    if callable(optimizer):
        optimizer = optimizer(student.parameters(), lr=lr)
    options = {"generator": rng(seed), **options}
    return Distiller(student, teacher, optimizer, process=process, config=config, **options)


def weights(distiller) -> list[torch.Tensor]:
    return [p.detach().clone() for p in distiller.student.parameters()]


def assert_same(ours, expected, **tolerance) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}))


def break_gradient(distiller, times: int = 1) -> None:
    """Make the next gradients of a bias infinite."""
    left = [times]

    def hook(gradient):
        left[0] -= 1
        return gradient * math.inf if left[0] >= 0 else gradient

    distiller.student.out.bias.register_hook(hook)


# Gradients


@dataclasses.dataclass(frozen=True)
class EveryOther(MaskedProcess):
    """Masks the positions 0, 2, 4: a step without randomness of its own."""

    def corrupt(self, x0, t, *, valid=None, generator=None):
        xt = x0.clone()
        xt[:, ::2] = self.mask_id
        return xt


def test_accumulated_batches_give_the_step_of_one_batch():
    low = {"process": EveryOther(MASK), "config": dataclasses.replace(CONFIG, low_t=1.0)}
    latent = torch.rand(B, 3, 1, generator=rng(2))
    whole = make(**low)
    whole.step(X0, t=T, latent=latent)
    parts = make(**low, accumulate=2)
    before = weights(parts)
    first = parts.step(X0[:2], t=T[:2], latent=latent[:2])
    assert_same(weights(parts), before)
    assert (parts.pending, parts.iterations) == (1, 0)
    assert "grad_norm" not in first
    parts.step(X0[2:], t=T[2:], latent=latent[2:])
    assert (parts.pending, parts.iterations, parts.examples) == (0, 1, B)
    # Sums in another order, in float64.
    assert_same(weights(parts), weights(whole), rtol=1e-10, atol=1e-12)


def test_a_step_is_that_of_the_optimiser_on_the_loss_of_distill_step():
    for process in (PROCESS, UniformNoise()):
        ours = make(torch.optim.Adam, process=process)
        plain = make(torch.optim.Adam, process=process)
        for seed in range(2):
            ours.generator.manual_seed(seed)
            metrics = ours.step(X0)
            out = distill_step(
                plain.student, plain.teacher, X0, process=process, config=CONFIG,
                generator=rng(seed),
            )  # fmt: skip
            plain.optimizer.zero_grad()
            out.loss.backward()
            plain.optimizer.step()
            torch.testing.assert_close(metrics["loss"], out.loss.detach())
        # The parts of a loss go backward one by one: sums in another order.
        assert_same(weights(ours), weights(plain), rtol=1e-9, atol=1e-11)


def test_gradients_are_clipped_to_the_norm_and_reported_before():
    free, clipped = make(), make(clip_norm=1e-3)
    norms = [float(d.step(X0, t=T)["grad_norm"]) for d in (free, clipped)]
    assert norms[0] == norms[1] > 1e-3
    before = weights(make())
    for distiller, norm in ((free, norms[0]), (clipped, 1e-3)):
        pairs = zip(weights(distiller), before, strict=True)
        moved = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
        assert moved == pytest.approx(0.1 * norm, rel=1e-3)  # clipping adds 1e-6 to the norm


def test_gradients_left_over_from_elsewhere_do_not_count():
    clean, dirty = make(), make()
    for p in dirty.student.parameters():
        p.grad = torch.ones_like(p)
    for distiller in (clean, dirty):
        distiller.step(X0, t=T)
    assert_same(weights(clean), weights(dirty))


def test_schedule_and_average_follow_the_optimiser_steps():
    student = Recorder(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller(
        student, Recorder(False), optimizer, process=PROCESS, config=CONFIG, accumulate=2,
        ema=EMA(student, 0.5, warmup=False), generator=rng(),
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )  # fmt: skip
    start = student.out.weight.detach().clone()
    for _ in range(4):
        distiller.step(X0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    assert distiller.ema.updates == 2
    assert not torch.equal(distiller.ema.shadow["out.weight"], start)
    assert not torch.equal(distiller.ema.shadow["out.weight"], student.out.weight)


def test_an_exception_drops_the_gradients_that_wait():
    distiller = make(accumulate=3, process=UniformNoise())
    distiller.step(X0)
    forward = distiller.student.forward
    # The third student pass of a step is the component pass: one part went backward already.
    distiller.student.calls.clear()
    distiller.student.forward = lambda *a, **k: (
        forward(*a, **k) if len(distiller.student.calls) < 2 else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        distiller.step(X0)
    assert distiller.pending == 0
    assert all(p.grad is None for p in distiller.student.parameters())


def test_an_empty_batch_changes_nothing_but_the_count():
    distiller = make()
    before = weights(distiller)
    metrics = distiller.step(X0[:0])
    assert_same(weights(distiller), before)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0.0
    assert float(metrics["component"]) == 0.0
    assert (distiller.iterations, distiller.examples) == (1, 0)


def test_autocast_around_a_step_leaves_backward_and_optimiser_alone():
    distiller = make(torch.optim.AdamW, process=UniformNoise(), clip_norm=1.0)
    distiller.student.float()
    distiller.teacher.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = distiller.step(X0)
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == torch.float32
    assert all(bool(p.isfinite().all()) for p in distiller.student.parameters())


# Steps that are not finite


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_that_is_not_finite_leaves_weights_and_optimiser_as_they_are(fused):
    def adam(parameters, lr):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.5, fused=fused)

    distiller = make(adam, clip_norm=1.0)
    distiller.step(X0)
    before = weights(distiller)
    state = {
        key: value.clone()
        for key, value in distiller.optimizer.state[distiller.student.out.weight].items()
    }
    break_gradient(distiller)
    metrics = distiller.step(X0)
    assert not math.isfinite(metrics["grad_norm"])
    assert float(metrics["skipped"]) == 1.0
    assert_same(weights(distiller), before)
    for key, value in distiller.optimizer.state[distiller.student.out.weight].items():
        assert torch.equal(value, state[key])
    metrics = distiller.step(X0)
    assert float(metrics["skipped"]) == 1.0
    assert distiller.iterations == 3
    assert not torch.equal(weights(distiller)[0], before[0])


def test_the_schedule_goes_on_over_a_first_step_that_is_skipped_without_a_warning(recwarn):
    student = Recorder(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller(
        student, Recorder(False), optimizer, process=PROCESS, config=CONFIG, generator=rng(),
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )  # fmt: skip
    break_gradient(distiller)
    distiller.step(X0)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert not recwarn.list


def test_skipping_can_be_turned_off():
    distiller = make(skip_nonfinite=False)
    break_gradient(distiller)
    metrics = distiller.step(X0)
    assert float(metrics["skipped"]) == 0.0
    assert not bool(distiller.student.out.bias.isfinite().all())


# Metrics


def test_metrics_are_the_means_of_the_terms_that_count():
    distiller = make()
    metrics = distiller.step(X0, t=T)
    low = CONFIG.low_t > T
    out = distill_step(
        Recorder(True), distiller.teacher, X0, process=PROCESS, config=CONFIG, generator=rng(), t=T
    )
    assert set(metrics) == {"loss", *LossTerms._fields, "grad_norm", "skipped"}
    for name, term in out.terms._asdict().items():
        counts = ~low if name.startswith("consistency") else low if name == "component" else low | 1
        torch.testing.assert_close(metrics[name], term[counts.bool()].mean())
    torch.testing.assert_close(metrics["loss"], out.loss.detach())
    assert all(not value.requires_grad and value.shape == () for value in metrics.values())
    assert all(bool(value.isfinite()) for value in make().step(X0, t=T * 0 + 0.1).values())


def test_terms_can_be_left_out():
    metrics = make().step(X0, t=T, return_terms=False)
    assert set(metrics) == {"loss", "grad_norm", "skipped"}


def test_what_the_caller_passes_reaches_the_step():
    distiller = make()
    latent, latent_u = torch.rand(B, 3, 1), torch.rand(B, 2, 1)
    label = torch.arange(B)
    valid = torch.ones(B, D, dtype=torch.bool)
    valid[:, 0] = False
    distiller.step(X0, t=T, latent=latent, latent_u=latent_u, context={"label": label}, valid=valid)
    at_t, at_u = distiller.student.calls
    # Examples with a consistency pass come first within the step.
    order = [1, 3, 0, 2]
    assert torch.equal(at_t["latent"], latent[order].flatten(0, 1))
    assert torch.equal(at_u["latent"], latent_u[[1, 3]].flatten(0, 1))
    assert torch.equal(at_t["context"]["label"], label[order].repeat_interleave(3))
    assert torch.equal(at_t["tokens"][:, 0], X0[order, 0].repeat_interleave(3))


def test_training_lowers_the_loss():
    config = dataclasses.replace(CONFIG, data_schedule="constant", low_t=0.0)
    distiller = make(torch.optim.Adam, config=config, lr=3e-3)
    assert float(data_weights(T, "constant", 0.1)[0]) == pytest.approx(0.1)
    losses = []
    for _ in range(60):
        distiller.generator.manual_seed(0)
        losses.append(float(distiller.step(X0, t=T)["loss"]))
    assert losses[-1] < 0.5 * losses[0]


# Bad input


def other_optimizer(student):
    return torch.optim.SGD(Recorder(True).parameters(), lr=0.1)


PLATEAU = torch.optim.lr_scheduler.ReduceLROnPlateau
EXPONENTIAL = torch.optim.lr_scheduler.ExponentialLR


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student": lambda s, o: s.forward}, TypeError, "student must be a Module, got method"),
        ({"teacher": lambda s, o: 3}, TypeError, "teacher must be callable, got int"),
        ({"optimizer": lambda s, o: "adam"}, TypeError, "optimizer must be a Optimizer, got str"),
        (
            {"optimizer": lambda s, o: other_optimizer(s)},
            ValueError,
            "optimizer must hold parameters of the student only, got 12 of 12 that are not",
        ),
        ({"process": lambda s, o: "masked"}, TypeError, "process must be a Process, got str 'mas"),
        ({"config": lambda s, o: {}}, TypeError, "config must be a DistillConfig, got dict"),
        ({"ema": lambda s, o: 0.999}, TypeError, "ema must be an EMA or None, got float"),
        (
            {"ema": lambda s, o: EMA(Recorder(True))},
            ValueError,
            "ema must average the student, got an EMA of another module",
        ),
        ({"scheduler": lambda s, o: 0.5}, TypeError, "scheduler must be an LRScheduler or None"),
        ({"scheduler": lambda s, o: PLATEAU(o)}, ValueError, "scheduler must step without a metr"),
        (
            {"scheduler": lambda s, o: EXPONENTIAL(other_optimizer(s), 0.5)},
            ValueError,
            "scheduler must be that of optimizer",
        ),
        ({"clip_norm": lambda s, o: 0.0}, ValueError, "clip_norm must be positive, got 0.0"),
        ({"clip_norm": lambda s, o: math.nan}, ValueError, "clip_norm must be finite"),
        ({"clip_norm": lambda s, o: "1"}, TypeError, "clip_norm must be a number, got str '1'"),
        ({"accumulate": lambda s, o: 0}, ValueError, "accumulate must be at least 1, got 0"),
        ({"accumulate": lambda s, o: 2.0}, TypeError, "accumulate must be an int, got float 2.0"),
        ({"skip_nonfinite": lambda s, o: 1}, TypeError, "skip_nonfinite must be True or False"),
        ({"generator": lambda s, o: 0}, TypeError, "generator must be a torch.Generator or None"),
    ],
)
def test_a_distiller_names_what_is_wrong(changes, error, message):
    student = Recorder(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    arguments = {
        "student": student,
        "teacher": Recorder(False),
        "optimizer": optimizer,
        "process": PROCESS,
        **{name: value(student, optimizer) for name, value in changes.items()},
    }
    with pytest.raises(error, match=message):
        Distiller(**arguments)


def test_a_step_names_what_is_wrong():
    distiller = make()
    with pytest.raises(TypeError, match=r"x0 must have dtype torch\.int64"):
        distiller.step(X0.float())
    with pytest.raises(ValueError, match=r"t must have shape \(B,\) = \(4,\)"):
        distiller.step(X0, t=T[:2])
    distiller.teacher = nn.Sequential(nn.Embedding(VOCAB, VOCAB + 1))
    distiller.teacher.forward = lambda tokens, t: torch.zeros(*tokens.shape, VOCAB + 1)
    with pytest.raises(ValueError, match="student must return logits over V = 7 classes"):
        distiller.step(X0)
    assert distiller.iterations == 0


def test_the_recipe_defaults_to_that_of_the_paper():
    student = Recorder(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller(student, Recorder(False), optimizer, process=PROCESS)
    assert distiller.config == DistillConfig()
