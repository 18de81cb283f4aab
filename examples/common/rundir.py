"""The directory of a run: what it belongs to, and its files, written whole or not at all.

`run.json` holds the recipe and the names of the files written so far; one process at a time holds
it, rank 0 of those that `torchrun` starts. Checkpoints and samples are checkpoint files of the
library, which an interruption at any point leaves as they were or complete.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from di4c_fast.training.checkpoint import (
    differences,
    hold,
    read_checkpoint,
    replacing,
    write_checkpoint,
)
from di4c_fast.training.parallel import on_first

from .options import Recipe
from .ranks import is_first

FORMAT = 3
STORED = "di4c_fast.examples/2"

Result = TypeVar("Result")


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
        try:
            on_first(self._open)
        except RuntimeError as error:  # of another rank
            raise RunError(str(error)) from error

    def _open(self) -> None:
        record = self.path / "run.json"
        if record.exists():
            self._claim(record)
            self._resume(record)
            return
        if self.path.exists():
            if not self.path.is_dir():
                raise RunError(f"{self.path} must be a directory, it is a file")
            # A run interrupted before its first line was written leaves a temporary file only.
            ours = (".tmp", ".lock")
            foreign = [p.name for p in self.path.iterdir() if not p.name.endswith(ours)]
            if foreign:
                raise RunError(
                    f"{self.path} holds files ({', '.join(sorted(foreign)[:3])}) but no run.json, "
                    "so it is not a run of this example; choose another --run-dir"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim(record)
        self._write_record()

    def _claim(self, record: pathlib.Path) -> None:
        try:
            self._hold = hold(record)  # until this object is gone, or the process
        except RuntimeError as error:
            raise RunError(str(error)) from error

    def _resume(self, record: pathlib.Path) -> None:
        try:
            stored = json.loads(record.read_text())
            files = stored.pop("files")
        except (ValueError, KeyError, AttributeError) as error:
            raise RunError(
                f"{record} is damaged ({error!r}); choose another --run-dir or remove {self.path}"
            ) from error
        if stored != self._identity:
            found = ", ".join(differences(stored, self._identity)).replace("config.", "")
            raise RunError(
                f"{self.path} belongs to another run: {found}. "
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

    def file(self, name: str) -> pathlib.Path:
        """`<name>.safetensors`, `name` being folder/file; the folder is made."""
        file = self.path / f"{name}.safetensors"
        if is_first():
            file.parent.mkdir(exist_ok=True)
        return file

    def written(self, file: pathlib.Path, write: Callable[[], None]) -> None:
        """Call `write`, which writes a file, and let rank 0 record that the run has it."""
        write()
        name = str(file.relative_to(self.path))
        if is_first() and name not in self._files:
            self._files.append(name)
            self._write_record()

    def reading(self, file: pathlib.Path, read: Callable[[], Result]) -> Result:
        """What `read` gives; a file that it cannot use ends the run with advice."""
        # A file that is not on the record was renamed just before an interruption: it is whole.
        try:
            return read()
        except ValueError as error:
            raise RunError(
                f"{error}; put {file.name} back, or remove {self.path} to start again"
            ) from error

    def save(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Write tensors, and values that survive JSON, under a name as for `file`."""
        file = self.file(name)
        self.written(file, lambda: write_checkpoint(file, STORED, tensors, dict(values)))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save` wrote, or None if this run has not written it."""
        file = self.file(name)
        if not file.exists():
            return None
        return self.reading(file, lambda: read_checkpoint(file, STORED))


def write_file(path: pathlib.Path, data: bytes) -> None:
    """Replace the file in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
