"""The benchmarks themselves: names, checks, skipping, memory, floors, targets, report, commands."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import (
    baselines,
    drop_ins,
    floors,
    gpu,
    harness,
    report,
    results,
    run,
    targets,
    tune,
)
from benchmarks.cases import AXES, DTYPES, SHAPES, SIZES, make_case, on_axis, sweep_cases
from benchmarks.floors import Machine, Work
from benchmarks.groups import no_compiler
from benchmarks.harness import Settings, make_group, measure, peak_of
from benchmarks.memory import MemoryUnknown, MemoryWorker, peak_in_this_process
from benchmarks.session import Replay, Run

ROOT = Path(__file__).resolve().parent.parent
MACHINE, QUICK = Machine(10e9, dict.fromkeys(DTYPES, 1e11)), Settings(seconds=0.001, rounds=2)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """The interpreter that the other tests use is no backend to measure."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def tiny(shape, dtype="fp32", **changes):
    return make_case(shape, "tiny", dtype, "cpu", **changes)


def measured(case, *names):
    """The records of some variants, by name."""
    variants = [v for v in make_group(case).variants() if v.name in names]
    return {record["variant"]: record for record in measure(case, variants, QUICK, MACHINE)}


def run_command(*arguments, **environment):
    # Of the tests' own run nothing: pytest-benchmark measures nothing in a worker of xdist.
    inner = ("TRITON_INTERPRET", "PYTEST_")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(inner)}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_every_field_of_the_search_is_a_launch_parameter_and_has_what_to_try():
    tuning = pytest.importorskip("di4c_fast.kernels.triton.tuning")
    from di4c_fast.passes import triton  # noqa: F401 - registers the records

    fields = [field for field, _, _ in tune.SEARCH]
    assert len(set(fields)) == len(fields)
    for field, candidates, shapes in tune.SEARCH:
        kernel, name = field.split(".")
        assert set(candidates) - {getattr(tuning.records[kernel](), name)}, field
        for candidate in candidates:
            tuning.checked(kernel, {name: candidate}, "the search")
        assert set(shapes) <= set(SHAPES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "unknown dtype 'fp8'; known are .*bf16"),
        ({"size": "huge"}, "unknown size 'huge'; known are .*small"),
        ({"device": "tpu"}, "unknown device 'tpu'; known are .*cuda"),
        ({"seconds": -1}, "seconds must be positive"),
        ({"rounds": 0}, "rounds must be positive"),
        ({"time_budget": -1}, "time_budget must be positive"),
    ],
)
def test_wrong_options_are_named_with_what_is_known(options, message):
    with pytest.raises(ValueError, match=message):
        Run(**options)
    with pytest.raises(ValueError, match=r"unknown shape 'langage'; .*language-hidden"):
        tiny("langage")


@pytest.mark.parametrize("size", SIZES)
def test_every_point_of_the_sweeps_is_measured_once_and_found_on_its_axis(size):
    everything = sweep_cases(size, "fp32", "cpu", threads=2)
    assert len({case.key for case in everything}) == len(everything)
    cases = [case for case in everything if case.shape == "scaling"]
    assert len({dataclasses.replace(case, note="") for case in cases}) == len(cases)
    records = [{"case": dataclasses.asdict(case)} for case in cases]
    found = {axis: [on_axis(record, axis) for record in records] for axis in AXES}
    for axis, places in found.items():
        values = [value for value in places if value is not None]
        assert len(set(values)) == len(values), axis
        assert float(getattr(cases[0], axis)) in values  # the base belongs to every axis
    for number in range(1, len(cases)):
        assert sum(places[number] is not None for places in found.values()) == 1
    assert found["threads"].count(1.0) == 1
    for shape in SHAPES:
        assert make_group(make_case(shape, size, "bf16", "cpu")).input_bytes() > 0


