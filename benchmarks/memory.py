"""Peak memory of a call above its inputs.

On a GPU the allocator counts. On a CPU the resident set of a child process is read: the child
builds the inputs, returns freed pages to the system, resets the kernel's high-water mark, and
makes the call. Small blocks are mapped singly there (see `ENVIRONMENT`), so that freed memory
leaves the resident set at once and cannot hide in the heap.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from di4c_fast._spare import release

ROOT = Path(__file__).resolve().parent.parent
# glibc: blocks from 64 KiB on are mapped, and unmapped when freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# Python's own allocator and thread stacks move by this much between identical calls.
RESIDENT_NOISE = 1 << 20


class MemoryUnknown(RuntimeError):
    """The peak could not be measured; the text says why."""


def available_bytes(device: str) -> int:
    """Memory that a new process (CPU) or this process (GPU) can still take."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    limits = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    used, limit = _read("/sys/fs/cgroup/memory.current"), _read("/sys/fs/cgroup/memory.max")
    if used.strip().isdigit() and limit.strip().isdigit():
        limits.append(int(limit) - int(used))
    if not limits:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return max(0, min(limits))


def peak_on_gpu(call: Callable[[], Any], device: str) -> int:
    """Bytes that the allocator handed out at the worst moment of `call`, above those before it.

    What `call` returns is part of the peak and is freed afterwards.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def peak_in_this_process(call: Callable[[], Any]) -> int:
    """Growth of this process's resident set at the worst moment of `call`.

    Exact only where freed memory is returned at once, as in the child that `MemoryWorker` starts.

    Raises:
        MemoryUnknown: the system tells no peak, or only one from before the call.
    """
    gc.collect()
    _trim()
    if reset_high_water_mark():
        before = _status_bytes("VmRSS")
        result = call()
        peak = _status_bytes("VmHWM")
        del result
        return max(0, peak - before)
    before, earlier = _resident_bytes(), _largest_resident_bytes()
    result = call()
    peak = _largest_resident_bytes()
    del result
    if peak <= earlier:
        raise MemoryUnknown(
            "the system cannot reset the high-water mark, and building the inputs took more "
            "memory than the call"
        )
    return max(0, peak - before)


def reset_high_water_mark() -> bool:
    """Make the kernel's VmHWM start again from the present resident set; False if it cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _status_bytes("VmHWM") <= _status_bytes("VmRSS") + (4 << 20)
    except (OSError, MemoryUnknown):
        return False


def _trim() -> None:
    release()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _status_bytes(field: str) -> int:
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise MemoryUnknown(f"/proc/self/status has no {field}")


def _resident_bytes() -> int:
    try:
        return _status_bytes("VmRSS")
    except MemoryUnknown:
        return _largest_resident_bytes()


def _largest_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MemoryWorker:
    """A child process that measures one request after the other; started again if it dies.

    A request is a case and the name of a variant; the answer is the peak in bytes.
    """

    def __init__(self, threads: int, timeout: float = 240.0):
        self.threads = threads
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None

    def peak(self, spec: dict[str, Any], variant: str) -> int:
        """The peak of one variant on the inputs of one case.

        Raises:
            MemoryUnknown: the child died (usually for lack of memory), failed, or took too long.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        request = json.dumps({"case": spec, "variant": variant})
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer below will be missing
        deadline = time.monotonic() + self.timeout
        while True:
            left = deadline - time.monotonic()
            ready = select.select([process.stdout], [], [], max(0.0, left))[0]
            if not ready:
                self.close()
                raise MemoryUnknown(f"no answer within {self.timeout:.0f} s")
            line = process.stdout.readline()
            if not line:
                status = process.wait()
                self.close()
                how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
                raise MemoryUnknown(f"the measuring process ended ({how}), likely out of memory")
            if line.startswith("{"):  # anything else was printed by a library
                break
        answer = json.loads(line)
        if "error" in answer:
            raise MemoryUnknown(answer["error"])
        if not answer["resettable"]:
            self.close()  # its high-water mark cannot be used a second time
        return int(answer["peak"])

    def _started(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            threads = str(self.threads)
            environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": threads}
            environment["PYTHONPATH"] = os.pathsep.join(
                path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path
            )
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.memory", threads],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                env=environment,
                cwd=ROOT,
            )
        return self.process

    def close(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue


def _serve(threads: int) -> None:
    """Answer requests from the standard input until it ends."""
    torch.set_num_threads(threads)
    warmed: set[tuple[str, str, str]] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            answer = _answer(request["case"], request["variant"], warmed)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _answer(
    spec: dict[str, Any], variant: str, warmed: set[tuple[str, str, str]]
) -> dict[str, Any]:
    from .cases import Case, check_name, make_case
    from .groups import make_group

    case = Case.from_spec(spec)
    group = make_group(case)
    check_name(variant, "variant", [known.name for known in group.variants()])
    resettable = reset_high_water_mark()
    shape = case.shape if case.shape != "scaling" else "language"
    if (shape, case.dtype, variant) not in warmed:
        # Imports, thread pools and workspaces are not the variant's memory.
        tiny = make_group(make_case(shape, "tiny", case.dtype, case.device))
        tiny.call(variant, tiny.make_inputs(0))
        warmed.add((shape, case.dtype, variant))
    inputs = group.make_inputs(0)
    call = functools.partial(group.call, variant, inputs)
    started = time.monotonic()
    peak = peak_in_this_process(call)
    if resettable and time.monotonic() - started < 1.0:
        # The first call of this size also sets up what later calls reuse.
        peak = min(peak, peak_in_this_process(call))
    return {"peak": peak, "resettable": resettable}


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
