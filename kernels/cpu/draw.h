// One draw from each row of a slot, by the law of di4c_fast/draw/law.py; random numbers are those
// of di4c_fast/rng.py. A row is read once from memory: every strip of columns leaves its largest
// logit, every block the sums relative to that. The chosen block is read once more for the race.
#pragma once

#include "rows.h"

namespace {

constexpr i64 BLOCK = 128;  // SAMPLE_BLOCK of the law
constexpr int FULL = BLOCK / W;
constexpr i64 STRIP = 8 * BLOCK;
enum Wanted { ARGMAX = 1, ENTROPY = 2, MARGIN = 4, RAW_PROB = 8 };
enum Stream : uint64_t { BLOCKS = 0, TOKENS = 1 };

// Random numbers ----------------------------------------------------------------------------------

typedef uint64_t vq __attribute__((vector_size(4 * W)));
constexpr int CALLS = W / 2;  // Philox calls at a time, four numbers each

DI4C_INLINE vq widening_product(vq x, uint32_t factor) {  // of the low halves
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#else
  return (x & 0xffffffffu) * (uint64_t)factor;
#endif
}

// x_0 y_0 x_1 y_1 ... in two vectors.
DI4C_INLINE void interleave(vq x, vq y, vq* low, vq* high) {
#if defined(__AVX512F__)
  __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  __m512i second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  *low = (vq)_mm512_permutex2var_epi64((__m512i)x, first, (__m512i)y);
  *high = (vq)_mm512_permutex2var_epi64((__m512i)x, second, (__m512i)y);
#elif defined(__AVX2__)
  __m256i even = _mm256_unpacklo_epi64((__m256i)x, (__m256i)y);
  __m256i odd = _mm256_unpackhi_epi64((__m256i)x, (__m256i)y);
  *low = (vq)_mm256_permute2x128_si256(even, odd, 0x20);
  *high = (vq)_mm256_permute2x128_si256(even, odd, 0x31);
#else
  *low = vq{x[0], y[0]}, *high = vq{x[1], y[1]};
#endif
}

DI4C_INLINE vf uniform(vq words) {
  vf u = (__builtin_convertvector((vu)words, vf) + 0.5f) * 0x1p-32f;
  return vmin(u, all(1.0f - 0x1p-24f));
}

struct Law {
  i64 seed, step;
};

// Uniform numbers 4 first .. 4 (first + calls) - 1 of a stream; up to 2 W - 4 more are written.
void uniforms(Law law, i64 key, Stream stream, i64 first, i64 calls, float* out) {
  uint64_t low = 0xffffffffu, seed = (uint64_t)law.seed, row = (uint64_t)key;
  for (i64 i = 0; i < calls; i += CALLS, out += 4 * CALLS) {
    vq c0{}, c1 = vq{} + (row & low), c2 = vq{} + (row >> 32), c3 = vq{} + (law.step & low);
    for (int lane = 0; lane < CALLS; ++lane) c0[lane] = (uint64_t)lane;
    c0 += (uint64_t)(first + i) + (stream << 30);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      vq p0 = widening_product(c0, 0xD2511F53u), p1 = widening_product(c2, 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ k0, c2 = (p0 >> 32) ^ c3 ^ k1;  // what stands above is ignored
      c1 = p1, c3 = p0;
    }
    vq some, others;
    interleave((c0 & low) | (c1 << 32), (c2 & low) | (c3 << 32), &some, &others);
    store(out, uniform(some)), store(out + W, uniform(others));
  }
}

// weight / -log(1 - u): the rounding of 1 - u is made good by what it took away.
DI4C_INLINE vf arrival(vf weight, vf u) {
  vf rest = 1.0f - u, taken = 1.0f - rest;
  vi none = taken == 0.0f;
  return select(none, weight, weight * taken) / select(none, u, -vlog(rest) * u);
}

// Blocks ------------------------------------------------------------------------------------------

// Whether all columns begin .. begin + 127 are there.
DI4C_INLINE bool is_whole(const Row& row, i64 begin) {
  return begin + BLOCK <= row.V && (row.mask < begin || row.mask >= begin + BLOCK);
}

// Columns begin .. begin + 127 of a row as fp32, -inf where there is none, in whole vectors.
DI4C_INLINE int read_block(const Row& row, i64 begin, float* out) {
  i64 n = row.V - begin < BLOCK ? row.V - begin : BLOCK;
  row.with_columns([&](auto columns) {
    for (i64 v = 0; v < n; v += W)
      store(out + v, n - v >= W ? columns.logits(begin + v) : columns.tail(begin + v, n - v));
  });
  if (row.mask >= begin && row.mask < begin + n) out[row.mask - begin] = -INF;
  return (int)((n + W - 1) / W);
}

// Rows are read in strips of 8 blocks. Of every strip: about the largest logit x_s, exactly so of
// logits in memory, and exp((x_s - x_max) / T). Of every block: the sum of e = exp((x - x_s) / T),
// that of exp(x - x_s), and that of e (x - x_s) / T.
struct Blocks {
  i64 count, strips;
  float *peak, *factor, *total, *raw, *weighted;