@pytest.mark.parametrize("shape", ["language", "image", "pixel", "large", "cross-entropy"])
def test_truth_agrees_with_the_dense_reference(shape):
    """The truth by the plain passes against the dense reference, both in float64."""
    group = make_group(tiny(shape))
    inputs = group.make_inputs(3)
    truth = group.truth(inputs)
    student = inputs.problem["student"]
    inputs.leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    others = student.tensors()[len(inputs.leaves) :]
    inputs.problem["student"] = student.with_tensors([*inputs.leaves, *others])
    check = group.check("reference", inputs, truth)
    # The teacher and the draws stay fp32 in the reference.
    assert max(10 * check.loss_error, check.gradient_error) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_every_variant_that_can_run_here_passes_its_check(shape):
    group = make_group(tiny(shape))
    inputs = group.make_inputs(0)
    truth = group.truth(inputs)
    for variant in group.variants():
        if group.unavailable(variant.name) is None:
            check = group.check(variant.name, inputs, truth)
            assert check.problem is None, (variant.name, check)


@pytest.mark.parametrize("broken", ["loss", "gradient", "nan", "inactive"])
def test_a_wrong_variant_has_no_speed(monkeypatch, broken):
    honest = baselines.dense_loss

    def wrong(student, **arguments):
        loss = honest(student, **arguments)
        extra = 1e-2 * student[..., 0]
        if broken == "inactive":  # gradient at revealed positions alone
            extra = extra * (arguments["xt"] != student.shape[-1] - 1)[:, None]
        changed = {"loss": loss * 1.01, "nan": loss + student.sum() * 0 / 0}
        return changed.get(broken, loss + (extra - extra.detach()).sum())

    monkeypatch.setattr(baselines, "dense_loss", wrong)
    found = measured(tiny("language"), "dense", "torch", "cpu-in-place")
    assert (found["dense"]["status"], found["dense"]["samples"]) == ("wrong", [])
    assert "off by" in found["dense"]["reason"]
    json.dumps(found["dense"], allow_nan=False)
    assert found["cpu-in-place"]["status"] in ("ok", "skipped")
    assert min(found["torch"]["samples"]) > 0


def test_a_biased_draw_has_no_speed(monkeypatch):
    honest = baselines.multinomial_draw
    monkeypatch.setattr(baselines, "multinomial_draw", lambda logits: honest(logits * 0.8))
    torch.manual_seed(0)
    record = measured(tiny("rows", positions=4096), "multinomial")["multinomial"]
    assert (record["status"], record["samples"]) == ("wrong", [])


def test_a_variant_that_raises_is_reported_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(baselines, "dense_loss", lambda **arguments: 1 / 0)
    found = measured(tiny("image"), "dense", "torch")
    assert [record["status"] for record in found.values()] == ["failed", "ok"]
    assert "ZeroDivisionError" in found["dense"]["reason"]


def test_what_does_not_fit_is_skipped_with_the_sizes(monkeypatch):
    group = make_group(tiny("image"))
    space = group.input_bytes() + group.call_bytes("torch") + 10
    for what, room in (("the inputs", 10), ("the call", space)):
        monkeypatch.setattr(harness, "available_bytes", lambda device, room=room: room)
        found = measured(group.case, "dense", "torch")
        assert found["dense"]["status"] == "skipped"
        assert found["dense"]["reason"].startswith(f"{what} would take about")
        assert found["torch"]["status"] == ("ok" if room == space else "skipped")


