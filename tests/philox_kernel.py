"""A kernel that writes Philox words in the layout of `rng`, to compare the two generators."""

import triton
import triton.language as tl


@triton.jit
def words(
    out_ptr,  # [R, COUNT, 4] int64, out
    keys_ptr,  # [R] int64, in
    seed,
    step,
    STREAM: tl.constexpr,
    COUNT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(keys_ptr + row)
    index = tl.arange(0, COUNT)
    zero = index.to(tl.uint32) * 0
    c0 = index.to(tl.uint32) + (STREAM << 30)
    c1 = zero + (key & 0xFFFFFFFF).to(tl.uint32)
    c2 = zero + ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = zero + step.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    base = out_ptr + (row * COUNT + index) * 4
    tl.store(base + 0, w0.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(base + 1, w1.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(base + 2, w2.to(tl.uint32, bitcast=True).to(tl.int64))
    tl.store(base + 3, w3.to(tl.uint32, bitcast=True).to(tl.int64))
