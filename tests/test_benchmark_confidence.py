"""The benchmark of confidence sampling: what passes its check, and what does not."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from test_benchmarks import measured, no_interpreter, tiny  # noqa: F401

from benchmarks import baselines, sampling
from benchmarks.harness import make_group, peak_of
from benchmarks.memory import MemoryWorker

NAMES = ("naive", "torch", "cpu")
HONEST = baselines.confidence_step


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_all_variants_pass_and_have_a_speed_in_half_precision(dtype):
    for record in measured(tiny("confidence", dtype=dtype), *NAMES).values():
        assert record["status"] in ("ok", "skipped"), record["reason"]
        assert record["floor_seconds"] > 0


@pytest.mark.parametrize(("positions", "steps"), [(2, 1), (3, 2), (24, 1), (24, 5), (24, 12)])
def test_any_number_of_positions_and_steps_is_followed(positions, steps):
    """One position, one step, as many steps as masked positions, with and without a remainder."""
    group = make_group(tiny("confidence", positions=positions, steps=steps, batch=3))
    assert sum(group.counts()) == group.case.active_positions
    inputs = group.make_inputs(1)
    for name in NAMES:
        if group.unavailable(name) is None:
            assert group.check(name, inputs, None).problem is None


def test_what_a_step_fills_changes_what_comes_after_it():
    """Else a variant that asks the model only once would pass."""
    group = make_group(tiny("confidence", positions=24, steps=4))
    inputs = group.make_inputs(0)
    final, start = group.call("naive", inputs), group.start(inputs)
    once = group.exact(inputs.model, start).argmax(-1)
    assert float((final[start == group.mask_id] != once).float().mean()) > 0.2


def one_more(logits, tokens, *, count, mask_id):
    left = int((tokens == mask_id).sum(1).min())
    return HONEST(logits, tokens, count=min(count + 1, left), mask_id=mask_id)


def least_confident(logits, tokens, *, count, mask_id):
    logits[..., mask_id] = float("-inf")
    prob, token = logits.softmax(-1).max(-1)
    chosen = torch.where(tokens == mask_id, -prob.float(), float("-inf")).topk(count).indices
    return tokens.scatter(-1, chosen, token.gather(-1, chosen))


def refilled(fill):
    """The honest step with other tokens: `fill(filled, tokens, mask_id)`."""

    def step(logits, tokens, **options):
        return fill(HONEST(logits, tokens, **options), tokens, options["mask_id"])

    return step


BROKEN = {
    "positions, not": one_more,
    "more confident": least_confident,
    "below the argmax": refilled(lambda f, old, m: torch.where(f != old, (f + 1) % m, f)),
    "was known": refilled(lambda f, old, m: torch.cat([(f[:, :1] + 1) % m, f[:, 1:]], 1)),
    "out of range": refilled(lambda f, old, m: torch.where(f != old, -2, f)),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("message", BROKEN)
def test_a_wrong_baseline_has_no_speed(monkeypatch, message, dtype):
    monkeypatch.setattr(baselines, "confidence_step", BROKEN[message])
    records = measured(tiny("confidence", dtype=dtype, positions=24, steps=4), *NAMES)
    assert (records["naive"]["status"], records["naive"]["samples"]) == ("wrong", [])
    assert message in records["naive"]["reason"]
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
        sampling, "sample_confidence", lambda *given, **named: honest(*given, **(named | changes))
    )
    records = measured(tiny("confidence", positions=24, steps=4), *NAMES)
    assert (records["torch"]["status"], records["torch"]["samples"]) == ("wrong", [])
    assert message in records["torch"]["reason"]
    assert records["naive"]["status"] == "ok"


def test_the_child_weighs_both_and_the_guess_of_the_naive_loop_is_near():
    sizes = {"vocabulary": 50021, "positions": 96, "batch": 1, "width": 32}
    group = make_group(tiny("confidence", **sizes))
    model = group.make_inputs(0).model
    assert group.input_bytes() == model.weight.nbytes + model.place.nbytes
    with contextlib.closing(MemoryWorker(timeout=120.0)) as worker:
        naive, ours = (worker.peak(peak_of, group.case, name) for name in ("naive", "torch"))
    assert 1.9 * group.case.logits_bytes < naive < 1.1 * group.call_bytes("naive")
    # Half of the positions, and one chunk more.
    assert ours < min(0.5 * naive, group.call_bytes("torch") + 1)
