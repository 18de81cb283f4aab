"""The benchmarks themselves: names, skipping, results, memory, floors, the gate, the report."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import baselines, floors, gpu, harness, report, store, targets, tune
from benchmarks.ancestral_group import _ToyModel
from benchmarks.cases import AXES, Case, make_case, memory_cases, on_axis, shape_names, sweep_cases
from benchmarks.floors import Machine, Work
from benchmarks.harness import Settings, measure, quantile
from benchmarks.memory import MemoryUnknown, MemoryWorker, reset_high_water_mark
from benchmarks.registry import make_group
from benchmarks.session import BenchSession, Options
from benchmarks.step_group import activation_bytes, largest_components

ROOT = Path(__file__).resolve().parent.parent
MACHINE = Machine(10e9, {"fp32": 1e11})
QUICK = Settings(seconds=0.001, rounds=2, memory=False, details=False)


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """The interpreter that the other tests use is no backend to measure."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def tiny(shape: str, **changes) -> Case:
    return make_case(shape, "tiny", "fp32", "cpu", **changes)


def chosen(group, *names):
    return [variant for variant in group.variants() if variant.name in names]


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider"]
    # A plugin of the surrounding run must not turn the benchmarks off.
    command += ["-p", "no:xdist", "--size=tiny", "--device=cpu", "--threads=1", "--rounds=2"]
    command += ["--seconds=0.005", f"--results={folder}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


# Tuning ------------------------------------------------------------------------------------------


def test_every_field_of_the_search_is_a_launch_parameter_and_has_what_to_try():
    tuning = pytest.importorskip("di4c_fast.kernels.triton.tuning")
    defaults = dataclasses.asdict(tuning.LaunchParameters())
    fields = [field for field, _, _ in tune.SEARCH]
    assert len(set(fields)) == len(fields)
    for field, candidates, shapes in tune.SEARCH:
        assert set(candidates) - {defaults[field]}, field
        for candidate in candidates:
            tuning.LaunchParameters(**{**defaults, field: candidate})
        assert set(shapes) <= set(shape_names(("loss", "draw")))
    # Rows short enough to be drawn whole, and scratch memory, are in no benchmark.
    others = {"sample_whole_elements", "sample_rows", "sample_scratch_bytes"}
    assert set(fields) == set(defaults) - others


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "known"),
    [
        (Options(shapes=("langage",)), "language-hidden"),
        (Options(backends=("cuda",)), "vectorised-compiled"),
        (Options(dtype="fp8"), "bf16"),
        (Options(size="huge"), "small"),
        (Options(device="tpu"), "cuda"),
    ],
)
def test_unknown_names_list_the_known_ones(options, known):
    with pytest.raises(ValueError, match=r"unknown .* known are ") as caught:
        options.checked()
    assert known in str(caught.value)


@pytest.mark.parametrize("field", ["seconds", "rounds", "threads", "time_budget"])
def test_impossible_numbers_are_refused(field):
    with pytest.raises(ValueError, match=r"must be positive, got -1"):
        Options(**{field: -1}).checked()


def test_every_shape_exists_at_every_size_and_survives_the_way_to_the_child():
    for shape in shape_names():
        for size in ("full", "small", "tiny"):
            case = make_case(shape, size, "bf16", "cpu")
            assert Case.from_spec(json.loads(json.dumps(case.spec()))) == case
            assert make_group(case).input_bytes() > 0


@pytest.mark.parametrize("size", ["full", "small", "tiny"])
def test_every_point_of_the_sweeps_is_measured_once_and_found_on_its_axis(size):
    cases = sweep_cases(size, "fp32", "cpu")
    keys = [case.key for case in cases]
    assert len(set(keys)) == len(keys)
    assert len({json.dumps({**case.spec(), "note": ""}) for case in cases}) == len(cases)
    records = [{"case": case.spec()} for case in cases]
    found = {axis: [on_axis(record, axis) for record in records] for axis in AXES}
    for axis, places in found.items():
        values = [value for value in places if value is not None]
        assert len(set(values)) == len(values), axis
        assert float(getattr(cases[0], axis)) in values  # the base belongs to every axis
    for number in range(1, len(cases)):
        assert sum(places[number] is not None for places in found.values()) == 1
    assert on_axis({"case": tiny("language").spec()}, "components") is None


