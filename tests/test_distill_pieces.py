"""Components in groups: the loss and the gradient of all at once, with the memory of a group."""

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
from test_loss_memory import Allocations
from torch import Tensor, nn

from di4c_fast import LinearHead, LogisticHead, TensorHead
from di4c_fast.heads import Head
from di4c_fast.models import LatentShift
from di4c_fast.processes import GaussianProcess, MaskGITProcess
from di4c_fast.training import DistillConfig, Distiller

PROCESSES = {
    "masked": PROCESS,
    "gaussian": GaussianProcess(VOCAB),
    "maskgit": MaskGITProcess(MASK),
    "uniform": UniformNoise(),
}


class OwnHead(Head):
    """Twice some logits."""

    def __init__(self, half):
        self.half = half

    shape = property(lambda self: self.half.shape)
    dtype = property(lambda self: self.half.dtype)
    device = property(lambda self: self.half.device)

    def take(self, rows):
        return OwnHead(self.half.flatten(0, -2)[rows])

    def logits(self):
        return 2 * self.half

    def tensors(self):
        return (self.half,)

    def with_tensors(self, tensors):
        return OwnHead(*tensors)


class Logistic(Recorder):
    def forward(self, *arguments, **context):
        out = super().forward(*arguments, **context)
        return LogisticHead(out[..., 0], out[..., 1], VOCAB)


class Own(Recorder):
    def forward(self, *arguments, **context):
        return OwnHead(super().forward(*arguments, **context))


class PositionalBias(Recorder):
    def forward(self, *arguments, **context):
        head = super().forward(*arguments, **context)
        return LinearHead(head.hidden, head.weight, head.bias + self.position[:, :1])


STUDENTS = {
    "tensor": lambda: Recorder(True),
    "linear": lambda: Recorder(True, head=True),
    "positional": lambda: PositionalBias(True, head=True),
    "logistic": lambda: Logistic(True),
    "own": lambda: Own(True),
}


def results(student, teacher, **options):
    """Loss, terms, and every gradient, that of λ included."""
    latent = torch.rand(B, 3, 1, generator=rng(9), dtype=torch.float64).requires_grad_()
    out = step(student, teacher, latent=latent, **options)
    if options.get("backward") is None:
        out.loss.backward()
    gradients = [p.grad for p in student.parameters()]
    return [out.loss.detach(), *out.terms, latent.grad, *gradients]


def assert_close(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("at_once", "backward"), [(1, None), (2, None), (1, Tensor.backward)])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("student", STUDENTS)
def test_groups_give_loss_and_gradients_of_all_at_once(student, process, at_once, backward):
    options = {"process": PROCESSES[process], "t": MIXED}
    teacher = Recorder(False, seed=1)
    ours = STUDENTS[student]()
    given = {"components_at_once": at_once, "backward": backward}
    groups = results(ours, teacher, **given, **options)
    assert max(len(call["tokens"]) for call in ours.calls) <= B * at_once
    assert max(len(call["tokens"]) for call in teacher.calls) <= B * at_once
    assert_close(groups, results(STUDENTS[student](), teacher, **options))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("t", [HIGH, LOW], ids=["high", "low"])
def test_groups_on_other_backends(backend, t):
    config = dataclasses.replace(CONFIG, backend=backend)
    student, teacher = models(head=True)
    if backend == "cpu":
        student.float(), teacher.float()
    options = {"t": t, "config": config}
    groups = results(student, teacher, components_at_once=1, **options)
    student.zero_grad()
    whole = results(student, teacher, **options)
    bounds = {"rtol": 1e-9, "atol": 1e-11} if backend == "torch" else {"rtol": 1e-4, "atol": 1e-5}
    for one, other in zip(groups, whole, strict=True):
        torch.testing.assert_close(one, other, **bounds)