def test_missing_peers_backends_and_compilers_are_reasons(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    no_compiler.cache_clear()
    small, group = make_case("language", "small", "fp32", "cpu"), make_group(tiny("cross-entropy"))
    assert "C++ compiler" in make_group(small).unavailable("vectorised-compiled")
    no_compiler.cache_clear()
    assert "half a minute" in group.unavailable("eager-compiled")
    assert "not installed" in group.unavailable("liger") or "GPU" in group.unavailable("liger")
    assert group.unavailable("triton") == "it needs a GPU"


def test_calls_are_interleaved_and_slow_ones_take_fewer_turns():
    order = []

    def turn(name, first, count):
        order.extend([name] * count)
        return [1.0] * count

    settings = Settings(seconds=0.08, rounds=4, slow_rounds=2)
    samples = harness.time_interleaved(turn, {"fast": 0.01, "slow": 5.0}, settings)
    assert {name: len(values) for name, values in samples.items()} == {"fast": 8, "slow": 2}
    # The first of several calls in a turn is not counted.
    assert order[:8] == [*["fast"] * 3, "slow", "slow", *["fast"] * 3]


def test_a_busy_case_is_timed_beside_a_process_on_its_threads(monkeypatch):
    started, popen, before = [], subprocess.Popen, torch.get_num_threads()
    watched = lambda *given: started.append(popen(*given)) or started[-1]  # noqa: E731
    monkeypatch.setattr(subprocess, "Popen", watched)
    case = tiny("language", busy=1, threads=1, note="busy")
    with harness.conditions(case):
        assert (started[0].poll(), torch.get_num_threads()) == (None, 1)
    assert started[0].poll() is not None
    assert torch.get_num_threads() == before
    record = measured(case, "dense")["dense"]
    assert (len(started), record["status"]) == (2, "ok")
    assert record["floor_seconds"] is None  # the floor is that of the idle machine


def test_groups_are_skipped_when_the_time_is_spent():
    session = Run(size="tiny", device="cpu", no_memory=True, time_budget=1e-9)
    session.asked = {key: ["plain", "torch"] for key in session.cases}
    record = session.record("step-distill-fp32", "plain")
    assert record["status"] == "skipped"
    assert "time budget" in record["reason"]
    assert not session.complete()


def test_times_are_handed_to_pytest_benchmark_unchanged():
    timer, durations = Replay(), []

    def pedantic(function, rounds, iterations):
        durations.extend(-timer() + timer() for _ in range(rounds))

    timer.play(types.SimpleNamespace(pedantic=pedantic), [0.5, 0.25, 2.0])
    assert durations == pytest.approx([0.5, 0.25, 2.0])


def test_floor_counts_reads_and_writes_once():
    case = make_case("language", "full", "bf16", "cpu")
    active = 512 * 50258
    work = floors.loss_floor(case)
    assert work.bytes == 2 * ((16 + 16 + 1) * active + 16 * 1024 * 50258)
    linear = floors.loss_floor(make_case("language-hidden", "full", "bf16", "cpu"))
    assert linear.flops == (4 * 16 + 1) * (2 * 512 * 768 * 50258)
    assert floors.draw_floor(make_case("rows", "full", "bf16", "cpu")).bytes == 8192 * 50258 * 2
    assert floors.loss_floor(make_case("pixel", "full", "bf16", "cpu")) is None
    confidence = make_group(make_case("confidence", "full", "bf16", "cpu")).work()
    rows, width, vocabulary = 512 + 384 + 256 + 128, 4096, 126464  # those still masked
    assert confidence == Work(2 * (4 * vocabulary + rows) * width, 2 * rows * width * vocabulary)
    machine = Machine(100.0, {"fp32": 1000.0})
    times = [Work(*work).seconds(machine, "fp32") for work in ((50, 100), (50, 2000), (50,))]
    assert times == [0.5, 2.0, 0.5]  # the longer of moving and multiplying


def two_blocks(size: int) -> int:
    """The peak of a call that holds two blocks of `size` bytes at once, in the child."""
    torch.set_num_threads(1)
    kept = torch.ones(size // 4)  # inputs do not count

    def call():
        return torch.ones(len(kept)) + 1

    torch.ones(1000).add_(1)
    return peak_in_this_process(call)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_weighs_known_blocks_and_variants_and_survives_errors():
    with contextlib.closing(MemoryWorker(timeout=120.0)) as worker:
        assert worker.peak(two_blocks, 160 << 20) == pytest.approx(2 * 160 << 20, rel=0.05)
        assert worker.peak(two_blocks, 1 << 12) < 4 << 20
        case = tiny("image", vocabulary=4097, positions=64, components=4)
        dense, ours = (worker.peak(peak_of, case, name) for name in ("dense", "torch"))
        assert 4 * case.logits_bytes < dense
        assert case.logits_bytes * 0.9 < ours < dense
        with pytest.raises(MemoryUnknown, match="unknown variant 'nonsense'; known are dense"):
            worker.peak(peak_of, case, "nonsense")
        with pytest.raises(MemoryUnknown, match="ended"):
            worker.peak(os._exit, 1)
        assert worker.peak(peak_of, case, "torch") > 0  # a new child


def record_of(shape, variant, size="small", dtype="fp32", note="", **values):
    case = make_case(shape, size, dtype, "cpu", note=note, positions=values.pop("positions", 64))
    usual = {"status": "ok", "seconds": 1.0, "peak_bytes": 100, "logits_bytes": 100}
    usual |= {"floor_seconds": None, "gradient_error": 0.0}
    return {**usual, "case": dataclasses.asdict(case), "variant": variant, **values}


def test_targets_compare_what_was_measured():
    records = [
        record_of("language", "dense", seconds=7.1),
        record_of("language", "cpu", seconds=0.1, peak_bytes=130),
        record_of("language", "dense", seconds=9.0, note="busy"),
        record_of("language", "cpu", seconds=0.3, note="busy", peak_bytes=None),
        record_of("language", "cpu", seconds=0.2, note="half", dtype="bf16"),
    ]
    found = {verdict.name: verdict for verdict in targets.judge(records, "cpu")}
    speed = found["language: cpu faster than dense"]
    assert (speed.wanted, speed.measured, speed.met) == ("at least 70 ×", "71 ×", True)
    assert not found["language: cpu of the logits"].met  # 1.3 > 1.25
    assert found["language, busy: cpu faster than dense"].measured == "30 ×"
    assert not found["language, half: cpu faster than fp32"].met
    records[1]["status"] = "wrong"
    assert [verdict.name for verdict in targets.judge(records, "cpu")] == [
        "language, busy: cpu faster than dense"
    ]


def test_memory_of_a_linear_head_is_judged_by_its_growth():
    def record(positions):
        note = f"D={positions}"
        record = record_of("language-hidden", "cpu", note=note, positions=positions)
        gradient = targets.hidden_gradient_bytes(record["case"])
        return record | {"peak_bytes": 50_000_000 + gradient, "logits_bytes": positions << 19}

    records = [record(128), record(1024)]
    assert [verdict.met for verdict in targets.judge(records, "cpu")] == [True, True]
    records[-1]["peak_bytes"] += records[-1]["logits_bytes"] // 4
    assert [verdict.met for verdict in targets.judge(records, "cpu")] == [True, False]


def test_half_a_gigabyte_is_promised_at_the_full_size_alone():
    for size, ours, met in (("full", 0.5e9, [True]), ("full", 0.51e9, [False]), ("small", 9e9, [])):
        record = record_of("confidence", "triton", size, peak_bytes=ours)
        assert [verdict.met for verdict in targets.judge([record], "gpu")] == met


BLOCK = "before\n<!-- results:{} -->\nold numbers\n<!-- /results -->\nafter\n"
README = "It is <!-- results:speed-up-cpu -->3 ×<!-- /results --> faster.\n"


@pytest.fixture(scope="module")
def run_of_two_shapes(tmp_path_factory):
    """`python -m benchmarks.run` on parts of two shapes: the process, and its JSON."""
    folder = tmp_path_factory.mktemp("run")
    chosen = "(image or language-fp32) and (dense or torch or compiled) and not busy"
    command = ["benchmarks.run", f"--results={folder}", "--size=tiny", "--device=cpu"]
    process = run_command(*command, "--rounds=2", "--seconds=0.005", "-k", chosen)
    return process, folder / "partial.json"


@pytest.fixture
def checkout(tmp_path, run_of_two_shapes):
    """Two pages and results, in the places that they have in a checkout."""
    for folder in ("docs", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(run_of_two_shapes[1], tmp_path / "benchmarks/results/cpu.json")
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs/distributed.md").write_text(BLOCK.format("many-cpu"))
    figure = "![speed](../benchmarks/figures/speed-cpu.svg)\n"
    (tmp_path / "docs/speed.md").write_text(BLOCK.format("loss-cpu") + figure)
    return tmp_path


def test_run_measures_stores_and_prints(run_of_two_shapes):
    process, path = run_of_two_shapes
    assert process.returncode == 0, process.stdout + process.stderr
    for text in ("eager, one gather per target", "peak memory", "di4c_fast torch", "Partial"):
        assert text in process.stdout
    loaded = results.Results.load(path)
    assert {r["variant"] for r in loaded.records} >= {"dense", "torch", "vectorised-compiled"}
    for record in loaded.records:
        measured = record["seconds"] is not None and record["peak_bytes"] is not None
        assert measured == (record["status"] == "ok"), record["memory_note"]
    assert not loaded.complete  # a part of the shapes
    assert loaded.machine["versions"]["torch"] == torch.__version__
    assert "node" not in loaded.machine
    assert loaded.machine["ceilings"]["bytes_per_second"] > 0


def test_report_fails_unless_the_pages_say_what_was_measured(checkout, capsys):
    pytest.importorskip("matplotlib")
    figure, readme = checkout / "benchmarks/figures/speed-cpu.svg", checkout / "README.md"

    def refused(message):
        assert report.main([f"--root={checkout}", "--check"]) == 1
        assert message in capsys.readouterr().err

    refused("loss-cpu is not what the newest results say")
    assert report.main([f"--root={checkout}", "--write"]) == 0
    assert "eager, one gather per target |" in (checkout / "docs/speed.md").read_text()
    assert figure.stat().st_size < 100_000
    assert report.main([f"--root={checkout}", "--check"]) == 0
    filled = readme.read_text()
    assert filled.startswith("It is <!-- results:speed-up-cpu -->")
    readme.write_text(README.replace("3 ×", "3000 ×"))
    refused("speed-up-cpu is not what the newest results say")
    readme.write_text(filled)
    figure.write_text("<svg/>")
    refused("was not drawn from the newest results")
    figure.unlink()
    refused("which does not exist")


def test_broken_blocks_and_results_are_named(tmp_path):
    broken = "<!-- results:loss-cpu -->\nno end\n"
    for text, message in (
        (BLOCK.format("loss-tpu"), "known are machine"),
        (broken, "has no <!-- /"),
    ):
        with pytest.raises(ValueError, match=message):
            report.fill(text, {})
    assert results.newest(tmp_path) == {}
    (tmp_path / "cpu.json").write_text('{"benchmarks": 99}')
    with pytest.raises(ValueError, match=r"cpu\.json holds no results"):
        results.newest(tmp_path)


def test_the_pages_of_this_checkout_say_what_was_measured():
    assert report.main(["--check"]) == 0


def test_the_record_of_a_drop_in_changes_in_its_entry_alone(tmp_path, monkeypatch):
    pytest.importorskip("transformers.models.diffusion_gemma")
    monkeypatch.setattr(MemoryWorker, "peak", lambda self, weigh, name, *sizes: 5 << 20)
    path, before = tmp_path / "drop-ins.json", drop_ins.RECORD.read_text("utf-8")
    path.write_text(before, "utf-8")
    drop_ins.main(["--sizes", "2", "3", "300", "--rounds", "1", "--write", str(path)])
    found, expected = json.loads(path.read_text("utf-8")), json.loads(before)
    pairs = zip(found["comparisons"], expected["comparisons"], strict=True)
    ((ours, old),) = (pair for pair in pairs if pair[0] != pair[1])
    step = ours["step_without_the_network"]
    assert set(step["median_s"]) == {"theirs", "ours"}
    assert step["peak_memory_growth_MiB"] == {"theirs": 5, "ours": 5}
    ours["step_without_the_network"] = old["step_without_the_network"]
    assert json.dumps(found, indent=1, ensure_ascii=False) == before


def test_commands_end_with_a_reason(capfd, tmp_path, monkeypatch):
    assert run.main([f"--results={tmp_path}", "--size=huge"]) == pytest.ExitCode.USAGE_ERROR
    assert "unknown size 'huge'; known are full, small, tiny" in capfd.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "sees no GPU" in capfd.readouterr().err


def test_gpu_entry_dry_run_writes_few_files_and_survives_a_failing_stage(tmp_path):
    command = ["benchmarks.gpu", "--dry-run", "--tests=no-such-folder", "--total-seconds=500"]
    command += ["--stages=tests,benchmarks", "--", "-k", "image and torch", "--no-memory"]
    process = run_command(*command, OUT=str(tmp_path))
    assert process.returncode == 1, process.stdout + process.stderr  # the tests are missing
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["benchmarks.log", "benchmarks/partial.json", "summary.txt", "tests.log"]
    summary = (tmp_path / "summary.txt").read_text()
    for text in ("tests: exit status 4", "benchmarks: passed", "di4c_fast torch"):
        assert text in summary
