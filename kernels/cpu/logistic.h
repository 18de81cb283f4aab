// A row of bins of a discretised logistic: its logits, their exponentials and their slopes, from two
// numbers per row. V bins of [-1, 1]; F the sigmoid, l and r the scaled edges of a bin.
//
//   lower = F(r) (F(-l) mass + eps)      upper = F(-l) (F(r) mass + eps)      mass = 1 - e^(l - r)
//   e^logit = lower, or with clamp "min" the smaller one, which is lower exactly where l + r < 0
//
// Exponentials need no logarithm, so rows are mostly formed as such. Rows whose bins all come close
// to underflow take the logarithms, which are finite wherever the truth is.
#pragma once

#include "vec.h"

namespace {

struct Bins {
  float mu, inverse, width, mass, rest, log_mass, eps, unit;
  float shift;   // about the largest logit
  float factor;  // e^-shift, or 0 where exponentials are taken from logarithms
  i64 V, mode;   // a column near mu
  bool both;
  bool narrow;  // whether e^-r is formed as e^-l e^-width, which underflows where e^-l does

  // F(-l), F(l), F(r) and F(-r), none by a difference, as fractions of sums of two positive parts.
  struct Edges {
    vf left, right, above_part, not_above_part, below_part, not_below_part, inverse, log_below;

    DI4C_INLINE vf left_sum() const { return above_part + not_above_part; }
    DI4C_INLINE vf right_sum() const { return below_part + not_below_part; }
    DI4C_INLINE vf above() const { return above_part * (right_sum() * inverse); }
    DI4C_INLINE vf not_above() const { return not_above_part * (right_sum() * inverse); }
    DI4C_INLINE vf below() const { return below_part * (left_sum() * inverse); }
    DI4C_INLINE vf not_below() const { return not_below_part * (left_sum() * inverse); }
  };

  DI4C_INLINE Edges edges(i64 v) const {
    vf twice = all((float)(2 * v - V));
    for (int i = 0; i < W; ++i) twice[i] += 2.0f * (float)i;
    Edges e;
    e.left = (twice * unit - mu) * inverse;
    e.right = ((twice + 2.0f) * unit - mu) * inverse;
    vf one = all(1.0f), tail = vexp(-magnitude(e.left));
    vi positive = e.left >= 0.0f;
    e.above_part = select(positive, tail, one), e.not_above_part = select(positive, one, tail);
    if (narrow) {  // saves an exponential
      e.below_part = e.not_above_part, e.not_below_part = e.above_part * rest;
      e.log_below = vmin(e.left, vf{});
    } else {
      tail = vexp(-magnitude(e.right)), positive = e.right >= 0.0f;
      e.below_part = select(positive, one, tail), e.not_below_part = select(positive, tail, one);
      e.log_below = vmin(e.right, vf{});
    }
    e.inverse = 1.0f / (e.left_sum() * e.right_sum());
    return e;
  }

  // Where the upper form is taken.
  DI4C_INLINE vi upper(const Edges& e) const {
    return both ? e.left + e.right >= 0.0f : vi{};
  }

  // Logits of columns v .. v + W - 1; those from V on mean nothing.
  DI4C_INLINE vf logits(i64 v) const {
    Edges e = edges(v);
    vf low = e.log_below, high = vmin(-e.left, vf{}), left = e.left_sum(), right = e.right_sum();
    if (eps == 0.0f) return (low + high) + (log_mass - vlog(left * right));
    vi up = upper(e);
    vf share = select(up, e.below(), e.above()) * mass + eps;
    return select(up, high, low) + vlog(share * (select(up, right, left) * e.inverse));
  }

  // Bins are narrow only where what underflows stays below TINY after the product with `factor`.
  DI4C_INLINE void set_shift(float x) {
    shift = x, factor = x > -16.0f ? vexp(all(-x))[0] : 0.0f, narrow = width - x < 8.0f;
  }

  // exp(logit - shift).
  DI4C_INLINE vf product(i64 v) const {
    Edges e = edges(v);
    vf above = e.above(), below = e.below();
    if (eps == 0.0f) return (above * factor) * (below * mass);
    vi up = upper(e);
    return (select(up, above, below) * factor) * (select(up, below, above) * mass + eps);
  }

  struct Slopes {
    vf mu, log_scale;  // d logit / d mu without its factor `inverse`, and d logit / d log_scale
  };

  DI4C_INLINE Slopes slopes(i64 v) const {
    Edges e = edges(v);
    vf by_left = e.not_above(), by_right = e.not_below(), by_width = all(rest / mass);
    if (eps != 0.0f) {
      vi up = upper(e), tie = both ? e.left + e.right == 0.0f : vi{};
      vf share = select(up, e.below(), e.above());
      share = share / (share * mass + eps);
      by_width = rest * share;
      vf part = mass * share, half = 0.5f + 0.5f * part;  // equal forms share the gradient
      by_left *= select(tie, half, select(up, all(1.0f), part));
      by_right *= select(tie, half, select(up, part, all(1.0f)));
    }
    return {by_left - by_right, e.left * by_left - e.right * by_right - width * by_width};
  }

  // Adds sum_v g_v d logit_v / d mu and d log_scale over n columns; g is padded with zeros. All g
  // of a row add up to 0, and far from mu all slopes are alike: so they count from that of a column.
  void add_slopes(const float* g, i64 begin, i64 n, double* by_mu, double* by_log_scale) const {
    Slopes base = slopes(mode);
    vf base_mu = all(base.mu[0]), base_scale = all(base.log_scale[0]), sum_mu{}, sum_scale{};
    for (i64 v = 0; v < n; v += W) {
      Slopes s = slopes(begin + v);
      vf gradient = load(g + v);
      sum_mu += gradient * (s.mu - base_mu);
      sum_scale += gradient * (s.log_scale - base_scale);
    }
    *by_mu += inverse * sum(sum_mu), *by_log_scale += sum(sum_scale);
  }
};

Bins bins_of(float mu, float log_scale, float eps, bool both, i64 V, i64 mask) {
  Bins b;
  b.mu = mu, b.eps = eps, b.both = both, b.V = V, b.unit = 1.0f / (float)V;
  b.inverse = vexp_any(all(2.0f - log_scale))[0];
  b.width = 2.0f * b.inverse * b.unit;
  b.rest = vexp(all(-b.width))[0];
  b.narrow = b.width < 40.0f;  // of logarithms nothing is lost
  float w = b.width;
  b.mass = w < 0.03f ? w * (1.0f - w * (0.5f - w * (1.0f / 6.0f - w * (1.0f / 24.0f))))
                     : 1.0f - b.rest;
  b.log_mass = eps == 0.0f ? vlog(all(b.mass))[0] : 0.0f;  // unused otherwise
  // The bin of mu, its neighbours, and what else a vector holds.
  float at = (mu + 1.0f) * 0.5f * (float)V;
  b.mode = !(at > 0.0f) ? 0 : at < (float)(V - 1) ? (i64)at : V - 1;
  i64 v = b.mode > V - W ? V - W : b.mode - 1;
  if (v < 0) v = 0;
  vf x = first(V - v, b.logits(v), -INF);
  for (int i = 0; i < W; ++i) x[i] = v + i == mask ? -INF : x[i];
  float best = any(x != x) ? __builtin_nanf("") : largest(x);
  b.set_shift(best == -INF ? 0.0f : best);
  return b;
}

}  // namespace
