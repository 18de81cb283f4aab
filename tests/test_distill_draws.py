"""A generator for each example, and the step as a module."""

from __future__ import annotations

import pytest
import torch
from distill_support import CONFIG, MASK, MIXED, PROCESS, VOCAB, X0, B, D, models, rng, step
from test_distill_pieces import PROCESSES

from di4c_fast import TensorHead
from di4c_fast.training import DistillModule
from di4c_fast.training.draws import example_generators, targets

FIELDS = ("t", "u", "xt", "xu", "latent", "latent_u", "t_min", "x_min", "latent_min")


@pytest.mark.parametrize("process", PROCESSES)
def test_an_example_draws_the_same_in_every_batch(process):
    process = PROCESSES[process]
    student, teacher = models()
    whole = step(student, teacher, process=process, generator=example_generators(3, 10, B))
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        first, count = 10 + part.start, part.stop - part.start
        own = example_generators(3, first, count)
        out = step(student, teacher, x0=X0[part], process=process, generator=own)
        for name in FIELDS:
            ours, theirs = getattr(out, name), getattr(whole, name)
            if ours is not None:  # x_u: no example of this part needed it
                assert torch.equal(ours, theirs[part]), name
        for ours, theirs in zip(out.terms, whole.terms, strict=True):
            torch.testing.assert_close(ours, theirs[part])


def test_examples_seeds_and_steps_draw_differently():
    words = [g.initial_seed() for seed in (0, 1) for g in example_generators(seed, 0, 100)]
    assert len(set(words)) == 200


def test_targets_follow_their_component_and_keep_what_xu_has_revealed():
    component = torch.tensor([1, 3, 0])
    logits = torch.full((2, 3, D, VOCAB), -1e9)
    logits[:, torch.arange(3), :, component] = 0.0
    xu = torch.full((2, 3, D), MASK)
    xu[:, :, 0] = 4
    valid = torch.ones(2, D, dtype=torch.bool)
    valid[0, 1] = False
    for mask, head in ((MASK, TensorHead(logits)), (None, TensorHead(logits))):
        found = targets(head, xu, example_generators(0, 0, 2), mask, valid, "torch")
        expected = component.view(1, 3, 1).expand(2, 3, D).clone()
        if mask is not None:
            expected[:, :, 0] = 4
            expected[0, :, 1] = MASK
        assert torch.equal(found, expected)


def test_targets_have_the_law_of_the_logits():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = weights.log().expand(40, 2, 50, 4)
    xu = torch.zeros(40, 2, 50, dtype=torch.int64)
    found = targets(TensorHead(logits), xu, example_generators(0, 0, 40), None, None, "torch")
    shares = found.flatten().bincount(minlength=4) / found.numel()
    # Five standard deviations of a share of 4000 draws.
    assert bool(((shares - weights).abs() < 5 * (weights * (1 - weights) / 4000).sqrt()).all())


@pytest.mark.parametrize(
    ("generator", "error", "message"),
    [
        ([rng()], ValueError, f"generator must be one, or one for each of B = {B} examples, got 1"),
        ([1] * B, TypeError, "generator must be a torch.Generator or None, got"),
    ],
)
def test_wrong_generators_are_named(generator, error, message):
    with pytest.raises(error, match=message):
        step(*models(), generator=generator)


def test_the_module_is_the_step():
    student, teacher = models()
    module = DistillModule(student, teacher, process=PROCESS, config=CONFIG)
    assert list(module.parameters()) == list(student.parameters())
    loss, output = module(X0, generator=rng(), t=torch.tensor(MIXED))
    expected = step(student, teacher, MIXED)
    assert torch.equal(loss, expected.loss)
    assert loss.requires_grad
    assert not output.loss.requires_grad
    module(X0, seed=1, first=2)[0].backward()
    assert all(p.grad is not None for p in student.parameters())
    with pytest.raises(ValueError, match="backward must be left to the caller"):
        module(X0, backward=print)


@pytest.mark.parametrize("name", ["student", "teacher", "process", "config"])
def test_a_module_of_something_else_is_named(name):
    student, teacher = models()
    options = {"student": student, "teacher": teacher, "process": PROCESS, "config": CONFIG}
    with pytest.raises(TypeError, match=f"{name} must be"):
        DistillModule(**{**options, name: 1})
