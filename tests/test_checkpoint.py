"""The file format of checkpoints: nested states, shared memory, and the identity of settings."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from di4c_fast.training.checkpoint import (
    decode,
    encode,
    hold,
    identity,
    read_checkpoint,
    write_checkpoint,
)


def test_nested_states_survive_the_file(tmp_path):
    shared = torch.arange(6.0)
    state = {
        0: (1, [2.5, None, True], {"a/b": shared[:2], "a": {"b": shared[2:4]}}),
        "empty": [torch.empty(0, 3), {}, ()],
        "same": shared[:2],
        "overlapping": shared[1:3],
        "strided": torch.arange(6).view(2, 3).T,
    }
    tensors: dict[str, Tensor] = {}
    values = encode(state, "s", tensors)
    write_checkpoint(tmp_path / "a", "test", tensors, values)
    read, values = read_checkpoint(tmp_path / "a", "test")
    back = decode(values, read)
    assert back[0][:2] == state[0][:2]
    for ours, expected in (
        (back[0][2]["a/b"], shared[:2]),
        (back[0][2]["a"]["b"], shared[2:4]),
        (back["empty"][0], torch.empty(0, 3)),
        (back["same"], shared[:2]),
        (back["overlapping"], shared[1:3]),
        (back["strided"], state["strided"]),
    ):
        assert torch.equal(ours, expected)
    assert back["empty"][1:] == [{}, ()]
    with safe_open(str(tmp_path / "a"), framework="pt") as opened:
        assert opened.metadata()["format"] == "test"


def test_an_identity_is_made_of_public_settings():
    class Settings:
        def __init__(self):
            self.rate, self.table, self._cache = 0.5, torch.ones(2), torch.rand(3)

    assert identity(Settings()) == identity(Settings())
    changed = Settings()
    changed.table[0] = 2.0
    assert identity(changed) != identity(Settings())
    assert identity({"a": (1, None), "f": len}) == {
        "a": [1, None],
        "f": {"class": "builtin_function_or_method"},
    }


def test_a_changed_digit_anywhere_is_noticed(tmp_path):
    write_checkpoint(tmp_path / "a", "test", {"x": torch.arange(4.0)}, {"iterations": 1234567})
    whole = (tmp_path / "a").read_bytes()
    for old, new in ((b"1234567", b"1234568"), (b"iterations", b"iteration5")):
        assert whole.count(old) == 1
        (tmp_path / "a").write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(tmp_path / "a", "test")
    (tmp_path / "a").write_bytes(whole)
    assert read_checkpoint(tmp_path / "a", "test")[1] == {"iterations": 1234567}


def test_a_link_keeps_pointing_to_the_file_that_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "a")
    for number in (1, 2):
        write_checkpoint(tmp_path / "link", "test", {}, number)
        assert (tmp_path / "link").is_symlink()
        assert read_checkpoint(tmp_path / "far" / "a", "test")[1] == number
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "far", "link"]


def test_a_file_has_one_writing_process_and_its_leftovers_go(tmp_path):
    """Another process is refused by name; a killed one leaves nothing that counts."""
    script = (
        "import sys, time; from di4c_fast.training.checkpoint import hold, replacing\n"
        "held = hold(sys.argv[1])\n"
        "with replacing(sys.argv[1]) as file:\n"
        "    file.write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    file = tmp_path / "a"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(file)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(RuntimeError, match=f"a is in use by process {other.pid} on"):
            hold(file)
        other.kill()
    assert len(list(tmp_path.glob("a.*.tmp"))) == 1
    held = hold(file)
    assert hold(file) is held
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
    write_checkpoint(file, "test", {}, 1)
    del held
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_gets_the_mode_that_the_umask_gives(tmp_path):
    write_checkpoint(tmp_path / "a", "test", {}, 1)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
