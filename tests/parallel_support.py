"""Several gloo processes on the CPU, and what their tests train."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
import traceback
from multiprocessing import forkserver
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distill_support import CONFIG, MASK, PROCESS, VOCAB, D, Recorder, UniformNoise, rng
from torch.nn.parallel import DistributedDataParallel

from di4c_fast.processes import GaussianProcess, MaskGITProcess
from di4c_fast.training import EMA, Distiller, DistillModule

TIMEOUT = 10  # seconds
G = 6  # examples of a global batch
BATCHES = torch.randint(MASK, (8, G, D), generator=rng(7))
SIZES = {1: [6], 2: [4, 2], 3: [3, 0, 3]}  # examples of each rank, where it may have none
PROCESSES = {
    "masked": PROCESS,
    "gaussian": GaussianProcess(VOCAB),
    "maskgit": MaskGITProcess(MASK),
    "uniform": UniformNoise(),
}


def start_server() -> Any:
    """Start what processes are forked from: it imports once what takes each of them 4 s."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["parallel_support", "torch._dynamo"])
    paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()
    return context


def launch(function, size: int, folder, *arguments: Any) -> list[Any]:
    """What function(rank, size, *arguments) returns, or as a string raises, on every rank."""
    context = start_server()
    folder.mkdir(exist_ok=True)
    ranks = [
        context.Process(target=_run, args=(function, rank, size, folder, arguments))
        for rank in range(size)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(12 * TIMEOUT)
    alive = [each for each in ranks if each.is_alive()]
    for each in alive:
        each.kill()
    assert not alive, f"{len(alive)} of {size} ranks hang"
    files = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _run(function, rank: int, size: int, folder, arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    try:
        result = function(rank, size, *arguments)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, folder / f"{rank}.pt")
    gc.collect()  # as in examples/common/ranks.py
    dist.destroy_process_group()


def refused(work) -> str:
    try:
        work()
    except Exception:
        return traceback.format_exc()
    return "nothing was raised"


def whole(tensor):
    """All of a tensor, of which this rank may hold a shard."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def make(kind: str, process: str = "masked", head: bool = True, **options: Any) -> Distiller:
    """A distiller of "plain", "ddp" or "fsdp" kind, the same for every number of processes."""
    seed, dropout = options.pop("seed", 0), options.pop("dropout", 0.0)
    optimizer = options.pop("optimizer", torch.optim.Adam)
    student = Recorder(True, seed=seed, head=head, dropout=dropout)
    if "width" in options:
        student.mix = torch.nn.Linear(8, options.pop("width")).double()
    teacher = Recorder(False, seed=1, head=head)
    config = dataclasses.replace(CONFIG, backend="torch")
    module = DistillModule(student, teacher, process=PROCESSES[process], config=config)
    if kind == "ddp":
        module = DistributedDataParallel(module)
    elif kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(student.mix)
        fully_shard(student.latent)
        fully_shard(module)
    defaults = {"ema": EMA(student, 0.9), "clip_norm": 1.0, "generator": rng(seed)}
    return Distiller.of(module, optimizer(student.parameters(), lr=1e-2), **{**defaults, **options})


def run(distiller, first: int, last: int, rank: int = 0, size: int = 1, **options) -> list[dict]:
    """Metrics of some steps with this rank's part of the batches."""
    sharded = any(hasattr(p, "full_tensor") for p in distiller.student.parameters())
    sizes = [3, 1, 2] if sharded and size == 3 else SIZES[size]
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    return [distiller.step(batch[part], **options) for batch in BATCHES[first:last]]


def state(distiller) -> dict[str, torch.Tensor]:
    """Weights, gradients, averages and moments by name, whole."""
    found = {}
    for name, parameter in distiller.student.named_parameters():
        found[f"weight {name}"] = whole(parameter)
        if parameter.grad is not None:
            found[f"gradient {name}"] = whole(parameter.grad)
        for key, value in distiller.optimizer.state.get(parameter, {}).items():
            found[f"{key} {name}"] = whole(value)
    for name, value in distiller.ema.shadow.items():
        found[f"average {name}"] = whole(value)
    return found


def assert_near(ours, expected) -> None:
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=name)
