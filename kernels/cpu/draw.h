// One draw from each row of a slot, by the law of di4c_fast/draw/law.py; random numbers are those
// of di4c_fast/rng.py. A row is read for its largest logit, then for the sums of its blocks of 128
// columns while it is in the cache; the chosen block is read once more for the race.
#pragma once

#include "rows.h"

namespace {

constexpr i64 BLOCK = 128;   // SAMPLE_BLOCK of the law
constexpr int CALLS = 32;    // Philox calls at a time, four numbers each
enum Wanted { ARGMAX = 1, ENTROPY = 2, MARGIN = 4, RAW_PROB = 8 };
enum Stream : uint32_t { BLOCKS = 0, TOKENS = 1 };

// Uniform numbers 4 first .. 4 (first + CALLS) - 1 of a stream.
void uniforms(const DrawPass& a, i64 key, Stream stream, uint32_t first, float* out) {
  uint32_t c0[CALLS], c1[CALLS], c2[CALLS], c3[CALLS];
  for (int i = 0; i < CALLS; ++i) {
    c0[i] = (stream << 30) + first + (uint32_t)i;
    c1[i] = (uint32_t)key, c2[i] = (uint32_t)((uint64_t)key >> 32), c3[i] = (uint32_t)a.step;
  }
  uint32_t k0 = (uint32_t)a.seed, k1 = (uint32_t)((uint64_t)a.seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int i = 0; i < CALLS; ++i) {
      uint64_t p0 = (uint64_t)c0[i] * 0xD2511F53u, p1 = (uint64_t)c2[i] * 0xCD9E8D57u;
      c0[i] = (uint32_t)(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = (uint32_t)(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = (uint32_t)p1, c3[i] = (uint32_t)p0;
    }
  auto number = [](uint32_t word) {
    float u = ((float)word + 0.5f) * 0x1p-32f;
    return u < 1.0f - 0x1p-24f ? u : 1.0f - 0x1p-24f;
  };
  for (int i = 0; i < CALLS; ++i) {
    out[4 * i] = number(c0[i]), out[4 * i + 1] = number(c1[i]);
    out[4 * i + 2] = number(c2[i]), out[4 * i + 3] = number(c3[i]);
  }
}

// -log(1 - u): the rounding of 1 - u is made good by what it took away.
DI4C_INLINE vf exponential(vf u) {
  vf rest = 1.0f - u, taken = 1.0f - rest;
  return select(taken == 0.0f, u, -vlog(rest) * (u / taken));
}

// Columns begin .. begin + 127 of a row as fp32, -inf where there is none.
void block(const Row& row, i64 begin, float* out) {
  i64 n = row.V - begin < BLOCK ? row.V - begin : BLOCK;
  row.with_columns([&](auto columns) {
    for (i64 v = 0; v < BLOCK; v += W)
      store(out + v, v + W <= n ? columns.logits(begin + v)
                     : v < n    ? columns.tail(begin + v, n - v)
                                : all(-INF));
  });
  if (row.mask >= begin && row.mask < begin + n) out[row.mask - begin] = -INF;
}

// The first column with this value, and the largest of all the others.
i64 find(const Row& row, float value, float* second) {
  float part[BLOCK];
  i64 found = -1;
  vf best = all(-INF);
  for (i64 begin = 0; begin < row.V; begin += BLOCK) {
    block(row, begin, part);
    for (i64 v = 0; found < 0 && v < BLOCK; ++v)
      if (part[v] == value) found = begin + v, part[v] = -INF;
    for (i64 v = 0; v < BLOCK; v += W) best = vmax(load(part + v), best);
  }
  *second = largest(best);
  return found < 0 ? 0 : found;
}

struct BlockSums {
  vf total{}, raw{}, weighted{};
};

// Sums over W columns: of e = exp((x - shift) / T), of exp(x - shift), of e (x - shift) / T.
template <bool TEMPERED, bool MORE>
DI4C_INLINE void add_columns(vf x, float shift, float T, i64 wanted, BlockSums& sums) {
  vf gap = x - shift, scaled = TEMPERED ? gap / T : gap;
  vf e = vexp(scaled);
  sums.total += e;
  if (MORE && (wanted & ENTROPY)) sums.weighted += vmax(scaled, all(-1e5f)) * e;
  if (MORE && TEMPERED && (wanted & RAW_PROB)) sums.raw += vexp(gap);
}

template <bool TEMPERED, bool MORE>
BlockSums sum_block(const Row& row, i64 begin, float shift, float T, i64 wanted) {
  BlockSums sums;
  bool plain = begin + BLOCK <= row.V && (row.mask < begin || row.mask >= begin + BLOCK);
  if (plain) {
    row.with_columns([&](auto columns) {
      for (i64 v = 0; v < BLOCK; v += W)
        add_columns<TEMPERED, MORE>(columns.logits(begin + v), shift, T, wanted, sums);
    });
    return sums;
  }
  float part[BLOCK];
  block(row, begin, part);
  for (i64 v = 0; v < BLOCK; v += W)
    add_columns<TEMPERED, MORE>(load(part + v), shift, T, wanted, sums);
  return sums;
}

void draw_row(const DrawPass& a, i64 r, const Row& row) {
  float T = a.temperature[r], second = -INF, random[4 * CALLS];
  bool cold = T == 0.0f;
  if (cold) T = 1.0f;
  bool tempered = T != 1.0f, more = (a.wanted & (ENTROPY | RAW_PROB)) != 0;
  float shift = row_shift(row);
  i64 best = 0, chosen = 0;
  if (cold || (a.wanted & (ARGMAX | MARGIN))) best = find(row, shift, &second);

  auto sum_of = tempered ? (more ? sum_block<true, true> : sum_block<true, false>)
                         : (more ? sum_block<false, true> : sum_block<false, false>);
  float reached = 0;
  double total = 0, raw_total = 0, weighted = 0;
  for (i64 g = 0; g * BLOCK < row.V; ++g) {
    BlockSums sums = sum_of(row, g * BLOCK, shift, T, a.wanted);
    float mass = (float)sum(sums.total);
    total += mass, reached += mass;
    if (more) raw_total += sum(sums.raw), weighted += sum(sums.weighted);
    if (cold || row.V <= BLOCK) continue;
    if (g % (4 * CALLS) == 0) uniforms(a, a.keys[r], BLOCKS, (uint32_t)(g / 4), random);
    if (random[g % (4 * CALLS)] * reached < mass) chosen = g;
  }
  if (!tempered) raw_total = total;

  i64 token = best;
  if (!cold) {
    float part[BLOCK], lead = -1.0f;
    block(row, chosen * BLOCK, part);
    uniforms(a, a.keys[r], TOKENS, (uint32_t)(chosen * BLOCK / 4), random);
    for (i64 v = 0; v < BLOCK; v += W) {
      vf gap = load(part + v) - shift;
      store(part + v, vexp(tempered ? gap / T : gap) / exponential(load(random + v)));
    }
    token = chosen * BLOCK;
    for (i64 v = 0; v < BLOCK; ++v)
      if (part[v] > lead) lead = part[v], token = chosen * BLOCK + v;
  }
  float gap = logits_of(row, token)[0] - shift;
  a.token[r] = total > 0 ? token : -1;
  a.shift[r] = shift / T;
  a.total[r] = (float)total;
  a.log_weight[r] = gap / T;
  if (a.wanted & ARGMAX) a.argmax[r] = best;
  if (a.wanted & ENTROPY) a.entropy[r] = (float)(log(total) - weighted / total);
  if (a.wanted & MARGIN) a.margin[r] = (float)((1.0 - exp((double)(second - shift) / T)) / total);
  if (a.wanted & RAW_PROB) a.raw_prob[r] = (float)(exp((double)gap) / raw_total);
}

void draw_slot(const void* pass, i64 i, char* scratch) {
  const DrawPass& a = *(const DrawPass*)pass;
  i64 C = a.x.components, V = a.vocabulary, s = a.visit.first + i;
  i64 index = a.visit.rows ? a.visit.rows[s] : s;
  i64 b = index / a.visit.positions, d = index % a.visit.positions;
  for (i64 c = 0; c < C; ++c) {
    Row row = row_of(a.x, i, b, c, d, V, a.mask_id);
    float* out = (float*)scratch;
    if (a.y.data) {  // guided logits u + (scale + 1) (x - u); excluded stays excluded
      float scale = a.guidance[i * C + c] + 1.0f;
      Row other = row_of(a.y, i, b, c, d, V, -1);
      for (i64 begin = 0; begin < V; begin += BLOCK) {
        float x[BLOCK], u[BLOCK];
        block(row, begin, x), block(other, begin, u);
        for (i64 v = 0; v < BLOCK; v += W) {
          vf given = load(x + v), y = load(u + v);
          store(out + begin + v, select(given == -INF, given, y + scale * (given - y)));
        }
      }
    } else if (row.dtype == LOGISTIC) {
      for (i64 begin = 0; begin < V; begin += BLOCK) block(row, begin, out + begin);
    }
    if (a.y.data || row.dtype == LOGISTIC) row.data = scratch, row.dtype = FP32;
    draw_row(a, i * C + c, row);
  }
}

}  // namespace
