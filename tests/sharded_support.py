"""Cases that several gloo processes run, and what they said of them.

Three processes run every case of a file, once all together and once the first two as a group of
their own: `GROUPS[0]` is the group of a case, `columns_of` cuts a vocabulary for it.
"""

from __future__ import annotations

import datetime
import functools
import gc
import importlib
import pathlib
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loss_cases import run_loss
from loss_heads import WIDTH
from parallel_support import start_server
from torch import Tensor

from di4c_fast import LinearHead, TensorHead

WORLDS = (2, 3)
VOCABULARY = 11
SHARDED = ("logits", "weight", "bias", "student", "teacher", "consistency")
TIMEOUT = datetime.timedelta(seconds=20)
CASES: dict[str, Callable[..., None]] = {}
GROUPS: list[Any] = []  # of a process: the one that shares the vocabulary, and one of its last rank


def case(*arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A case of every process, once with each of the arguments."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for argument in arguments or (None,):
            label = getattr(argument, "__name__", argument)
            name = function.__name__ + ("" if argument is None else f"[{label}]")
            bound = function if argument is None else functools.partial(function, argument)
            CASES[name] = bound
        return function

    return add


def here(columns: Any) -> dict[str, Any]:
    """The arguments of a head for these columns; None for the whole vocabulary."""
    return {} if columns is None else {"columns": columns, "group": GROUPS[0]}


def columns_of(vocabulary: int, cuts: tuple[int, ...] = ()) -> tuple[int, int]:
    """Uneven shards, the first rank with the last columns."""
    world = dist.get_world_size(GROUPS[0])
    ends = [0, *(cuts or (2, 6))[: world - 1], vocabulary]
    at = world - 1 - dist.get_rank(GROUPS[0])
    return ends[at], ends[at + 1]


def leaves_of(kind: str, problem: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    leading = problem["student"].shape[:-1]
    leaves = {"logits": problem["student"]}
    if kind != "tensor":
        leaves = {
            "hidden": torch.randn(*leading, WIDTH, generator=g, dtype=torch.float64),
            "weight": torch.randn(VOCABULARY, WIDTH, generator=g, dtype=torch.float64) / 2,
        }
        if "bias" in kind or "capped" in kind:
            rows = leading[-1:] if "position" in kind else ()
            leaves["bias"] = torch.randn(*rows, VOCABULARY, generator=g, dtype=torch.float64)
    if "log_weights" in problem:
        leaves["log_weights"] = problem["log_weights"]
    return {name: leaf.to(dtype).clone() for name, leaf in leaves.items()}


def part_of(name: str, tensor: Tensor, columns: tuple[int, int] | None) -> Tensor:
    """The columns of a tensor behind a head; tensors without columns are whole on every rank."""
    if columns is None or name not in SHARDED:
        return tensor
    return tensor[slice(*columns)] if name == "weight" else tensor[..., slice(*columns)]


def evaluate(
    problem: dict[str, Any],
    kind: str,
    columns: tuple[int, int] | None,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> dict[str, Tensor]:
    """Loss, terms and gradients, of the whole vocabulary or of a shard."""
    leaves = {
        name: part_of(name, leaf, columns).clone().requires_grad_()
        for name, leaf in leaves_of(kind, problem, dtype).items()
    }
    call = dict(problem)
    for name in ("teacher", "consistency"):
        if name in call:
            call[name] = TensorHead(
                part_of(name, call[name].to(dtype), columns).contiguous(), **here(columns)
            )
    log_weights = leaves.get("log_weights")
    if log_weights is not None:
        call["log_weights"] = log_weights
    parts = [leaf for name, leaf in leaves.items() if name != "log_weights"]
    kinds = TensorHead if kind == "tensor" else LinearHead
    names = ("budget_bytes", "reduce_hidden_grad")
    options = {name: settings.pop(name) for name in names if name in settings}
    options |= {"softcap": 1.5} if "capped" in kind else {}
    call["student"] = kinds(*parts, **here(columns), vocabulary=columns and VOCABULARY, **options)
    generator = torch.Generator().manual_seed(5)
    value, terms = run_loss(call, return_terms=True, generator=generator, **settings)
    value.backward()
    found = {"loss": value.detach(), **terms._asdict()}
    return found | {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}


def assert_raises(message: str, function: Callable[..., Any], *arguments: Any, **options: Any):
    with pytest.raises((TypeError, ValueError), match=message):
        function(*arguments, **options)


def work(rank: int, folder: str, module: str) -> None:
    importlib.import_module(module)  # its cases
    torch.set_num_threads(1)
    store, last = f"file://{folder}/store", WORLDS[-1]
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=last, timeout=TIMEOUT)
    groups = {
        world: [dist.new_group(range(world)), dist.new_group([world - 1])] for world in WORLDS
    }
    for world in WORLDS:
        GROUPS[:] = groups[world]
        if rank < world:
            said = run_cases()
            pathlib.Path(folder, f"{world}-{rank}").write_bytes(pickle.dumps(said))
    gc.collect()  # as in examples/common/ranks.py
    dist.destroy_process_group()


def run_cases() -> dict[str, str | None]:
    """What each case says: None, or where it failed."""
    said: dict[str, str | None] = {}
    for name, run in CASES.items():
        try:
            run()
            said[name] = None
        except BaseException:
            said[name] = traceback.format_exc()
        try:
            dist.barrier(GROUPS[0])
        except RuntimeError:  # a rank waits for one that has gone on: the case has failed
            break
    return said


@functools.cache
def results(module: str) -> dict[int, list[dict[str, str | None]]]:
    """By number of ranks, what each of them said; once, even if a process dies."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            start_server()
            torch.multiprocessing.start_processes(
                work, (folder, module), nprocs=WORLDS[-1], start_method="forkserver"
            )
        except Exception:
            traceback.print_exc()
        found: dict[int, list[dict[str, str | None]]] = {}
        for world in WORLDS:
            files = [pathlib.Path(folder, f"{world}-{rank}") for rank in range(world)]
            found[world] = [pickle.loads(f.read_bytes()) if f.exists() else {} for f in files]
        return found
