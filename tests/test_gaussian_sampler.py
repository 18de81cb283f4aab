"""The Gaussian sampler: the law of the exact posterior chain, whatever the number of steps."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from process_cases import exact
from sampler_cases import Denoiser, Tabular
from torch import Tensor
from torch.nn.functional import one_hot

from di4c_fast.processes import GaussianProcess
from di4c_fast.samplers import sample_gaussian
from di4c_fast.testing import assert_counts_match

D, V = 2, 4
STATES = V**D
PROCESS = GaussianProcess(V, rate_sigma=1.2, target_sigma=2.0, time_base=0.05, t_min=0.02)
ROWS = torch.tensor(list(itertools.product(range(V), repeat=D)))


matrix = functools.partial(exact, PROCESS)


class Oracle:
    """The exact denoiser of a law over all rows of D tokens."""

    law = torch.tensor([5.0, 1, 0, 0, 1, 3, 0, 0, 0, 0, 2, 1, 0, 0, 1, 6], dtype=torch.float64) / 20

    def probabilities(self, t: float, component: int = 0) -> Tensor:
        """(STATES, D, V): p(x_0 of each position | x_t) for every x_t."""
        q = matrix(0.0, t)
        likelihood = torch.kron(q, q)  # [x_0, x_t]
        joint = (self.law.unsqueeze(1) * likelihood).T
        joint = (joint / joint.sum(1, keepdim=True)).view(STATES, V, V)
        return torch.stack([joint.sum(2), joint.sum(1)], dim=1)

    def __call__(self, tokens: Tensor, t: Tensor) -> Tensor:
        return self.probabilities(float(t[0])).log()[tokens @ torch.tensor([V, 1])]


class Table(Tabular):
    def __init__(self, seed: int, latent: bool = False):
        super().__init__(seed, latent, size=(D, V))

    def probabilities(self, t: float, component: int = 0) -> Tensor:
        return (self.table[0, component].double() * (0.5 + t)).softmax(-1)


counts_of = Table(0).counts_of


def step_matrix(model, t: float, s: float | None, component: int = 0) -> Tensor:
    """(STATES, STATES): one posterior step from t to s; s = None is the argmax."""
    p0 = model.probabilities(t, component)  # [x_t, d, x_0]
    if s is None:
        each = one_hot(p0.argmax(-1), V).double()
    else:
        joint = matrix(0.0, s).unsqueeze(-1) * matrix(s, t)  # [x_0, x_s, x_t]
        bridge = joint / joint.sum(1, keepdim=True)
        each = torch.stack(
            [torch.einsum("xa,asx->xs", p0[:, d], bridge[:, :, ROWS[:, d]]) for d in range(D)], 1
        )
    return torch.einsum("xi,xj->xij", *each.unbind(1)).flatten(1)


def exact_law(models: list, steps: int) -> Tensor:
    """Law of the last state by enumeration, `models` one per step, λ fresh at every step."""
    times = torch.linspace(1.0, PROCESS.t_min, steps, dtype=torch.float64).tolist()
    target = PROCESS.transitions.target
    law = torch.kron(target, target)
    for model, t, s in zip(models, times, [*times[1:], None], strict=True):
        components = range(getattr(model, "table", torch.zeros(1, 1)).shape[1])
        law = torch.stack([law @ step_matrix(model, t, s, c) for c in components]).mean(0)
    return law


def run(model, batch: int, steps: int, **more) -> Tensor:
    arguments = {"process": PROCESS, "steps": steps, "seed": 11, **more}
    return sample_gaussian(model, (batch, D), **arguments)


# The law


@pytest.mark.parametrize(("steps", "latent"), [(1, False), (2, False), (5, False), (4, True)])
def test_samples_follow_the_enumerated_chain_with_fresh_latents(steps, latent):
    model = Table(int(latent), latent)
    tokens = run(model, 15_000, steps, latent_dim=int(latent))
    assert_counts_match(counts_of(tokens), exact_law([model] * steps, steps))


def test_last_steps_go_to_the_teacher():
    student, teacher = Table(2, latent=True), Table(3)
    tokens = run(student, 15_000, 5, latent_dim=1, teacher=teacher, teacher_steps=2)
    assert len(student.calls) == 3
    assert [call[2] is None for call in teacher.calls] == [True, True]
    models = [student] * 3 + [teacher] * 2
    assert_counts_match(counts_of(tokens), exact_law(models, 5))


def test_teacher_alone_and_teacher_unused():
    student, teacher = Table(2, latent=True), Table(3)
    alone = run(student, 20, 3, latent_dim=1, teacher=teacher, teacher_steps=3)
    assert torch.equal(alone, run(teacher, 20, 3))
    assert not student.calls
    run(student, 20, 3, latent_dim=1, teacher=teacher)
    assert len(student.calls) == 3


def test_exact_denoiser_gives_the_data_with_many_steps():
    oracle = Oracle()
    marginal = oracle.law.view(V, V).sum(1)
    errors = []
    for steps in (3, 25):
        law = exact_law([oracle] * steps, steps)
        errors.append(float((law - oracle.law).abs().sum()) / 2)
        tokens = run(oracle, 3000, steps)
        assert_counts_match(counts_of(tokens), law, name=f"{steps} steps")
    assert errors[1] < 0.5 * errors[0]
    share = torch.bincount(tokens[:, 0], minlength=V) / len(tokens)
    # What remains is the argmax of the last step at t_min and the length of the steps.
    assert float((share - marginal).abs().sum()) / 2 < 0.05


def test_last_step_can_draw():
    model = Table(4)
    tokens = run(model, 15_000, 1, last="draw")
    start = torch.kron(PROCESS.transitions.target, PROCESS.transitions.target)
    p = model.probabilities(1.0)
    law = start @ torch.einsum("xi,xj->xij", *p.unbind(1)).flatten(1)
    assert_counts_match(counts_of(tokens), law)


def test_last_step_keeps_the_most_probable_of_several_latents():
    model = Table(5, latent=True)
    start = torch.tensor([[0, 1]]).expand(6, -1)
    tokens = run(model, 6, 1, latent_dim=1, last_latents=8, initial=start)
    seen, _, latent = model.calls[0]
    assert seen.shape == (48, D)
    assert latent is not None
    assert latent.shape == (48, 1)
    assert len(latent.unique()) == 48
    probabilities = torch.stack([model.probabilities(1.0, c)[1] for c in range(2)])
    joint = probabilities.amax(-1).log().sum(-1)
    for row, tried in zip(tokens, (latent[:, 0] > 0.5).long().view(6, 8), strict=True):
        best = tried[joint[tried].argmax()]
        assert torch.equal(row, probabilities[best].argmax(-1))


def test_first_of_several_latents_is_that_of_one():
    one, many = Table(6, latent=True), Table(6, latent=True)
    run(one, 5, 2, latent_dim=1)
    run(many, 5, 2, latent_dim=1, last_latents=3)
    assert torch.equal(one.calls[-1][2], many.calls[-1][2].view(5, 3, 1)[:, 0])


@pytest.mark.parametrize("law", ["target", "uniform"])
def test_sampling_starts_from_its_law(law):
    history: list[Tensor] = []
    run(Table(0), 20_000, 1, initial=law, history=history)
    start = PROCESS.transitions.target if law == "target" else torch.ones(V) / V
    assert_counts_match(counts_of(history[0]), torch.kron(start, start))


# Calls, times, latents


def test_models_are_called_on_an_even_grid():
    model = Table(0)
    run(model, 3, 5)
    times = torch.stack([t for _, t, _ in model.calls])
    torch.testing.assert_close(times, torch.linspace(1.0, 0.02, 5).unsqueeze(1).expand(-1, 3))
    model.calls.clear()
    run(model, 3, 2, t_min=0.5)
    assert [float(t[0]) for _, t, _ in model.calls] == [1.0, 0.5]


def test_same_sequences_come_out_with_several_latents_in_the_last_call():
    model, more = Table(7, latent=True), {"latent_dim": 1, "last_latents": 3}
    whole = run(model, 10, 4, **more)
    parts = [run(model, n, 4, first_sequence=first, **more) for first, n in ((0, 3), (3, 7))]
    assert torch.equal(torch.cat(parts), whole)


def test_given_start_is_used_and_not_written_to():
    model = Table(0)
    start = torch.tensor([[0, 1], [3, 3]])
    copy = start.clone()
    run(model, 2, 3, initial=start)
    assert torch.equal(model.calls[0][0], copy)
    assert torch.equal(start, copy)


def test_context_reaches_both_models_and_follows_the_rows():
    seen: list[Tensor] = []

    def model(tokens, t, *latent, label):
        seen.append(label)
        return torch.zeros(*tokens.shape, V)

    how = {"latent_dim": 1, "context": {"label": torch.tensor([5, 6])}}
    run(model, 2, 2, last_latents=2, **how)
    assert [value.tolist() for value in seen] == [[5, 6], [5, 5, 6, 6]]
    run(model, 2, 2, teacher=model, teacher_steps=1, **how)
    assert seen[-1].tolist() == [5, 6]


def test_the_teacher_runs_in_eval_mode_and_comes_back():
    student, teacher = Denoiser(), Denoiser()
    how = {"process": GaussianProcess(11), "teacher": teacher, "teacher_steps": 1}
    sample_gaussian(student, (2, 3), steps=3, **how)
    assert student.modes + teacher.modes == [False] * 3
    assert student.training
    assert teacher.training


def test_temperature_zero_takes_the_most_probable_clean_token():
    logits = torch.zeros(1, D, V)
    logits[..., 2] = 1e-3
    process = GaussianProcess(V, rate_sigma=1.2, time_base=1e-6, t_min=1e-3)
    model = lambda x, t: logits.expand(len(x), -1, -1)  # noqa: E731
    tokens = run(model, 500, 2, process=process, temperature=0.0, last="draw")
    assert bool((tokens == 2).all())
