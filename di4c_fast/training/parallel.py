"""Processes of torch.distributed that train one student: what they exchange, their checkpoints.

Where each has the whole state (DDP), rank 0 writes a file as one process does. Where each has
a part (FSDP2), a checkpoint is a folder: `checkpoint.json`, replaced in one step, names the
subfolder with the tensors, which torch.distributed.checkpoint has written before. An interruption
leaves the old checkpoint or the new one. Any number of processes can read either.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checkpoint import Hold, PathLike, differences, hold, hold_and_write, replacing
from .checkpoint import read_checkpoint as read_file

T = TypeVar("T")
_RECORD = "checkpoint.json"
_WHOLE = ("random/", "ranks/")  # names of what every rank reads


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    found = [value] * rank_and_size()[1]
    if is_distributed():
        dist.all_gather_object(found, value)
    return found


def agreed(work: Callable[[], T]) -> T:
    """What `work` returns here; where it fails on one rank, every rank raises."""
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    messages = gathered(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # its traceback holds this frame
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {rank} failed: {message}")
    return result


def on_first(work: Callable[[], None]) -> None:
    """Let rank 0 do it; where it fails, every rank raises."""
    agreed(work if rank_and_size()[0] == 0 else lambda: None)


def check_same(record: Mapping[str, Any]) -> None:
    """Raise on every rank where one has other plain values than rank 0."""
    records = gathered(dict(record))
    for rank, other in enumerate(records):
        found = differences(records[0], other)
        if found:
            raise ValueError(
                f"all ranks must train the same, got on rank 0 (there) and rank {rank} (here): "
                f"{'; '.join(found[:5])}"
            )


def is_wrapped(module: nn.Module) -> bool:
    """Whether the module's gradients are exchanged."""
    if not is_distributed():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, (nn.parallel.DistributedDataParallel, FSDPModule))


def has_shards(module: Any) -> bool:
    """Whether a call of the module gathers weights, which all ranks do together."""
    if not is_distributed() or not isinstance(module, nn.Module):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def reshard(module: nn.Module) -> None:
    """Where a pass without a graph has left weights gathered, back to this rank's shards."""
    if has_shards(module):
        for part in module.modules():
            getattr(part, "reshard", int)()


@contextlib.contextmanager
def exchanging(module: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are exchanged in the last of some backward passes, else they wait."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if last else module.no_sync():
            yield
        return
    if is_wrapped(module):
        module.set_requires_gradient_sync(last)  # type: ignore[operator]
    yield


class Place(NamedTuple):
    """Where this rank's examples stand in the global batch."""

    first: int
    total: int
    seed: int


def place_of(x0: Tensor, seed: int, terms: bool, position_group: Any, *, empty: bool) -> Place:
    """One exchange of sizes; an error on every rank where they do not go together.

    position_group: of ranks that have other positions of the same examples.
    empty: whether a rank may have no example.
    """
    if not is_distributed():
        return Place(0, len(x0), seed)
    rank, size = rank_and_size()
    shared = isinstance(position_group, dist.ProcessGroup) and dist.get_rank(position_group) >= 0
    first = dist.get_global_rank(position_group, 0) if shared else rank
    length = 0 if shared else x0.shape[1]
    mine = torch.tensor([len(x0), length, seed, terms, first], device=x0.device)
    every = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(every, mine)
    counts, positions, seeds, returned, firsts = torch.stack(every, dim=1).tolist()
    for other, count in enumerate(counts):
        if count != counts[firsts[other]]:
            raise ValueError(
                f"x0 must have the same B on all ranks of position_group, got {counts}"
            )
    for name, values in (
        ("x0 must have the same D", positions),
        ("generator must have the same state", seeds),
        ("return_terms must be the same", returned),
    ):
        if len(set(values)) > 1:
            raise ValueError(f"{name} on all ranks, got {values}")
    if not empty and 0 in counts:
        raise ValueError(f"x0 must have examples on every rank of a sharded student, got {counts}")
    own = [count * (other == firsts[other]) for other, count in enumerate(counts)]
    return Place(sum(own[:first]), sum(own), seeds[0])


def reduced(sums: Mapping[str, tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Means over the examples of all ranks, fp64, from the sum and the number of each."""
    values = [value for value, _ in sums.values()]
    counts = values[0].new_tensor([count for _, count in sums.values()], dtype=torch.float64)
    both = torch.stack([torch.stack([value.double() for value in values]), counts])
    if is_distributed():
        dist.all_reduce(both)
    means = both[0] / both[1].clamp(min=1)
    return dict(zip(sums, means.unbind(), strict=True))


def ranks_states(
    states: Mapping[str, Tensor], common: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state that all ranks share, and those that each has for itself, (ranks, ...) each."""
    own = {name: state.cpu() for name, state in states.items() if name != common}
    every = gathered(own)
    shared = {name: state for name, state in states.items() if name == common}
    return shared, {name: torch.stack([one[name] for one in every]) for name in own}


def write_checkpoint(
    path: PathLike, format_name: str, tensors: Mapping[str, Tensor], values: Any
) -> Hold | None:
    """Write a file or, where tensors are sharded, a folder, all ranks together.

    Values, and tensors that are not sharded, are those of rank 0. Returns what keeps other runs
    away, on rank 0.
    """
    folder, (rank, _) = pathlib.Path(path), rank_and_size()
    if not any(map(is_sharded, tensors.values())):
        content = path, format_name, tensors, values
        return agreed(lambda: None if rank else hold_and_write(*content))
    import torch.distributed.checkpoint as dcp

    def prepare() -> tuple[str, Hold | None]:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"path must be a folder, got the file {folder}")
        if not folder.resolve().parent.is_dir():
            raise FileNotFoundError(f"path must lie in a folder that exists, got {folder}")
        held = None
        if rank == 0:
            folder.mkdir(exist_ok=True)
            held = hold(folder / _RECORD)
        return json.dumps({"format": format_name, "values": values}), held

    text, held = agreed(prepare)
    name = gathered(f"{secrets.token_hex(8)}.tensors")[0]
    with _named(f"{folder} cannot be written", OSError):
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder / name))

    def finish() -> None:
        if rank == 0:
            with replacing(folder / _RECORD) as temporary:
                temporary.write_text(json.dumps({**json.loads(text), "folder": name}))
            for left in folder.glob("*.tensors"):
                if left.name != name:
                    shutil.rmtree(left, ignore_errors=True)

    agreed(finish)
    return held


