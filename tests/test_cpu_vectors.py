"""exp and log of the C++ passes, on every instruction set that this CPU has, against float64."""

from __future__ import annotations

import ctypes
import shutil

import numpy as np
import pytest
from di4c_fast.kernels.cpu.build import BuildError, find_library

from di4c_fast.passes.cpu import SETS

EXP, ANY_EXP, LOG = 0, 1, 2  # the first for x <= 88, its denormal results may be 0
TINY, HUGE = 2.0**-126, 2.0**128  # the least normal number, and where infinity begins
# Where the formulas change their course, or results become denormal, 0 or infinite.
EXP_CORNERS = [
    0.0,
    -87.33654,
    -87.68311,
    -88.0,
    88.0,
    -103.27893,
    -103.97208,
    -104.0,
    88.72284,
    89.0,
    1e-30,
    -1e-30,
]
LOG_CORNERS = [1.0, 0.5, 2.0, 0.70710678, 1.41421356, TINY, 2.0**-149, 3.4028235e38]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    """A copy, so that the instruction set of the passes under test elsewhere stays as it is."""
    try:
        source = find_library()
    except BuildError as error:
        pytest.skip(str(error))
    copy = ctypes.CDLL(shutil.copy(source, tmp_path_factory.mktemp("library")))
    copy.di4c_start.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    copy.di4c_map.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return copy


@pytest.fixture(params=SETS)
def apply(library, request):
    """`apply(EXP, ANY_EXP or LOG, x)` on one instruction set."""
    wanted = SETS.index(request.param)
    if library.di4c_start(None, wanted) != wanted:
        pytest.skip(f"this CPU has no {request.param}")

    def run(which: int, x: np.ndarray) -> np.ndarray:
        y = np.full_like(x, np.nan)
        library.di4c_map(which, x.ctypes.data, y.ctypes.data, x.size)
        return y

    return run


def floats(first: float, last: float, corners: list[float]) -> np.ndarray:
    """A million numbers of either sign with every exponent, and all those around the corners."""
    bits = np.array([first, last], np.float32).view(np.int32).astype(np.int64)
    spread = np.linspace(*bits, 1_000_001).astype(np.int32).view(np.float32)
    around = np.array(corners, np.float32).view(np.int32)[:, None] + np.arange(-500, 501)
    numbers = np.concatenate([spread, around.astype(np.int32).ravel().view(np.float32)])
    return numbers[np.isfinite(numbers)]


def ulps(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distance in units of the last place that fp32 has at the truth; infinity counts as 2^128."""
    found = found.astype(np.float64)
    found = np.where(np.isinf(found), np.sign(found) * HUGE, found)
    size = np.clip(np.abs(truth), TINY, HUGE / 2)
    return np.abs(found - np.clip(truth, -HUGE, HUGE)) / 2.0 ** (np.floor(np.log2(size)) - 23)


def test_exp_is_within_two_ulp_over_its_whole_range(apply):
    positive = floats(0.0, 3.4028235e38, EXP_CORNERS)
    x = np.concatenate([positive, -positive])
    with np.errstate(over="ignore", under="ignore"):
        truth = np.exp(x.astype(np.float64))
    found = apply(ANY_EXP, x)
    assert np.max(ulps(found, truth)) <= 2
    assert np.all(found[truth >= HUGE] == np.inf)
    assert np.all(found[truth < 2.0**-150] == 0)
    found, normal = apply(EXP, x), (x <= 88) & (truth >= TINY)
    assert np.max(ulps(found[normal], truth[normal])) <= 2
    assert np.all((found[truth < TINY] == 0) | (ulps(found, truth)[truth < TINY] <= 2))


def test_log_is_within_two_ulp_over_its_whole_range(apply):
    x = np.abs(floats(2.0**-149, 3.4028235e38, LOG_CORNERS))
    x = x[x > 0]
    assert np.max(ulps(apply(LOG, x), np.log(x.astype(np.float64)))) <= 2


def test_infinities_zeros_and_nan(apply):
    inf, nan = np.inf, np.nan
    x = np.array([inf, -inf, nan, -nan, 0.0, -0.0, -1.0, -1e-40, -3e38], np.float32)
    exps = np.array([inf, 0, nan, nan, 1, 1], np.float32)
    np.testing.assert_array_equal(apply(ANY_EXP, x[:6]), exps)
    np.testing.assert_array_equal(apply(EXP, x[1:6]), exps[1:])
    expected = np.array([inf, nan, nan, nan, -inf, -inf, nan, nan, nan], np.float32)
    np.testing.assert_array_equal(apply(LOG, x), expected)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 15, 16, 17, 33])
def test_tails_give_what_whole_vectors_give(apply, count):
    x = np.linspace(0.1, 9.0, 64, dtype=np.float32)
    for which in (EXP, LOG):
        padded = np.full(64, -7.0, np.float32)
        padded[:count] = apply(which, x[:count].copy())
        np.testing.assert_array_equal(padded[:count], apply(which, x)[:count])
