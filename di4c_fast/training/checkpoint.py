"""Checkpoint files: safetensors written whole or not at all, nested states as JSON beside them.

A file holds its tensors by name and, in the metadata of its header, `format` (which program reads
it) and `values`, a JSON text with everything that is not a tensor and a CRC-32 of each tensor.
An interruption while one is written leaves the old file or the new one; `hold` keeps other
processes away and removes what a killed one left.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import glob
import json
import os
import pathlib
import secrets
import shutil
import sys
import weakref
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import describe

if sys.platform != "win32":
    import fcntl

PathLike = str | os.PathLike[str]


class Hold:
    """A claim to write a file; it ends with the last reference to it, or with the process."""


_held: weakref.WeakValueDictionary[tuple[int, str], Hold] = weakref.WeakValueDictionary()


def hold(path: PathLike) -> Hold:
    """Claim a file that this process will write; those who claim it in one process share it.

    Leftovers of a process that was killed while it wrote are removed. Where the system has no
    locks of files (Windows, some network file systems) nothing is claimed.

    Raises:
        RuntimeError: another process holds it; the message names that process and the folder.
    """
    # A forked child inherits the dictionary, but not the locks.
    owner, path = os.getpid(), os.path.realpath(check_place(path))
    held = _held.get((owner, path))
    if held is None:
        held = Hold()
        weakref.finalize(held, _unlock, path, _lock(path), owner)
        _held[owner, path] = held
        for left in glob.glob(glob.escape(path) + ".*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
    return held


def _lock(path: str) -> int | None:
    """A descriptor of `path`.lock, locked, with the name of this process in the file."""
    if sys.platform == "win32":
        return None
    name = path + ".lock"
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(descriptor, 200).decode() or "that has just started"
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        raise RuntimeError(
            f"{path} is in use by process {owner}: wait until it ends, or choose another "
            f"folder than {os.path.dirname(path)}"
        ) from None
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.stat(name), os.fstat(descriptor)):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} on {os.uname().nodename}".encode())
            return descriptor
    os.close(descriptor)  # of a holder that has just ended and removed it
    return _lock(path)


def _unlock(path: str, descriptor: int | None, owner: int) -> None:
    if descriptor is not None:
        if os.getpid() == owner:
            with contextlib.suppress(OSError):
                os.unlink(path + ".lock")
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[pathlib.Path]:
    """A file to write in the `with`, which then takes the place of `path` in one step."""
    path = pathlib.Path(os.path.realpath(path))  # a link stays, its target is replaced
    # A folder: whoever writes the file may have temporary names of his own.
    folder = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    folder.mkdir()
    try:
        yield folder / path.name
        os.chmod(folder / path.name, folder.stat().st_mode & 0o666)  # as the umask says
        _sync(folder / path.name)
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _sync(path.parent)  # the new name itself survives a crash once the folder is on disk


def _sync(path: pathlib.Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_checkpoint(
    path: PathLike, format_name: str, tensors: Mapping[str, Tensor], values: Any
) -> None:
    """Replace the file in one step; an OSError leaves a file of that name as it was.

    Args:
        path: its folder must exist.
        format_name: what `read_checkpoint` will ask for.
        tensors: by name; on any device, of any strides, sharing memory or not.
        values: anything that survives JSON.
    """
    path = check_place(path)
    stored, aliases = _own_memory(tensors)
    sums = {name: _sum_of(value) for name, value in stored.items()}
    text = json.dumps({"aliases": aliases, "sums": sums, "values": values})
    metadata = {"format": format_name, "values": text, "sum": str(zlib.crc32(text.encode()))}
    with replacing(path) as temporary:
        try:
            save_file(stored, str(temporary), metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error


def hold_and_write(
    path: PathLike, format_name: str, tensors: Mapping[str, Tensor], values: Any
) -> Hold:
    """`write_checkpoint` of a file that this process holds from then on."""
    held = hold(path)
    write_checkpoint(path, format_name, tensors, values)
    return held


def check_place(path: PathLike) -> pathlib.Path:
    """The path of a file that could be written."""
    path = pathlib.Path(path)
    if not pathlib.Path(os.path.realpath(path)).parent.is_dir():
        raise FileNotFoundError(f"path must lie in a folder that exists, got {path}")
    if path.is_dir():
        raise ValueError(f"path must be a file to write, got the folder {path}")
    return path


def read_checkpoint(path: PathLike, format_name: str) -> tuple[dict[str, Tensor], Any]:
    """What `write_checkpoint` wrote: tensors on the CPU, and values.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is a folder, torn, no safetensors file, of another program, or its content
            does not match its sums.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a checkpoint file, got the folder {path}")
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with safe_open(str(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
            found = metadata.get("format")
            if found != format_name:
                raise ValueError(
                    f"{path} is not a checkpoint of {format_name}: its format is {found!r}"
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    try:
        text = metadata["values"]
        if str(zlib.crc32(text.encode())) != metadata["sum"]:
            raise ValueError("its sum is another")
        record = json.loads(text)
        there = {name: _sum_of(value) for name, value in tensors.items()}
        for line in differences(record["sums"], there):
            raise ValueError(f"not what was written: the sum of {line}")
        tensors |= {name: tensors[first] for name, first in record["aliases"].items()}
        return tensors, record["values"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _own_memory(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors on the CPU, none sharing memory, and for tied ones the name of the first."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_of: dict[tuple[Any, ...], str] = {}
    memories: set[int] = set()
    for name, value in tensors.items():
        same = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        first = first_of.setdefault(same, name) if value.numel() else name
        if first != name:
            aliases[name] = first
            continue
        own = value.detach().cpu().contiguous()
        memory = own.untyped_storage().data_ptr()
        stored[name] = own.clone() if memory in memories else own
        memories.add(memory)
    return stored, aliases


def _sum_of(value: Tensor) -> int:
    return zlib.crc32(value.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state as JSON values; its tensors go into `tensors` under names below `name`."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, Tensor):
        while name in tensors:  # keys that hold a slash themselves
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, Mapping):
        pairs = [
            [encode(key, f"{name}/key", tensors), encode(item, f"{name}/{key}", tensors)]
            for key, item in value.items()
        ]
        return {"counter" if isinstance(value, collections.Counter) else "dict": pairs}
    raise TypeError(
        f"{name} must consist of tensors, numbers, strings and containers of them to be saved, "
        f"got {describe(value)}"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given, out of its result and the tensors of the file."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    make = {"list": list, "tuple": tuple, "dict": dict, "counter": collections.Counter}[kind]
    if kind in ("list", "tuple"):
        return make(decode(item, tensors) for item in content)
    return make({decode(key, tensors): decode(item, tensors) for key, item in content})


def outline(value: Any) -> Any:
    """The form of a nested state, for `differences`: tensors by shape and dtype, no other values.

    >>> outline({"a": [torch.zeros(2), 3.0]})
    {'a': {'0': '(2,) float32', '1': 'a value'}}
    """
    if isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return {str(key): outline(item) for key, item in items}
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return "a value"


def identity(value: Any) -> Any:
    """Plain values that tell one configuration from another: a class and its public settings.

    Dataclasses give their fields, other objects their public attributes; tensors a sum of their
    content. Attributes of other kinds give the name of their class.
    """
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, Tensor):
        return [list(value.shape), str(value.dtype), _sum_of(value.detach().cpu().contiguous())]
    if isinstance(value, (list, tuple)):
        return [identity(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): identity(item) for key, item in value.items()}
    own = {} if callable(value) else getattr(value, "__dict__", {})
    names = [name for name in own if not name.startswith("_")]
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
    return {"class": type(value).__name__, **{n: identity(getattr(value, n)) for n in names}}


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """'config.components is 16 there and 8 here', for every plain value that differs.

    >>> differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3, "d": 4}})
    ['b.c is 2 there and 3 here', 'b.d is absent there and 4 here']
    """
    if isinstance(there, dict) and isinstance(here, dict):
        return [
            line
            for key in dict.fromkeys([*here, *there])
            for line in differences(
                there.get(key, _ABSENT), here.get(key, _ABSENT), f"{name}.{key}" if name else key
            )
        ]
    if there == here:
        return []
    return [f"{name} is {_shown(there)} there and {_shown(here)} here"]


_ABSENT = object()


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = str(value["class"] if isinstance(value, dict) and "class" in value else value)
    return text if len(text) <= 60 else text[:57] + "..."
