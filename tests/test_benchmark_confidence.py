"""The benchmark of confidence sampling: what passes its check, what does not, what is promised."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import baselines, confidence_group, harness, report, store, targets
from benchmarks.cases import Case, make_case, shape_names
from benchmarks.confidence_group import ConfidenceGroup
from benchmarks.floors import Machine
from benchmarks.harness import Settings, measure
from benchmarks.memory import MemoryWorker
from benchmarks.registry import all_variants, make_group
from benchmarks.session import BenchSession, Options

MACHINE = Machine(10e9, {"fp32": 1e11, "bf16": 1e11, "fp16": 1e11})
QUICK = Settings(seconds=0.001, rounds=2, memory=False, details=False)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """The interpreter that the other tests use is no backend to measure."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def tiny(dtype: str = "fp32", **changes) -> ConfidenceGroup:
    group = make_group(make_case("confidence", "tiny", dtype, "cpu", **changes))
    assert isinstance(group, ConfidenceGroup)
    return group


def measured(group: ConfidenceGroup) -> dict:
    records = measure(group, group.variants(), QUICK, MACHINE, None)
    return {record["variant"]: record for record in records}


# The check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("seed", range(2))
def test_both_variants_pass_and_have_a_speed(dtype, seed):
    group = tiny(dtype)
    inputs = group.make_inputs(seed)
    truth = group.truth(inputs)
    assert (truth is None) == (dtype != "fp32")
    for variant in group.variants():
        check = group.check(variant.name, inputs, truth)
        assert check.problem is None, (variant.name, check)
    if seed == 0:
        for record in measured(group).values():
            assert record["status"] == "ok"
            assert record["seconds"] > 0
            assert record["floor_seconds"] > 0


@pytest.mark.parametrize(("positions", "steps"), [(2, 1), (3, 2), (24, 1), (24, 5), (24, 12)])
def test_any_number_of_positions_and_steps_is_followed(positions, steps):
    """One position, one step, as many steps as masked positions, with and without a remainder."""
    group = tiny(positions=positions, steps=steps, batch=3)
    assert sum(group.counts()) == group.case.active_positions
    inputs = group.make_inputs(0)
    truth = group.truth(inputs)
    for variant in group.variants():
        assert group.check(variant.name, inputs, truth).problem is None


def test_truth_is_the_rule_one_token_at_a_time():
    """float64, all logits at once, positions sorted by hand."""
    group = tiny(vocabulary=97, positions=20, steps=4)
    inputs = group.make_inputs(1)
    truth = group.truth(inputs)
    assert truth is not None
    model, mask_id, width = inputs.model, group.mask_id, 10
    for row, known in zip(truth, inputs.prompt, strict=True):
        tokens = torch.cat([known, torch.full((width,), mask_id)])
        for count in (3, 3, 2, 2):
            logits = (model.hidden(tokens[None])[0].double() @ model.weight.double().T)[:, :mask_id]
            log_prob, best = logits.log_softmax(-1).max(-1)
            masked = [d for d in range(20) if tokens[d] == mask_id]
            for d in sorted(masked, key=lambda d: -float(log_prob[d]))[:count]:
                tokens[d] = best[d]
        assert torch.equal(row, tokens)


def test_exact_choices_do_not_depend_on_the_blocks_of_the_weight(monkeypatch):
    group = tiny(vocabulary=301)
    inputs = group.make_inputs(0)
    whole = group.exact(inputs.model, group.start(inputs))
    monkeypatch.setattr(confidence_group, "WEIGHT_BLOCK", 7)
    parts = group.exact(inputs.model, group.start(inputs))
    assert torch.equal(whole.best, parts.best)
    torch.testing.assert_close(whole.log_prob, parts.log_prob, rtol=1e-12, atol=0)
    torch.testing.assert_close(whole.top, parts.top, rtol=1e-12, atol=0)
    assert not bool((whole.best == group.mask_id).any())


def test_what_a_step_fills_changes_what_comes_after_it():
    """Else a variant that asks the model only once would pass."""
    group = tiny(positions=24, steps=4)
    inputs = group.make_inputs(0)
    final = group.truth(inputs)
    once = group.exact(inputs.model, group.start(inputs)).best
    masked = group.start(inputs) == group.mask_id
    assert final is not None
    assert float((final != once)[masked].float().mean()) > 0.2


def test_noise_of_the_naive_loop_has_the_law_of_its_temperature():
    logits = torch.tensor([1.0, 0.0, -1.0, 3.0]).repeat(20_000, 1, 1)
    torch.manual_seed(0)
    tokens = torch.full((20_000, 1), 3)
    drawn = baselines.confidence_step(logits, tokens, count=1, mask_id=3, temperature=0.5)
    share = drawn.flatten().bincount(minlength=4)[:3].double() / 20_000
    law = torch.tensor([2.0, 0.0, -2.0]).softmax(-1).double()
    # Five standard deviations of a share among 20 000.
    assert bool(((share - law).abs() < 5 * (law * (1 - law) / 20_000).sqrt()).all())
    assert int((drawn == 3).sum()) == 0


