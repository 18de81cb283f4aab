"""Checkpoints of the distiller: exact resuming, and nothing half-done when writing."""

from __future__ import annotations

import os

import pytest
import torch
from distill_support import VOCAB, Recorder, UniformNoise
from distiller_support import (
    BATCHES,
    adam,
    adamw,
    assert_same,
    everything,
    make_full,
    milestones,
    run,
    warm_up_then_cosine,
)
from safetensors.torch import load_file
from torch import nn


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def momentum(parameters):
    first, *others = parameters
    groups = [{"params": [first], "lr": 0.02}, {"params": others}]
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True)


# Resuming


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [
        (adam, warm_up_then_cosine),
        (adamw, warm_up_then_cosine),
        (adamw, milestones),
        (fused, None),
        (momentum, warm_up_then_cosine),
    ],
    ids=["adam", "adamw", "milestones", "fused", "momentum"],
)
@pytest.mark.parametrize("stop", [4, 5], ids=["between steps", "in a step"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, optimizer, schedule, stop):
    torch.manual_seed(0)
    whole = make_full(optimizer, schedule)
    torch.manual_seed(3)  # dropout
    run(whole, 0, stop)
    at_stop = everything(whole)
    expected = run(whole, stop, 8)
    assert whole.iterations == 4

    first = make_full(optimizer, schedule)
    torch.manual_seed(3)
    run(first, 0, stop)
    file = tmp_path / "run.safetensors"
    first.save(file, extra={"batch": stop})
    assert sorted(os.listdir(tmp_path)) == ["run.safetensors", "run.safetensors.lock"]
    del first
    torch.manual_seed(99)
    resumed = make_full(optimizer, schedule, seed=5)
    run(resumed, 12, 13)
    assert resumed.load(file) == {"batch": stop}
    assert_same(everything(resumed), at_stop)
    metrics = run(resumed, stop, 8)
    assert_same(everything(resumed), everything(whole))
    assert_same(metrics, expected)


def test_the_count_of_skipped_steps_comes_back(tmp_path):
    distiller = make_full(accumulate=1)
    distiller.student.out.bias.register_hook(lambda gradient: gradient * float("nan"))
    run(distiller, 0, 2)
    distiller.save(tmp_path / "a")
    resumed = make_full(accumulate=1)
    resumed.load(tmp_path / "a")
    assert float(resumed.skipped) == 2.0
    assert float(run(resumed, 2, 3)[0]["skipped"]) == 2.0


def test_the_scale_of_the_loss_comes_back(tmp_path):
    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        return make_full(accumulate=1, scaler=scaler)

    whole = scaled()
    run(whole, 0, 4)
    whole.save(tmp_path / "a")
    resumed = scaled()
    resumed.load(tmp_path / "a")
    assert_same(everything(resumed), everything(whole))
    run(whole, 4, 6)
    run(resumed, 4, 6)
    assert resumed.scaler.get_scale() == whole.scaler.get_scale() == 32.0
    with pytest.raises(ValueError, match="belongs to another run: scaler"):
        make_full(accumulate=1).load(tmp_path / "a")


def test_saving_changes_nothing(tmp_path):
    distiller = make_full(adamw, warm_up_then_cosine)
    run(distiller, 0, 3)
    before = everything(distiller)
    distiller.save(tmp_path / "a")
    assert_same(everything(distiller), before)


def test_torchs_default_generator_resumes_where_none_is_given(tmp_path):
    options = {"generator": None, "process": UniformNoise(), "average": None}
    torch.manual_seed(0)
    whole = make_full(**options)
    torch.manual_seed(4)
    run(whole, 0, 2)
    whole.save(tmp_path / "a")
    run(whole, 2, 4)
    torch.manual_seed(5)
    resumed = make_full(**options)
    resumed.load(tmp_path / "a")
    run(resumed, 2, 4)
    assert_same(everything(resumed), everything(whole))


class Tied(nn.Module):
    """Embedding and output share a weight; one buffer; a state that is no tensor."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 4, dtype=dtype)
        self.out = nn.Linear(4, VOCAB, bias=False, dtype=dtype)
        self.out.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.note = "new"

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]

    def forward(self, tokens, t, latent):
        self.seen += 1
        return self.out(self.embed(tokens) * (1 + latent[:, None]).to(self.embed.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_buffers_and_other_states_come_back(tmp_path, dtype):
    written = make_full(adamw, student=Tied(dtype))
    written.student.note = "trained"
    run(written, 0, 3)
    written.save(tmp_path / "a")
    stored = load_file(tmp_path / "a")
    assert ("student/embed.weight" in stored) != ("student/out.weight" in stored)
    resumed = make_full(adamw, student=Tied(dtype), seed=1)
    resumed.load(tmp_path / "a")
    assert resumed.student.note == "trained"
    assert int(resumed.student.seen) == int(written.student.seen) > 0
    assert resumed.student.out.weight is resumed.student.embed.weight
    run(written, 3, 6)
    run(resumed, 3, 6)
    assert_same(everything(resumed), everything(written))


def test_optimiser_state_keeps_its_dtype(tmp_path):
    """State in fp32 beside half-precision weights, which torch would cast when loading."""

    class Keeper(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    state["average"] = state.get("average", 0.0) + p.grad.float() / 3
            return super().step(closure)

    written = make_full(lambda p: Keeper(p, lr=0.01), student=Tied(torch.bfloat16))
    run(written, 0, 4)
    written.save(tmp_path / "a")
    resumed = make_full(lambda p: Keeper(p, lr=0.01), student=Tied(torch.bfloat16))
    resumed.load(tmp_path / "a")
    assert_same(everything(resumed), everything(written))


def test_the_weights_can_be_read_without_this_package(tmp_path):
    distiller = make_full()
    run(distiller, 0, 2)
    distiller.save(tmp_path / "a")
    stored = load_file(tmp_path / "a")
    assert torch.equal(stored["student/out.weight"], distiller.student.out.weight)
    assert torch.equal(stored["ema/shadow/out.weight"], distiller.ema.shadow["out.weight"])


@pytest.mark.gpu
def test_a_resumed_run_on_a_gpu_is_the_uninterrupted_one(tmp_path):
    def build(seed):
        student = Recorder(True, seed=seed, dropout=0.2).cuda()
        distiller = make_full(
            fused, student=student, generator=torch.Generator("cuda").manual_seed(seed)
        )
        distiller.teacher.cuda()
        return distiller

    def go(distiller, first, last):
        for batch in BATCHES[first:last]:
            distiller.step(batch.cuda())

    whole = build(0)
    torch.manual_seed(3)
    go(whole, 0, 3)
    whole.save(tmp_path / "a")
    go(whole, 3, 6)
    resumed = build(1)
    resumed.load(tmp_path / "a")
    go(resumed, 3, 6)
    assert_same(everything(resumed), everything(whole))


# Writing


def test_an_interruption_while_writing_leaves_the_former_file(tmp_path, monkeypatch):
    distiller = make_full()
    distiller.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    run(distiller, 0, 2)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        distiller.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a", "a.lock"]


def test_a_folder_that_does_not_exist_is_not_made_up(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must lie in a folder that exists"):
        make_full().save(tmp_path / "missing" / "a")
    with pytest.raises(ValueError, match="path must be a file to write, got the folder"):
        make_full().save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_states_that_cannot_be_written_are_named_and_nothing_is(tmp_path):
    distiller = make_full(schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1.0))
    distiller.save(tmp_path / "a")
    distiller.scheduler.odd = object()
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(TypeError, match="scheduler/odd must consist of tensors, numbers, strings"):
        distiller.save(tmp_path / "a")
    with pytest.raises(TypeError, match="JSON"):
        make_full().save(tmp_path / "a", extra=object())
    assert (tmp_path / "a").read_bytes() == before
