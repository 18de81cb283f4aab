// Vectors of W floats for the instruction set that the file is compiled for, with exp and log.
//
// Everything here has internal linkage: the same names exist once per instruction set, and the
// linker must never replace one by another. So no std:: templates either.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

typedef int64_t i64;
#define DI4C_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;  // SSE2 or NEON, by the compiler
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef vf vf_any __attribute__((aligned(4), may_alias));  // anywhere in memory
typedef vh vh_any __attribute__((aligned(2), may_alias));

constexpr float INF = __builtin_inff();
constexpr float TINY = 1e-30f;  // below, sums of exponentials are formed again from logarithms

DI4C_INLINE vf all(float x) { return x - vf{}; }
DI4C_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
DI4C_INLINE vf as_float(vi x) { return (vf)x; }
DI4C_INLINE vi as_int(vf x) { return (vi)x; }
DI4C_INLINE vf power_of_two(vi n) { return (vf)((vu)(n + 127) << 23); }  // for -127 < n < 128
DI4C_INLINE vf load(const float* p) { return *(const vf_any*)p; }
DI4C_INLINE void store(float* p, vf x) { *(vf_any*)p = x; }

DI4C_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

DI4C_INLINE vf magnitude(vf x) { return as_float(as_int(x) & 0x7fffffff); }

// The larger one; b where a is NaN.
DI4C_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller one; b where a is NaN.
DI4C_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

// x in the first count lanes, `fill` in the others.
DI4C_INLINE vf first(i64 count, vf x, float fill) {
  for (int i = 0; i < W; ++i) x[i] = i < count ? x[i] : fill;
  return x;
}

typedef float v4 __attribute__((vector_size(16)));

// f(f(f(x_0, x_8), ...)) over all lanes: pairs half a vector apart, then a quarter, and so on.
template <class F>
DI4C_INLINE float fold(vf x, F f) {
#if defined(__AVX512F__)
  __m256 half = f(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  v4 y = (v4)f(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  v4 y = (v4)f(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  v4 y = x;
#endif
  return f(f(y[0], y[2]), f(y[1], y[3]));
}

DI4C_INLINE float largest(vf x) {
  return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

DI4C_INLINE float quick_sum(vf x) {
  return fold(x, [](auto a, auto b) { return a + b; });
}

DI4C_INLINE double sum(vf x) {
#if defined(__AVX512F__)
  __m512d y = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)) +
              _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
  __m256d z = _mm512_castpd512_pd256(y) + _mm512_extractf64x4_pd(y, 1);
  return (z[0] + z[2]) + (z[1] + z[3]);
#elif defined(__AVX2__)
  __m256d z = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)) +
              _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
  return (z[0] + z[2]) + (z[1] + z[3]);
#else
  return ((double)x[0] + x[2]) + ((double)x[1] + x[3]);
#endif
}

// e^x = 2^n y for any x, at most 2 ulp off: x = n ln 2 + r with |r| <= ln(2)/2, and
// y = e^r = 1 + r + r^2 P(r). The low bits of `shifted` are n: 1.5 * 2^23 rounds to integers.
DI4C_INLINE vf reduced_exp(vf x, vf& shifted) {
  shifted = x * 1.44269504f + 12582912.0f;
  vf n = shifted - 12582912.0f;
  vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = ((1.3814321e-3f * r + 8.3688507e-3f) * r + 4.1668400e-2f) * r + 1.6666520e-1f;
  p = p * r + 0.49999994f;
  return (p * r + 1.0f) * r + 1.0f;
}

// e^x for x <= 88, at most 2 ulp off; what is denormal may be 0, NaN for NaN.
DI4C_INLINE vf vexp(vf x) {
  vf shifted, y;
#if defined(__AVX512F__)
  y = reduced_exp(vmax(all(-104.0f), x), shifted);
  return (vf)_mm512_scalef_ps((__m512)y, (__m512)(shifted - 12582912.0f));
#else
  y = reduced_exp(vmax(all(-88.0f), x), shifted);  // n >= -127, whose power of two is 0 here
  return y * (vf)(((vu)shifted << 23) + 0x3f800000);
#endif
}

// e^x for any x, at most 2 ulp off, denormal results included; inf beyond 88.73, NaN for NaN.
DI4C_INLINE vf vexp_any(vf x) {
  vf shifted, y = reduced_exp(vmax(all(-104.0f), vmin(all(89.0f), x)), shifted);
  vi whole = (vi)((vu)shifted - 0x4b400000);
  vi half = whole >> 1;  // two steps, so that denormal results are rounded once
  y = y * power_of_two(half);
  return y * power_of_two(whole - half);
}

