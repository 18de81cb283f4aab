"""Checkpoints of the distiller: exact resuming, files that cannot be used, nothing half-done."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from distill_support import CONFIG, MASK, VOCAB, B, D, Recorder, UniformNoise, rng
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from di4c_fast._checkpoint import decode, encode, identity, read_checkpoint, write_checkpoint
from di4c_fast.distill import EMA, DistillConfig
from di4c_fast.distiller import Distiller
from di4c_fast.processes import MaskedProcess

BATCHES = torch.randint(MASK, (16, B, D), generator=torch.Generator().manual_seed(7))
PROCESS = MaskedProcess(MASK)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.96), weight_decay=0.1)


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def momentum(parameters):
    first, *others = parameters
    groups = [{"params": [first], "lr": 0.02}, {"params": others}]
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True)


def warm_up_then_cosine(optimizer):
    schedules = torch.optim.lr_scheduler
    parts = [
        schedules.LinearLR(optimizer, 0.1, total_iters=2),
        schedules.CosineAnnealingLR(optimizer, 10),
    ]
    return schedules.SequentialLR(optimizer, parts, milestones=[2])


def milestones(optimizer):
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 2, 3])


def make(optimizer=adam, schedule=None, seed=0, student=None, average=0.9, **options) -> Distiller:
    student = Recorder(True, seed=seed, dropout=0.2) if student is None else student
    optimizer = optimizer(student.parameters())
    options = {
        "process": PROCESS,
        "config": CONFIG,
        "clip_norm": 5.0,
        "accumulate": 2,
        "generator": rng(seed),
        "scheduler": None if schedule is None else schedule(optimizer),
        "ema": None if average is None else EMA(student, average),
        **options,
    }
    return Distiller(student, Recorder(False, seed=1), optimizer, **options)


def run(distiller, first: int, last: int) -> list[dict[str, Tensor]]:
    return [distiller.step(batch) for batch in BATCHES[first:last]]


def everything(distiller) -> dict[str, Tensor]:
    """Every number that training depends on, by name."""
    tensors: dict[str, Tensor] = {}
    states = copy.deepcopy(distiller._states())
    plain = encode(states, "states", tensors)
    tensors = {name: value.clone() for name, value in tensors.items()}
    for name, p in distiller.student.named_parameters():
        if distiller.pending:
            tensors[f"gradient/{name}"] = p.grad.clone()
    plain = [plain, distiller.iterations, distiller.examples, distiller.pending]
    tensors["plain"] = torch.tensor(list(json.dumps(plain).encode()))
    return tensors


def assert_same(ours, expected) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


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
    whole = make(optimizer, schedule)
    torch.manual_seed(3)  # dropout
    run(whole, 0, stop)
    at_stop = everything(whole)
    expected = run(whole, stop, 8)
    assert whole.iterations == 4

    first = make(optimizer, schedule)
    torch.manual_seed(3)
    run(first, 0, stop)
    file = tmp_path / "run.safetensors"
    first.save(file, extra={"batch": stop})
    assert os.listdir(tmp_path) == ["run.safetensors"]
    del first
    torch.manual_seed(99)
    resumed = make(optimizer, schedule, seed=5)
    run(resumed, 12, 13)
    assert resumed.load(file) == {"batch": stop}
    assert_same(everything(resumed), at_stop)
    metrics = run(resumed, stop, 8)
    assert_same(everything(resumed), everything(whole))
    for ours, theirs in zip(metrics, expected, strict=True):
        assert_same(ours, theirs)


def test_the_count_of_skipped_steps_comes_back(tmp_path):
    distiller = make(accumulate=1)
    distiller.student.out.bias.register_hook(lambda gradient: gradient * float("nan"))
    run(distiller, 0, 2)
    distiller.save(tmp_path / "a")
    resumed = make(accumulate=1)
    resumed.load(tmp_path / "a")
    assert float(resumed.skipped) == 2.0
    assert float(run(resumed, 2, 3)[0]["skipped"]) == 2.0


def test_saving_changes_nothing(tmp_path):
    distiller = make(adamw, warm_up_then_cosine)
    run(distiller, 0, 3)
    before = everything(distiller)
    distiller.save(tmp_path / "a")
    assert_same(everything(distiller), before)


def test_torchs_default_generator_resumes_where_none_is_given(tmp_path):
    options = {"generator": None, "process": UniformNoise(), "average": None}
    torch.manual_seed(0)
    whole = make(**options)
    torch.manual_seed(4)
    run(whole, 0, 2)
    whole.save(tmp_path / "a")
    run(whole, 2, 4)
    torch.manual_seed(5)
    resumed = make(**options)
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
    written = make(adamw, student=Tied(dtype))
    written.student.note = "trained"
    run(written, 0, 3)
    written.save(tmp_path / "a")
    stored = load_file(tmp_path / "a")
    assert ("student/embed.weight" in stored) != ("student/out.weight" in stored)
    resumed = make(adamw, student=Tied(dtype), seed=1)
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

    written = make(lambda p: Keeper(p, lr=0.01), student=Tied(torch.bfloat16))
    run(written, 0, 4)
    written.save(tmp_path / "a")
    resumed = make(lambda p: Keeper(p, lr=0.01), student=Tied(torch.bfloat16))
    resumed.load(tmp_path / "a")
    assert_same(everything(resumed), everything(written))


def test_the_weights_can_be_read_without_this_package(tmp_path):
    distiller = make()
    run(distiller, 0, 2)
    distiller.save(tmp_path / "a")
    stored = load_file(tmp_path / "a")
    assert torch.equal(stored["student/out.weight"], distiller.student.out.weight)
    assert torch.equal(stored["ema/shadow/out.weight"], distiller.ema.shadow["out.weight"])


@pytest.mark.gpu
def test_a_resumed_run_on_a_gpu_is_the_uninterrupted_one(tmp_path):
    def build(seed):
        student = Recorder(True, seed=seed, dropout=0.2).cuda()
        distiller = make(
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
    distiller = make()
    distiller.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    run(distiller, 0, 2)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        distiller.save(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_that_does_not_exist_is_not_made_up(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must lie in a folder that exists"):
        make().save(tmp_path / "missing" / "a")
    with pytest.raises(ValueError, match="path must be a file to write, got the folder"):
        make().save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_states_that_cannot_be_written_are_named_and_nothing_is(tmp_path):
    distiller = make(schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1.0))
    distiller.save(tmp_path / "a")
    distiller.scheduler.odd = object()
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(TypeError, match="scheduler/odd must consist of tensors, numbers, strings"):
        distiller.save(tmp_path / "a")
    with pytest.raises(TypeError, match="JSON"):
        make().save(tmp_path / "a", extra=object())
    assert (tmp_path / "a").read_bytes() == before


def test_the_average_in_the_students_place_is_not_saved(tmp_path):
    distiller = make()
    with distiller.ema.applied(), pytest.raises(RuntimeError, match=r"inside EMA\.applied"):
        distiller.save(tmp_path / "a")
    assert os.listdir(tmp_path) == []


# Files that cannot be used


def refused(distiller, file, message, error=ValueError) -> None:
    """Loading fails by the message and changes neither the file nor the object."""
    content = file.read_bytes() if file.is_file() else None
    before = everything(distiller)
    with pytest.raises(error, match=message):
        distiller.load(file)
    assert_same(everything(distiller), before)
    if content is not None:
        assert file.read_bytes() == content


def torn(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-9] ^= 16
    file.write_bytes(content)


def emptied(file):
    file.write_bytes(b"")


def foreign(file):
    save_file({"weight": torch.ones(2)}, file)


def text(file):
    file.write_text("not a checkpoint at all, but long enough to hold a header")


def without_record(file):
    save_file(load_file(file), file, metadata={"format": "di4c_fast.Distiller/1"})


def rewritten(change):
    """A file with a record that is whole but holds something else."""

    def write(file):
        tensors, values = read_checkpoint(file, "di4c_fast.Distiller/1")
        change(tensors, values)
        write_checkpoint(file, "di4c_fast.Distiller/1", tensors, values)

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (torn, "is no whole safetensors file"),
        (emptied, "is no whole safetensors file"),
        (text, "is no whole safetensors file"),
        (flipped, "is damaged: .* is not what was written"),
        (foreign, r"is not a checkpoint of di4c_fast.Distiller/1: its format is None"),
        (without_record, "is damaged: its header cannot be read"),
        (rewritten(lambda t, v: v.pop("counters")), "is damaged: its record lacks 'counters'"),
        (rewritten(lambda t, v: t.pop("random/cpu")), "is damaged: its record lacks 'random/cpu'"),
        (rewritten(lambda t, v: v["states"].pop("ema")), "is damaged: its record lacks 'ema'"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, damage, message):
    distiller = make(schedule=milestones)
    run(distiller, 0, 3)
    distiller.save(tmp_path / "a")
    damage(tmp_path / "a")
    refused(distiller, tmp_path / "a", message)


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    refused(make(), tmp_path / "a", "there is no checkpoint", FileNotFoundError)
    refused(make(), tmp_path, "path must be a checkpoint file, got the folder")


class Wider(Recorder):
    def __init__(self):
        super().__init__(True)
        self.mix = nn.Linear(8, 8, bias=False).double()
        self.extra = nn.Linear(1, 1).double()
        self.position = nn.Parameter(torch.randn(D + 1, 8).double())


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer)


def three_parts(optimizer):
    schedules = torch.optim.lr_scheduler
    parts = [schedules.ConstantLR(optimizer) for _ in range(3)]
    return schedules.SequentialLR(optimizer, parts, milestones=[2, 4])


def frozen_out(parameters):
    return torch.optim.Adam(list(parameters)[:-1], lr=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student": Wider()},
            r"holds another student: position is \(5, 8\) float64 there and \(6, 8\) float64 here;"
            r" .*extra.weight is absent there and \(1, 1\) float64 here;"
            r".*mix.bias is \(8,\) float64 there and absent here",
        ),
        (
            {"student": Recorder(True).float()},
            r"position is \(5, 8\) float64 there and \(5, 8\) float32 here; .*; and \d+ more",
        ),
        (
            {"config": DistillConfig(components=2)},
            "belongs to another run: config.components is 3 there and 2 here; config.draws is 2",
        ),
        ({"process": MaskedProcess(MASK, levels=8)}, "process.levels is None there and 8 here"),
        (
            {"process": UniformNoise(None)},
            "process.class is 'MaskedProcess' there and 'UniformNoise' here",
        ),
        ({"optimizer": adamw}, "optimizer is 'Adam' there and 'AdamW' here"),
        (
            {"optimizer": lambda p: torch.optim.Adam(p, fused=True)},
            "fused is False there and True here",
        ),
        ({"optimizer": frozen_out}, "the optimizer has other parameters, or in another order"),
        ({"schedule": None}, "scheduler is 'SequentialLR' there and None here"),
        ({"schedule": constant}, "scheduler is 'SequentialLR' there and 'ConstantLR' here"),
        ({"schedule": three_parts}, "the scheduler consists of other parts"),
        ({"average": None}, r"ema is {'decay': 0.9, 'warmup': True} there and None here"),
        ({"average": 0.5}, "ema.decay is 0.9 there and 0.5 here"),
        ({"clip_norm": None}, "clip_norm is 5.0 there and None here"),
        ({"accumulate": 4}, "accumulate is 2 there and 4 here"),
        ({"skip_nonfinite": False}, "skip_nonfinite is True there and False here"),
        ({"generator": None}, "generator is 'cpu' there and None here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changes, message):
    written = make(schedule=warm_up_then_cosine)
    run(written, 0, 3)
    written.save(tmp_path / "a")
    refused(make(**{"schedule": warm_up_then_cosine, **changes}), tmp_path / "a", message)


# The file format itself


def test_nested_states_survive_the_file(tmp_path):
    shared = torch.arange(6.0)
    state = {
        0: (1, [2.5, None, True], {"a/b": shared[:2], "a": {"b": shared[2:4]}}),
        "empty": [torch.empty(0, 3), {}, ()],
        "same": shared[:2],
        "overlapping": shared[1:3],
        "strided": torch.arange(6).view(2, 3).T,
    }
    tensors: dict[str, Tensor] = {}
    values = encode(state, "s", tensors)
    write_checkpoint(tmp_path / "a", "test", tensors, values)
    read, values = read_checkpoint(tmp_path / "a", "test")
    back = decode(values, read)
    assert back[0][:2] == state[0][:2]
    for ours, expected in (
        (back[0][2]["a/b"], shared[:2]),
        (back[0][2]["a"]["b"], shared[2:4]),
        (back["empty"][0], torch.empty(0, 3)),
        (back["same"], shared[:2]),
        (back["overlapping"], shared[1:3]),
        (back["strided"], state["strided"]),
    ):
        assert torch.equal(ours, expected)
    assert back["empty"][1:] == [{}, ()]
    with safe_open(str(tmp_path / "a"), framework="pt") as opened:
        assert opened.metadata()["format"] == "test"


def test_an_identity_is_made_of_public_settings():
    class Settings:
        def __init__(self):
            self.rate, self.table, self._cache = 0.5, torch.ones(2), torch.rand(3)

    assert identity(Settings()) == identity(Settings())
    changed = Settings()
    changed.table[0] = 2.0
    assert identity(changed) != identity(Settings())
    assert identity({"a": (1, None), "f": len}) == {
        "a": [1, None],
        "f": {"class": "builtin_function_or_method"},
    }
