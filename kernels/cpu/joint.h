// The joint terms of one target row of one example: see di4c_fast/loss/joint.py for the equations.
// Slots of an example follow each other in the order of their positions, so its sums repeat.
#pragma once

#include "rows.h"

namespace {

// The first slot whose position is at least `position`.
i64 slot_at(const JointPass& a, i64 position) {
  if (!a.rows) return position < a.slots ? position : a.slots;
  i64 low = 0, high = a.slots;
  while (low < high) {
    i64 middle = (low + high) / 2;
    if (a.rows[middle] < position) low = middle + 1;
    else high = middle;
  }
  return low;
}

DI4C_INLINE vf load_some(const float* p, i64 count, float fill) {
  return count >= W ? load(p) : load_tail<Fp32>(p, (int)count, fill);
}

void joint_slot(const void* pass, i64 i, char* scratch) {
  const JointPass& a = *(const JointPass*)pass;
  i64 b = i / a.targets, j = i % a.targets, N = a.components, counted = 0;
  Arena arena{scratch};
  double* sum = (double*)arena.floats(2 * N);
  float *share = arena.floats(N), *weight = arena.floats(N);
  const float* log_weight = a.log_weights + b * N;
  for (i64 n = 0; n < N; ++n) sum[n] = 0;
  i64 first = slot_at(a, b * a.positions), last = slot_at(a, (b + 1) * a.positions);
  bool occupied = false;

  for (i64 s = first; s < last; ++s) {
    const float* l = a.log_prob + (s * a.targets + j) * N;
    float* rho = a.difference + (s * a.targets + j) * N;
    for (i64 n = 0; n < N; ++n) rho[n] = 0.0f;
    occupied |= a.alive[s] != 0;
    if (!a.alive[s]) {
      rho[0] = -1.0f;  // does not count
      continue;
    }
    if (!a.correlation) {
      for (i64 n = 0; n < N; ++n) sum[n] += l[n];
      ++counted;
      continue;
    }
    vf best = all(-INF), total{};
    for (i64 n = 0; n < N; n += W) {
      vf x = load_some(l + n, N - n, -INF) + load_some(log_weight + n, N - n, 0.0f);
      store(share + n, x);
      best = vmax(x, best);
    }
    float shift = largest(best);
    if (shift == -INF) {  // a target that no component can produce; NaN goes on
      bool nan = false;
      for (i64 n = 0; n < N; ++n) nan |= share[n] != share[n];
      if (!nan) {
        rho[0] = -1.0f;
        continue;
      }
      shift = 0.0f;
    }
    for (i64 n = 0; n < N; n += W) {
      vf x = load(share + n) - shift, e = vexp(x);
      total += e;
      store(share + n, x), store(weight + n, e);
    }
    float mass = quick_sum(total), log_mass = vlog(all(mass))[0];
    for (i64 n = 0; n < N; ++n) {
      rho[n] = weight[n] / mass;
      sum[n] += (share[n] - log_mass) - (log_weight[n] == -INF ? 0.0f : log_weight[n]);
    }
    ++counted;
  }

  double best = -INF, mass = 0;
  for (i64 n = 0; n < N; ++n) {
    sum[n] += log_weight[n];
    if (best == best && !(sum[n] <= best)) best = sum[n];  // NaN stays
  }
  for (i64 n = 0; n < N; ++n) mass += exp(sum[n] - best);
  bool defined = occupied && best != -INF;
  a.value[i] = defined ? -(best + log(mass)) : occupied ? INF : 0.0;
  for (i64 n = 0; n < N; ++n) {
    weight[n] = defined ? (float)(exp(sum[n] - best) / mass) : 0.0f;
    a.weights[i * N + n] = weight[n];
  }
  a.counted[i] = defined ? (float)counted : 0.0f;
  for (i64 s = first; s < last; ++s) {
    float* difference = a.difference + (s * a.targets + j) * N;
    bool none = !defined || difference[0] == -1.0f;
    for (i64 n = 0; n < N; ++n) difference[n] = none ? 0.0f : difference[n] - weight[n];
  }
}

}  // namespace