def read_checkpoint(
    path: PathLike, format_name: str, module: nn.Module, own: Callable[[], Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], Any]:
    """Tensors of a file or a folder, and values; all ranks together.

    Those of a folder, or for a module that is sharded, are placed as those of the same name in
    `own()`. Where none of them fits in shape and dtype, they have no content: they are on the
    device "meta", for a comparison. States of random generators are whole.
    """
    if any(gathered(os.path.isdir(path))):
        return _read_folder(path, format_name, own())
    tensors, values = agreed(lambda: read_file(path, format_name))
    if any(map(is_sharded, module.parameters())):
        tensors = _sharded_as(own(), tensors)
    return tensors, values


@contextlib.contextmanager
def _named(what: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """What torch.distributed.checkpoint meets is an error on every rank, and no BaseException."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        rank, (failure, _) = next(iter(error.failures.items()))
        text = f"{what}, as rank {rank} found: {type(failure).__name__}: {failure}"
        raise kind(text) from failure


def _read_folder(
    path: PathLike, format_name: str, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    folder = pathlib.Path(path)

    def begin() -> tuple[dcp.FileSystemReader, Any, dict[str, Tensor]]:
        if not (folder / _RECORD).is_file():
            raise FileNotFoundError(f"there is no checkpoint of several processes at {folder}")
        try:
            record = json.loads((folder / _RECORD).read_text("utf-8"))
            reader = dcp.FileSystemReader(os.fspath(folder / record["folder"]))
            stored = reader.read_metadata().state_dict_metadata
            found, values = record["format"], record["values"]
        except Exception as error:  # torch raises whatever it meets
            raise ValueError(f"{folder} is damaged: {error!r}") from error
        if found != format_name:
            raise ValueError(
                f"{folder} is not a checkpoint of {format_name}: its format is {found!r}"
            )
        tensors: dict[str, Tensor] = {}
        for name, there in stored.items():
            assert isinstance(there, TensorStorageMetadata)
            device = "cpu" if name.startswith(_WHOLE) else "meta"
            form = torch.empty(there.size, dtype=there.properties.dtype, device=device)
            tensors[name] = torch.empty_like(_form(name, form, own))
        return reader, values, tensors

    reader, values, tensors = agreed(begin)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # by one process
        with _named(f"{folder} is damaged"):
            dcp.load({k: v for k, v in tensors.items() if not v.is_meta}, storage_reader=reader)
    return tensors, values


def _sharded_as(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from torch.distributed.tensor import distribute_tensor

    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        form: Any = _form(name, value, own)
        if is_sharded(form):
            place = form.device_mesh, form.placements
            found[name] = distribute_tensor(value, *place, src_data_rank=None)
        else:
            found[name] = form if form.is_meta else value
    return found


def _form(name: str, value: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """What is placed as a stored tensor shall be."""
    here = value if name.startswith(_WHOLE) else own.get(name)
    if here is None or (here.shape, here.dtype) != (value.shape, value.dtype):
        return value.to("meta")
    return here
