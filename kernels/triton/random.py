"""Random numbers in the layout of `rng`: Philox 4x32-10, keyed by (seed, step, row key, index)."""

from __future__ import annotations

import triton
import triton.language as tl

# Logarithms are to base 2 in most kernels: exp and log cost a product and, for denormal numbers, a
# comparison and two products more than exp2 and log2.
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Streams, as in `rng`.
BLOCKS = tl.constexpr(0)  # one number per block of the vocabulary
TOKENS = tl.constexpr(1)  # one per token


@triton.jit
def random_words(seed, step, key, call, STREAM: tl.constexpr):
    """The four Philox words of indices 4·call .. 4·call + 3, in the layout of `rng`: uint32.

    seed and step are scalars, int64; key (int64) and call broadcast against each other.
    """
    zero = (key * 0 + call * 0).to(tl.uint32)
    low = (key & 0xFFFFFFFF).to(tl.uint32) + zero
    high = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32) + zero
    counter = (call + (STREAM << 30)).to(tl.uint32) + zero
    last = (step & 0xFFFFFFFF).to(tl.uint32) + zero
    return tl.philox(seed, counter, low, high, last)


@triton.jit
def word_to_uniform(word):
    """(i + 1/2) 2^-32 of a word i, below 1."""
    number = (word.to(tl.uint32).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.minimum(number, 0.99999994)


@triton.jit
def uniform(seed, step, key, index, STREAM: tl.constexpr):
    """Uniform numbers in (0, 1), a function of (seed, step, row key, stream, index)."""
    w0, w1, w2, w3 = random_words(seed, step, key, index // 4, STREAM)
    which = index % 4
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return word_to_uniform(word)


@triton.jit
def uniform_run(seed, step, key, first, STREAM: tl.constexpr, COUNT: tl.constexpr):
    """`uniform` of indices first .. first + COUNT - 1, a quarter of the work: [R, COUNT].

    key and first are [R]; first is a multiple of 4, COUNT a power of two.
    """
    if COUNT < 4:
        number = uniform(seed, step, key[:, None], first[:, None] + tl.arange(0, COUNT), STREAM)
    else:
        call = (first // 4)[:, None] + tl.arange(0, COUNT // 4)[None, :]
        w0, w1, w2, w3 = random_words(seed, step, key[:, None], call, STREAM)
        number = word_to_uniform(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)))
    return number


@triton.jit
def log_positive(x):
    """log x of a positive normal number, at most 2 ulp off, in half the instructions of `tl.log`.

    NaN stays NaN.
    """
    e, log_m = split_log(x)
    return e * LN_2 + log_m


@triton.jit
def log2_positive(x):
    """log2 x likewise."""
    e, log_m = split_log(x)
    return e + log_m * LOG2_E


@triton.jit
def split_log(x):
    """e and log m of x = 2^e m with sqrt(1/2) <= m < sqrt(2): f = m - 1,
    log m = f - f^2/2 + f^3 P(f), as in the C++ of `cpu/vec.h`."""
    bits = x.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = ((-7.6343916e-2 * f + 1.2765431e-1) * f - 1.3162005e-1) * f + 1.4201368e-1
    p = ((p * f - 1.6623144e-1) * f + 2.0001236e-1) * f - 2.5000826e-1
    p = (p * f + 3.3333331e-1) * f - 0.5
    return e.to(tl.float32), p * (f * f) + (f + 0.0 * x)


@triton.jit
def log_exponential(number):
    """log(-log(1 - u)); small u keep their precision."""
    rest = 1.0 - number
    # log1p(-u) from log: the rounding of 1 - u is divided out. The quotient is nearly 1.
    gap = 1.0 - rest
    root = tl.rsqrt(tl.maximum(gap, 1.0e-30))
    log1p = log_positive(rest) * (1.0 + (number - gap) * root * root)
    return log_positive(tl.where(gap > 0.0, -log1p, number))
