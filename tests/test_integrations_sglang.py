"""The decoding algorithm for SGLang, against a small stand-in for the interface it has published.

SGLang itself is not installed here: `fake_sglang` has the names, arguments and loops that its
version 0.5.23 (logits in `step`) and its main branch of November 2026 (their output) have.
"""

from __future__ import annotations

import ast
import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from wrong_arguments import Wrong, wrong

from di4c_fast.integrations import sglang
from di4c_fast.testing import assert_draws_match

PACKAGE = "sglang.srt.dllm.algorithm"
V, MASK, L = 9, 8, 6
Namespace = types.SimpleNamespace


def published_base(whole_output: bool) -> type:
    class DllmAlgorithm:
        def __init__(self, config):
            self.block_size = config.block_size
            self.mask_id = config.mask_id
            self.fdfo = config.first_done_first_out_mode

        def init_step_state(self, forward_batch):
            return [None] * forward_batch.batch_size

        def max_steps(self, block_size):
            return block_size + 1

        def step(self, forward_batch, full_logits, states):
            raise NotImplementedError

        def run(self, model_runner, forward_batch, algo_states=None):
            forward = lambda: model_runner.forward(forward_batch, pp_proxy_tensors=None)  # noqa: E731
            given = lambda out: out if whole_output else out.full_logits  # noqa: E731
            if not self.fdfo:
                states, out = self.init_step_state(forward_batch), forward()
                for _ in range(self.max_steps(self.block_size)):
                    if all(self.step(forward_batch, given(out.logits_output), states)):
                        break
                    out = forward()
                return None
            fresh = self.init_step_state(forward_batch)
            carried = algo_states or [None] * len(fresh)
            states = [new if old is None else old for new, old in zip(fresh, carried, strict=True)]
            done = self.step(forward_batch, given(forward().logits_output), states)
            return [None if end else state for end, state in zip(done, states, strict=True)]

    return DllmAlgorithm


