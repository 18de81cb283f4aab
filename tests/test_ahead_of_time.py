"""Ahead-of-time compilation of the Triton kernels: no spills, shared memory within the target.

The full table is `python -m tools.compile_report`; here a part of it that has every
kernel, every kind of head and every target. It runs in a process of its own, because the
interpreter, which the other tests need, is chosen when Triton is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Target and shapes; together they contain every kernel of the package.
PARTS = [
    ("sm_90", ["language", "many components", "pixel min", "draw language", "draw image all"]),
    ("sm_80", ["image", "pixel", "draw pixel all"]),
    ("sm_100", ["language linear", "draw language linear"]),
    ("gfx942", ["language", "draw guided"]),
]
KERNELS = {
    "block_sums",
    "factors",
    "joint",
    "loss",
    "marginal",
    "mixture_backward",
    "mixture_forward",
    "order",
    "row_draw",
    "row_statistics",
    "target_gradient",
}


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[int, str, str]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    results = {}
    for target, shapes in PARTS:
        command = [sys.executable, "-m", "tools.compile_report"]
        run = subprocess.run(
            [*command, "--targets", target, "--shapes", *shapes],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        results[target] = (run.returncode, run.stdout, run.stderr)
    return results


@pytest.mark.parametrize("target", [target for target, _ in PARTS])
def test_no_spills_and_enough_shared_memory(tables, target):
    status, output, errors = tables[target]
    assert status == 0, output + errors
    assert "<-" not in output


def test_every_kernel_is_in_the_table(tables):
    found = set()
    for _, output, _ in tables.values():
        for line in output.splitlines()[1:]:
            match = re.match(r"\S+\s+.*?\s{2,}(\w+)\s+\d+\s+\d+", line)
            if match:
                found.add(match.group(1))
    assert found >= KERNELS


def test_loads_of_our_own_buffers_are_at_least_four_bytes_per_thread(tables):
    _, output, _ = tables["sm_100"]
    for kernel in (
        "row_statistics",
        "mixture_forward",
        "mixture_backward",
        "marginal",
        "block_sums",
    ):
        rows = [line for line in output.splitlines() if f" {kernel} " in line]
        assert rows
        assert all(int(line.split()[-1]) >= 32 for line in rows)


def test_a_spill_is_a_fault_on_nvidia():
    from tools.compile_report import Resources, faults

    def row(target: str, shared: int, spills: int) -> Resources:
        return Resources("shape", "kernel", target, 8, 64, shared, spills, 32)

    assert faults(row("sm_90", 1024, 0)) == []
    assert faults(row("sm_90", 1024, 8)) == ["spills 8 bytes"]
    assert "shared memory" in faults(row("sm_80", 200_000, 0))[0]


def test_report_refuses_the_interpreter(monkeypatch, capsys):
    from tools import compile_report

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert compile_report.main(["--targets", "sm_90", "--shapes", "image"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