  Blocks(i64 V, Arena& arena) : count((V + BLOCK - 1) / BLOCK), strips((V + STRIP - 1) / STRIP) {
    peak = arena.floats(strips), factor = arena.floats(strips), total = arena.floats(count);
    raw = arena.floats(count), weighted = arena.floats(count);
  }
};

constexpr i64 AHEAD = 6 * STRIP;  // columns between what is read and what is prefetched

// The sums of block g, whose columns stand from v on; with NEXT, `best` takes in the logits one
// strip further.
template <bool TEMPERED, bool MORE, bool STORE, bool NEXT, class C>
DI4C_INLINE void sum_block(C columns, i64 v, int vectors, float shift, float heat, Blocks& blocks,
                           i64 g, float* out, vf& best) {
  auto exponentials = columns.exponentials(shift);
  vf total{}, other{}, raw{}, weighted{};
  int i = 0;
  auto add = [&](vf& total) __attribute__((always_inline)) {
    asm volatile("");  // keeps GCC from two loops, for sums and stores, each with all exponentials
    vf gap{}, e;
    if (NEXT) {
      if (i * W % 16 == 0) columns.prefetch(v + i * W + AHEAD);
      best = vmax(columns.logits(v + i * W + STRIP), best);
    }
    if (TEMPERED || MORE) gap = columns.logits(v + i * W) - shift;
    if (MORE && TEMPERED) raw += vexp(gap);
    if (TEMPERED) gap = gap * heat;
    e = TEMPERED || MORE ? vexp(gap) : exponentials.whole(v + i * W);
    total += e;
    if (STORE) store(out + i * W, e);
    if (MORE) weighted += vmax(gap, all(-1e5f)) * e;
    ++i;
  };
  while (i + 2 <= vectors) add(total), add(other);
  if (i < vectors) add(total);
  blocks.total[g] = quick_sum(total + other);
  if (MORE) blocks.weighted[g] = quick_sum(weighted);
  if (MORE && TEMPERED) blocks.raw[g] = quick_sum(raw);
}

// The largest logit of strip s.
template <class C>
DI4C_INLINE float peak_of(const Row& row, C columns, i64 s) {
  if (!C::IN_MEMORY) return row.bins.shift;
  i64 begin = s * STRIP, end = begin + STRIP < row.V ? begin + STRIP : row.V;
  i64 hole = row.mask >= begin && row.mask < end ? row.mask : end;
  vf best = max_of(columns, begin, hole, all(-INF));
  return largest(max_of(columns, hole + 1, end, best));
}

// Fill `blocks`, and with STORE the exponentials of all columns, relative to those of their strip.
// While a strip is summed, the next one comes from memory for its largest logit.
template <bool TEMPERED, bool MORE, bool STORE>
void sum_blocks(const Row& row, float heat, Blocks& blocks, float* out) {
  row.with_columns([&](auto columns) {
    float peak = peak_of(row, columns, 0);
    for (i64 s = 0; s < blocks.strips; ++s) {
      i64 begin = s * STRIP, next = begin + STRIP, end = next + STRIP;
      bool ahead = columns.IN_MEMORY && end <= row.V && (row.mask < begin || row.mask >= end);
      blocks.peak[s] = peak;
      float shift = peak == -INF ? 0.0f : peak;
      vf best = all(-INF);
      for (i64 v = begin; v < next && v < row.V; v += BLOCK) {
        float part[BLOCK], *to = STORE ? out + v : nullptr;
        i64 g = v / BLOCK;
        if (ahead) {
          sum_block<TEMPERED, MORE, STORE, true>(columns, v, FULL, shift, heat, blocks, g, to, best);
        } else if (is_whole(row, v)) {
          sum_block<TEMPERED, MORE, STORE, false>(columns, v, FULL, shift, heat, blocks, g, to, best);
        } else {
          int vectors = read_block(row, v, part);
          Memory<Fp32> copy = {part};
          sum_block<TEMPERED, MORE, STORE, false>(copy, 0, vectors, shift, heat, blocks, g, to, best);
        }
      }
      if (next < row.V) peak = ahead ? largest(best) : peak_of(row, columns, s + 1);
    }
  });
}

struct Sample {
  i64 token;    // -1 where there is none
  float shift;  // the largest logit, 0 for a row without a class
  double total, raw, weighted;  // the sums of the row, relative to `shift`
};

// The token of a row whose blocks are summed, with its exponentials where they are stored; greedy:
// its statistics alone.
Sample choose(const Row& row, Law law, i64 key, float heat, bool greedy, Blocks& blocks,
              const float* stored) {
  i64 G = blocks.count, chosen = 0;
  float peak = -INF;
  for (i64 i = 0; i < blocks.strips; ++i) peak = blocks.peak[i] > peak ? blocks.peak[i] : peak;
  Sample s = {-1, peak == -INF ? 0.0f : peak, 0, 0, 0};
  for (i64 i = 0; i < blocks.strips; i += W)
    store(blocks.factor + i, vexp((load(blocks.peak + i) - s.shift) * heat));
  float reached = 0, random[BLOCK];
  for (i64 g = 0; g < G; ++g) {
    float mass = blocks.total[g] * blocks.factor[g / (STRIP / BLOCK)];
    reached += mass, s.total += mass;
    if (greedy || G == 1) continue;
    i64 left = G - g < BLOCK ? G - g : BLOCK;
    if (g % BLOCK == 0) uniforms(law, key, BLOCKS, g / 4, (left + 3) / 4, random);
    if (random[g % BLOCK] * reached < mass) chosen = g;
  }
  if (greedy || !(s.total > 0)) return s;

  float part[BLOCK];
  i64 first_column = chosen * BLOCK;
  int vectors = FULL;
  if (!stored) {
    vectors = read_block(row, first_column, part);
    for (int i = 0; i < vectors; ++i)
      store(part + i * W, vexp((load(part + i * W) - s.shift) * heat));
  } else if (row.V - first_column < BLOCK) {
    vectors = (int)((row.V - first_column + W - 1) / W);
  }
  const float* weights = stored ? stored + first_column : part;
  uniforms(law, key, TOKENS, first_column / 4, vectors * W / 4, random);
  vf lead = all(-1.0f);
  vi at{};
  for (int i = 0; i < vectors; ++i) {
    vf x = arrival(load(weights + i * W), load(random + i * W));
    vi better = x > lead;
    lead = select(better, x, lead), at = better ? vi{} + i : at;
  }
  float most = largest(lead);  // the first of equals
  vf place = __builtin_convertvector(at * W, vf);
  for (int lane = 0; lane < W; ++lane) place[lane] += (float)lane;
  s.token = first_column - (i64)largest(select(lead == most, -place, all(-INF)));
  return s;
}

// The first column of the largest logit `peak`, and the largest of all the others.
i64 find_largest(const Row& row, float peak, Blocks& blocks, float* second) {
  i64 s = 0, found = -1;
  while (s + 1 < blocks.strips && blocks.peak[s] != peak) ++s;
  vf others = all(-INF);
  i64 end = (s + 1) * STRIP < row.V ? (s + 1) * STRIP : row.V;
  for (i64 v = s * STRIP; v < end; v += BLOCK) {
    float part[BLOCK];
    int vectors = read_block(row, v, part);
    for (int i = 0; i < vectors; ++i) {
      vf x = load(part + i * W);
      if (found < 0 && any(x == peak))
        for (int lane = W; lane-- > 0;)
          if (x[lane] == peak) found = v + i * W + lane;
      if (found >= v + i * W) x[(found - v) % W] = -INF;
      others = vmax(x, others);
    }
  }
  *second = largest(others);
  for (i64 i = 0; i < blocks.strips; ++i)
    if (i != s && blocks.peak[i] > *second) *second = blocks.peak[i];
  return found < 0 ? 0 : found;
}

// The pass ----------------------------------------------------------------------------------------

void draw_row(const DrawPass& a, i64 r, const Row& row, Blocks& blocks) {
  float T = a.temperature[r];
  bool greedy = T == 0.0f;
  if (greedy) T = 1.0f;
  float heat = 1.0f / T;
  bool tempered = T != 1.0f, more = (a.wanted & (ENTROPY | RAW_PROB)) != 0;
  auto sum = tempered ? (more ? sum_blocks<true, true, false> : sum_blocks<true, false, false>)
                      : (more ? sum_blocks<false, true, false> : sum_blocks<false, false, false>);
  sum(row, heat, blocks, nullptr);
  Sample s = choose(row, {a.seed, a.step}, a.keys[r], heat, greedy, blocks, nullptr);
  double raw = 0, weighted = 0;
  for (i64 g = 0; more && g < blocks.count; ++g) {
    i64 strip = g / (STRIP / BLOCK);
    float gap = blocks.peak[strip] - s.shift, scaled = gap * heat, factor = blocks.factor[strip];
    if (!(scaled > -1e5f)) scaled = -1e5f;
    weighted += factor * blocks.weighted[g] + factor * blocks.total[g] * scaled;
    if (tempered) raw += blocks.raw[g] * vexp(all(gap))[0];
  }
  if (!tempered) raw = s.total;
  float second = -INF;
  i64 largest = 0;
  if (greedy || (a.wanted & (ARGMAX | MARGIN)))
    largest = find_largest(row, s.shift, blocks, &second);
  if (greedy && s.total > 0) s.token = largest;
  float gap = logit_of(row, s.token < 0 ? 0 : s.token) - s.shift;
  a.token[r] = s.token;
  a.shift[r] = s.shift / T;
  a.total[r] = (float)s.total;
  a.log_weight[r] = gap / T;
  if (a.wanted & ARGMAX) a.argmax[r] = largest;
  if (a.wanted & ENTROPY) a.entropy[r] = (float)(log(s.total) - weighted / s.total);
  if (a.wanted & MARGIN)
    a.margin[r] = (float)((1.0 - exp((double)(second - s.shift) / T)) / s.total);
  if (a.wanted & RAW_PROB) a.raw_prob[r] = (float)(exp((double)gap) / raw);
}

// Whether rows are formed before they are drawn from; bins, too, so that their largest is exact.
bool copies_rows(const DrawPass& a) { return a.y.data || a.x.dtype == LOGISTIC; }

void draw_slot(const void* pass, i64 i, char* scratch) {
  const DrawPass& a = *(const DrawPass*)pass;
  i64 C = a.x.components, V = a.vocabulary, s = a.visit.first + i;
  i64 index = a.visit.rows ? a.visit.rows[s] : s;
  i64 b = index / a.visit.positions, d = index % a.visit.positions;
  Arena arena{scratch};
  Blocks blocks(V, arena);
  float* copy = copies_rows(a) ? arena.floats(V) : nullptr;
  for (i64 c = 0; c < C; ++c) {
    Row row = row_of(a.x, i, b, c, d, V, a.mask_id);
    if (a.y.data) {  // logits u + (scale + 1) (x - u); excluded stays excluded
      float scale = a.guidance[i * C + c] + 1.0f;
      Row other = row_of(a.y, i, b, c, d, V, -1);
      for (i64 begin = 0; begin < V; begin += BLOCK) {
        float x[BLOCK], u[BLOCK];
        int vectors = read_block(row, begin, x);
        read_block(other, begin, u);
        for (int j = 0; j < vectors; ++j) {
          vf given = load(x + j * W), y = load(u + j * W);
          y = select(given == -INF, given, y + scale * (given - y));
          store(copy + begin + j * W, y);
        }
      }
    } else if (copy) {
      for (i64 begin = 0; begin < V; begin += BLOCK) read_block(row, begin, copy + begin);
    }
    if (copy) row.data = (const char*)copy, row.dtype = FP32;
    draw_row(a, i * C + c, row, blocks);
  }
}

i64 draw_scratch(const void* pass) {
  const DrawPass& a = *(const DrawPass*)pass;
  Arena arena{(char*)64};
  Blocks blocks(a.vocabulary, arena);
  if (copies_rows(a)) arena.floats(a.vocabulary);
  return arena.next - (char*)64;
}

}  // namespace