# The gate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["language", "image", "pixel", "large", "cross-entropy"])
def test_truth_agrees_with_the_dense_reference(shape):
    """The chunked float64 truth against di4c_fast's dense reference in float64."""
    group = make_group(tiny(shape))
    inputs = group.make_inputs(3)
    truth = group.truth(inputs)
    wide = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    student = inputs.problem.student.with_tensors(
        [*wide, *inputs.problem.student.tensors()[len(wide) :]]
    )
    inputs.problem = dataclasses.replace(inputs.problem, student=student)
    inputs.leaves = wide
    check = group.check("reference", inputs, truth)
    # The teacher and the draws stay fp32 in the reference.
    assert check.loss_error < 1e-7
    assert check.gradient_error < 1e-6


def test_every_variant_that_can_run_here_passes_its_check():
    for shape in shape_names():
        group = make_group(tiny(shape))
        inputs = group.make_inputs(0)
        truth = group.truth(inputs)
        for variant in group.variants():
            if group.unavailable(variant.name) is None and "compiled" not in variant.name:
                check = group.check(variant.name, inputs, truth)
                assert check.problem is None, (shape, variant.name, check)


@pytest.mark.parametrize("broken", ["loss", "gradient", "nan", "inactive"])
def test_a_wrong_variant_has_no_speed(monkeypatch, broken):
    honest = baselines.dense_loss

    def wrong(student, *arguments, **keywords):
        loss = honest(student, *arguments, **keywords)
        if broken == "loss":
            return loss * 1.01
        if broken == "nan":
            return loss + student.sum() * 0 / 0
        extra = 1e-2 * student[..., 0]
        if broken == "inactive":  # gradient at revealed positions alone
            active = keywords["xt"] == student.shape[-1] - 1
            extra = extra * ~active[:, None]
        return loss + (extra - extra.detach()).sum()

    monkeypatch.setattr(baselines, "dense_loss", wrong)
    group = make_group(tiny("language"))
    records = measure(group, chosen(group, "dense", "torch"), QUICK, MACHINE, None)
    by_name = {record["variant"]: record for record in records}
    assert by_name["dense"]["status"] == "wrong"
    assert by_name["dense"]["seconds"] is None
    assert by_name["dense"]["samples"] == []
    assert "off by" in by_name["dense"]["reason"]
    assert by_name["torch"]["status"] == "ok"
    assert by_name["torch"]["seconds"] > 0
    rows = report.blocks({"cpu": as_results(records)})["loss-cpu"]
    assert "one gather per target |" not in rows
    assert "off by" in rows
    json.dumps(store.finite(records), allow_nan=False)


def test_a_biased_draw_has_no_speed(monkeypatch):
    def biased(logits):
        warm = (logits.float() * 0.8).softmax(-1)
        token = torch.multinomial(warm, 1)
        log_prob = logits.float().log_softmax(-1).gather(-1, token)
        return token.squeeze(-1), log_prob.squeeze(-1)

    monkeypatch.setattr(baselines, "multinomial_draw", biased)
    group = make_group(tiny("rows", positions=4096))
    torch.manual_seed(0)
    (record,) = measure(group, chosen(group, "multinomial"), QUICK, MACHINE, None)
    assert record["status"] == "wrong"
    assert record["seconds"] is None


def test_a_variant_that_raises_is_reported_and_the_others_go_on(monkeypatch):
    def raising(*arguments, **keywords):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(baselines, "dense_loss", raising)
    group = make_group(tiny("image"))
    records = measure(group, chosen(group, "dense", "torch"), QUICK, MACHINE, None)
    assert [record["status"] for record in records] == ["failed", "ok"]
    assert "no such kernel" in records[0]["reason"]


