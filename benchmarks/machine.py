"""What this machine is, in which state, and how fast it copies and multiplies."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from .floors import Machine

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "liger-kernel",
    "cut-cross-entropy",
    "flashinfer-python",
    "pytest-benchmark",
)


def device_name(device: str) -> str:
    """The name of the processor or of the GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(text: str) -> str:
    """For folder names: lower case, letters and digits, single hyphens.

    >>> slug("Intel(R) Xeon(R) Processor")
    'intel-xeon-processor'
    """
    text = re.sub(r"\((r|tm|c)\)", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def device_slug(device: str, threads: int) -> str:
    name = slug(device_name(device))
    return name if device.startswith("cuda") else f"cpu-{name}-{threads}-threads"


def commit() -> str:
    """The short commit of the checkout, with "-dirty" if sources differ from it."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD").strip()
        changed = _git("status", "--porcelain", "--untracked-files=no").splitlines()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("DI4C_FAST_COMMIT", "no-commit")
    # Results, figures and the README's tables come after the measurement.
    derived = re.compile(r" (benchmarks/(results|figures)/|README\.md)")
    sources = [line for line in changed if not derived.search(line)]
    return f"{head}-dirty" if sources else head


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
    ).stdout


def describe(device: str, threads: int) -> dict[str, Any]:
    """Device, driver, versions and commit; nothing that names the host or its paths."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    described: dict[str, Any] = {
        "device": device_name(device),
        "kind": "gpu" if device.startswith("cuda") else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(torch.device(device))
        described["memory_bytes"] = properties.total_memory
        described["multiprocessors"] = properties.multi_processor_count
        described["l2_bytes"] = getattr(properties, "L2_cache_size", 0)
        described["cuda"] = torch.version.cuda or torch.version.hip
        described["driver"] = _query_gpu(device, "driver_version").get("driver_version")
    else:
        described["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        described["capability"] = torch.backends.cpu.get_cpu_capability()
    return described


def clock_state(device: str) -> dict[str, Any]:
    """Clocks, load, temperature at this moment, as far as the system tells."""
    if device.startswith("cuda"):
        return _query_gpu(
            device,
            "clocks.sm",
            "clocks.mem",
            "clocks.max.sm",
            "temperature.gpu",
            "power.draw",
            "clocks_throttle_reasons.active",
        )
    state: dict[str, Any] = {}
    try:
        state["load"] = round(os.getloadavg()[0], 2)
        text = Path("/proc/cpuinfo").read_text()
        clocks = [float(value) for value in re.findall(r"cpu MHz\s*:\s*([0-9.]+)", text)]
        if clocks:
            state["clock_mhz"] = round(sum(clocks) / len(clocks))
    except OSError:
        pass
    return state


def _query_gpu(device: str, *fields: str) -> dict[str, str]:
    index = torch.device(device).index or 0
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={','.join(fields)}"]
    try:
        output = subprocess.run(
            [*command, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (part.strip() for part in output.split(",")), strict=False))


def measure_ceilings(device: str, dtype: str, quick: bool = False) -> Machine:
    """Copy bandwidth (bytes read plus written) and rate of a large matrix product."""
    gpu = device.startswith("cuda")
    target = torch.device(device)
    # Several times the last cache, so that the copy measures memory.
    size = (1 << 31) if gpu else (1 << 29)
    if quick:
        size = 1 << 22
    source = torch.empty(size, dtype=torch.uint8, device=target)
    source.view(torch.int32).random_()
    copy = torch.empty_like(source)
    bandwidth = (
        2 * size / _median_seconds(functools.partial(copy.copy_, source), target, 2 if quick else 8)
    )
    del source, copy

    side = 8192 if gpu else 2048
    if quick:
        side = 128
    flops = {}
    for name, kind in {"fp32": torch.float32, dtype: _dtype(dtype)}.items():
        left, right = (torch.randn(side, side, device=target).to(kind) for _ in range(2))
        product = functools.partial(torch.matmul, left, right)
        flops[name] = 2 * side**3 / _median_seconds(product, target, 2 if quick else 6)
    return Machine(bandwidth, flops)


def _dtype(name: str) -> torch.dtype:
    from .cases import DTYPES

    return DTYPES[name]


def _median_seconds(call: Any, device: torch.device, rounds: int) -> float:
    """The median of timed calls after a warm-up."""
    samples = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - started)
    return sorted(samples[1:])[rounds // 2]
