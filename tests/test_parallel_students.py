"""Students under `fully_shard`: tied and frozen weights, recomputed blocks, calls of their own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from distill_support import CONFIG, PROCESS, VOCAB, Recorder, rng
from parallel_support import BATCHES, assert_near, launch, run, state
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from di4c_fast import LinearHead
from di4c_fast.models import LatentShift
from di4c_fast.training import EMA, Distiller, DistillModule


class Block(nn.Module):
    def __init__(self, recomputed):
        super().__init__()
        self.layer, self.recomputed = nn.Linear(8, 8), recomputed

    def forward(self, h):
        if self.recomputed and torch.is_grad_enabled():
            return h + checkpoint(self._of, h, use_reentrant=False)
        return h + self._of(h)

    def _of(self, h):
        return torch.tanh(self.layer(h).cumsum(1))


class Student(nn.Module):
    """Embedding and output share a weight; one block can be frozen but for a low-rank part."""

    def __init__(self, recomputed=False, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.latent = nn.Embedding(VOCAB, 8), LatentShift(8, zero_init=False)
        self.blocks = nn.ModuleList(Block(recomputed) for _ in range(2))
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.bias = nn.Parameter(torch.zeros(VOCAB))
        self.double()
        if frozen:
            self.blocks.requires_grad_(False)

    def forward(self, tokens, t, latent):
        h = self.latent(self.embed(tokens), latent)
        for block in self.blocks:
            h = block(h)
        return LinearHead(h + self.up(self.down(h)), self.embed.weight, self.bias)


CASES = {
    "tied": {},
    "recomputed": {"recomputed": True},
    "frozen": {"frozen": True},
    "groups": {"recomputed": True, "at_once": 2},
}


def options_of(policy, cast):
    if not policy:
        return {}
    from torch.distributed.fsdp import MixedPrecisionPolicy

    precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    return {"mp_policy": MixedPrecisionPolicy(**precision, cast_forward_inputs=cast)}


def train(kind, at_once=None, policy=None, **options):
    student = Student(**options)
    if policy:
        student.float()
    config = dataclasses.replace(CONFIG, backend="torch")
    module = DistillModule(student, Recorder(False, seed=1), process=PROCESS, config=config)
    if kind == "ddp":
        module = DistributedDataParallel(module)
    elif kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in student.blocks:
            fully_shard(block, **options_of(policy, True))
        fully_shard(student, reshard_after_forward=False, **options_of(policy, False))
        fully_shard(module, **options_of(policy, False))
    weights = [p for p in student.parameters() if p.requires_grad]
    distiller = Distiller.of(
        module, torch.optim.SGD(weights, lr=0.1), ema=EMA(student, 0.9), generator=rng()
    )
    return distiller, {"components_at_once": at_once}


def evaluated(distiller):
    """A call of the student alone, with its average, as a sampler makes it."""
    with torch.no_grad(), distiller.ema.applied() as student:
        return student(BATCHES[0], torch.ones(6), torch.full((6, 1), 0.5)).logits()


def every_case(rank, size):
    found = {}
    for kind in ("ddp", "fsdp") if size > 1 else ("plain",):
        for name, case in CASES.items():
            distiller, options = train(kind, **case)
            run(distiller, 0, 1, rank, size, **options)
            logits = evaluated(distiller)
            run(distiller, 1, 2, rank, size, **options)
            found[kind, name] = {"logits": logits, **state(distiller)}
    distiller, _ = train("fsdp" if size > 1 else "plain", policy=True)
    found["mixed"] = run(distiller, 0, 2, rank, size), state(distiller)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    found = launch(every_case, 2, tmp_path_factory.mktemp("ranks"))
    for one in found:
        assert isinstance(one, dict), one
    return found, every_case(0, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_students_train_and_sample_as_in_one_process(ranks, kind, case):
    found, expected = ranks
    for one in found:
        assert_near(one[kind, case], expected["plain", case])


def test_mixed_precision_keeps_weights_in_fp32_and_stays_near(ranks):
    found, expected = ranks
    for one in found:
        for ours, theirs in zip(one["mixed"][0], expected["mixed"][0], strict=True):
            for name in ("loss", "grad_norm"):  # bf16 has 8 bits; tokens drawn may differ
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=0.1)
        assert {value.dtype for value in one["mixed"][1].values()} == {torch.float32}
