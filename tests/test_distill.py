"""One distillation step: which model calls it makes, what is random in it, and that it teaches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from distill_support import (
    CONFIG,
    HIGH,
    LOW,
    MASK,
    MIXED,
    PROCESS,
    VOCAB,
    X0,
    B,
    D,
    Recorder,
    UniformNoise,
    models,
    rng,
    step,
)
from torch import nn

from di4c_fast.processes import MaskedProcess
from di4c_fast.training import DistillConfig, distill_step

# The model calls


def test_one_teacher_call_of_b_rows_serves_targets_and_draws():
    student, teacher = models()
    out = step(student, teacher, HIGH)
    (call,) = teacher.calls
    assert torch.equal(call["tokens"], out.xt)
    assert torch.equal(call["t"], out.t)
    assert call["latent"] is None
    assert out.xu.shape == (B, 2, D)


def test_the_student_is_called_at_xu_without_a_graph_and_at_xt_with_one():
    student, teacher = models()
    out = step(student, teacher, HIGH)
    at_t, at_u = student.calls
    assert torch.equal(at_u["tokens"], out.xu.flatten(0, 1))
    assert torch.equal(at_u["t"], out.u.repeat_interleave(2))
    assert torch.equal(at_u["latent"], out.latent_u.flatten(0, 1))
    assert torch.equal(at_t["tokens"], out.xt.repeat_interleave(3, 0))
    assert torch.equal(at_t["t"], out.t.repeat_interleave(3))
    assert torch.equal(at_t["latent"], out.latent.flatten(0, 1))
    assert (at_u["grad"], at_t["grad"]) == (False, True)
    assert (at_u["training"], at_t["training"]) == (False, True)
    assert (teacher.calls[0]["grad"], teacher.calls[0]["training"]) == (False, False)
    assert student.training
    assert teacher.training


def test_low_times_need_no_student_pass_at_xu():
    student, teacher = models()
    out = step(student, teacher, LOW)
    assert len(student.calls) == 1
    assert out.xu is None
    assert bool(out.low.all())
    assert len(teacher.calls) == 1


def test_only_the_examples_that_need_it_go_through_the_xu_pass():
    student, teacher = models()
    out = step(student, teacher, MIXED)
    at_u = student.calls[1]
    assert at_u["tokens"].shape == (2 * 2, D)
    assert torch.equal(at_u["tokens"], out.xu[[1, 3]].flatten(0, 1))
    assert torch.equal(at_u["latent"], out.latent_u[[1, 3]].flatten(0, 1))
    assert torch.equal(out.xu[[0, 2]], out.xt[[0, 2]].unsqueeze(1).expand(-1, 2, -1))
    torch.testing.assert_close(out.t, torch.tensor(MIXED))


def test_u_is_a_teacher_step_or_half_the_time_earlier():
    out = step(*models(), HIGH)
    torch.testing.assert_close(out.u, torch.tensor([0.53, 0.325, 0.35, 0.43]))


def test_a_di4c_teacher_is_called_once_with_its_components_and_draws_follow_them():
    class ByLatent(nn.Module):
        calls = 0

        def forward(self, tokens, t, latent):
            self.calls += 1
            assert tokens.shape == (B * 2, D)
            logits = torch.full((*tokens.shape, VOCAB), -1e9)
            token = (latent[:, 0] > 0.5).long().view(-1, 1, 1).expand(-1, D, 1)
            return logits.scatter(2, token, 0.0)

    teacher = ByLatent()
    latent_teacher = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.2, 0.3], [0.8, 0.7]]).unsqueeze(-1)
    config = DistillConfig(
        components=2, teacher_step=1.0, teacher_components=2, backend="reference"
    )
    student = Recorder(True)
    out = step(student, teacher, [1.0] * B, config, latent_teacher=latent_teacher)
    assert teacher.calls == 1
    unmasked = out.xu != MASK
    component = (latent_teacher > 0.5).long().expand(-1, -1, D)
    assert torch.equal(out.xu[unmasked], component[unmasked])
    assert bool(unmasked.any())


def test_a_teacher_with_trainable_weights_gets_no_graph_and_no_gradient():
    student, teacher = models()
    step(student, teacher, HIGH).loss.backward()
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_gradients_survive_autocast():
    student, teacher = Recorder(True).float(), Recorder(False, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = step(student, teacher, HIGH)
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    plain = Recorder(True).float()
    step(plain, teacher, HIGH, latent=out.latent, latent_u=out.latent_u).loss.backward()
    for ours, p in zip(student.parameters(), plain.parameters(), strict=True):
        # bf16 activations: the direction is what must survive.
        cosine = torch.cosine_similarity(ours.grad.flatten(), p.grad.flatten(), dim=0)
        assert float(cosine) > 0.9


def test_dropout_acts_at_xt_only():
    student, teacher = models(dropout=0.5)
    torch.manual_seed(0)
    first = step(student, teacher, HIGH)
    torch.manual_seed(1)
    second = step(student, teacher, HIGH)
    assert torch.equal(first.xu, second.xu)
    assert float(first.loss.detach()) != float(second.loss.detach())
    student.eval()
    assert torch.equal(*(step(student, teacher, HIGH).loss for _ in range(2)))


def test_modes_come_back_when_a_model_fails():
    student, teacher = Recorder(True), Recorder(False)
    student.mix.eval()
    teacher.forward = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        step(student, teacher, HIGH)
    assert student.training
    assert not student.mix.training


# Randomness and what the caller passes


def test_a_step_is_a_function_of_the_generator():
    student, teacher = models()
    first, again, other = (step(student, teacher, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.loss, again.loss)
    for name in ("t", "xt", "xu", "latent", "latent_u"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.latent, other.latent)


def test_latents_are_fresh_for_the_two_passes_unless_passed():
    student, teacher = models()
    out = step(student, teacher, HIGH)
    assert out.latent.unique().numel() == B * 3
    assert torch.cat([out.latent.flatten(), out.latent_u.flatten()]).unique().numel() == B * 5
    latent, latent_u = torch.rand(B, 3, 1), torch.rand(B, 2, 1)
    student.calls.clear()
    out = step(student, teacher, HIGH, latent=latent, latent_u=latent_u)
    assert torch.equal(student.calls[1]["latent"], latent_u.flatten(0, 1))
    assert torch.equal(student.calls[0]["latent"], latent.flatten(0, 1))
    assert torch.equal(out.latent, latent)


@pytest.mark.parametrize(("name", "call"), [("latent", 0), ("latent_min", 2)])
def test_a_given_latent_is_used_and_may_have_a_gradient(name, call):
    given = torch.rand(B, 3, 1, requires_grad=True)
    student, teacher = models()
    out = step(student, teacher, HIGH, process=UniformNoise(), **{name: given})
    assert torch.equal(student.calls[call]["latent"], given.flatten(0, 1))
    out.loss.backward()
    assert float(given.grad.abs().min()) > 0
    assert not getattr(out, name).requires_grad


def test_times_are_drawn_low_with_the_configured_probability():
    for probability in (1.0, 0.0):
        config = dataclasses.replace(CONFIG, low_t=0.1, low_t_probability=probability)
        out = step(*models(), config=config)
        assert bool(((out.t < 0.1) == (probability == 1.0)).all())


def test_times_below_the_bound_by_quantisation_alone_still_take_the_low_branch():
    config = DistillConfig(components=2, low_t=0.15, low_t_probability=0.5, backend="reference")
    out = step(*models(), config=config, seed=2, process=MaskedProcess(MASK, levels=10))
    assert torch.equal(out.low, out.t < 0.15)


@pytest.mark.parametrize(
    ("times", "process"),
    [(HIGH, PROCESS), (MIXED, PROCESS), (HIGH, UniformNoise())],
    ids=["high", "mixed", "component pass"],
)
def test_context_follows_its_example_through_every_pass(times, process):
    student, teacher = models()
    label = torch.arange(B) * 10
    out = step(student, teacher, times, process=process, context={"label": label})
    t_of = dict(zip(label.tolist(), out.t.tolist(), strict=True))
    u_of = dict(zip(label.tolist(), out.u.tolist(), strict=True))
    at_t, at_u, *at_min = student.calls
    for call, of in ((teacher.calls[0], t_of), (at_t, t_of), (at_u, u_of)):
        labels = call["context"]["label"].tolist()
        assert [of[value] for value in labels] == call["t"].tolist()
    for call in (*at_min, *teacher.calls[1:]):
        assert torch.equal(call["context"]["label"], label.repeat_interleave(3))


def test_draws_default_to_the_number_of_components():
    config = DistillConfig(components=3, teacher_step=0.3, backend="reference")
    out = step(*models(), HIGH, config)
    assert out.xu.shape == (B, 3, D)


# On a GPU


@pytest.mark.gpu
def test_a_cpu_generator_gives_the_same_step_on_a_gpu():
    results = []
    for device in ("cpu", "cuda"):
        student, teacher = Recorder(True).to(device), Recorder(False, seed=1).to(device)
        out = distill_step(
            student, teacher, X0.to(device), process=PROCESS, config=CONFIG, generator=rng(3)
        )
        out.loss.backward()
        gradients = [p.grad.cpu() for p in student.parameters()]
        results.append((out, gradients))
    (on_cpu, cpu_gradients), (on_gpu, gpu_gradients) = results
    for name in ("t", "xt", "xu", "latent", "latent_u"):
        assert torch.equal(getattr(on_gpu, name).cpu(), getattr(on_cpu, name))
    torch.testing.assert_close(on_gpu.loss.detach().cpu(), on_cpu.loss.detach())
    torch.testing.assert_close(gpu_gradients, cpu_gradients, rtol=1e-6, atol=1e-9)


# Learning


def test_distillation_teaches_a_one_step_student_the_correlation_its_teacher_lacks():
    """Data: two equal coins. The teacher knows everything but needs two steps."""
    coin, mask = 2, 2

    def teacher(tokens, t):
        other = tokens.flip(1)
        logits = torch.zeros(*tokens.shape, 3)
        known = other != mask
        logits[known] = -1e9
        logits[known, other[known]] = 0.0
        return logits

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6 + 8, 64), nn.GELU(), nn.Linear(64, 6))

        def forward(self, tokens, t, latent):
            wave = (latent * torch.pi * torch.tensor([0.5, 1, 2, 4])).T.T
            x = nn.functional.one_hot(tokens, 3).float().flatten(1)
            return self.net(torch.cat([x, wave.sin(), wave.cos()], 1)).view(-1, 2, 3)

    torch.manual_seed(0)
    student = Student()
    generator = rng(0)
    config = DistillConfig(
        components=8, teacher_step=0.25, data_weight=1.0, data_schedule="constant", low_t=0.0,
        low_t_probability=0.0, backend="reference",
    )  # fmt: skip
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    for _ in range(250):
        x0 = torch.randint(coin, (16, 1), generator=generator).expand(-1, 2).contiguous()
        out = distill_step(
            student, teacher, x0, process=MaskedProcess(mask), config=config, generator=generator
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    with torch.no_grad():
        latent = torch.rand(2000, 1, generator=generator)
        tokens = torch.full((2000, 2), mask)
        p = student(tokens, torch.ones(2000), latent)[..., :mask].softmax(-1)
    equal = (p[:, 0] * p[:, 1]).sum(-1).mean()
    heads = p[:, 0, 0].mean()
    # Independent coins agree half of the time; the data always does.
    assert float(equal) > 0.85
    assert 0.4 < float(heads) < 0.6


def test_no_share_of_the_times_is_set_aside_for_a_branch_that_is_off():
    config = dataclasses.replace(CONFIG, low_t=0.0, low_t_probability=0.9)
    out = step(*models(), config=config, x0=X0.repeat(50, 1))
    # 200 uniform times: fewer than 150 below 0.5 but for a chance of 1e-12.
    assert int((out.t < 0.5).sum()) < 150
    assert not bool(out.low.any())


# What is given and not drawn


@pytest.mark.parametrize("times", [HIGH, MIXED, LOW], ids=["high", "mixed", "low"])
def test_the_output_of_a_step_given_back_repeats_it(times):
    student, teacher = models()
    first = step(student, teacher, times)
    names = ("t", "u", "xt", "xu", "latent", "latent_u")
    given = {name: getattr(first, name) for name in names}
    shown = first.xt.unsqueeze(1).expand(-1, 2, -1) if first.xu is None else first.xu
    drawn = torch.randint(MASK, shown.shape, generator=rng(9))
    given["consistency_x"] = torch.where(shown == MASK, drawn, shown)
    losses = [step(student, teacher, seed=seed, **given).loss for seed in (1, 2)]
    torch.testing.assert_close(*losses)
    changed = {**given, "xt": torch.full_like(first.xt, MASK)}
    assert not torch.allclose(step(student, teacher, **changed).loss, losses[0])


def test_times_and_tokens_of_the_component_pass_can_be_given():
    student, teacher = models()
    config = dataclasses.replace(CONFIG, component_spread=0.3, consistency_weight=0.0)
    options = {"process": UniformNoise(), "config": config}
    first = step(student, teacher, **options)
    names = ("t", "u", "xt", "xu", "latent", "latent_u", "t_min", "x_min", "latent_min")
    given = {name: getattr(first, name) for name in names}
    again = step(student, teacher, seed=1, **options, **given)
    torch.testing.assert_close(again.loss, first.loss)
    assert all(torch.equal(getattr(again, name), given[name]) for name in names)
