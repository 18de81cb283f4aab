"""`pytest benchmarks/`: what is measured, the replay of measured times, what the JSON holds.

pytest-benchmark keeps the times (`--benchmark-json`, `--benchmark-autosave`), prints and compares
them (`--benchmark-compare`); `-k` chooses among the tests, one for each group and variant.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.session import REPLAY, Run

PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "cut-cross-entropy", "flashinfer-python")
RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("di4c_fast", "benchmarks of di4c_fast")
    group.addoption("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    group.addoption("--dtype", help="fp32, bf16 or fp16 (default: bf16 on a GPU, fp32 on a CPU)")
    group.addoption("--size", help="full, small or tiny (default: full on a GPU, small on a CPU)")
    group.addoption("--seconds", type=float, help="seconds of timed calls per variant")
    group.addoption("--rounds", type=int, default=5, help="turns of every variant")
    group.addoption("--time-budget", type=float, help="seconds after which groups are skipped")
    group.addoption("--no-memory", action="store_true", help="do not measure peak memory")
    group.addoption("--launch-parameters", type=Path, help="JSON of kernels/configs to use")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install '.[bench]'")
    config.addinivalue_line("python_files", "bench_*.py")
    names = [field.name for field in dataclasses.fields(Run)]
    try:
        config.stash[RUN] = Run(**{name: config.getoption(name) for name in names})
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "group" not in metafunc.fixturenames:
        return
    cases = metafunc.config.stash[RUN].cases
    pairs = [(key, v.name) for key, (_, variants) in cases.items() for v in variants]
    metafunc.parametrize(("group", "variant"), pairs)


def pytest_collection_finish(session: pytest.Session) -> None:
    asked = session.config.stash[RUN].asked
    for item in session.items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "group" in parameters:  # no doctest
            asked.setdefault(parameters["group"], []).append(parameters["variant"])
            item.add_marker(pytest.mark.benchmark(timer=REPLAY))


@pytest.fixture
def measured(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    """Measures the group of a test if that has not happened, and reports one variant of it."""

    def report(group: str, variant: str) -> None:
        record = request.config.stash[RUN].record(group, variant)
        if record["status"] != "ok":
            text = f"{record['shape']}, {record['title']}: {record['reason']}"
            # What others wrote may be broken here; what we wrote may not.
            if record["status"] == "wrong" or (record["status"] == "failed" and record["library"]):
                pytest.fail(text, pytrace=False)
            pytest.skip(text)
        benchmark.extra_info |= {k: v for k, v in record.items() if k != "samples"}
        benchmark.group = record["shape"]
        REPLAY.play(benchmark, record["samples"])

    return report


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What runs, at which speed; nothing that names the host."""
    run = config.stash[RUN]
    cpu = machine_info["cpu"]
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    del machine_info["node"]
    machine_info["cpu"] = {key: cpu.get(key) for key in ("brand_raw", "count")}
    machine_info |= {
        "kind": "gpu" if run.gpu else "cpu",
        "device": torch.cuda.get_device_name(run.device) if run.gpu else cpu.get("brand_raw"),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0],
        "versions": versions,
        "settings": dataclasses.asdict(run.settings) | {"size": run.size, "dtype": run.dtype},
    }
    if run.gpu:
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks_throttle_reasons.active"
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            found = subprocess.run(command, capture_output=True, text=True, timeout=20)
            machine_info["clocks"] = f"{fields}: " + found.stdout.strip()
    if run.machine is not None:
        machine_info["ceilings"] = dataclasses.asdict(run.machine)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    """Beside the times: what was not measured and why, and whether the run is complete."""
    run = config.stash[RUN]
    output_json["complete"] = run.complete()
    output_json["not_measured"] = [
        record
        for records in run.records.values()
        for record in records.values()
        if record["status"] != "ok"
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash.get(RUN, None)
    if run is not None:
        run.close()