def _one_more(logits, tokens, *, count, **options):
    left = int((tokens == options["mask_id"]).sum(1).min())
    return HONEST(logits, tokens, count=min(count + 1, left), **options)


def _next_token(logits, tokens, **options):
    filled = HONEST(logits, tokens, **options)
    return torch.where(filled != tokens, (filled + 1) % options["mask_id"], filled)


def _least_confident(logits, tokens, *, count, mask_id, temperature):
    logits[..., mask_id] = float("-inf")
    prob, token = logits.softmax(-1).max(-1)
    confidence = torch.where(tokens == mask_id, -prob.float(), float("-inf"))
    chosen = confidence.topk(count, dim=-1).indices
    return tokens.scatter(-1, chosen, token.gather(-1, chosen))


def _known_too(logits, tokens, **options):
    filled = HONEST(logits, tokens, **options).clone()
    filled[:, 0] = (filled[:, 0] + 1) % options["mask_id"]
    return filled


def _negative(logits, tokens, **options):
    filled = HONEST(logits, tokens, **options)
    return torch.where(filled != tokens, -2, filled)


HONEST = baselines.confidence_step
BROKEN = {
    "one-more": (_one_more, "positions, not"),
    "next-token": (_next_token, "below the argmax"),
    "least-confident": (_least_confident, "more confident"),
    "known-too": (_known_too, "was known"),
    "out-of-range": (_negative, "out of range"),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_wrong_baseline_has_no_speed(monkeypatch, broken, dtype):
    wrong, message = BROKEN[broken]
    monkeypatch.setattr(baselines, "confidence_step", wrong)
    by_name = measured(tiny(dtype, positions=24, steps=4))
    record = by_name["naive"]
    assert record["status"] == "wrong", record["reason"]
    assert message in record["reason"]
    assert record["seconds"] is None
    assert record["samples"] == []
    assert by_name["di4c-fast"]["status"] == "ok"
    assert by_name["di4c-fast"]["seconds"] > 0
    json.dumps(store.finite(record), allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2}, "2 steps from the prompt, 4 expected"),
        ({"rule": "random"}, "more confident"),
        ({"temperature": 1.0}, "below the argmax"),
        ({"schedule": "ancestral"}, "positions, not"),
    ],
)
def test_the_library_with_another_rule_has_no_speed(monkeypatch, changes, message):
    honest = confidence_group.sample_confidence
    monkeypatch.setattr(
        confidence_group,
        "sample_confidence",
        lambda model, shape, **options: honest(model, shape, **{**options, **changes}),
    )
    by_name = measured(tiny(positions=24, steps=4))
    assert by_name["di4c-fast"]["status"] == "wrong"
    assert message in by_name["di4c-fast"]["reason"]
    assert by_name["di4c-fast"]["seconds"] is None
    assert by_name["naive"]["status"] == "ok"


def test_other_tokens_than_those_of_float64_are_counted_in_fp32():
    """A step within the limit everywhere, but not the same tokens."""
    group = tiny()
    inputs = group.make_inputs(0)
    truth = group.truth(inputs)
    assert truth is not None
    other = truth.clone()
    other[0, -1] = (other[0, -1] + 1) % group.mask_id
    check = group.check("naive", inputs, other)
    assert check.problem == f"1 of {truth.numel()} tokens are not those of float64 logits"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_limits_are_a_few_units_of_roundoff(dtype):
    """Wide enough for a logit and a logsumexp of each of two choices, and not much wider."""
    group = tiny(dtype)
    roundoff = torch.finfo(group.case.torch_dtype).eps / 2
    limit = confidence_group.LIMITS[dtype]
    assert limit >= 4 * roundoff
    assert limit <= (4 * roundoff if dtype != "fp32" else 200 * roundoff)


# Names, skipping, memory --------------------------------------------------------------------------


def test_names_know_the_shape_and_its_variants():
    assert "confidence" in shape_names()
    assert shape_names(("confidence",)) == ["confidence"]
    names = [variant.name for variant in tiny().variants()]
    assert names == ["naive", "di4c-fast"]
    assert set(names) <= set(all_variants())
    options = Options(shapes=("confidence",), backends=("naive",), size="tiny", device="cpu")
    (entry,) = BenchSession(options).plan("confidence")
    assert [variant.name for variant in entry.variants] == ["naive"]
    assert entry.timed