def test_toy_law_of_ancestral_sampling_sums_to_one_and_depends_on_the_steps():
    model = _ToyModel("cpu")
    for steps in (1, 3):
        assert float(model.law(steps).sum()) == pytest.approx(1.0, abs=1e-12)
    assert float((model.law(1) - model.law(8)).abs().max()) > 1e-3


# Skipping ----------------------------------------------------------------------------------------


def test_a_shape_that_does_not_fit_is_skipped_with_the_sizes(monkeypatch):
    monkeypatch.setattr(harness, "available_bytes", lambda device: 10_000)
    group = make_group(tiny("language"))
    records = measure(group, group.variants(), QUICK, MACHINE, None)
    assert {record["status"] for record in records} == {"skipped"}
    assert "would take about" in records[0]["reason"]
    assert "10.00 kB are available" in records[0]["reason"]


def test_a_variant_that_does_not_fit_leaves_the_others(monkeypatch):
    group = make_group(tiny("image"))
    space = group.input_bytes() + group.call_bytes("torch") + 10
    monkeypatch.setattr(harness, "available_bytes", lambda device: space)
    records = measure(group, chosen(group, "dense", "torch"), QUICK, MACHINE, None)
    assert [record["status"] for record in records] == ["skipped", "ok"]


def test_missing_peers_and_backends_are_skipped_with_a_reason():
    group = make_group(tiny("cross-entropy"))
    if torch.cuda.is_available():
        pytest.skip("they may exist beside a GPU")
    assert "not installed" in group.unavailable("liger") or "GPU" in group.unavailable("liger")
    assert group.unavailable("triton") == "it needs a GPU"


def test_compiled_variants_need_a_compiler(monkeypatch):
    from benchmarks import groups

    groups.no_compiler.cache_clear()
    monkeypatch.setattr(groups.shutil, "which", lambda name: None)
    assert "C++ compiler" in make_group(tiny("language")).unavailable("dense-compiled")
    groups.no_compiler.cache_clear()


# Floors and statistics ---------------------------------------------------------------------------


def test_floor_counts_reads_and_writes_once():
    case = make_case("language", "full", "bf16", "cpu")
    active = 512 * 50258
    work = floors.loss_floor(case)
    assert work.bytes == 2 * ((16 + 16 + 1) * active + 16 * 1024 * 50258)
    plan = floors.loss_plan(case)
    assert plan.bytes == 2 * 6 * 16 * active  # 3 reads, 1 write, 2 reads of the draws
    linear = floors.loss_plan(make_case("language-hidden", "full", "bf16", "cpu"))
    assert linear.flops == 5 * (2 * 16 * 512 * 768 * 50258)
    draw = floors.draw_floor(make_case("rows", "full", "bf16", "cpu"))
    assert draw.bytes == 8192 * 50258 * 2
    assert floors.loss_floor(make_case("pixel", "full", "bf16", "cpu")) is None


def test_floor_is_the_longer_of_moving_and_multiplying():
    machine = Machine(100.0, {"fp32": 1000.0})
    assert Work(50, 100).seconds(machine, "fp32") == 0.5
    assert Work(50, 2000).seconds(machine, "fp32") == 2.0
    assert Work(50).seconds(machine, "bf16") == 0.5


def test_quantiles_interpolate():
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([5.0], 0.8) == 5.0
    with pytest.raises(ValueError, match="empty"):
        quantile([], 0.5)


def test_calls_are_interleaved_and_slow_ones_take_fewer_turns():
    order = []
    calls = {name: (lambda i, name=name: order.append(name)) for name in ("fast", "slow")}
    settings = Settings(seconds=1.0, rounds=4, slow_rounds=2, samples_per_round=2)
    samples = harness.time_interleaved(
        calls, {"fast": 0.01, "slow": 5.0}, harness.Clock("cpu"), settings
    )
    assert len(samples["slow"]) == 2
    assert len(samples["fast"]) == 8
    # The first of several calls in a turn is not counted.
    assert order[:8] == [*["fast"] * 3, "slow", "slow", *["fast"] * 3]


