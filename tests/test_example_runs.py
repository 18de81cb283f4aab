"""Runs of the examples: exact resumption, files, options, and what they say to bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from types import ModuleType
from typing import Any

import pytest
import torch
from example_support import DIGITS, TEXT, Stop, stop_at, stored
from safetensors.torch import load_file

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("sacrebleu")
pytest.importorskip("tqdm")

import examples.digits.__main__ as digits_command
import examples.text.__main__ as text_command
from examples.common import report, sampling
from examples.common.rundir import RunDirectory, RunError
from examples.digits import train as digits_train
from examples.digits import trials
from examples.digits.config import Config
from examples.text import train as text_train
from examples.text.metrics import MEASURES as TEXT_MEASURES
from examples.text.metrics import Score as TextScore

TINY: dict[str, Any] = {**DIGITS, "text": TEXT}
MODELS = ("teacher", "student")


def command(name: str) -> ModuleType:
    return text_command if name == "text" else digits_command


def train(name: str) -> ModuleType:
    return text_train if name == "text" else digits_train


def main(name: str, *options: str) -> int:
    system = [] if name == "text" else ["--system", name]
    return command(name).main([*system, *options])


def options_of(name: str, run: pathlib.Path, *more: str) -> list[str]:
    """The options of a tiny run with one thread."""
    options = ["--run-dir", str(run), "--threads", "1", "--checkpoint-every", "2", *more]
    for field in dataclasses.fields(TINY[name]):
        value = getattr(TINY[name], field.name)
        values = value if isinstance(value, tuple) else (value,)
        options += ["--" + field.name.replace("_", "-"), *(str(item) for item in values)]
    return [*options, "--no-speed"] if name == "masked" else options


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def content(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Resumption


def train_both(name: str, path: pathlib.Path) -> None:
    config = TINY[name]
    data = command(name).data.load(*([] if name == "text" else [config.levels]))
    more = {"text": data.fingerprint} if name == "text" else {}
    run = RunDirectory(path, config, **more)
    teacher = train(name).train_teacher(config, data, run, 5, 2)
    train(name).distill_student(config, data, teacher, run, 5, 2)


@pytest.mark.parametrize(
    ("name", "calls"),
    # Batches are drawn once per iteration: 5 of the teacher, then 5 of the student; checkpoints
    # come after 2 and 4 iterations and at the end.
    [("masked", (call,)) for call in (1, 4, 7, 9)]
    + [("text", (call,)) for call in (1, 3, 8)]
    + [("maskgit", (3, 6)), ("gaussian", (3, 6))],
)
def test_an_interrupted_run_ends_bit_for_bit_where_an_uninterrupted_one_does(
    name, calls, tmp_path, monkeypatch
):
    train_both(name, tmp_path / "whole")
    for call in calls:
        with monkeypatch.context() as patch:
            patch.setattr(train(name), "draw_batch", stop_at(call, train(name).draw_batch))
            with pytest.raises(Stop):
                train_both(name, tmp_path / "stopped")
        torch.manual_seed(123)  # a new process has another state of the default generator
    train_both(name, tmp_path / "stopped")
    for model in MODELS:
        file = f"seed-5/{model}.safetensors"
        whole, losses = stored(tmp_path / "whole" / file)
        stopped, others = stored(tmp_path / "stopped" / file)
        assert whole.keys() == stopped.keys()
        assert len(losses) == 5
        assert losses == others
        for key in whole:
            assert torch.equal(whole[key], stopped[key]), key


@pytest.mark.parametrize("name", TINY)
def test_the_command_runs_reports_and_does_not_repeat_finished_work(
    name, tmp_path, monkeypatch, capsys
):
    run, reported = tmp_path / "run", tmp_path / "report"
    seeds = ["3", "4"] if name in ("masked", "text") else ["3"]
    arguments = options_of(name, run, "--seeds", *seeds, "--report", str(reported))
    assert main(name, *arguments) == 0
    printed = capsys.readouterr().out
    assert "seed 3" in printed
    assert ("range of 2 seeds" in printed) == (len(seeds) == 2)
    results = json.loads((reported / "results.json").read_text())
    assert results["config"] == TINY[name].to_json()
    assert set(results["seeds"]) == set(seeds)
    assert set(results["seeds"]["3"]["student"]) == {"1", "3"}
    picture = "text.png" if name == "text" else "digits.png"
    assert (reported / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    if name == "text":
        assert "windows of held-out text" in printed
        assert "bits per hidden character" in printed
        assert set(results["seeds"]["4"]["one_step"]) == {"0.25", "0.5", "0.75", "1.0"}
        assert set(results["real"]) == {"bits", "reverse_bits", "self_bleu", "repeats", "windows"}
        assert (run / "samples.txt").read_text().count("student, 3 steps") == 2
    else:
        assert "noise floor" in printed
        assert "pixel-pair TV" in printed
        assert results["loss"] is None
        assert results.get("distances") == ("within classes" if name == "maskgit" else None)
    files = {f"{m}{rest}" for m in MODELS for rest in ("", "-1-steps", "-3-steps")}
    files |= {"one-step"} if name == "text" else set()
    assert {path.name for path in (run / "seed-3").iterdir()} == {f"{f}.safetensors" for f in files}
    for model in MODELS:
        tokens = load_file(run / "seed-3" / f"{model}-3-steps.safetensors")["tokens"]
        assert tokens.shape == (40, TINY[name].positions)
        assert int(tokens.max()) < (102 if name == "text" else 3)
    assert not list(tmp_path.rglob("*.tmp"))

    def unexpected(*args, **kwargs):
        raise AssertionError("finished work was repeated")

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "draw_samples", unexpected)
        patch.setattr(train(name), "draw_batch", unexpected)
        assert main(name, *arguments) == 0
    assert json.loads((run / "results.json").read_text()) == results
    capsys.readouterr()

    if name == "masked":
        file = tmp_path / "trials.json"
        assert trials.main([str(run), "--about", "a test", "--out", str(file)]) == 0
        trial = json.loads(file.read_text())["trials"][0]
        assert trial["name"] == "run"
        assert trial["changes"].items() >= {"levels": 3, "steps": [1, 3]}.items()
        assert trial["student"]["3"].keys() == {"frechet", "pair_tv"}
        for nats in trial["diagnostics"].values():
            assert 0 <= nats["kl"] < 1
            assert 0 < nats["joint_nats"] < nats["student_nats"] + 0.1
    before = content(run)
    assert main(name, *arguments, "--layers", "2") == 2
    assert "layers is 1 there and 2 here" in capsys.readouterr().err
    assert content(run) == before
    if name in ("maskgit", "gaussian"):
        return  # the same code as for "masked", after the training of the same classifier
    checkpoint = run / "seed-3" / "student.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    assert main(name, *arguments) == 2
    assert "put student.safetensors back" in capsys.readouterr().err
    checkpoint.unlink()
    assert main(name, *arguments) == 2
    assert "has lost seed-3/student.safetensors" in capsys.readouterr().err
    assert json.loads((run / "results.json").read_text()) == results


# Run directories


@pytest.fixture
def saved(tmp_path) -> pathlib.Path:
    """A run directory with one file, whose run has ended."""
    RunDirectory(tmp_path, TINY["masked"]).save("seed-0/x", {"x": torch.arange(300)}, {"s": 1.0})
    return tmp_path


def test_a_failed_write_leaves_the_file_before_it(saved, monkeypatch):
    before = (saved / "seed-0" / "x.safetensors").read_bytes()
    run = RunDirectory(saved, TINY["masked"])

    def broken(source, target):
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(OSError, match="disk gone"):
            run.save("seed-0/x", {"x": torch.arange(4)}, {"s": 2.0})
    assert (saved / "seed-0" / "x.safetensors").read_bytes() == before
    tensors, values = RunDirectory(saved, TINY["masked"]).load("seed-0/x")
    assert torch.equal(tensors["x"], torch.arange(300))
    assert values == {"s": 1.0}


def test_a_run_directory_of_another_configuration_is_refused_and_left_alone(saved):
    before = content(saved)
    other = dataclasses.replace(TINY["masked"], levels=5, steps=(1, 2))
    with pytest.raises(RunError, match=r"levels is 3 there and 5 here.*steps is \[1, 3\] there"):
        RunDirectory(saved, other)
    with pytest.raises(RunError, match="text is absent there and 4567 here"):
        RunDirectory(saved, TINY["masked"], text="4567")
    assert content(saved) == before


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds files \(notes.txt\) but no run.json"):
        RunDirectory(tmp_path, TINY["masked"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(RunError, match="must be a directory"):
        RunDirectory(tmp_path / "notes.txt", TINY["masked"])


def test_a_missing_file_is_an_error_and_not_a_fresh_start(saved):
    (saved / "seed-0" / "x.safetensors").unlink()
    with pytest.raises(RunError, match=r"has lost seed-0/x\.safetensors"):
        RunDirectory(saved, TINY["masked"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-7],
        lambda content: b"",
        lambda content: content[:-5] + bytes([content[-5] ^ 4]) + content[-4:],
        lambda content: content.replace(b'"x"', b'"z"'),
    ],
    ids=["cut", "empty", "flipped", "renamed"],
)
def test_a_torn_file_is_an_error(saved, damage):
    file = saved / "seed-0" / "x.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(RunError, match=r"x\.safetensors is (damaged|not).*put x\.safetensors"):
        RunDirectory(saved, TINY["masked"]).load("seed-0/x")


@pytest.mark.parametrize("name", ["masked", "gaussian"])
def test_a_damaged_record_is_an_error(name, tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"format": 1, "con')
    assert main(name, *options_of(name, tmp_path)) == 2
    assert "run.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "here"), [("masked", "maskgit"), ("maskgit", "gaussian"), ("gaussian", "masked")]
)
def test_the_directory_of_another_system_is_refused(there, here, tmp_path, capsys):
    RunDirectory(tmp_path, TINY[there])
    before = content(tmp_path)
    assert main(here, *options_of(here, tmp_path)) == 2
    error = capsys.readouterr().err
    assert f"belongs to a run of --system {there}, not {here}" in error
    assert "choose another --run-dir" in error
    assert content(tmp_path) == before


def test_a_run_directory_has_one_process_at_a_time(saved, tmp_path_factory):
    run = RunDirectory(saved, TINY["masked"])
    child = os.fork()
    if child == 0:  # pragma: no cover - another process
        try:
            RunDirectory(saved, TINY["masked"])
        except RunError as error:
            os._exit(0 if f"is in use by process {os.getppid()} on" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del run
    assert RunDirectory(saved, TINY["masked"]).load("seed-0/x")
    assert not list(saved.rglob("*.lock"))


def test_masked_runs_are_identified_as_they_always_were():
    assert "system" not in Config().to_json()
    assert {"levels", "steps"} < Config().to_json().keys()
    named = {name: recipe.to_json().get("system") for name, recipe in DIGITS.items()}
    assert named == {"masked": None, "maskgit": "maskgit", "gaussian": "gaussian"}


# Interruptions and errors


@pytest.mark.parametrize("name", ["masked", "text"])
def test_ctrl_c_says_how_to_continue(name, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train(name), "draw_batch", interrupted)
    assert main(name, *options_of(name, tmp_path / "run")) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["masked", "text"])
def test_a_loss_that_is_not_finite_stops_with_advice(name, tmp_path, monkeypatch, capsys):
    def broken(logits, *rest):
        return logits.sum() * math.nan

    monkeypatch.setattr(train(name), "masked_cross_entropy", broken)
    assert main(name, *options_of(name, tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert "loss of the teacher became nan" in error
    assert "--teacher-lr" in error


def test_the_verdict_says_the_range_over_the_seeds():
    def scores(shift: float) -> report.Scores:
        base = TextScore(3.0, 3.5, 10.0, 0.05)
        return {"teacher": {4: base}, "student": {4: dataclasses.replace(base, bits=3.0 - shift)}}

    line = text_command.verdict([scores(0.25), scores(0.5)]).splitlines()[1]
    assert line.startswith("       4 bits per char. -0.500 to -0.250, reverse bits +0.000 to")
    one = report.table(3, TEXT_MEASURES, scores(0.25), _instant(), scores(0)["teacher"][4], "real")
    assert one.splitlines()[3].split()[:5] == ["4", "3.000", "2.750", "3.500", "3.500"]


def _instant() -> report.Drawn:
    drawn = sampling.Samples(torch.zeros(4, 2), 0.5)
    return {name: {4: drawn} for name in MODELS}


# Options

WRONG = [
    ("masked", "--levels 1", "argument --levels: must be between 2 and 17, got 1"),
    ("masked", "--levels many", "argument --levels: invalid int value: 'many'"),
    ("masked", "--components 0", "argument --components: must be between 1 and 1024, got 0"),
    ("masked", "--student-iterations -5", "argument --student-iterations: must be at least 1"),
    ("masked", "--teacher-lr nan", "argument --teacher-lr: must be between 1e-08 and 1, got nan"),
    ("masked", "--data-weight inf", "argument --data-weight: must be at least 0, got inf"),
    ("masked", "--teacher-step 2", "argument --teacher-step: must be between 0.0001 and 1"),
    ("masked", "--width 10", "argument --width: must be a multiple of 4"),
    ("masked", "--steps 4 2", "argument --steps: must increase, got 4 2"),
    ("masked", "--steps 0", "argument --steps: must be between 1 and 4096, got 0"),
    ("masked", "--samples 8", "argument --samples: must be at least 32, got 8"),
    ("masked", "--seeds -1", "argument --seeds: must be different numbers"),
    ("masked", "--seeds 1 1", "argument --seeds: must be different numbers"),
    ("masked", "--threads 0", "argument --threads: must be at least 1, got 0"),
    ("masked", "--checkpoint-every 0", "argument --checkpoint-every: must be at least 1, got 0"),
    ("masked", "--epochs 3", "unrecognized arguments: --epochs"),
    ("masked", "--guidance 1", "unrecognized arguments: --guidance"),
    ("masked", "--system duo", "argument --system: invalid choice: 'duo'"),
    ("masked", "--system", "argument --system: expected one argument"),
    ("maskgit", "--guidance -1", "argument --guidance: must be between 0 and 100"),
    ("maskgit", "--label-dropout 2", "argument --label-dropout: must be between 0 and"),
    ("maskgit", "--label-dropout 0", "argument --label-dropout: must be above 0 for guidance = 0"),
    ("maskgit", "--low-t 0.9", "argument --low-t: must be between 0 and 0.5, got 0.9"),
    ("maskgit", "--steps 65", "argument --steps: must be between 1 and 64, got 65"),
    ("gaussian", "--guidance 1", "unrecognized arguments: --guidance"),
    ("gaussian", "--no-speed", "unrecognized arguments: --no-speed"),
    ("gaussian", "--target-sigma 1", "argument --target-sigma: must be between 2 and"),
    ("gaussian", "--rate-sigma nan", "argument --rate-sigma: must be between 0.05"),
    ("gaussian", "--teacher-step 0.01", "argument --min-step: must be at most teacher_step = 0.01"),
    ("gaussian", "--component-weight -1", "argument --component-weight: must be at"),
    ("text", "--length 15", "argument --length: must be between 16 and 1024, got 15"),
    ("text", "--length 100", "argument --length: must be a multiple of 8, got 100"),
    ("text", "--block 10", "argument --block: must be a multiple of 4, got 10"),
    ("text", "--stretch 3", "argument --stretch: must be a multiple of 2, got 3"),
    ("text", "--width 12", "argument --width: must be a multiple of 8, got 12"),
    ("text", "--judge-order 9", "argument --judge-order: must be between 2 and 8, got 9"),
    ("text", "--samples 8", "argument --samples: must be at least 32, got 8"),
    ("text", "--steps 8 4", "argument --steps: must increase, got 8 4"),
    ("text", "--teacher-lr nan", "argument --teacher-lr: must be between 1e-08 and 1, got nan"),
    ("text", "--teacher-step 0", "argument --teacher-step: must be between 0.0001 and 1, got 0"),
    ("text", "--components many", "argument --components: invalid int value: 'many'"),
    ("text", "--seeds 1 1", "argument --seeds: must be different numbers"),
    ("text", "--threads 0", "argument --threads: must be at least 1, got 0"),
    ("text", "--levels 3", "unrecognized arguments: --levels"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_a_wrong_option_is_named_and_begins_no_run(name, options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(name, "--run-dir", str(tmp_path / "run"), *options.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", TINY)
def test_help_lists_every_option(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(name, "--help")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    fields = [field.name for field in dataclasses.fields(TINY[name])]
    for option in (*fields, "run_dir", "seeds", "report", "threads", "checkpoint_every"):
        assert "--" + option.replace("_", "-") in printed
    folder = {"text": "runs/text", "masked": "runs/digits"}.get(name, f"runs/digits-{name}")
    assert f"{folder})" in printed
