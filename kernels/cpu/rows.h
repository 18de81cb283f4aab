// Sweeps over one row of logits or a block of it: the largest, the exponentials, sums of products.
#pragma once

#include "abi.h"
#include "logistic.h"

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

DI4C_INLINE i64 size_of(i64 dtype) { return dtype == BF16 || dtype == FP16 ? 2 : 4; }

DI4C_INLINE i64 offset_of(const Operand& o, i64 i, i64 b, i64 c, i64 d) {  // in bytes
  return (i * o.stride_i + b * o.stride_b + c * o.stride_c + d * o.stride_d) * size_of(o.dtype);
}

template <class T>
struct Memory {  // columns of a row in memory, and below their exponentials
  static constexpr bool IN_MEMORY = true;
  const typename T::type* p;

  DI4C_INLINE vf logits(i64 v) const { return T::load(p + v); }
  DI4C_INLINE vf tail(i64 v, i64 count) const { return load_tail<T>(p + v, (int)count, -INF); }
  DI4C_INLINE void prefetch(i64 v) const { __builtin_prefetch(p + v); }

  struct Exponentials {
    const typename T::type* p;
    vf shift;
    DI4C_INLINE vf whole(i64 v) const { return vexp(T::load(p + v) - shift); }
    DI4C_INLINE vf tail(i64 v, i64 count) const {
      return vexp(load_tail<T>(p + v, (int)count, -INF) - shift);
    }
    DI4C_INLINE void prefetch(i64 v, i64 ahead) const {
      if (ahead) __builtin_prefetch((const char*)(p + v) + ahead);
    }
  };
  DI4C_INLINE Exponentials exponentials(float shift) const { return {p, all(shift)}; }
};

struct Computed {  // the same of bins
  static constexpr bool IN_MEMORY = false;
  const Bins& bins;

  DI4C_INLINE vf logits(i64 v) const { return bins.logits(v); }
  DI4C_INLINE vf tail(i64 v, i64 count) const { return first(count, logits(v), -INF); }
  DI4C_INLINE void prefetch(i64) const {}

  struct Exponentials {
    Bins bins;
    DI4C_INLINE vf whole(i64 v) const {
      return bins.factor > 0.0f ? bins.product(v) : vexp(bins.logits(v) - bins.shift);
    }
    DI4C_INLINE vf tail(i64 v, i64 count) const { return first(count, whole(v), 0.0f); }
    DI4C_INLINE void prefetch(i64, i64) const {}
  };
  DI4C_INLINE Exponentials exponentials(float shift) const {
    Exponentials e = {bins};
    if (shift != bins.shift) e.bins.set_shift(shift);
    return e;
  }
};

struct Row {
  const char* data;  // of logits in memory
  i64 dtype, V, mask;
  Bins bins;  // of dtype LOGISTIC

  // f(columns) with the kind of columns that the row has: once per row or block.
  template <class F>
  DI4C_INLINE void with_columns(F f) const {
    if (dtype == LOGISTIC) return f(Computed{bins});
    with_dtype((int)dtype, [&](auto type) {
      using T = decltype(type);
      f(Memory<T>{elements<T>(data)});
    });
  }
};

Row row_of(const Operand& o, i64 i, i64 b, i64 c, i64 d, i64 V, i64 mask) {
  i64 at = offset_of(o, i, b, c, d);
  Row row = {o.data + at, o.dtype, V, mask, {}};
  if (o.dtype == LOGISTIC)
    row.bins = bins_of(*(const float*)(o.data + at), *(const float*)(o.log_scale + at),
                       (float)o.eps, o.both != 0, V, mask);
  return row;
}

// Logits of columns v .. v + W - 1, -inf beyond the last.
vf logits_of(const Row& row, i64 v) {
  vf x{};
  row.with_columns([&](auto columns) {
    x = row.V - v >= W ? columns.logits(v) : columns.tail(v, row.V - v);
  });
  return x;
}

float logit_of(const Row& row, i64 v) {
  switch (row.dtype) {
    case FP32: return elements<Fp32>(row.data)[v];
    case LOGISTIC: return row.bins.logits(v)[0];
    default: return logits_of(row, v)[0];
  }
}