def test_largest_components_solves_the_linear_count():
    assert largest_components(100.0, 10.0, 20.0) == 4
    assert largest_components(5.0, 10.0, 20.0) == 0
    with pytest.raises(ValueError, match="positive"):
        largest_components(5.0, 10.0, 0.0)


def test_activations_are_counted_in_proportion_to_the_rows():
    case = tiny("distill")
    one, two, three = (activation_bytes(case, rows) for rows in (1, 2, 3))
    assert three - two == two - one > 0


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_known_allocation_is_measured_within_five_percent():
    script = """
import sys, torch
from benchmarks.memory import peak_in_this_process
torch.set_num_threads(1)
size = 160 << 20
kept = torch.ones(size // 4)  # inputs do not count
def call():
    first = torch.ones(size // 4)
    second = first + 1
    del first
    return second
torch.ones(1000) + 1
print(peak_in_this_process(call), peak_in_this_process(lambda: None), 2 * size)
"""
    from benchmarks.memory import ENVIRONMENT

    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    measured, nothing, expected = map(int, result.stdout.split())
    assert measured == pytest.approx(expected, rel=0.05)
    if reset_high_water_mark():
        assert nothing < 4 << 20


def test_the_child_measures_variants_and_survives_errors():
    worker = MemoryWorker(threads=1, timeout=60.0)
    try:
        case = tiny("image", vocabulary=4097, positions=64, components=4)
        logits = case.logits_bytes
        dense, ours = (worker.peak(case.spec(), name) for name in ("dense", "torch"))
        assert dense > 4 * logits
        assert logits * 0.9 < ours < dense
        with pytest.raises(MemoryUnknown, match="nonsense"):
            worker.peak(case.spec(), "nonsense")
        assert worker.peak(case.spec(), "torch") > 0
        assert worker.process is not None
        worker.process.kill()
        worker.process.wait()
        assert worker.peak(case.spec(), "torch") > 0  # a new child
    finally:
        worker.close()


# Results -----------------------------------------------------------------------------------------


def header(**changes):
    return {
        "started": "2026-01-01T00:00:00+00:00",
        "machine": {
            "kind": "cpu",
            "device": "a processor",
            "threads": 2,
            "versions": {"torch": "2"},
            "commit": "0123456789",
            "date": "2026-01-01",
        },
        "ceilings": {"bytes_per_second": 1e10, "flops": {"fp32": 1e11}},
        "settings": {"size": "small"},
        "complete": True,
        **changes,
    }


def as_results(records, folder=Path("unused"), **changes):
    results = store.ResultSet(folder, header(**changes))
    results.records = [store.finite(record) for record in records]
    return results


def small_records(seconds=1.0):
    group = make_group(tiny("image"))
    records = measure(group, chosen(group, "dense", "torch"), QUICK, MACHINE, None)
    for record in records:
        record |= {"seconds": seconds, "p20": seconds, "p80": seconds, "peak_bytes": 1000}
    return records