def test_context_a_teacher_of_components_and_backward_in_parts():
    class Labelled(Recorder):
        def forward(self, tokens, t, latent=None, *, label):
            return super().forward(tokens, t, latent) * label[:, None, None]

    config = dataclasses.replace(CONFIG, teacher_components=2)
    options = {"context": {"label": torch.rand(B, generator=rng(3)).double()}, "config": config}
    for process in (PROCESS, UniformNoise()):
        found = []
        for at_once in (1, None):
            student, teacher = Labelled(True), Labelled(True, seed=1)
            more = {"process": process, "components_at_once": at_once}
            found.append(results(student, teacher, backward=Tensor.backward, **options, **more))
        assert_close(*found)


class InTurn(nn.Module):
    """A student that calls another on a few rows at a time, all of their graphs kept."""

    def __init__(self, inner, rows):
        super().__init__()
        self.inner, self.rows = inner, rows

    def forward(self, *tensors):
        return torch.cat(
            [self.inner(*part) for part in zip(*(t.split(self.rows) for t in tensors), strict=True)]
        )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_and_autocast_of_a_group_are_the_same_in_both_runs(autocast, nested):
    def backward(part):
        torch.rand(3)  # the backward pass brings its random state back, and leaves ours alone
        before = torch.get_rng_state()
        part.backward()
        assert torch.equal(torch.get_rng_state(), before)

    found = []
    for grouped in (True, False):
        student, teacher = models(dropout=0.5)
        if autocast:
            student.float(), teacher.float()
        called = student if grouped else InTurn(student, B)
        torch.manual_seed(5)
        # Groups that go backward one by one add up in fp32; the cast of a weight that autocast has
        # kept for several calls would add up in bf16.
        kept = grouped or not nested
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=kept):
            options = {"components_at_once": 1 if grouped else None}
            options["backward"] = backward if nested else None
            out = step(called, teacher, HIGH, **options)
        if not nested:
            backward(out.loss)
        found.append([out.loss.detach(), *(p.grad for p in student.parameters())])
    assert_close(*found)


class Deep(nn.Module):
    """Many activations for every hidden state."""

    def __init__(self, tensor, width=256, layers=6, narrow=4):
        super().__init__()
        self.embed, self.latent = nn.Embedding(VOCAB, width), LatentShift(width, frequencies=4)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.narrow, self.out = nn.Linear(width, narrow), nn.Linear(narrow, VOCAB)
        self.tensor = tensor

    def forward(self, tokens, t, latent):
        h = self.latent(self.embed(tokens), latent)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        head = LinearHead(self.narrow(h), self.out.weight, self.out.bias)
        return TensorHead(head.logits()) if self.tensor else head


def peak(components, at_once, tensor=False, backward=Tensor.backward):
    """The most bytes alive at once in a step with its gradient, those of the weights included."""
    x0 = torch.randint(MASK, (16, D), generator=rng())
    config = DistillConfig(components=components, draws=4, low_t=0.0, backend="torch")
    student, watch = Deep(tensor), Allocations()
    options = {"t": [0.9] * 16, "config": config, "x0": x0, "components_at_once": at_once}
    with watch:
        out = step(
            student, Recorder(False).float(), return_terms=False, backward=backward, **options
        )
        if backward is None:
            out.loss.backward()
    return watch.peak


@pytest.mark.parametrize("backward", [None, Tensor.backward])
@pytest.mark.parametrize("tensor", [False, True], ids=["linear", "tensor"])
def test_sixty_four_components_in_groups_of_four_take_little_more_memory_than_four(
    tensor, backward
):
    few, groups, whole = (peak(*n, tensor, backward) for n in ((4, None), (64, 4), (64, None)))
    # On top come the heads' tensors of all 64, their gradient, and the statistics of the loss.
    assert groups < 1.5 * few, (groups, few)
    assert groups < 0.2 * whole


@pytest.mark.parametrize("tensor", [False, True], ids=["linear", "tensor"])
def test_groups_of_sixteen_take_the_gradients_beside_what_sixteen_components_take(tensor):
    few, groups = peak(16, None, tensor), peak(256, 16, tensor)
    weights = sum(p.nbytes for p in Deep(tensor).parameters())
    rows = 256 * 16
    heads = rows * D * (VOCAB if tensor else 4) * 4
    arguments = rows * (D * 8 + 4 + 4)  # tokens, t and λ
    step_of_a_group = 1 << 15  # what its backward pass has at the peak beside the activations
    assert groups <= few + weights + heads + arguments + step_of_a_group, (groups, few)
    # Smaller groups make up for it: 256 components in the memory of 16.
    assert peak(256, 12, tensor) <= few


