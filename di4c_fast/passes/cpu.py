"""The passes in C++: one visit of a position while its logits are in the cache of a core.

fp32, bf16 and fp16 logits on a CPU; the work dtype is fp32. The sources are in `kernels/cpu`. Every
field of the structs in `kernels/cpu/abi.h` has 8 bytes, so a struct is handed over as a list of
integers: addresses, sizes, strides and flags in the order of its fields.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..kernels.cpu.build import BuildError, find_library
from .base import (
    Chunk,
    Drawn,
    DrawOptions,
    Factors,
    Joint,
    Mixture,
    Operand,
    Places,
    RowSums,
    Statistics,
    Swept,
    Values,
    Visit,
)

WRITES_ZEROS = False  # `backward` visits active slots only
READS_BINS = sys.maxsize
DRAWS_TARGETS = sys.maxsize  # `forward` draws x^k
SETS = ("plain", "avx2", "avx512")  # DI4C_FAST_CPU names the highest that may run
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LOGISTIC = 3  # of Dtype in vec.h
_WANTED = ("argmax", "entropy", "margin", "raw_prob")  # bits of Wanted in draw.h
_FAILURES = {1: "no memory", 2: "torch_parallel_for failed", 3: "abi.h and cpu.py differ"}


def unavailable(device: torch.device) -> str | None:
    """Why these passes cannot run on `device`; None: they can."""
    if device.type != "cpu":
        return f"the C++ passes run on the CPU, the tensors are on {device.type}"
    return _library()[1]


def instruction_set() -> str:
    """The one that runs: "plain", "avx2" or "avx512"."""
    return SETS[_library()[2]]


def chunk_bytes(device: torch.device) -> int:
    """Of computed logits: matrix products of more rows gain more than logits in the cache.

    One core with AVX-512, 512 x 512 x 32000: 756 ms with 8 MiB, 527 with 16, 474 with 32, 486
    with 64; language with hidden states 291, 246, 233, 264 ms.
    """
    return 32 << 20


def temporary_bytes(components: int, row_bytes: int) -> int:
    """What a slot takes beside its operands: nothing that grows with the chunk."""
    return 0


def forward(chunk: Chunk) -> None:
    """See `base`."""
    _run("di4c_forward", _Words().mixture_pass(chunk), chunk.visit)


def backward(chunk: Chunk, factors: Factors, gradient: Operand) -> None:
    """See `base`."""
    _run("di4c_backward", _Words().mixture_pass(chunk, factors, gradient), chunk.visit)


def clear(gradient: Operand, visit: Visit) -> None:
    """See `base`."""
    words = _Words().operand(gradient).visit(visit).numbers(gradient.vocabulary)
    _run("di4c_clear", words, visit)


def draw(x: Operand, y: Operand | None, visit: Visit, keys: Tensor, options: DrawOptions) -> Drawn:
    """See `base`."""
    rows = visit.slots * x.components

    def by_row(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float32).expand(rows)

    statistics = ("entropy", "margin", "raw_prob")
    wanted = {n: torch.empty(rows) if n in options.wanted else None for n in statistics}
    token, argmax = torch.empty(2, rows, dtype=torch.int64)
    shift, total, log_weight = torch.empty(3, rows)
    words = _Words().operand(x).operand(y).visit(visit)
    words.numbers(x.vocabulary, -1 if options.mask_id is None else options.mask_id)
    words.numbers(_signed(options.seed), _signed(options.step))
    words.numbers(sum(1 << i for i, name in enumerate(_WANTED) if name in options.wanted))
    words.pointers(keys, dtype=torch.int64)
    words.pointers(by_row(options.temperature), by_row(options.guidance))
    words.pointers(token, argmax, dtype=torch.int64)
    words.outputs(shift, total, log_weight).pointers(*wanted.values())
    _run("di4c_draw", words, visit)
    found = argmax if "argmax" in options.wanted else None
    return Drawn(token, shift, total, log_weight, found, **wanted)


def _signed(value: int | Tensor) -> int:
    """The 64 bits of an integer as int64 has them."""
    return (int(value) + 2**63) % 2**64 - 2**63


def joint(swept: Swept, out: Joint) -> Values:
    """See `loss.joint.joint_terms`."""
    by_example = [out.counted.shape[:1]] * 4
    rows, *others = (torch.empty(shape) for shape in (out.counted.shape, *by_example))
    words = _Words().terms(*swept).outputs(rows, *others)
    _call("di4c_joint", words.outputs(out.difference, out.weights, out.counted))
    return Values(rows, *others)


def factors(swept: Swept, joint: Joint, rows: Tensor | None, loss: Tensor | None) -> Factors:
    """See `loss.joint.factors`."""
    slots, _, components = joint.difference.shape
    probability, component = torch.empty(2, slots, components)
    found = Factors(probability, torch.empty(slots), component, torch.empty_like(joint.difference))
    words = _Words().terms(*swept).pointers(joint.difference, rows, loss)
    _call("di4c_factors", words.outputs(probability, found.marginal, component, found.kappa))
    return found


class _Words:
    """The fields of a struct of `abi.h`, and the tensors they point to."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self._alive: list[Tensor] = []

    def numbers(self, *values: int) -> _Words:
        self.values += [int(value) for value in values]
        return self

    def pointers(self, *tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> _Words:
        """Addresses of contiguous tensors, 0 for None; inputs of other strides are copied."""
        for tensor in tensors:
            if tensor is not None:
                assert tensor.dtype == dtype, (tensor.dtype, dtype)
                tensor = tensor.contiguous()
                self._alive.append(tensor)
            self.values.append(0 if tensor is None else tensor.data_ptr())
        return self

    def outputs(self, *tensors: Tensor) -> _Words:
        """Addresses of contiguous fp32 tensors that are written."""
        assert all(tensor.is_contiguous() for tensor in tensors)
        return self.pointers(*tensors)

    def operand(self, x: Operand | None) -> _Words:
        if x is None:
            return self.numbers(*[0] * 10)
        self._alive.append(x.logits)
        self.numbers(x.logits.data_ptr(), *x.strides, x.components)
        if x.bins is None:
            assert x.logits.shape[-1] <= 1 or x.logits.stride(-1) == 1
            return self.numbers(_DTYPES[x.logits.dtype], 0, 0, 0)
        self.numbers(_LOGISTIC).outputs(x.bins.log_scale)
        (eps,) = struct.unpack("q", struct.pack("d", x.bins.eps))
        return self.numbers(eps, x.bins.clamp == "min")

    def visit(self, visit: Visit) -> _Words:
        assert visit.count is None, "every visited slot is active"
        self.pointers(visit.rows, dtype=torch.int64)
        return self.numbers(visit.first, visit.slots, visit.positions, torch.get_num_threads())

    def sums(self, sums: RowSums | None) -> _Words:
        return self.numbers(0, 0) if sums is None else self.outputs(sums.shift, sums.total)

    def kept(self, rows: Tensor) -> _Words:
        assert rows.stride(1) == 1
        return self.numbers(rows.data_ptr(), rows.shape[0], rows.stride(0))

    def terms(self, s: Statistics, m: Mixture, places: Places) -> _Words:
        self.pointers(places.rows, dtype=torch.int64)
        teachers = 0 if s.teacher is None else s.teacher.total.shape[1]
        self.numbers(places.slots, places.sizes[1], places.sizes[0], *s.log_prob.shape[1:])
        self.numbers(teachers, torch.get_num_threads())
        self.pointers(m.log_weights, m.data_weight, m.teacher_weight, m.consistency_weight)
        self.pointers(m.component_weight, s.log_prob, s.student.total)
        both = [s.mass, s.teacher_kl, None if s.consistency is None else s.consistency_kl]
        self.pointers(*(both if m.marginal else [None] * 3))
        apart = [s.divergence, None if s.teacher is None else s.teacher.total]
        self.pointers(*(apart if m.component else [None] * 2))
        return self.numbers(m.correlation)

    def mixture_pass(
        self, chunk: Chunk, factors: Factors | None = None, gradient: Operand | None = None
    ) -> _Words:
        z, t, u, visit, m, s = chunk
        for operand in (z, t, u, gradient):
            self.operand(operand)
        self.visit(visit)
        self.numbers(z.vocabulary, -1 if m.mask_id is None else m.mask_id)
        self.pointers(m.xu, dtype=torch.int64)
        self.pointers(m.log_weights, m.teacher_weight, m.consistency_weight)
        self.numbers(m.marginal, m.component, s.sums_known, s.all_known)
        self.numbers(*((0, 0) if m.seed is None else (1, int(m.seed))))
        self.pointers(s.tokens, dtype=torch.int64).numbers(s.tokens.shape[1])
        self.sums(s.student).sums(s.teacher).sums(s.consistency)
        self.outputs(s.log_prob, s.mass, s.teacher_kl, s.consistency_kl, s.divergence)
        self.kept(s.q).kept(s.q_teacher)
        f = factors
        if f is None:
            return self.numbers(0, 0, 0, 0)
        return self.pointers(f.probability, f.marginal, f.component, f.kappa)


def _run(name: str, words: _Words, visit: Visit) -> None:
    if visit.slots:
        _call(name, words)


def _call(name: str, words: _Words) -> None:
    library, reason, _ = _library()
    assert library is not None, reason
    count = len(words.values)
    failure = getattr(library, name)((ctypes.c_int64 * count)(*words.values), count)
    if failure:
        error = MemoryError if failure == 1 else RuntimeError
        raise error(f"{name}: {_FAILURES[failure]}")


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, str | None, int]:
    """The library or why there is none, and the index of the instruction set that runs."""
    if sys.platform == "win32" or sys.maxsize < 2**32:
        return None, "the C++ passes need Linux or macOS on a 64-bit CPU", 0
    highest = os.environ.get("DI4C_FAST_CPU", SETS[-1])
    if highest not in SETS:
        return None, f"DI4C_FAST_CPU must be one of {', '.join(SETS)}, got {highest!r}", 0
    try:
        library = ctypes.CDLL(str(find_library()))
        parallel_for = ctypes.cast(_torch_library().torch_parallel_for, ctypes.c_void_p)
    except (BuildError, OSError, AttributeError) as error:
        return None, f"the C++ passes cannot be built or loaded: {error}", 0
    for name in ("forward", "backward", "clear", "draw", "joint", "factors"):
        getattr(library, f"di4c_{name}").argtypes = [ctypes.POINTER(ctypes.c_int64), ctypes.c_int64]
    library.di4c_map.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return library, None, library.di4c_start(parallel_for, SETS.index(highest))


def _torch_library() -> ctypes.CDLL:
    """Where `torch_parallel_for` is: torch's stable C interface, since version 2.10."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"
    return ctypes.CDLL(str(path) if path.exists() else None)  # None: what is loaded already
