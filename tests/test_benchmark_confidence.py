"""The benchmark of confidence sampling: what passes its check, and what does not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import baselines, sampling
from benchmarks.cases import make_case
from benchmarks.floors import Machine
from benchmarks.harness import Settings, make_group, measure, peak_of
from benchmarks.memory import MemoryWorker

DTYPES = ("fp32", "bf16", "fp16")


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """The interpreter that the other tests use is no backend to measure."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def tiny(dtype="fp32", **changes):
    return make_group(make_case("confidence", "tiny", dtype, "cpu", **changes))


def measured(group):
    machine, settings = Machine(10e9, dict.fromkeys(DTYPES, 1e11)), Settings(0.001, 2)
    records = measure(group.case, group.variants(), settings, machine)
    return {record["variant"]: record for record in records}


def assert_all_pass(group, seed=0):
    inputs = group.make_inputs(seed)
    for variant in group.variants():
        if group.unavailable(variant.name) is None:
            check = group.check(variant.name, inputs, group.truth(inputs))
            assert check.problem is None, (variant.name, check)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_variants_pass_and_have_a_speed(dtype):
    assert_all_pass(tiny(dtype), seed=1)
    for record in measured(tiny(dtype)).values():
        assert record["status"] in ("ok", "skipped"), record["reason"]
        assert record["floor_seconds"] > 0


@pytest.mark.parametrize(("positions", "steps"), [(2, 1), (3, 2), (24, 1), (24, 5), (24, 12)])
def test_any_number_of_positions_and_steps_is_followed(positions, steps):
    """One position, one step, as many steps as masked positions, with and without a remainder."""
    group = tiny(positions=positions, steps=steps, batch=3)
    assert sum(group.counts()) == group.case.active_positions
    assert_all_pass(group)


def test_what_a_step_fills_changes_what_comes_after_it():
    """Else a variant that asks the model only once would pass."""
    group = tiny(positions=24, steps=4)
    inputs = group.make_inputs(0)
    final, start = group.call("naive", inputs), group.start(inputs)
    masked = start == group.mask_id
    once = group.exact(inputs.model, start).argmax(-1)
    assert float((final[masked] != once).float().mean()) > 0.2


HONEST = baselines.confidence_step


def one_more(logits, tokens, *, count, mask_id):
    left = int((tokens == mask_id).sum(1).min())
    return HONEST(logits, tokens, count=min(count + 1, left), mask_id=mask_id)


def least_confident(logits, tokens, *, count, mask_id):
    logits[..., mask_id] = float("-inf")
    prob, token = logits.softmax(-1).max(-1)
    confidence = torch.where(tokens == mask_id, -prob.float(), float("-inf"))
    chosen = confidence.topk(count, dim=-1).indices
    return tokens.scatter(-1, chosen, token.gather(-1, chosen))


def changed(change):
    """The honest step, with `change(tokens, filled, mask_id)` made of what it fills."""

    def step(logits, tokens, **options):
        return change(tokens, HONEST(logits, tokens, **options), options["mask_id"])

    return step


def known_too(tokens, filled, mask_id):
    return torch.cat([(filled[:, :1] + 1) % mask_id, filled[:, 1:]], 1)


BROKEN = {
    "one more": (one_more, "positions, not"),
    "least confident": (least_confident, "more confident"),
    "known, too": (changed(known_too), "was known"),
    "next token": (
        changed(lambda tokens, new, mask_id: torch.where(new != tokens, (new + 1) % mask_id, new)),
        "below the argmax",
    ),
    "out of range": (
        changed(lambda tokens, new, mask_id: torch.where(new != tokens, -2, new)),
        "out of range",
    ),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_wrong_baseline_has_no_speed(monkeypatch, broken, dtype):
    wrong, message = BROKEN[broken]
    monkeypatch.setattr(baselines, "confidence_step", wrong)
    records = measured(tiny(dtype, positions=24, steps=4))
    assert records["naive"]["status"] == "wrong"
    assert message in records["naive"]["reason"]
    assert records["naive"]["samples"] == []
    assert records["torch"]["status"] == "ok"
    assert min(records["torch"]["samples"]) > 0


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
    honest = sampling.sample_confidence
    monkeypatch.setattr(
        sampling,
        "sample_confidence",
        lambda model, shape, **options: honest(model, shape, **{**options, **changes}),
    )
    records = measured(tiny(positions=24, steps=4))
    assert records["torch"]["status"] == "wrong"
    assert message in records["torch"]["reason"]
    assert records["torch"]["samples"] == []
    assert records["naive"]["status"] == "ok"


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_are_a_few_units_of_roundoff(dtype):
    """Wide enough for a logit and a logsumexp of each of two choices, and not much wider."""
    roundoff = torch.finfo(tiny(dtype).case.torch_dtype).eps / 2
    limit = sampling.LIMITS[dtype]
    assert 4 * roundoff <= limit <= (4 * roundoff if dtype != "fp32" else 200 * roundoff)


def test_floor_counts_the_positions_that_are_still_masked():
    case = make_case("confidence", "full", "bf16", "cpu")
    assert "50% masked" in case.title
    assert "N=" not in case.title
    rows, width, vocabulary = 512 + 384 + 256 + 128, 4096, 126464
    work = make_group(case).work()
    assert work.flops == 2 * rows * width * vocabulary
    assert work.bytes == 2 * (4 * vocabulary * width + rows * width)


def test_the_child_weighs_both_and_the_guess_of_the_naive_loop_is_near():
    sizes = {"vocabulary": 50021, "positions": 96, "batch": 1, "width": 32}
    group = tiny(**sizes)
    model = group.make_inputs(0).model
    assert group.input_bytes() == model.weight.nbytes + model.place.nbytes
    worker = MemoryWorker(timeout=120.0)
    try:
        naive, ours = (worker.peak(peak_of, group.case, name) for name in ("naive", "torch"))
    finally:
        worker.close()
    assert 1.9 * group.case.logits_bytes < naive < 1.1 * group.call_bytes("naive")
    # Half of the positions, and one chunk more.
    assert ours < 0.5 * naive
    assert ours <= group.call_bytes("torch")
