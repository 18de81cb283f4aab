// Sweeps over one row of logits or a block of it: the largest, the exponentials, sums of products.
#pragma once

#include "abi.h"
#include "vec.h"

namespace {

constexpr i64 RUN = 512;     // columns summed one by one, so that small ones are not rounded away,
constexpr i64 PIECE = 8192;  // and columns whose sums are added in fp32, before fp64

struct Arena {  // hands out parts of the scratch memory of a thread, 64-byte aligned
  char* next;
  float* floats(i64 count) {
    float* part = (float*)next;
    next += (count * 4 + 4 * W + 63) / 64 * 64;  // vectors may overrun the end
    return part;
  }
};

// Columns of a buffer of rows: whole cache lines, and rows that do not all share a cache set.
i64 padded_columns(i64 columns) {
  i64 lines = (columns + 15) / 16;
  return (lines % 2 ? lines : lines + 1) * 16;
}

DI4C_INLINE i64 size_of(i64 dtype) { return dtype == FP32 ? 4 : 2; }

DI4C_INLINE char* row_of(const Operand& o, i64 i, i64 b, i64 c, i64 d) {
  return o.data +
         (i * o.stride_i + b * o.stride_b + c * o.stride_c + d * o.stride_d) * size_of(o.dtype);
}

float element(const char* row, i64 dtype, i64 v) {
  float x = 0;
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    x = load_tail<T>(elements<T>(row) + v, 1, 0.0f)[0];
  });
  return x;
}

template <class T>
vf max_of(const typename T::type* p, i64 n, vf best) {
  vf b1 = best, b2 = best, b3 = best;
  i64 v = 0;
  for (; v + 4 * W <= n; v += 4 * W) {
    best = vmax(T::load(p + v), best);
    b1 = vmax(T::load(p + v + W), b1);
    b2 = vmax(T::load(p + v + 2 * W), b2);
    b3 = vmax(T::load(p + v + 3 * W), b3);
  }
  for (; v + W <= n; v += W) best = vmax(T::load(p + v), best);
  if (v < n) best = vmax(load_tail<T>(p + v, (int)(n - v), -INF), best);
  return vmax(vmax(best, b1), vmax(b2, b3));
}

// The largest logit of a row without column `mask`; 0 where there is no class.
float row_shift(const char* row, i64 dtype, i64 V, i64 mask) {
  vf best = all(-INF);
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    auto p = elements<T>(row);
    if (mask < 0) best = max_of<T>(p, V, best);
    else best = max_of<T>(p + mask + 1, V - mask - 1, max_of<T>(p, mask, best));
  });
  float shift = largest(best);
  return shift == -INF ? 0.0f : shift;
}

// Sum of exp(x - shift), and with STORE the exponentials, to `out`; `ahead` bytes further stands
// what is read next.
template <class T, bool STORE>
double exp_of(const typename T::type* p, i64 n, float shift, float* out, i64 ahead) {
  double total = 0;
  vf shifts = all(shift);
  i64 v = 0;
  while (v < n) {
    i64 piece = v + PIECE < n ? v + PIECE : n;
    vf subtotal{};
    while (v < piece) {
      i64 stop = v + RUN < piece ? v + RUN : piece;
      vf s0{}, s1{};
      for (; v + 2 * W <= stop; v += 2 * W) {
        if (ahead) __builtin_prefetch((const char*)(p + v) + ahead);
        vf e0 = vexp(T::load(p + v) - shifts), e1 = vexp(T::load(p + v + W) - shifts);
        s0 += e0, s1 += e1;
        if (STORE) store(out + v, e0), store(out + v + W, e1);
      }
      for (; v < stop; v += W) {
        vf x = stop - v >= W ? T::load(p + v) : load_tail<T>(p + v, (int)(stop - v), -INF);
        vf e = vexp(x - shifts);
        s0 += e;
        if (STORE) store(out + v, e);
      }
      v = stop;
      subtotal += s0 + s1;
    }
    total += sum(subtotal);
  }
  return total;
}

// The same for columns begin .. end - 1 of a row without column `mask`, whose exponential is 0;
// `out` starts at `begin` and is filled up with zeros to whole vectors.
template <bool STORE>
double exp_row(const char* row, i64 dtype, i64 begin, i64 end, i64 mask, float shift, float* out,
               i64 ahead = 0) {
  double total = 0;
  i64 n = end - begin, hole = mask >= begin && mask < end ? mask - begin : n;
  if (STORE && n % W) store(out + n / W * W, vf{});
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    auto p = elements<T>(row) + begin;
    total = exp_of<T, STORE>(p, hole, shift, out, ahead);
    if (hole == n) return;
    if (STORE) out[hole] = 0.0f;
    total += exp_of<T, STORE>(p + hole + 1, n - hole - 1, shift, out + hole + 1, ahead);
  });
  return total;
}

// out = sum_n w_n e_n over K vectors.
template <int K>
DI4C_INLINE void weighted_sum(const float* e, i64 stride, i64 N, const float* w, float* out) {
  vf sums[K] = {};
  for (i64 n = 0; n < N; ++n) {
    vf factor = all(w[n]);
    for (int k = 0; k < K; ++k) sums[k] += factor * load(e + n * stride + k * W);
  }
  for (int k = 0; k < K; ++k) store(out + k * W, sums[k]);
}

double dot(const float* x, const float* y, i64 n) {  // both padded with zeros
  vf s0{}, s1{}, s2{}, s3{};
  i64 v = 0;
  for (; v + 4 * W <= n; v += 4 * W) {
    s0 += load(x + v) * load(y + v);
    s1 += load(x + v + W) * load(y + v + W);
    s2 += load(x + v + 2 * W) * load(y + v + 2 * W);
    s3 += load(x + v + 3 * W) * load(y + v + 3 * W);
  }
  for (; v < n; v += W) s0 += load(x + v) * load(y + v);
  return sum((s0 + s1) + (s2 + s3));
}

void copy_padded(const float* from, i64 n, float* to) {
  if (n % W) store(to + n / W * W, vf{});
  memcpy(to, from, n * sizeof(float));
}

// Store columns begin .. begin + n - 1 of a row in its dtype.
void write_row(const float* from, char* row, i64 dtype, i64 begin, i64 n) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    auto to = (typename T::type*)row + begin;
    i64 v = 0;
    for (; v + W <= n; v += W) T::store(to + v, load(from + v));
    if (v < n) store_tail<T>(to + v, load(from + v), (int)(n - v));
  });
}

}  // namespace
