"""What the tests of the examples share: interruptions, options, and what a wrong one says."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open


class Stop(Exception):
    """Stands for an interruption."""


def stop_at(call: int, function):
    """`function` that is interrupted at its call number `call`."""
    calls = iter(range(call))

    def stopping(*args, **kwargs):
        if next(calls, None) is None:
            raise Stop
        return function(*args, **kwargs)

    return stopping


def assert_interruption_changes_nothing(
    train_both: Callable[[pathlib.Path], None],
    train: ModuleType,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    call: int,
    iterations: int,
) -> None:
    """Teacher and student of seed 5 end bit for bit the same after an interruption.

    Args:
        train_both: trains both, `iterations` each, in the run directory that it is given.
        train: its module; the interruption comes when `draw_batch` is called for the batch after
            number `call`.
    """
    train_both(folder / "whole")

    with monkeypatch.context() as patch:
        patch.setattr(train, "draw_batch", stop_at(call, train.draw_batch))
        with pytest.raises(Stop):
            train_both(folder / "stopped")
    torch.manual_seed(123)  # a new process has another state of the default generator
    train_both(folder / "stopped")

    for name in ("teacher", "student"):
        whole, losses = stored(folder / "whole" / "seed-5" / f"{name}.safetensors")
        stopped, others = stored(folder / "stopped" / "seed-5" / f"{name}.safetensors")
        assert whole.keys() == stopped.keys()
        assert len(losses) == iterations
        assert losses == others
        for key in whole:
            assert torch.equal(whole[key], stopped[key]), key


def stored(file: pathlib.Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Tensors and losses of a trainer's checkpoint."""
    with safe_open(str(file), "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        values = json.loads(opened.metadata()["values"])["values"]
    return tensors, values["extra"]["losses"]


def options_of(config: Any, run: pathlib.Path, *more: str) -> list[str]:
    """The command line that runs a configuration in a run directory with one thread."""
    options = ["--run-dir", str(run), "--threads", "1", *more]
    for name, value in config.to_json().items():
        values = value if isinstance(value, list) else [value]
        options += ["--" + name.replace("_", "-"), *(str(item) for item in values)]
    return options


def assert_option_is_named(
    main: Callable[[list[str]], int],
    options: Sequence[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    run: pathlib.Path,
) -> None:
    """The command ends with 2 and the message, and begins no run."""
    with pytest.raises(SystemExit) as stopped:
        main(["--run-dir", str(run), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


def assert_help_lists_options(
    main: Callable[[list[str]], int], config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--help` ends with 0 and names every field of the configuration and every common option."""
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for name in (*config.to_json(), "run_dir", "seeds", "report", "threads", "checkpoint_every"):
        assert "--" + name.replace("_", "-") in printed
