"""The component pass of a step, its parts as they come, and steps without examples."""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref

import distill_support as support
import pytest
import torch
from distill_support import (
    CONFIG,
    HIGH,
    MASK,
    PROCESS,
    VOCAB,
    X0,
    B,
    D,
    Recorder,
    UniformNoise,
    models,
)
from torch import Tensor

from di4c_fast.processes import MaskedProcess
from di4c_fast.training import DistillConfig, distill_step

N, K = 3, 2


@dataclasses.dataclass(frozen=True)
class MaskedWithComponentPass(MaskedProcess):
    component_time: float | None = 0.5  # type: ignore[assignment]


RECIPE = DistillConfig(
    components=N, draws=K, data_weight=0.7, component_weight=1.5, low_t=0.6, backend="reference"
)
NOISE = UniformNoise()


step = functools.partial(support.step, t=HIGH, config=RECIPE, process=NOISE)


def divergences(student, teacher, out, mask_id=None, positions=D) -> Tensor:
    """KL(q_T || p) of every row of the component pass, (B, N), by the formula."""
    x, t = out.x_min.flatten(0, 1), out.t_min.flatten()
    last = VOCAB if mask_id is None else mask_id
    with torch.no_grad():
        q = teacher(x, t)[..., :last].softmax(-1)
    log_p = student(x, t, out.latent_min.flatten(0, 1))[..., :last].log_softmax(-1)
    kl = (q * (q.log() - log_p)).sum(-1)
    if mask_id is not None:
        kl = kl * (x == mask_id)
    return kl[:, :positions].sum(-1).view(B, N)


# The term


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("control_variate", [True, False])
def test_loss_and_gradients_gain_the_mean_divergence_at_x_min(backend, control_variate):
    config = dataclasses.replace(RECIPE, backend=backend, control_variate=control_variate)
    student, teacher = models()
    out = step(student, teacher, config=config)
    out.loss.backward()
    gradients = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    # The same draws come first: without the pass, the step is the rest of the loss.
    rest = step(
        student, teacher, config=dataclasses.replace(config, low_t=0.0),
        process=UniformNoise(component_time=None),
    )  # fmt: skip
    assert torch.equal(rest.xt, out.xt)
    assert rest.x_min is None
    component = divergences(student, teacher, out)
    expected = rest.loss + config.component_weight * component.mean()
    expected.backward()
    # Same arithmetic in float64 in another order: rounding only.
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-11)
    expected = [p.grad for p in student.parameters()]
    torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(out.terms.component, component.mean(1).detach())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("process", "mask_id", "kept"),
    [(UniformNoise(component_time=1.0), None, 2), (MaskedWithComponentPass(MASK), MASK, 3)],
    ids=["noise", "masked"],
)
def test_positions_outside_valid_keep_their_token_and_carry_no_divergence(process, mask_id, kept):
    """With a mask, positions that are not masked carry none either."""
    valid = torch.ones(B, D, dtype=torch.bool)
    valid[:, kept:] = False
    student, teacher = models()
    out = step(student, teacher, process=process, valid=valid)
    assert torch.equal(out.x_min[..., kept:], X0[:, None, kept:].expand(-1, N, -1))
    assert mask_id is None or bool((out.x_min[..., :kept] == MASK).any())
    expected = divergences(student, teacher, out, mask_id, positions=kept).mean(1)
    torch.testing.assert_close(out.terms.component, expected.detach())


# The model calls


def test_the_pass_has_b_times_n_rows_with_draws_of_their_own():
    student, teacher = models()
    out = step(student, teacher)
    at_t, at_min = teacher.calls
    assert at_t["tokens"].shape == (B, D)
    assert at_min["tokens"].shape == (B * N, D)
    assert torch.equal(at_min["tokens"], out.x_min.flatten(0, 1))
    assert bool((at_min["t"] == 0.125).all())
    assert (at_min["grad"], at_min["training"], at_min["latent"]) == (False, False, None)
    at_t, at_u, at_min = student.calls
    assert at_u["tokens"].shape == (B * K, D)
    assert at_t["tokens"].shape == (B * N, D)
    assert torch.equal(at_min["tokens"], out.x_min.flatten(0, 1))
    assert torch.equal(at_min["latent"], out.latent_min.flatten(0, 1))
    assert (at_min["grad"], at_min["training"]) == (True, True)
    rows = out.x_min.flatten(0, 1)
    assert not torch.equal(rows[0::N], rows[1::N])
    latents = torch.cat([out.latent.flatten(), out.latent_u.flatten(), out.latent_min.flatten()])
    assert latents.unique().numel() == latents.numel()


def test_no_example_takes_the_low_branch_and_times_ignore_it():
    student, teacher = models()
    config = dataclasses.replace(RECIPE, low_t=1.0, low_t_probability=1.0)
    out = step(student, teacher, t=None, config=config)
    assert not bool(out.low.any())
    assert out.xu.shape == (B, K, D)