// log x, at most 2 ulp off, denormals included; -inf for 0, NaN below it.
// x = 2^e m with sqrt(1/2) <= m < sqrt(2), f = m - 1, log m = f - f^2/2 + f^3 P(f).
DI4C_INLINE vf vlog(vf x) {
  vi small = x < 1.17549435e-38f;
  vf scaled = select(small, x * 33554432.0f, x);
  vi e = (vi)((vu)scaled - 0x3f3504f3) >> 23;
  vf f = (vf)((vu)scaled - ((vu)e << 23)) - 1.0f;
  vf n = __builtin_convertvector(e - (small & 25), vf);
  vf p = ((-7.6343916e-2f * f + 1.2765431e-1f) * f - 1.3162005e-1f) * f + 1.4201368e-1f;
  p = ((p * f - 1.6623144e-1f) * f + 2.0001236e-1f) * f - 2.5000826e-1f;
  p = p * f + 3.3333331e-1f;
  vf square = f * f;
  vf y = (n * -2.12194440e-4f + (p * (square * f) - 0.5f * square)) + f + n * 0.693359375f;
  y = select(x == INF, x, y);
  y = select(x == 0.0f, all(-INF), y);
  return select(~(x >= 0.0f), all(__builtin_nanf("")), y);
}

// The three dtypes of logits in memory; stores round to nearest even. LOGISTIC stands for rows of
// bins that are computed from two fp32 numbers.
enum Dtype { FP32 = 0, BF16 = 1, FP16 = 2, LOGISTIC = 3 };

struct Fp32 {
  typedef float type;
  static DI4C_INLINE vf load(const type* p) { return *(const vf_any*)p; }
  static DI4C_INLINE void store(type* p, vf x) { *(vf_any*)p = x; }
};

struct Bf16 {
  typedef uint16_t type;
  static DI4C_INLINE vf load(const type* p) {
    return (vf)(__builtin_convertvector(*(const vh_any*)p, vu) << 16);
  }
  static DI4C_INLINE void store(type* p, vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    rounded = (vu)((x == x) ? (vi)rounded : (vi)(vu{} + 0x7fc0));
    *(vh_any*)p = __builtin_convertvector(rounded, vh);
  }
};

struct Fp16 {
  typedef uint16_t type;
#if defined(__AVX512F__)
  static DI4C_INLINE vf load(const type* p) {
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  }
  static DI4C_INLINE void store(type* p, vf x) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, 0));
  }
#elif defined(__AVX2__)
  static DI4C_INLINE vf load(const type* p) {
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }
  static DI4C_INLINE void store(type* p, vf x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0));
  }
#else
  static DI4C_INLINE vf load(const type* p) {
    vu half = __builtin_convertvector(*(const vh_any*)p, vu);
    vu wide = (half & 0x7fff) << 13;
    vf value = (vf)wide * 5.192296858534828e33f;  // 2^112: right for denormals, too
    vu special = (vu)((half & 0x7c00) == 0x7c00) & 0x7f800000;
    return (vf)((vu)value | special | ((half & 0x8000) << 16));
  }
  static DI4C_INLINE void store(type* p, vf x) {
    vu sign = ((vu)x >> 16) & 0x8000;
    vu size = (vu)x & 0x7fffffff;
    vu normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
    vu denormal = (vu)((vf)size + 0.5f) - 0x3f000000;  // rounds at 2^-24
    vu half = size < 0x38800000 ? denormal : normal;
    half = size >= 0x47800000 ? vu{} + 0x7c00 : half;
    half = size > 0x7f800000 ? vu{} + 0x7e00 : half;
    *(vh_any*)p = __builtin_convertvector(half | sign, vh);
  }
#endif
};

template <class T>
DI4C_INLINE vf load_tail(const typename T::type* p, int count, float fill) {
#if defined(__AVX512F__)
  __mmask16 mask = (__mmask16)((1u << count) - 1);
  if constexpr (sizeof(typename T::type) == 4)
    return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask, p);
#endif
  typename T::type part[W] = {};
  for (int i = 0; i < count; ++i) part[i] = p[i];
  vf x = T::load(part);
  for (int i = count; i < W; ++i) x[i] = fill;
  return x;
}

template <class T>
DI4C_INLINE void store_tail(typename T::type* p, vf x, int count) {
  typename T::type part[W];
  T::store(part, x);
  for (int i = 0; i < count; ++i) p[i] = part[i];
}

// f(T{}) with the type of a dtype: once per row or block, so that nothing else depends on it.
template <class F>
DI4C_INLINE void with_dtype(int dtype, F f) {
  if (dtype == FP32) f(Fp32{});
  else if (dtype == BF16) f(Bf16{});
  else f(Fp16{});
}

template <class T>
DI4C_INLINE const typename T::type* elements(const void* p) {
  return (const typename T::type*)p;
}

}  // namespace