def nodes_of_graph(components, backward_of_its_own):
    """How many nodes the graph of a step in groups of four has."""
    config = dataclasses.replace(CONFIG, components=components)
    student, teacher = models(head=True)
    found = []

    def backward(part):
        nodes, todo = set(), [part.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in nodes:
                nodes.add(node)
                todo += [following for following, _ in node.next_functions]
        found.append(len(nodes))

    given = {"backward": backward} if backward_of_its_own else {}
    out = step(student, teacher, HIGH, config=config, components_at_once=4, **given)
    if not backward_of_its_own:
        backward(out.loss)
    return found[0]


def test_no_graph_of_a_group_waits_where_the_step_goes_backward_itself():
    # For each of six groups more, the node that calls the student again.
    assert nodes_of_graph(32, True) - nodes_of_graph(8, True) <= 6
    assert nodes_of_graph(32, False) - nodes_of_graph(8, False) >= 10 * 6


def clamped(student):
    """The gradient of every weight is clamped, by a hook."""
    for weight in student.parameters():
        weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return student


def stepping(student):
    """Every weight makes its step of the optimiser within the backward pass."""

    def descend(weight):
        weight.data.sub_(weight.grad)

    for weight in student.parameters():
        weight.register_post_accumulate_grad_hook(descend)
    return student


def merged(student):
    """Called with weights that are computed from others before the step."""
    weights = {name: 1.1 * (weight * weight) for name, weight in student.named_parameters()}
    return lambda *tensors: torch.func.functional_call(student, weights, tensors)


@pytest.mark.parametrize("change", [clamped, stepping, merged])
def test_what_counts_on_one_backward_pass_gets_one(change):
    found = []
    for at_once in (1, None):
        student = Recorder(True)
        options = {"components_at_once": at_once, "backward": Tensor.backward}
        step(change(student), Recorder(False, seed=1), HIGH, **options)
        weights = list(student.parameters())
        found.append([*(w.grad for w in weights), *(w.detach() for w in weights)])
    assert_close(*found)


class TwoParts(Recorder):
    """A logistic student, of whose two tensors each has a weight of its own."""

    def __init__(self):
        super().__init__(True)
        self.scales = nn.ParameterList([torch.ones(1).double() for _ in range(2)])

    def forward(self, *arguments, **context):
        out = super().forward(*arguments, **context)
        return LogisticHead(out[..., 0] * self.scales[0], out[..., 1] * self.scales[1], VOCAB)


@pytest.mark.parametrize("weight", [0, 1])
def test_gradients_that_groups_cannot_leave_are_refused(weight):
    student, teacher = TwoParts(), Recorder(False, seed=1)
    options = {"process": PROCESSES["gaussian"], "components_at_once": 1}
    with pytest.raises(RuntimeError, match=r"incompatible with \.grad"):
        step(
            student, teacher, **options,
            backward=lambda part: torch.autograd.grad(part, student.scales[weight]),
        )  # fmt: skip


def test_a_distiller_takes_groups_too():
    found = []
    for at_once in (2, None):
        student, teacher = models()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        distiller = Distiller(
            student, teacher, optimizer, process=PROCESS, config=CONFIG, generator=rng()
        )
        distiller.step(X0, components_at_once=at_once)
        found.append([p.detach() for p in student.parameters()])
    assert_close(*found)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_wrong_groups_are_named(value, error):
    with pytest.raises(error, match="components_at_once must be"):
        step(*models(), components_at_once=value)


def test_an_empty_batch_in_groups():
    student, teacher = models()
    step(student, teacher, x0=torch.zeros(0, D, dtype=torch.int64), components_at_once=1)
    assert not student.calls