def test_a_spread_moves_half_of_the_times_up():
    config = dataclasses.replace(RECIPE, components=64, component_spread=0.25)
    out = step(*models(), config=config, return_terms=False)
    times = out.t_min
    assert times.shape == (B, 64)
    assert float(times.min()) == 0.125
    assert float(times.max()) < 0.125 + 0.25
    moved = times[times > 0.125]
    # 256 coins: six standard deviations are 48. Then the mean of at least 80 uniform numbers.
    assert abs(moved.numel() - 128) < 48
    assert abs(float(moved.mean()) - 0.25) < 6 * 0.25 / math.sqrt(12 * 80)
    late = step(*models(), config=config, process=UniformNoise(component_time=1.0))
    assert float(late.t_min.max()) == 1.0


def test_a_pass_of_weight_zero_is_left_out():
    student, teacher = models()
    out = step(student, teacher, config=dataclasses.replace(RECIPE, component_weight=0.0))
    assert (len(student.calls), len(teacher.calls)) == (2, 1)
    assert out.x_min is None
    assert torch.equal(out.terms.component, torch.zeros(B).double())


def test_a_di4c_teacher_has_one_latent_per_row():
    teacher = Recorder(True, seed=1)
    out = step(Recorder(True), teacher, config=dataclasses.replace(RECIPE, teacher_components=2))
    at_t, at_min = teacher.calls
    assert at_t["latent"].shape == (B * 2, 1)
    assert at_min["latent"].shape == (B * N, 1)
    assert at_min["latent"].unique().numel() == B * N
    assert out.x_min.shape == (B, N, D)


# Parts of the loss as they come


def test_backward_is_called_with_each_part_and_gives_the_same_gradients():
    student, teacher = models()
    whole = step(student, teacher)
    whole.loss.backward()
    expected = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    parts = []

    def backward(part: Tensor) -> None:
        parts.append(part.detach())
        part.backward()

    out = step(student, teacher, backward=backward)
    assert len(parts) == 2
    torch.testing.assert_close(out.loss, whole.loss.detach(), rtol=0, atol=0)
    torch.testing.assert_close(sum(parts), whole.loss.detach(), rtol=0, atol=0)
    assert not out.loss.requires_grad
    gradients = [p.grad for p in student.parameters()]
    torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-15)


def test_one_graph_at_a_time_is_alive_when_parts_go_backward():
    alive: list[int] = []
    outputs: list[weakref.ref] = []

    class Watched(Recorder):
        def forward(self, *arguments, **context):
            self.calls.clear()
            if torch.is_grad_enabled():
                alive.append(sum(output() is not None for output in outputs))
            result = super().forward(*arguments, **context)
            if torch.is_grad_enabled():
                outputs.append(weakref.ref(result))
            return result

    student, teacher = Watched(True), Recorder(False, seed=1)
    step(student, teacher, backward=lambda part: part.backward())
    assert alive == [0, 0]


def test_a_masked_step_goes_backward_in_one_part_outside_autocast():
    student, teacher = Recorder(True).float(), Recorder(False, seed=1).float()
    seen = []

    def backward(part: Tensor) -> None:
        seen.append(torch.is_autocast_enabled("cpu"))
        part.backward()

    for process, config in ((PROCESS, CONFIG), (NOISE, RECIPE)):
        student.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = step(student, teacher, process=process, config=config, backward=backward)
        assert out.loss.dtype == torch.float32
        assert all(bool(p.grad.isfinite().all()) for p in student.parameters())
    assert seen == [False] * 3


# No examples


@pytest.mark.parametrize("process", [PROCESS, NOISE], ids=["masked", "component pass"])
@pytest.mark.parametrize("given", [True, False], ids=["t given", "t drawn"])
def test_an_empty_batch_has_loss_zero_and_zero_gradients(process, given):
    student, teacher = models()
    with torch.no_grad():
        student.out.bias[0] = math.nan
    student.mix.weight.requires_grad_(False)
    out = step(student, teacher, t=[] if given else None, x0=X0[:0], process=process)
    assert float(out.loss.detach()) == 0.0
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    for p in student.parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, torch.zeros_like(p))
    assert student.mix.weight.grad is None
    assert student.calls == []
    assert teacher.calls == []
    assert out.xt.shape == (0, D)
    assert out.xu is None
    assert [term.shape for term in out.terms] == [(0,)] * 5
    assert (out.latent.shape, out.latent_u.shape) == ((0, N, 1), (0, K, 1))


def test_an_empty_batch_for_a_plain_function_can_go_backward():
    teacher = Recorder(False)
    latent = torch.rand(0, N, 1, requires_grad=True)
    for options in ({}, {"latent": latent}):
        out = distill_step(
            lambda *a: torch.zeros(0, D, VOCAB), teacher, X0[:0], process=PROCESS, config=RECIPE,
            **options,
        )  # fmt: skip
        out.loss.backward()
    assert latent.grad.shape == (0, N, 1)
    parts = []
    out = distill_step(
        teacher, teacher, X0[:0], process=PROCESS, config=RECIPE, backward=parts.append
    )
    assert len(parts) == 1
    assert not out.loss.requires_grad


def test_the_student_must_have_the_classes_of_the_teacher_in_the_pass_too():
    student, teacher = models()
    plain = teacher.forward

    def more_classes_later(tokens, t, **context):
        logits = plain(tokens, t)
        return logits if len(tokens) == B else torch.cat([logits, logits], -1)

    teacher.forward = more_classes_later
    with pytest.raises(ValueError, match="student must return logits over V = 12 classes"):
        step(student, teacher)
