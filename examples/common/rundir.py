"""The directory of a run: what it belongs to, and its files, written whole or not at all.

`run.json` holds the recipe and the names of the files written so far. Checkpoints and
samples are safetensors files with a checksum in their metadata. A file is written to a temporary
name, flushed and renamed, so that an interruption at any point leaves the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .options import Recipe

FORMAT = 1


class RunError(Exception):
    """A run directory that cannot be used; the message says why and what to do."""


class RunDirectory:
    """A run, one folder per seed. Opening creates it, or resumes one of the same configuration.

    Args:
        path: the directory.
        config: the recipe that the run belongs to.
        data: what else it belongs to, such as a checksum of the data, by name.

    Raises:
        RunError: the directory belongs to another configuration, is something else, or has lost
            a file. Nothing in it is changed then.
    """

    def __init__(self, path: str | os.PathLike[str], config: Recipe, **data: str):
        self.path = pathlib.Path(path)
        self._identity = {"format": FORMAT, "config": config.to_json(), **data}
        self._files: list[str] = []
        record = self.path / "run.json"
        if record.exists():
            self._resume(record)
            return
        if self.path.exists():
            if not self.path.is_dir():
                raise RunError(f"{self.path} must be a directory, it is a file")
            # A run interrupted before its first line was written leaves a temporary file only.
            foreign = [p.name for p in self.path.iterdir() if not p.name.endswith(".tmp")]
            if foreign:
                raise RunError(
                    f"{self.path} holds files ({', '.join(sorted(foreign)[:3])}) but no run.json, "
                    "so it is not a run of this example; choose another --run-dir"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_record()

    def _resume(self, record: pathlib.Path) -> None:
        try:
            stored = json.loads(record.read_text())
            files = stored.pop("files")
        except (ValueError, KeyError, AttributeError) as error:
            raise RunError(
                f"{record} is damaged ({error!r}); choose another --run-dir or remove {self.path}"
            ) from error
        if stored != self._identity:
            raise RunError(
                f"{self.path} belongs to another run: {_differences(stored, self._identity)}. "
                "Repeat that run's options, or choose another --run-dir"
            )
        missing = [name for name in files if not (self.path / name).is_file()]
        if missing:
            raise RunError(
                f"{self.path} has lost {', '.join(missing)}, which the run had written; "
                f"put it back, or remove {self.path} to start again"
            )
        self._files = files

    def _write_record(self) -> None:
        record = {**self._identity, "files": self._files}
        write_file(self.path / "run.json", (json.dumps(record, indent=1) + "\n").encode())

    def save(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Write `<name>.safetensors`, `name` being folder/file; metadata must survive JSON."""
        tensors = {key: value.detach().contiguous() for key, value in tensors.items()}
        text = json.dumps(metadata, sort_keys=True)
        checksum = _checksum(tensors, text)
        data = save(tensors, metadata={"values": text, "sha256": checksum})
        file = self.path / f"{name}.safetensors"
        file.parent.mkdir(exist_ok=True)
        write_file(file, data)
        if f"{name}.safetensors" not in self._files:
            self._files.append(f"{name}.safetensors")
            self._write_record()

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save` wrote, or None if this run has not written it.

        Raises:
            RunError: the file is torn or its content does not match its checksum.
        """
        file = self.path / f"{name}.safetensors"
        # A file that is not on the record was renamed just before an interruption: it is whole.
        if not file.exists():
            return None
        try:
            with safe_open(str(file), framework="pt") as opened:
                stored = opened.metadata() or {}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            whole = stored["sha256"] == _checksum(tensors, stored["values"])
            values = json.loads(stored["values"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise RunError(f"{file} is damaged ({error}); {_advice(self.path)}") from error
        if not whole:
            raise RunError(f"{file} is damaged (its checksum does not match); {_advice(self.path)}")
        return tensors, values


def write_file(path: pathlib.Path, data: bytes) -> None:
    """Replace the file in one step."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, (json.dumps(values, indent=1) + "\n").encode())


def _advice(path: pathlib.Path) -> str:
    return f"put it back, or remove {path} to start again"


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """'levels is 4 there and 17 here', for each setting that differs."""

    def flat(identity: dict[str, Any]) -> dict[str, Any]:
        config = identity.get("config")
        rest = {key: value for key, value in identity.items() if key != "config"}
        return {**rest, **(config if isinstance(config, dict) else {})}

    there, here = flat(stored), flat(wanted)
    return ", ".join(
        f"{key} is {there.get(key, 'unknown')} there and {here.get(key, 'unknown')} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    )