template <class C>
vf max_of(C columns, i64 v, i64 end, vf best) {
  vf b1 = best, b2 = best, b3 = best;
  for (; v + 4 * W <= end; v += 4 * W) {
    best = vmax(columns.logits(v), best);
    b1 = vmax(columns.logits(v + W), b1);
    b2 = vmax(columns.logits(v + 2 * W), b2);
    b3 = vmax(columns.logits(v + 3 * W), b3);
  }
  for (; v + W <= end; v += W) best = vmax(columns.logits(v), best);
  if (v < end) best = vmax(columns.tail(v, end - v), best);
  return vmax(vmax(best, b1), vmax(b2, b3));
}

// The largest logit of a row without column `mask`, about so of bins; 0 where there is no class.
float row_shift(const Row& row) {
  if (row.dtype == LOGISTIC) return row.bins.shift;
  vf best = all(-INF);
  with_dtype((int)row.dtype, [&](auto type) {
    using T = decltype(type);
    Memory<T> columns = {elements<T>(row.data)};
    i64 hole = row.mask < 0 ? row.V : row.mask;
    best = max_of(columns, 0, hole, best);
    best = max_of(columns, hole + 1, row.V, best);
  });
  float shift = largest(best);
  return shift == -INF ? 0.0f : shift;
}

// Sum of the exponentials of columns v .. end - 1, and with STORE these themselves, to `out`;
// `ahead` bytes further stands what is read next.
template <bool STORE, class E>
double exp_of(E exponentials, i64 v, i64 end, float* out, i64 ahead) {
  double total = 0;
  while (v < end) {
    i64 piece = v + PIECE < end ? v + PIECE : end;
    vf subtotal{};
    while (v < piece) {
      i64 stop = v + RUN < piece ? v + RUN : piece;
      vf s0{}, s1{};
      for (; v + 2 * W <= stop; v += 2 * W, out += 2 * W) {
        exponentials.prefetch(v, ahead);
        vf e0 = exponentials.whole(v), e1 = exponentials.whole(v + W);
        s0 += e0, s1 += e1;
        if (STORE) store(out, e0), store(out + W, e1);
      }
      for (; v < stop; v += W, out += W) {
        vf e = stop - v >= W ? exponentials.whole(v) : exponentials.tail(v, stop - v);
        s0 += e;
        if (STORE) store(out, e);
      }
      v = stop;
      subtotal += s0 + s1;
    }
    total += sum(subtotal);
  }
  return total;
}

// The same for columns begin .. end - 1 of a row without its column `mask`, whose exponential is
// 0; `out` starts at `begin` and is filled up with zeros to whole vectors.
template <bool STORE>
double exp_row(const Row& row, i64 begin, i64 end, float shift, float* out, i64 ahead = 0) {
  double total = 0;
  i64 n = end - begin, hole = row.mask >= begin && row.mask < end ? row.mask : end;
  if (STORE && n % W) store(out + n / W * W, vf{});
  row.with_columns([&](auto columns) {
    auto exponentials = columns.exponentials(shift);
    total = exp_of<STORE>(exponentials, begin, hole, out, ahead);
    if (hole == end) return;
    if (STORE) out[hole - begin] = 0.0f;
    total += exp_of<STORE>(exponentials, hole + 1, end, out + (hole + 1 - begin), ahead);
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

// memcpy past the caches, for what nobody reads soon: a line that is written whole is not read.
void stream(char* to, const char* from, i64 bytes) {
#if defined(__SSE2__)
  i64 head = -(i64)(uintptr_t)to & 63, v = head < bytes ? head : bytes;
  memcpy(to, from, v);
#if defined(__AVX512F__)
  for (; v + 64 <= bytes; v += 64)
    _mm512_stream_si512((__m512i*)(to + v), _mm512_loadu_si512(from + v));
#else
  for (; v + 16 <= bytes; v += 16)
    _mm_stream_si128((__m128i*)(to + v), _mm_loadu_si128((const __m128i*)(from + v)));
#endif
  memcpy(to + v, from + v, bytes - v);
#else
  memcpy(to, from, bytes);
#endif
}

// Store columns begin .. begin + n - 1 of a row in its dtype; `from` may be changed.
void write_row(float* from, char* row, i64 dtype, i64 begin, i64 n, bool streams) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    auto to = (typename T::type*)row + begin, narrow = (typename T::type*)from;
    i64 v = 0;
    if (!streams) {
      for (; v + W <= n; v += W) T::store(to + v, load(from + v));
      if (v < n) store_tail<T>(to + v, load(from + v), (int)(n - v));
      return;
    }
    for (; dtype != FP32 && v < n; v += W) T::store(narrow + v, load(from + v));
    stream((char*)to, (const char*)narrow, n * sizeof(*to));
  });
}

}  // namespace