def test_pytest_benchmarks_measures_the_shape_alone(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_sample.py", "-q", "--size=tiny"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--device=cpu", "--threads=1"]
    command += ["--rounds=2", "--seconds=0.005", f"--results={tmp_path}", "--shape=confidence"]
    command += ["--no-memory"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "di4c_fast.sample_confidence" in result.stdout
    loaded = store.ResultSet.load(tmp_path)
    assert [(r["case"]["kind"], r["variant"]) for r in loaded.records] == [
        ("confidence", "naive"),
        ("confidence", "di4c-fast"),
    ]
    assert all(r["seconds"] > 0 for r in loaded.records)


def test_full_size_is_that_of_the_target():
    case = make_case("confidence", "full", "bf16", "cpu")
    assert (case.vocabulary, case.width, case.positions) == (126464, 4096, 1024)
    assert case.active_positions == 512
    assert "50% masked" in case.title
    assert "N=" not in case.title


@pytest.mark.parametrize("size", ["full", "small", "tiny"])
def test_a_case_survives_the_way_to_the_child(size):
    case = make_case("confidence", size, "bf16", "cpu")
    again = Case.from_spec(json.loads(json.dumps(case.spec())))
    assert again == case
    assert again.key == "confidence-confidence-bf16"
    group = make_group(again)
    assert isinstance(group, ConfidenceGroup)
    assert sum(group.counts()) == case.active_positions


def test_input_bytes_are_those_of_the_inputs():
    group = tiny("bf16")
    model = group.make_inputs(0).model
    assert group.input_bytes() == model.weight.nbytes + model.place.nbytes


def test_floor_counts_the_positions_that_are_still_masked():
    case = make_case("confidence", "full", "bf16", "cpu")
    rows, width, vocabulary = 512 + 384 + 256 + 128, 4096, 126464
    work = make_group(case).work()
    assert work.flops == 2 * rows * width * vocabulary
    assert work.bytes == 2 * (4 * vocabulary * width + rows * width)


def test_a_loop_that_does_not_fit_is_skipped_with_the_sizes(monkeypatch):
    group = tiny(vocabulary=4097, positions=64)
    space = group.input_bytes() + group.call_bytes("di4c-fast") + 10
    assert group.call_bytes("naive") > group.call_bytes("di4c-fast")
    monkeypatch.setattr(harness, "available_bytes", lambda device: space)
    by_name = measured(group)
    assert by_name["naive"]["status"] == "skipped"
    assert "the call would take about" in by_name["naive"]["reason"]
    assert "are available" in by_name["naive"]["reason"]
    assert by_name["di4c-fast"]["status"] == "ok"


def test_the_child_measures_both_and_the_guess_of_the_naive_loop_is_near():
    case = make_case(
        "confidence", "tiny", "fp32", "cpu", vocabulary=50021, positions=96, batch=1, width=32
    )
    worker = MemoryWorker(threads=1, timeout=60.0)
    try:
        naive, ours = (worker.peak(case.spec(), name) for name in ("naive", "di4c-fast"))
    finally:
        worker.close()
    guess = make_group(case).call_bytes("naive")
    assert 1.9 * case.logits_bytes < naive < 1.1 * guess
    # Half of the positions, and one chunk more.
    assert ours < 0.5 * naive
    assert ours <= make_group(case).call_bytes("di4c-fast")


# Promises and tables ------------------------------------------------------------------------------


def records(size: str, dtype: str, naive: float, ours: float) -> list[dict]:
    case = make_case("confidence", size, dtype, "cpu")
    base = {"case": case.spec(), "status": "ok", "seconds": 1.0, "logits_bytes": case.logits_bytes}
    return [
        {**base, "variant": "naive", "peak_bytes": naive},
        {**base, "variant": "di4c-fast", "peak_bytes": ours},
    ]


@pytest.mark.parametrize(("ours", "met"), [(100e6, True), (101e6, False)])
def test_on_a_cpu_four_times_less_memory_is_promised(ours, met):
    (verdict,) = targets.judge(records("small", "fp32", 400e6, ours), "cpu")
    assert verdict.met is met
    assert verdict.wanted == "at least 4 × less"
    assert "confidence" in verdict.name


@pytest.mark.parametrize(("ours", "met"), [(0.5e9, True), (0.51e9, False)])
def test_on_a_gpu_half_a_gigabyte_is_promised_at_the_full_size_alone(ours, met):
    (verdict,) = targets.judge(records("full", "bf16", 2e9, ours), "gpu")
    assert verdict.met is met
    assert verdict.name == "confidence sampling, above the model: peak memory of di4c-fast"
    assert verdict.wanted == "at most 500.00 MB"
    assert targets.judge(records("small", "bf16", 2e9, ours), "gpu") == []


def test_the_table_of_samplers_holds_the_group(tmp_path):
    results = store.ResultSet(tmp_path, {})
    results.records = [store.finite(record) for record in measured(tiny()).values()]
    lines = report.TABLES["sample"](results)
    assert lines[0].startswith("**confidence (B=2, D=14, V=33")
    assert sum("sample_confidence" in line for line in lines) == 1
    assert sum("naive loop: logits of all positions" in line for line in lines) == 1
    for first, second in itertools.pairwise(line for line in lines if line.startswith("| ")):
        assert first.count("|") == second.count("|")
