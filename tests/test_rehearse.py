"""Launches written down in the interpreter and compiled for a GPU, in processes of their own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*arguments: object, interpret: bool) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_launches_of_a_test_are_written_down_and_compile(tmp_path):
    file = tmp_path / "launches.jsonl"
    recorded = run(
        *("pytest", "-q", "-p", "tools.rehearse", "-p", "no:cacheprovider", "--launches", file),
        *("tests/test_launches.py", "-k", "masked"),
        interpret=True,
    )
    assert recorded.returncode == 0, recorded.stdout + recorded.stderr
    lines = file.read_text().splitlines()
    assert len(set(lines)) == len(lines)
    names = {json.loads(line)["kernel"].split(":")[1] for line in lines}
    assert {"_order_kernel", "_joint_kernel", "_loss_kernel", "_factors_kernel"} <= names
    # One that no compiler takes is reported, and hides no other.
    broken = json.loads(next(line for line in lines if "_loss_kernel" in line))
    broken["arguments"]["BLOCK_J"] = 3
    file.write_text("\n".join([*lines, json.dumps(broken)]) + "\n")
    compiled = run("tools.rehearse", file, "--targets", "sm_90", interpret=False)
    assert compiled.returncode == 1
    assert f"sm_90: {len(lines) + 1} launches, 1 do not compile" in compiled.stdout
    assert "_loss_kernel" in compiled.stderr
