"""The distiller: accumulation, clipping, skipped steps, failures and metrics."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from distill_support import (
    CONFIG,
    MASK,
    MIXED,
    PROCESS,
    X0,
    B,
    D,
    Recorder,
    UniformNoise,
    rng,
)
from distiller_support import BATCHES, adam, adamw, break_gradient, exponential, make, sgd

from di4c_fast.loss.problem import LossTerms
from di4c_fast.processes import MaskedProcess
from di4c_fast.training import DistillConfig, Distiller, data_weights, distill_step

T = torch.tensor(MIXED)


def weights(distiller) -> list[torch.Tensor]:
    return [p.detach().clone() for p in distiller.student.parameters()]


def assert_same(ours, expected, **tolerance) -> None:
    torch.testing.assert_close(ours, expected, **(tolerance or {"rtol": 0, "atol": 0}))


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
        ours = make(adam, process=process)
        plain = make(adam, process=process)
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
    distiller = make(schedule=exponential, average=0.5, accumulate=2)
    student = distiller.student
    start = student.out.weight.detach().clone()
    for _ in range(4):
        distiller.step(X0)
    assert distiller.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
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
    distiller = make(adamw, process=UniformNoise(), clip_norm=1.0)
    distiller.student.float()
    distiller.teacher.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = distiller.step(X0)
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == torch.float32
    assert all(bool(p.isfinite().all()) for p in distiller.student.parameters())


# Steps that are not finite


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_that_is_not_finite_leaves_weights_and_optimiser_as_they_are(fused):
    distiller = make(
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=fused), clip_norm=1.0
    )
    distiller.step(X0)
    before = weights(distiller)
    state = copy.deepcopy(distiller.optimizer.state[distiller.student.out.weight])
    break_gradient(distiller)
    metrics = distiller.step(X0)
    assert not math.isfinite(metrics["grad_norm"])
    assert float(metrics["skipped"]) == 1.0
    assert_same(weights(distiller), before)
    assert_same(distiller.optimizer.state[distiller.student.out.weight], state)
    metrics = distiller.step(X0)
    assert float(metrics["skipped"]) == 1.0
    assert distiller.iterations == 3
    assert not torch.equal(weights(distiller)[0], before[0])


def test_the_schedule_goes_on_over_a_first_step_that_is_skipped_without_a_warning(recwarn):
    distiller = make(schedule=exponential)
    break_gradient(distiller)
    distiller.step(X0)
    assert distiller.optimizer.param_groups[0]["lr"] == 0.05
    assert not recwarn.list


def test_skipping_can_be_turned_off():
    distiller = make(skip_nonfinite=False)
    break_gradient(distiller)
    metrics = distiller.step(X0)
    assert float(metrics["skipped"]) == 0.0
    assert not bool(distiller.student.out.bias.isfinite().all())


# Steps that fail, or would do harm


class FailsOnce(torch.optim.SGD):
    failed = False

    def step(self, closure=None):
        if not self.failed:
            self.failed = True
            raise MemoryError("once")
        return super().step(closure)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_goes_on_after_an_optimiser_that_failed_once(accumulate):
    distiller = make(lambda p: FailsOnce(p, lr=0.1), accumulate=accumulate)
    for _ in range(accumulate - 1):
        distiller.step(X0)
    with pytest.raises(MemoryError, match="once"):
        distiller.step(X0)
    assert (distiller.pending, distiller.iterations) == (0, 0)
    assert all(p.grad is None for p in distiller.student.parameters())
    before = distiller.student.out.weight.detach().clone()
    for _ in range(accumulate):
        metrics = distiller.step(X0)
    assert "grad_norm" in metrics
    assert (distiller.pending, distiller.iterations) == (0, 1)
    assert not torch.equal(distiller.student.out.weight, before)


def test_a_schedule_that_has_ended_is_reported_at_every_step():
    def schedule(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3)

    distiller = make(schedule=schedule)
    for _ in range(3):
        distiller.step(X0)
    for count in (4, 5):
        with pytest.raises(ValueError, match="steps"):
            distiller.step(X0)
        assert (distiller.pending, distiller.iterations) == (0, count)


@pytest.mark.parametrize("call", ["step", "load", "save"])
def test_nothing_is_done_while_the_student_holds_the_average(call, tmp_path):
    distiller = make(average=0.9)
    distiller.step(X0)
    distiller.save(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    argument = X0 if call == "step" else tmp_path / "a"
    with distiller.ema.applied():
        held = distiller.student.out.weight.detach().clone()
        with pytest.raises(RuntimeError, match=rf"{call}\(\) inside EMA\.applied\(\)"):
            getattr(distiller, call)(argument)
        assert torch.equal(distiller.student.out.weight, held)
    assert (tmp_path / "a").read_bytes() == content
    distiller.step(X0)
    assert distiller.iterations == 2


FUSED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_first_step_that_is_skipped_leaves_a_fused_optimiser_as_new(name):
    distiller, fresh = make(FUSED[name]), make(FUSED[name])
    # Memory that an optimiser would take uninitialised is not zero.
    filled = [torch.full_like(p, math.nan) for p in distiller.student.parameters()]
    del filled
    break_gradient(distiller)
    metrics = distiller.step(X0)
    assert float(metrics["skipped"]) == 1.0
    for seed in (5, 6):
        for each in (distiller, fresh):
            each.generator.manual_seed(seed)
            each.step(X0)
    assert_same(weights(distiller), weights(fresh))


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
    distiller = make(lambda p: torch.optim.Adam(p, lr=3e-3), config=config)
    assert float(data_weights(T, "constant", 0.1)[0]) == pytest.approx(0.1)
    losses = []
    for _ in range(60):
        distiller.generator.manual_seed(0)
        losses.append(float(distiller.step(X0, t=T)["loss"]))
    assert losses[-1] < 0.5 * losses[0]


def test_the_recipe_defaults_to_that_of_the_paper():
    student = Recorder(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    distiller = Distiller(student, Recorder(False), optimizer, process=PROCESS)
    assert distiller.config == DistillConfig()


# GradScaler


@pytest.mark.parametrize("optimizer", [sgd, adam], ids=["sgd", "adam"])
def test_a_scaled_run_is_the_unscaled_one(optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    options = {"clip_norm": 0.5, "accumulate": 2}
    scaled, plain = make(optimizer, scaler=scaler, **options), make(optimizer, **options)
    for batch in BATCHES[:8]:
        ours, expected = scaled.step(batch), plain.step(batch)
        torch.testing.assert_close(ours, expected)
    assert_same(weights(scaled), weights(plain), rtol=1e-6, atol=1e-7)
    assert scaler.get_scale() == 2.0**18
    assert scaled.iterations == 4


def test_a_scaler_leaves_steps_that_are_not_finite_out_and_halves_its_scale(recwarn):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    distiller = make(adam, exponential, scaler=scaler)
    break_gradient(distiller)
    before = weights(distiller)
    metrics = distiller.step(BATCHES[0])
    assert all(map(torch.equal, weights(distiller), before))
    assert float(metrics["skipped"]) == 1.0
    assert scaler.get_scale() == 4.0
    assert not distiller.optimizer.state
    metrics = distiller.step(BATCHES[1])
    assert float(metrics["skipped"]) == 1.0
    assert not any(map(torch.equal, weights(distiller), before))
    assert distiller.iterations == 2
    assert not recwarn.list