@pytest.fixture(params=[False, True], ids=["logits", "output"])
def fake_sglang(request, monkeypatch) -> types.ModuleType:
    """The package of algorithms."""
    names = PACKAGE.split(".")
    for i in range(1, len(names) + 1):
        module = types.ModuleType(".".join(names[:i]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    base = types.ModuleType(f"{PACKAGE}.base")
    base.DllmAlgorithm = published_base(request.param)
    monkeypatch.setitem(sys.modules, base.__name__, base)
    module.algo_name_to_cls = {"LowConfidence": type("LowConfidence", (base.DllmAlgorithm,), {})}
    return module


class Runner:
    """A model whose logits depend on the token of a position and on its neighbour."""

    def __init__(self, seed: int = 0, confused: float = 0.0):
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(2, L, V, V, generator=generator)
        self.table[..., MASK] -= 20.0
        self.confused = confused
        self.seen: list[Tensor] = []

    def logits(self, ids: Tensor) -> Tensor:
        place = torch.arange(L)
        return self.table[0, place, ids] + self.table[1, place, ids.roll(1, -1)]

    def forward(self, batch: Any, pp_proxy_tensors: None) -> Any:
        ids = batch.input_ids.view(-1, L).clone()
        self.seen.append(ids)
        logits = self.logits(ids)
        logits[ids != MASK] += self.confused
        output = Namespace(full_logits=logits.view(-1, V), next_token_logits=None)
        return Namespace(logits_output=output, can_run_graph=False)


def batch_of(ids: Tensor) -> Any:
    return Namespace(batch_size=len(ids), input_ids=ids.clone().flatten())


def algorithm(fdfo: bool = False, mask_id: int = MASK, **config: Any) -> Any:
    common = {"block_size": L, "mask_id": mask_id, "first_done_first_out_mode": fdfo}
    return sglang.register()(Namespace(algorithm_config=config, **common))


def some_ids(blocks: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(MASK, (blocks, L), generator=generator)
    ids[torch.rand(blocks, L, generator=generator) < 0.7] = MASK
    return ids


def low_confidence(ids: Tensor, logits: Tensor, threshold: float) -> Tensor:
    """SGLang's rule for one block."""
    confidence, token = logits.softmax(-1).max(-1)
    confidence[ids != MASK] = -1.0
    chosen = confidence > threshold
    if not chosen.any():
        chosen[confidence.argmax()] = True
    return torch.where(chosen & (ids == MASK), token, ids)


def entropy_bound(ids: Tensor, logits: Tensor, gamma: float) -> Tensor:
    """The same by entropy."""
    logits[:, MASK] = -torch.inf
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    spent, filled = 0.0, ids.clone()
    for d in entropy.argsort(stable=True):
        if ids[d] == MASK and spent <= gamma:
            filled[d] = logits[d].argmax()
            spent += float(entropy[d])
    return filled


@pytest.mark.parametrize("fdfo", [False, True])
@pytest.mark.parametrize(
    ("rule", "config"),
    [
        (lambda ids, logits: low_confidence(ids, logits, 0.95), {}),
        (lambda ids, logits: low_confidence(ids, logits, 0.6), {"threshold": 0.6}),
        (lambda ids, logits: entropy_bound(ids, logits, 0.15), {"rule": "entropy_bound"}),
        (
            lambda ids, logits: entropy_bound(ids, logits, 1.5),
            {"rule": "entropy_bound", "gamma": 1.5, "block_size": L},
        ),
    ],
)
def test_blocks_fill_by_the_rule_and_are_done_a_pass_later(
    fake_sglang, rule: Callable[..., Tensor], config, fdfo
):
    runner, batch = Runner(), batch_of(some_ids(5))
    held = batch.input_ids
    decoding = algorithm(fdfo, **config)
    states = decoding.run(runner, batch)
    while fdfo and any(states):
        states = decoding.run(runner, batch, states)
    ids = some_ids(5)
    for step, seen in enumerate(runner.seen):
        assert torch.equal(seen, ids), step
        done = (ids != MASK).all(1)
        ids = torch.stack([rule(row, runner.logits(row)) for row in ids])
    assert done.all()
    assert not (runner.seen[-2] != MASK).all()
    assert torch.equal(batch.input_ids.view(5, L), ids)
    assert batch.input_ids is held


def test_only_masked_rows_of_the_blocks_are_drawn(fake_sglang):
    batch = batch_of(some_ids(4))
    algorithm().run(Runner(confused=torch.nan), batch)  # NaN is an error where a row is drawn
    assert (batch.input_ids != MASK).all()


def test_masks_of_a_prompt_stay(fake_sglang):
    ids = torch.full((1, L), MASK)
    batch = batch_of(ids)
    batch.dllm_prompt_mask = torch.arange(L).expand(1, L) < 3
    algorithm(exclude_mask=True).run(Runner(), batch)
    assert torch.equal(batch.input_ids == MASK, batch.dllm_prompt_mask[0])


def test_the_mask_takes_part_where_the_published_rule_lets_it(fake_sglang):
    runner = Runner()
    runner.table[:, 0, :, MASK] = 50.0
    ids = torch.full((1, L), MASK)
    for config, left in (({}, True), ({"exclude_mask": True}, False), ({"threshold": 0.0}, True)):
        batch = batch_of(ids)
        algorithm(**config).run(runner, batch)
        assert bool((batch.input_ids == MASK).any()) is left


def test_draws_have_the_law_of_the_filtered_softmax_and_numbers_of_their_own(fake_sglang):
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1))
    runner = Namespace(
        forward=lambda batch, pp_proxy_tensors: Namespace(
            logits_output=Namespace(full_logits=logits.expand(len(batch.input_ids), V))
        )
    )
    config = {"temperature": 0.7, "top_k": 5, "threshold": 0.0, "exclude_mask": True}
    drawn = []
    for seed in (0, 0, 3):
        batch, decoding = batch_of(torch.full((1500, L), MASK)), algorithm(seed=seed, **config)
        decoding.run(runner, batch)
        drawn.append(batch.input_ids.view(1500, L))
    expected = logits.clone()
    expected[MASK] = -torch.inf
    expected[expected < expected.topk(5).values[-1]] = -torch.inf
    assert_draws_match(drawn[0].flatten(), (expected / 0.7).softmax(-1))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    # Blocks of a later call, and steps of a block, have numbers that none has had.
    batch = batch_of(torch.full((1500, L), MASK))
    decoding.run(runner, batch)
    assert not torch.equal(batch.input_ids.view(1500, L), drawn[2])
    one = batch_of(torch.full((1, L), MASK))
    states = decoding.init_step_state(one)
    again = []
    for _ in range(2):
        one.input_ids.fill_(MASK)
        decoding.step(one, logits.expand(L, V), states)
        again.append(one.input_ids.clone())
    assert not torch.equal(*again)


def test_confidences_in_half_precision_are_those_of_whole_rows(fake_sglang):
    ids = torch.full((40, L), MASK)
    logits = (3 * torch.randn(40 * L, V, generator=torch.Generator().manual_seed(2))).bfloat16()
    batch, decoding = batch_of(ids), algorithm(confidence_dtype="bfloat16", threshold=0.6)
    decoding.step(batch, logits, decoding.init_step_state(batch))
    rows = zip(ids, logits.view(40, L, V), strict=True)
    assert torch.equal(
        batch.input_ids.view(40, L), torch.stack([low_confidence(*row, 0.6) for row in rows])
    )


def test_registering_again_changes_nothing_and_no_name_is_taken_away(fake_sglang):
    found = sglang.register()
    assert found is sglang.register() is fake_sglang.algo_name_to_cls["Di4CFast"]
    assert sglang.register("other").__name__ == "other"
    with pytest.raises(ValueError, match=r"name must be that of no other algorithm .* 'LowConf"):
        sglang.register("LowConfidence")


def test_an_attribute_that_another_version_lacks_is_named(fake_sglang, monkeypatch):
    base = sys.modules[f"{PACKAGE}.base"]
    monkeypatch.delattr(base.DllmAlgorithm, "init_step_state")
    message = "DllmAlgorithm must have .*, got type without init_step_state; known to work: SGLang"
    with pytest.raises(TypeError, match=message):
        sglang.register()
    monkeypatch.delattr(fake_sglang, "algo_name_to_cls")
    with pytest.raises(TypeError, match="got module without algo_name_to_cls"):
        sglang.register()


def test_without_sglang_registering_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ImportError, match="sglang"):
        sglang.register()