def test_results_survive_a_crash_while_writing(tmp_path, monkeypatch):
    results = store.ResultSet(tmp_path, header())
    results.add([{"group": "a", "variant": "x", "status": "ok", "seconds": 1.0}])
    monkeypatch.setattr(store.os, "replace", lambda *names: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        results.add([{"group": "b", "variant": "x", "status": "ok", "seconds": 2.0}])
    monkeypatch.undo()
    assert [r["group"] for r in store.ResultSet.load(tmp_path).records] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json"]


def test_csv_has_one_line_per_record(tmp_path):
    as_results(small_records(), tmp_path).save()
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("group,variant,status")
    assert len(lines) == 3


def test_broken_results_are_named(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "results.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match=r"results\.json holds no results of schema 1"):
        store.ResultSet.load(folder)
    assert store.result_sets(tmp_path) == []


def test_the_newest_complete_set_wins(tmp_path):
    for name, started, complete in (("a", "2026-01-01", True), ("b", "2026-01-03", False),
                                    ("c", "2026-01-02", True)):  # fmt: skip
        as_results([], tmp_path / name, started=started, complete=complete).save()
    assert store.newest(tmp_path)["cpu"].folder.name == "c"


def test_an_interrupted_run_keeps_its_groups_and_resumes_with_the_rest(tmp_path, monkeypatch):
    options = Options(
        shapes=("image", "language"), backends=("torch",), size="tiny", device="cpu",
        results=tmp_path, memory=False, rounds=1, seconds=0.001, threads=torch.get_num_threads(),
    )  # fmt: skip
    measured = []
    honest = harness.measure

    def watched(group, *arguments, **keywords):
        if len(measured) == 1 and group.case.shape == "image":
            raise KeyboardInterrupt
        measured.append(group.case.shape)
        return honest(group, *arguments, **keywords)

    monkeypatch.setattr(harness, "measure", watched)
    first = BenchSession(options)
    keys = {entry.case.shape: entry.case.key for entry in first.plan("loss")}
    for key in keys.values():
        first.select(key, "torch")
    first.records(keys["language"])
    with pytest.raises(KeyboardInterrupt):
        first.records(keys["image"])
    assert [r["case"]["shape"] for r in store.ResultSet.load(tmp_path).records] == ["language"]

    measured.clear()
    monkeypatch.setattr(harness, "measure", lambda group, *a, **k: (
        measured.append(group.case.shape), honest(group, *a, **k))[1])  # fmt: skip
    again = BenchSession(dataclasses.replace(options, resume=True))
    again.plan("loss")
    for key in keys.values():
        again.select(key, "torch")
        again.records(key)
    assert measured == ["image"]
    other = BenchSession(dataclasses.replace(options, resume=True, rounds=2))
    other.plan("loss")
    other.select(keys["image"], "torch")
    other.records(keys["image"])
    assert measured == ["image", "image"]  # other settings: nothing is taken over


def test_groups_are_skipped_when_the_time_is_spent(tmp_path):
    session = BenchSession(
        Options(size="tiny", device="cpu", results=tmp_path, memory=False, time_budget=1e-9)
    )
    key = session.plan("step")[0].case.key
    session.select(key, "plain")
    record = session.records(key)["plain"]
    assert record["status"] == "skipped"
    assert "time budget" in record["reason"]
    session.finish(interrupted=False, deselected=False)
    assert not session.results.header["complete"]


# Promises ----------------------------------------------------------------------------------------


def test_promises_compare_what_was_measured():
    case = make_case("language", "small", "fp32", "cpu")
    base = {"case": case.spec(), "status": "ok", "logits_bytes": 100, "gradient_error": 0.0}
    records = [
        {**base, "variant": "dense", "seconds": 3.1, "peak_bytes": 900},
        {**base, "variant": "torch", "seconds": 0.1, "peak_bytes": 130},
    ]
    speed, memory = targets.judge(records, "cpu")
    assert speed.met
    assert speed.measured == "31.0 ×"
    assert not memory.met  # 1.3 > 1.25
    records[1]["status"] = "wrong"
    assert targets.judge(records, "cpu") == []


def test_memory_of_a_linear_head_is_judged_by_its_growth():
    records = []
    for case in memory_cases("small", "fp32", "cpu"):
        gradient = targets.hidden_gradient_bytes(case.spec())
        records.append(
            {"case": case.spec(), "variant": "torch", "status": "ok", "seconds": None,
             "peak_bytes": 50_000_000 + gradient, "logits_bytes": case.logits_bytes}
        )  # fmt: skip
    below, growth = targets.judge(records, "cpu")
    assert below.met
    assert growth.met
    records[-1]["peak_bytes"] += records[-1]["logits_bytes"] // 4
    below, growth = targets.judge(records, "cpu")
    assert below.met
    assert not growth.met


# The report --------------------------------------------------------------------------------------

BLOCK = "before\n<!-- results:{} -->\nold numbers\n<!-- /results -->\nafter\n"


def test_report_fails_unless_the_readme_says_what_was_measured(tmp_path, capsys):
    results = tmp_path / "results"
    as_results(small_records(), results / "a").save()
    readme = tmp_path / "README.md"
    readme.write_text(BLOCK.format("loss-cpu"))
    arguments = ["--root", str(results), "--readme", str(readme), "--figures", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert "loss-cpu is not what the newest results say" in capsys.readouterr().err
    assert report.main([*arguments, "--write", "--no-figures"]) == 0
    assert "1.00 s" in readme.read_text() or "1 s" in readme.read_text()
    assert report.main([*arguments, "--check"]) == 0
    as_results(small_records(2.0), results / "b", started="2026-02-01").save()
    assert report.main([*arguments, "--check"]) == 1
    readme.write_text(readme.read_text().replace("1 s", "0.5 s"))
    assert report.main([*arguments, "--check"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BLOCK.format("loss-tpu"), "known are machine-cpu"),
        ("<!-- results:loss-cpu -->\nno end\n", "has no <!-- /results -->"),
    ],
)
def test_broken_blocks_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        report.fill(text, report.blocks({}))


def test_figures_carry_the_results_they_were_drawn_from(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.figures import draw

    results = as_results(small_records())
    (path,) = draw(results, tmp_path, report.digest(results))
    assert path.name == "speed-cpu.svg"
    assert path.stat().st_size < 100_000
    readme = "![speed](benchmarks/figures/speed-cpu.svg)\n"
    assert report.check(readme, {"cpu": results}, tmp_path) == 0
    other = as_results(small_records(2.0))
    with pytest.raises(report.Inconsistent, match="was not drawn from the newest results"):
        report.check(readme, {"cpu": other}, tmp_path)
    with pytest.raises(report.Inconsistent, match="does not exist"):
        report.check(readme.replace("speed", "spread"), {"cpu": results}, tmp_path)


def test_the_readme_of_this_checkout_is_consistent():
    assert report.main(["--check"]) == 0


# The commands ------------------------------------------------------------------------------------


def test_pytest_benchmarks_runs_from_measurement_to_closing_table(tmp_path):
    result = run_pytest(tmp_path, "--shape=image", "--backend=dense,torch")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "eager, one gather per target" in result.stdout
    assert "peak memory" in result.stdout
    loaded = store.ResultSet.load(tmp_path)
    assert {r["variant"] for r in loaded.records} == {"dense", "torch"}
    assert all(r["seconds"] > 0 and r["peak_bytes"] is not None for r in loaded.records)
    assert not loaded.header["complete"]  # a part of the shapes
    assert loaded.header["machine"]["versions"]["torch"] == torch.__version__


def test_pytest_benchmarks_refuses_unknown_names(tmp_path):
    result = run_pytest(tmp_path, "--shape=nothing")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "unknown shape 'nothing'; known are language" in result.stdout + result.stderr


def test_gpu_entry_dry_run_writes_few_files_and_survives_a_failing_stage(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--tests=no-such-folder"]
    command += ["--total-seconds=500", "--stages=tests,benchmarks", "--", "--shape=image"]
    command += ["--backend=torch", "--no-memory", "--threads=1"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 1, result.stdout + result.stderr  # the tests are missing
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "benchmarks.log",
        "benchmarks/results.csv",
        "benchmarks/results.json",
        "summary.txt",
        "tests.log",
    ]
    summary = (tmp_path / "summary.txt").read_text()
    assert "tests: exit status 4" in summary
    assert "benchmarks: passed" in summary
    assert "di4c_fast torch" in summary


def test_gpu_entry_refuses_a_machine_without_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "sees no GPU" in capsys.readouterr().err


def test_times_are_handed_to_pytest_benchmark_unchanged():
    from benchmarks.replay import Replay

    class Fixture:
        def pedantic(self, function, rounds, iterations):
            self.durations = []
            for _ in range(rounds):
                started = timer()
                function()
                self.durations.append(timer() - started)

    timer, fixture = Replay(), Fixture()
    timer.play(fixture, [0.5, 0.25, 2.0])
    assert all(map(math.isclose, fixture.durations, [0.5, 0.25, 2.0]))
