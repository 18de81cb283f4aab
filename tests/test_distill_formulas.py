"""The loss of a distillation step, its terms and gradients are those of the paper's formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from distill_support import (
    CONFIG,
    HIGH,
    LOW,
    MASK,
    MIXED,
    PROCESS,
    X0,
    B,
    D,
    Recorder,
    UniformNoise,
    models,
    rng,
    step,
)
from torch import Tensor

import di4c_fast.training.step as distill_module
from di4c_fast.training import data_weights

# The same arithmetic in float64 in another order; losses of some ten nats, whose parts cancel in
# gradients. A wrong factor or a term left out is above 1e-3.
SAME = {"rtol": 1e-9, "atol": 1e-11}
SAME_GRADIENT = {"rtol": 1e-8, "atol": 1e-10}


def argmax_draws(monkeypatch) -> None:
    """Make the draws x^k a known function of the logits, so that a test can repeat them."""
    loss = distill_module.loss

    def with_argmax(student, teacher, x0, *, consistency=None, xu=None, **rest):
        rest.pop("consistency_x", None)
        chosen = None
        if consistency is not None:
            chosen = consistency.logits()[..., :MASK].argmax(-1)
            chosen = torch.where(xu == MASK, chosen, xu)
        return loss(
            student, teacher, x0, consistency=consistency, consistency_x=chosen, xu=xu, **rest
        )

    monkeypatch.setattr(distill_module, "loss", with_argmax)


def log_probabilities(model, tokens, t, latent=None) -> Tensor:
    """(R, D, V - 1), the mask left out, of rows that share a time."""
    time = t.expand(tokens.shape[0])
    logits = model(tokens, time) if latent is None else model(tokens, time, latent)
    return logits[..., :MASK].log_softmax(-1)


def dense_loss(student, teacher, out, config, latent_teacher=None, positions=D) -> Tensor:
    """The formulas of the paper, one example at a time, from the same draws."""
    latents = [None] * B if latent_teacher is None else latent_teacher
    losses = [
        example_loss(student, teacher, out, config, b, latent, positions)
        for b, latent in enumerate(latents)
    ]
    return torch.stack(losses).mean()


def example_loss(student, teacher, out, config, b: int, latent_teacher, positions) -> Tensor:
    n_count = config.components
    t, u, xt = out.t[b], out.u[b], out.xt[b]
    masked = [d for d in range(positions) if xt[d] == MASK]

    with torch.no_grad():
        rows = config.teacher_components
        q_t = log_probabilities(teacher, xt.expand(rows, D), t, latent_teacher).exp().mean(0)
    logs = log_probabilities(student, xt.expand(n_count, D), t, out.latent[b])
    marginal = logs.logsumexp(0) - math.log(n_count)

    def cor(x):
        joint = sum((logs[:, d, x[d]] for d in masked), torch.zeros(n_count).double())
        product = sum(marginal[d, x[d]] for d in masked) if config.control_variate else 0.0
        return product - (joint.logsumexp(0) - math.log(n_count))

    def kl(q, log_p):
        return sum(((q[d] * (q[d].log() - log_p[d])).nansum() for d in masked), 0.0)

    total = data_weights(t, config.data_schedule, config.data_weight) * cor(X0[b])
    if config.control_variate:
        total = total + kl(q_t, marginal)
    if float(t) < config.low_t:
        components = [kl(q_t, logs[n]) for n in range(n_count)]
        return total + config.component_weight * sum(components) / n_count

    draws = config.draws or n_count
    with torch.no_grad():
        at_u = log_probabilities(student, out.xu[b], u, out.latent_u[b])
    q_u = torch.zeros(D, MASK, dtype=torch.float64)
    for k in range(draws):
        x_k = torch.where(out.xu[b, k] == MASK, at_u[k].argmax(-1), out.xu[b, k])
        total = total + cor(x_k) / draws
        for d in masked:
            if out.xu[b, k, d] == MASK:
                q_u[d] += at_u[k, d].exp() / draws
            else:
                q_u[d, out.xu[b, k, d]] += 1 / draws
    return total + kl(q_u, marginal) if config.control_variate else total


@pytest.mark.parametrize("times", [HIGH, LOW, MIXED], ids=["high", "low", "mixed"])
@pytest.mark.parametrize("control_variate", [True, False])
@pytest.mark.parametrize("head", [False, True], ids=["logits", "head"])
def test_loss_and_gradients_are_those_of_the_formulas(monkeypatch, times, control_variate, head):
    argmax_draws(monkeypatch)
    config = dataclasses.replace(
        CONFIG, data_weight=0.7, component_weight=1.5, control_variate=control_variate
    )
    student, teacher = models(head=head)
    out = step(student, teacher, times, config, seed=3)
    out.loss.backward()
    assert out.loss.dtype == torch.float64
    gradients = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    student.head = teacher.head = False
    expected = dense_loss(student, teacher, out, config)
    expected.backward()
    torch.testing.assert_close(out.loss, expected, **SAME)
    torch.testing.assert_close(gradients, [p.grad for p in student.parameters()], **SAME_GRADIENT)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_di4c_teacher_gives_the_loss_of_the_formulas(monkeypatch):
    argmax_draws(monkeypatch)
    config = dataclasses.replace(CONFIG, draws=4, teacher_step=0.3, teacher_components=2)
    student, teacher = Recorder(True), Recorder(True, seed=1)
    latent_teacher = torch.rand(B, 2, 1, generator=rng(5))
    out = step(student, teacher, MIXED, config, latent_teacher=latent_teacher)
    expected = dense_loss(student, teacher, out, config, latent_teacher)
    torch.testing.assert_close(out.loss.detach(), expected.detach(), **SAME)


COMPONENT = dataclasses.replace(CONFIG, data_schedule="linear", component_weight=1.5)


@pytest.mark.parametrize(
    ("process", "config", "times"),
    [(PROCESS, CONFIG, t) for t in (HIGH, LOW, MIXED)] + [(UniformNoise(), COMPONENT, HIGH)],
    ids=["high", "low", "mixed", "component pass"],
)
def test_terms_add_up_to_the_loss_with_their_weights_and_can_be_left_out(process, config, times):
    out = step(*models(), times, config, process=process)
    terms, own_pass = out.terms, process.component_time is not None
    assert out.low.tolist() == [not own_pass and t < config.low_t for t in times]
    total = terms.data_correlation * data_weights(out.t, config.data_schedule, config.data_weight)
    total = total + terms.teacher_marginal
    total = total + terms.consistency_correlation + terms.consistency_marginal
    counts = torch.ones(B) if own_pass else out.low.double()
    total = total + config.component_weight * counts * terms.component
    # Times are float32, and so are the weights that follow them.
    torch.testing.assert_close(out.loss.detach(), total.mean(), rtol=1e-6, atol=1e-9)
    assert bool((terms.consistency_marginal[out.low] == 0).all())
    assert bool((terms.consistency_marginal[~out.low] > 0).all())
    without = step(*models(), times, config, process=process, return_terms=False)
    assert without.terms is None
    torch.testing.assert_close(without.loss, out.loss, rtol=1e-12, atol=0)


def test_the_streaming_backend_gives_the_step_of_the_reference():
    student, teacher = models()
    results = []
    for backend in ("reference", "torch"):
        config = dataclasses.replace(CONFIG, backend=backend)
        student.zero_grad()
        out = step(student, teacher, MIXED, config)
        out.loss.backward()
        results.append([out.loss.detach(), *(p.grad.clone() for p in student.parameters())])
    torch.testing.assert_close(results[1], results[0], **SAME_GRADIENT)


def test_positions_outside_valid_keep_their_token_and_carry_no_loss(monkeypatch):
    argmax_draws(monkeypatch)
    valid = torch.ones(B, D, dtype=torch.bool)
    valid[:, 2:] = False
    x0 = X0.clone()
    x0[:, 4] = MASK
    student, teacher = models()
    out = step(student, teacher, MIXED, x0=x0, valid=valid)
    assert torch.equal(out.xt[:, 2:], x0[:, 2:])
    assert torch.equal(out.xu[..., 2:], x0[:, None, 2:].expand(-1, 2, -1))
    assert bool((out.xt[:, :2] == MASK).any())
    expected = dense_loss(student, teacher, out, CONFIG, positions=2)
    torch.testing.assert_close(out.loss.detach(), expected.detach(), **SAME)


def test_data_weights_follow_their_schedules():
    t = torch.tensor([0.0, 0.5, 0.75, 1.0], dtype=torch.float64)
    sigmoid = [1 / (1 + math.exp(-20 * (x - 0.5))) for x in t.tolist()]
    expected = torch.tensor(sigmoid, dtype=torch.float64) * 0.1
    torch.testing.assert_close(data_weights(t, "sigmoid", 0.1), expected)
    torch.testing.assert_close(data_weights(t, "linear", 0.2), 0.2 * t)
    torch.testing.assert_close(data_weights(t, "constant", 0.3), torch.full_like(t, 0.3))
