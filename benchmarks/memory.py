"""Peak memory of a call above its inputs.

On a GPU the allocator counts. On a CPU the resident set of a child process is read: the child
builds the inputs, returns freed pages to the system, resets the kernel's high-water mark, and
makes the call. Small blocks are mapped singly there (see `ENVIRONMENT`), so that freed memory
leaves the resident set at once and cannot hide in the heap.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import di4c_fast

# glibc: blocks from 64 KiB on are mapped, and unmapped when freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class MemoryUnknown(RuntimeError):
    """The peak could not be measured; the text says why."""


def available_bytes(device: str) -> int:
    """Memory that a new process (CPU) or this process (GPU) can still take."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    limits = [_field("/proc/meminfo", "MemAvailable")]
    group = [_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current")]
    if all(text.isdigit() for text in group):
        limits.append(int(group[0]) - int(group[1]))
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else 1 << 32


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

    Exact only where freed memory is returned at once, as in the child of `MemoryWorker`.

    Raises:
        MemoryUnknown: the system cannot reset the high-water mark.
    """
    gc.collect()
    di4c_fast.memory.empty_cache()  # a call pays for memory that an earlier one has left
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise MemoryUnknown(f"the high-water mark cannot be reset: {error}") from error
    before, mark = (_field("/proc/self/status", name) for name in ("VmRSS", "VmHWM"))
    if before is None or mark is None or mark > before + (4 << 20):
        raise MemoryUnknown("the high-water mark cannot be reset")
    result = call()
    peak = _field("/proc/self/status", "VmHWM")
    del result
    assert peak is not None
    return max(0, peak - before)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _field(path: str, name: str) -> int | None:
    """A line "name: 123 kB" of a file, in bytes."""
    for line in _read(path).splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


class MemoryWorker:
    """A child process in which one call after the other is weighed; started again if it dies."""

    def __init__(self, timeout: float = 240.0):
        self.timeout = timeout
        self.pool: ProcessPoolExecutor | None = None

    def peak(self, weigh: Callable[..., int], *arguments: Any) -> int:
        """What `weigh(*arguments)`, a function of a module, returns in the child.

        Raises:
            MemoryUnknown: the child died (usually for lack of memory), failed, or took too long.
        """
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(1, mp_context=context)
        try:
            # The child is started by the first request; glibc reads its settings then.
            with mock.patch.dict(os.environ, ENVIRONMENT):
                future = self.pool.submit(weigh, *arguments)
            return future.result(self.timeout)
        except BrokenProcessPool as error:
            self.close()
            raise MemoryUnknown("the measuring process ended, likely out of memory") from error
        except Exception as error:
            if isinstance(error, TimeoutError):
                self.close()
            raise MemoryUnknown(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        pool, self.pool = self.pool, None
        if pool is not None:
            for process in multiprocessing.active_children():
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)
