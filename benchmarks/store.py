"""Sets of results: one folder per device, day and commit, rewritten whole after every group."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1
CSV_COLUMNS = (
    "group",
    "variant",
    "status",
    "reason",
    "seconds",
    "p20",
    "p80",
    "peak_bytes",
    "logits_bytes",
    "loss_error",
    "gradient_error",
    "error_limit",
    "floor_seconds",
    "plan_seconds",
)


def write_atomically(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it: readers see the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


class ResultSet:
    """The results of one run, in `folder/results.json` and `folder/results.csv`."""

    def __init__(self, folder: Path, header: dict[str, Any]):
        self.folder = folder
        self.header = header
        self.records: list[dict[str, Any]] = []

    @property
    def json_path(self) -> Path:
        return self.folder / "results.json"

    @staticmethod
    def load(path: Path) -> ResultSet:
        """Read a set.

        Args:
            path: the folder, or its results.json.

        Raises:
            ValueError: not a set of results of this schema, naming the file.
        """
        path = path / "results.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no results: {error}") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"{path} holds no results of schema {SCHEMA}")
        results = ResultSet(path.parent, content["header"])
        results.records = content["records"]
        return results

    def resume(self) -> int:
        """Take over the records of an interrupted run with the same settings; their number.

        Records of another run stay untouched on disk until the first group is saved.
        """
        if not self.json_path.exists():
            return 0
        try:
            before = ResultSet.load(self.json_path)
        except ValueError:
            return 0
        if before.header.get("settings") != self.header.get("settings"):
            return 0
        self.records = before.records
        return len(self.records)

    def group(self, key: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["group"] == key]

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace the records of the same group and variant, and save everything."""
        new = list(records)
        names = {(record["group"], record["variant"]) for record in new}
        kept = [r for r in self.records if (r["group"], r["variant"]) not in names]
        self.records = kept + new
        self.save()

    def finish(self, **fields: Any) -> None:
        """Mark the run as finished; `complete` says whether all of it was measured."""
        self.header.update(fields)
        self.save()

    def save(self) -> None:
        content = {"schema": SCHEMA, "header": self.header, "records": self.records}
        write_atomically(self.json_path, json.dumps(content, indent=1, allow_nan=False) + "\n")
        write_atomically(self.folder / "results.csv", self._csv())

    def _csv(self) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return buffer.getvalue()


def finite(value: Any) -> Any:
    """The same structure with NaN and infinities as text, which JSON can hold."""
    if isinstance(value, float) and not -1e308 < value < 1e308:
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def result_sets(root: Path = RESULTS) -> list[ResultSet]:
    """All readable sets under a folder, oldest first."""
    found = []
    for path in sorted(root.glob("*/results.json")):
        try:
            found.append(ResultSet.load(path))
        except ValueError:
            continue
    return sorted(found, key=lambda results: str(results.header.get("started", "")))


def newest(root: Path = RESULTS) -> dict[str, ResultSet]:
    """The newest complete set of each kind of device, "cpu" and "gpu"."""
    return {
        results.header["machine"]["kind"]: results
        for results in result_sets(root)
        if results.header.get("complete")
    }