T, VALUE = TypeError, ValueError


@wrong(
    [
        ({"treshold": 0.9}, VALUE, "config must have keys of rule, ..., got ['treshold']"),
        ({"rule": "gamma"}, VALUE, "rule must be one of 'low_confidence', 'entropy_bound'"),
        ({"threshold": "a"}, T, "threshold must be a number"),
        ({"gamma": -1.0}, VALUE, "gamma must be finite and at least 0"),
        ({"temperature": -1.0}, VALUE, "temperature must be finite and at least 0"),
        ({"top_p": 2.0}, VALUE, "top_p must be in (0, 1]"),
        ({"exclude_mask": 1}, T, "exclude_mask must be True or False"),
        ({"confidence_dtype": "int8"}, VALUE, "confidence_dtype must be one of 'float32'"),
        ({"seed": "a"}, T, "seed must be an int"),
        ({"backend": "tpu"}, VALUE, "backend must be one of"),
        ({"mask_id": -1}, VALUE, "needs a model with a mask token, got mask_id = -1"),
    ]
)
def test_wrong_settings_are_named_before_a_step(wrong: Wrong, fake_sglang):
    with wrong.raises():
        algorithm(**wrong.what)


def test_outputs_without_whole_logits_are_refused(fake_sglang):
    decoding, batch = algorithm(), batch_of(some_ids(2))
    for output in (Namespace(full_logits=None), Namespace(), torch.zeros(3, V)):
        with pytest.raises(ValueError, match=r"needs logits of 2 blocks of 6 tokens, .*, got "):
            decoding.step(batch, output, decoding.init_step_state(batch))


def test_a_config_that_is_not_a_dict_is_named(fake_sglang):
    common = {"block_size": L, "mask_id": MASK, "first_done_first_out_mode": False}
    with pytest.raises(TypeError, match="the algorithm's config must be a dict, got list"):
        sglang.register()(Namespace(algorithm_config=["rule"], **common))


def test_states_are_one_for_each_block(fake_sglang):
    decoding, batch = algorithm(), batch_of(some_ids(2))
    with pytest.raises(ValueError, match="states must be one for each of 2 blocks, got 1"):
        decoding.step(batch, torch.zeros(12, V), decoding.init_step_state(batch)[:1])


def test_no_blocks_and_logits_of_any_strides(fake_sglang):
    decoding, none = algorithm(), batch_of(some_ids(0))
    assert decoding.step(none, torch.zeros(0, V), decoding.init_step_state(none)) == []
    tokens = []
    logits = torch.randn(12, V, generator=torch.Generator().manual_seed(0))
    for output in (logits, logits.T.contiguous().T, logits.view(2, 6, V)):
        decoding, batch = algorithm(), batch_of(some_ids(2))
        decoding.step(batch, output, decoding.init_step_state(batch))
        tokens.append(batch.input_ids)
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


def test_the_entry_point_for_plugins_of_sglang_leads_to_register():
    text = (pathlib.Path(__file__).parents[1] / "setup.py").read_text()
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.keyword)]
    (points,) = (node.value for node in calls if node.arg == "entry_points")
    (target,) = ast.literal_eval(points)["sglang.srt.plugins"]
    assert target == f"di4c_fast = {sglang.register.__module__}:{sglang.register.__name__}"
