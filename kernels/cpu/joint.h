// The joint terms of an example, the loss, and the factors of its gradient: see
// di4c_fast/loss/joint.py for the equations. Slots of an example follow each other in the order of
// their positions, so its sums repeat.
#pragma once

#include "rows.h"

namespace {

// The first slot whose position is at least `position`.
i64 slot_at(const Terms& t, i64 position) {
  if (!t.rows) return position < t.slots ? position : t.slots;
  i64 low = 0, high = t.slots;
  while (low < high) {
    i64 middle = (low + high) / 2;
    if (t.rows[middle] < position) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Whether some row of the student has a class there.
bool is_alive(const Terms& t, i64 s) {
  for (i64 n = 0; n < t.components; ++n)
    if (t.total[s * t.components + n] != 0) return true;
  return false;
}

DI4C_INLINE vf load_some(const float* p, i64 count, float fill) {
  return count >= W ? load(p) : load_tail<Fp32>(p, (int)count, fill);
}

// The divergences of slots first .. last - 1 of example b.
void sum_divergences(const JointPass& a, i64 b, i64 first, i64 last, double* sum) {
  const Terms& t = a.terms;
  i64 N = t.components;
  const float* log_weight = t.log_weights + b * N;
  double teacher = 0, consistency = 0, component = 0;
  for (i64 n = 0; n < N; ++n) sum[n] = 0;
  for (i64 s = first; s < last; ++s) {
    if (!is_alive(t, s)) continue;
    if (t.teacher_kl) teacher += t.teacher_kl[s];
    if (t.consistency_kl) consistency += t.consistency_kl[s];
    for (i64 n = 0; t.divergence && n < N; ++n)
      if (log_weight[n] != -INF) sum[n] += t.divergence[s * N + n];
  }
  // However small its weight, a component that excludes a class of q_T is infinitely far.
  for (i64 n = 0; t.divergence && n < N; ++n)
    component += sum[n] == INF ? sum[n] : (double)vexp_any(all(log_weight[n]))[0] * sum[n];
  a.teacher_kl[b] = (float)teacher;
  a.consistency_kl[b] = (float)consistency;
  a.component[b] = (float)component;
}

void joint_slot(const void* pass, i64 i, char* scratch) {
  const JointPass& a = *(const JointPass*)pass;
  const Terms& t = a.terms;
  i64 J = t.targets, N = t.components, b = i / (J + 1), j = i % (J + 1), counted = 0;
  Arena arena{scratch};
  double* sum = (double*)arena.floats(2 * N);
  float *share = arena.floats(N), *weight = arena.floats(N);
  const float* log_weight = t.log_weights + b * N;
  i64 first = slot_at(t, b * t.positions), last = slot_at(t, (b + 1) * t.positions);
  if (j == J) return sum_divergences(a, b, first, last, sum);
  for (i64 n = 0; n < N; ++n) sum[n] = 0;
  bool occupied = false;

  for (i64 s = first; s < last; ++s) {
    const float* l = t.log_prob + (s * J + j) * N;
    float* rho = a.difference + (s * J + j) * N;
    for (i64 n = 0; n < N; ++n) rho[n] = 0.0f;
    bool alive = is_alive(t, s);
    occupied |= alive;
    if (!alive) {
      rho[0] = -1.0f;  // does not count
      continue;
    }
    if (!t.correlation) {
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
  i64 row = b * J + j;
  a.rows[row] = defined ? (float)-(best + log(mass)) : occupied ? INF : 0.0f;
  for (i64 n = 0; n < N; ++n) {
    weight[n] = defined ? (float)(exp(sum[n] - best) / mass) : 0.0f;
    a.weights[row * N + n] = weight[n];
  }
  a.counted[row] = defined ? (float)counted : 0.0f;
  for (i64 s = first; s < last; ++s) {
    float* difference = a.difference + (s * J + j) * N;
    bool none = !defined || difference[0] == -1.0f;
    for (i64 n = 0; n < N; ++n) difference[n] = none ? 0.0f : difference[n] - weight[n];
  }
}

// The weight of a target row in the loss; no gradient comes through a term of weight 0.
float row_weight(const Terms& t, i64 b, i64 j) {
  return j ? t.consistency_weight[b] / (float)(t.targets - 1) : t.data_weight[b];
}

// An infinite term of weight 0 must not give NaN.
double weighted(double term, float weight) { return weight > 0 ? term * weight : 0.0; }

void loss_slot(const void* pass, i64 b, char*) {
  const JointPass& a = *(const JointPass*)pass;
  const Terms& t = a.terms;
  double loss = 0;
  for (i64 j = 0; t.data_weight && j < t.targets; ++j)
    loss += weighted(a.rows[b * t.targets + j], row_weight(t, b, j));
  if (t.data_weight && t.teacher_kl) loss += weighted(a.teacher_kl[b], t.teacher_weight[b]);
  if (t.data_weight && t.consistency_kl)
    loss += weighted(a.consistency_kl[b], t.consistency_weight[b]);
  if (t.data_weight && t.divergence) loss += weighted(a.component[b], t.component_weight[b]);
  a.loss[b] = (float)loss;
}

void factors_slot(const void* pass, i64 s, char* scratch) {
  const FactorsPass& a = *(const FactorsPass*)pass;
  const Terms& t = a.terms;
  i64 J = t.targets, N = t.components, b = (t.rows ? t.rows[s] : s) / t.positions;
  Arena arena{scratch};
  float* sum = arena.floats(N);
  for (i64 n = 0; n < N; ++n) sum[n] = 0;
  float upstream = a.gradient ? a.gradient[b] : 0.0f;
  for (i64 j = 0; j < J; ++j) {
    float alpha = a.rows_gradient ? a.rows_gradient[b * J + j] : 0.0f;
    if (a.gradient && t.data_weight) {
      float weight = row_weight(t, b, j);
      if (weight > 0) alpha += weight * upstream;
    }
    const float* difference = a.difference + (s * J + j) * N;
    float* kappa = a.kappa + (s * J + j) * N;
    for (i64 n = 0; n < N; ++n) kappa[n] = difference[n] * alpha, sum[n] += kappa[n];
  }
  float component = 0, whole = 0;
  if (t.divergence && a.gradient && t.component_weight[b] > 0)
    component = upstream * t.component_weight[b];
  // A teacher's component without any class takes its share out of q_T.
  for (i64 m = 0; t.divergence && m < t.teachers; ++m)
    whole += t.teacher_total[s * t.teachers + m] != 0 ? 1.0f / (float)t.teachers : 0.0f;
  a.marginal[s] = upstream;
  for (i64 n = 0; n < N; ++n) {
    float probability = -sum[n], factor = 0;
    if (t.mass) probability += upstream * t.mass[s * N + n];
    if (t.divergence && t.divergence[s * N + n] != INF) {  // an infinite one has no gradient
      factor = component * vexp_any(all(t.log_weights[b * N + n]))[0];
      probability += factor * whole;
    }
    a.component[s * N + n] = factor;
    a.probability[s * N + n] = probability;
  }
}

}  // namespace
