// One position of the loss, all components at once: `forward` fills its statistics, `backward`
// writes dL/dz. Shapes: N student components, V columns; a block is a range of columns.
//
//   mix_v = sum_n s_n e_nv,  e_nv = exp(z_nv - shift_n),  s_n = exp(a_n) / total_n,  m = log mix
//   KL(q || m) = sum_v q_v log(q_v / mix_v)      R_n = s_n sum_v (q_v / mix_v) e_nv
//   dz_nv = e_nv (probability_n / total_n - marginal q_v / mix_v s_n) - component_n q_T,v + kappa
//
// A ratio q / mix carries no cancellation. Columns where mix underflows although q is not 0 are
// computed from logarithms instead, W of them at a time.
#pragma once

#include "draw.h"

namespace {

constexpr i64 STORED_BYTES = 1 << 20;  // exponentials of a slot that are kept between its steps
constexpr i64 STREAMED_BYTES = 8 << 20;  // of a gradient: what no cache keeps for its reader
constexpr i64 BLOCK_BYTES = 1 << 16;   // exponentials of one block of columns

i64 block_columns(i64 components) {
  i64 columns = BLOCK_BYTES / 4 / components / 64 * 64;
  return columns < 64 ? 64 : columns > 1024 ? 1024 : columns;
}

bool wants_targets(const MixturePass& a) {
  return a.t.data && (a.mixture.marginal || a.mixture.component);
}

bool stores_exponentials(const MixturePass& a) {
  return wants_targets(a) && 4 * a.z.components * padded_columns(a.mixture.vocabulary) <= STORED_BYTES;
}

// What a slot needs besides its arguments, carved out of the scratch memory of a thread.
struct Slot {
  const MixturePass& a;
  i64 i, s, b, d;  // slot of the visit, of all, its example and position
  i64 N, V, columns, stride;
  float *shift, *total, *log_total, *log_weight, *weight, *parts;  // [N]; parts [N, W]
  double *mass, *slopes;                                          // [N], [N, 2]
  Row* rows;                                                      // [N] of the student
  float *q_teacher, *q_draws, *row;                               // [V]
  float *mix, *q;                                                 // [columns]
  float* e;  // [N, stride]: of all columns or of one block
  Blocks blocks;

  Slot(const MixturePass& a, i64 i, Arena arena, bool whole)
      : a(a),
        i(i),
        s(a.visit.first + i),
        N(a.z.components),
        V(a.mixture.vocabulary),
        blocks(a.mixture.draws ? V : 0, arena) {
    i64 index = a.visit.rows ? a.visit.rows[s] : s;
    b = index / a.visit.positions, d = index % a.visit.positions;
    columns = block_columns(N);
    stride = padded_columns(whole ? V : columns);
    shift = arena.floats(N), total = arena.floats(N), log_total = arena.floats(N);
    log_weight = arena.floats(N), weight = arena.floats(N), parts = arena.floats(N * W);
    mass = (double*)arena.floats(2 * N), slopes = (double*)arena.floats(4 * N);
    rows = (Row*)arena.floats(N * sizeof(Row) / 4);
    mix = arena.floats(columns), q = arena.floats(columns);
    i64 width = a.gradient.data ? columns : V;  // backward forms q block by block
    q_teacher = arena.floats(width), q_draws = arena.floats(width), row = arena.floats(width);
    e = arena.floats(N * stride);
    end = arena.next;
  }
  char* end;  // of the scratch memory

  static i64 scratch_bytes(const MixturePass& a, bool whole) {
    return Slot(a, 0, {(char*)64}, whole).end - (char*)64;
  }

  void find_rows() {
    for (i64 n = 0; n < N; ++n) rows[n] = row_of(a.z, i, b, n, d, V, a.mixture.mask_id);
  }

  // The constants of the components, once shift and total are there; whether any has a class.
  bool prepare() {
    bool alive = false;
    memcpy(log_weight, a.mixture.log_weights + b * N, N * sizeof(float));
    for (i64 n = 0; n < N; n += W) {
      vf sum = load(total + n);
      vi empty = sum == 0.0f;
      store(log_total + n, select(empty, vf{}, vlog(sum)));
      store(weight + n, select(empty, vf{}, vexp(load(log_weight + n)) / sum));
    }
    for (i64 n = 0; n < N; ++n) alive |= total[n] != 0.0f;
    return alive;
  }

  // r_n of W columns into `parts`, from logarithms, and m; 0 and -inf where there is no class.
  vf log_marginal(i64 v) {
    vf best = all(-INF), sum{};
    for (i64 n = 0; n < N; ++n) {
      vf x = ((logits_of(rows[n], v) - shift[n]) - log_total[n]) + log_weight[n];
      store(parts + n * W, x);
      best = vmax(x, best);
    }
    best = select(best > -INF, best, vf{});
    for (i64 n = 0; n < N; ++n) {
      vf x = vexp(load(parts + n * W) - best);
      store(parts + n * W, x);
      sum += x;
    }
    vf inverse = select(sum == 0.0f, vf{}, 1.0f / sum);
    for (i64 n = 0; n < N; ++n) store(parts + n * W, load(parts + n * W) * inverse);
    return best + vlog(sum);
  }

  // Exponentials of a block of all components: rows of `e` from the first column on.
  float* exponentials(i64 begin, i64 end) {
    i64 ahead = end + columns <= V ? columns * size_of(a.z.dtype) : 0;  // the same of the next block
    for (i64 n = 0; n < N; ++n)
      exp_row<true>(rows[n], begin, end, shift[n], e + n * stride, ahead);
    return e;
  }

  // Log-probabilities of one column; with `whole` the exponentials of all columns are there.
  void find_log_prob(i64 x, bool whole, float* out) {
    if (x >= V) return;  // of another shard
    if (a.z.dtype == LOGISTIC && whole) {
      bool underflow = false;
      for (i64 n = 0; n < N; ++n) {
        parts[n] = e[n * stride + x];
        underflow |= parts[n] < TINY;
      }
      if (!underflow) {
        for (i64 n = 0; n < N; n += W)
          store(parts + n, vlog(load(parts + n)) - load(log_total + n));
        memcpy(out, parts, N * sizeof(float));
        return;
      }
    }
    for (i64 n = 0; n < N; ++n) {
      float l = (logit_of(rows[n], x) - shift[n]) - log_total[n];
      out[n] = x == a.mixture.mask_id || total[n] == 0.0f ? -INF : l;
    }
  }

  void mixture_of(const float* e, i64 count) {
    i64 v = 0;
    for (; v + 4 * W <= count; v += 4 * W) weighted_sum<4>(e + v, stride, N, weight, mix + v);
    for (; v < count; v += W) weighted_sum<1>(e + v, stride, N, weight, mix + v);
  }

  i64* token(i64 j) const {
    return a.statistics.tokens + (b * a.statistics.targets + j) * a.visit.positions + d;
  }

  // q_T of a block; with `known` the sums of its rows are there already. Likewise q_u.
  void find_q_teacher(i64 begin, i64 end, bool known) {
    mean_softmax(a.t, a.statistics.teacher, known, false, nullptr, begin, end, q_teacher);
  }

  void find_q_draws(i64 begin, i64 end, bool known, bool draws) {
    const i64* xu = a.mixture.xu;
    if (xu) xu += b * a.u.components * a.visit.positions + d;
    mean_softmax(a.u, a.statistics.consistency, known, draws, xu, begin, end, q_draws);
  }

  // The mean of the softmaxes of o; where xu shows a token the softmax is that one. With `draws`,
  // of a whole row, the last target rows get a token of each.
  void mean_softmax(const Operand& o, Sums sums, bool known, bool draws, const i64* xu, i64 begin,
                    i64 end, float* q) {
    i64 C = o.components, count = end - begin, mask = a.mixture.mask_id, D = a.visit.positions;
    bool first = true;
    for (i64 c = 0; o.data && c < C; ++c) {
      float &shift = sums.shift[s * C + c], &total = sums.total[s * C + c];
      i64* drawn = draws ? token(a.statistics.targets - C + c) : nullptr;
      if (xu && xu[c * D] != mask) {
        if (!known) shift = total = 0.0f;
        if (draws) *drawn = xu[c * D];
        continue;
      }
      Row x = row_of(o, i, b, c, d, V, mask);
      float* out = first ? q : row;
      if (draws) {
        sum_blocks<false, false, true>(x, 1.0f, blocks, out);
        i64 key = (b * C + c) * D + d;
        Sample sample = choose(x, {a.mixture.seed, 0}, key, 1.0f, false, blocks, out);
        shift = sample.shift, total = (float)sample.total;
        *drawn = sample.token < 0 ? 0 : sample.token;
      } else {
        if (!known) shift = row_shift(x);
        double mass = exp_row<true>(x, begin, end, shift, out);
        if (!known) total = (float)mass;
      }
      float inverse = total == 0.0f ? 0.0f : 1.0f / (total * (float)C);
      for (i64 v = 0; v < count;) {
        i64 stop = draws && v + STRIP < count ? v + STRIP : count;
        vf factor = all(draws ? inverse * blocks.factor[v / STRIP] : inverse);
        if (first)
          for (; v < stop; v += W) store(q + v, load(q + v) * factor);
        else
          for (; v < stop; v += W) store(q + v, load(q + v) + load(row + v) * factor);
      }
      first = false;
    }
    if (first)
      for (i64 v = 0; v < count; v += W) store(q + v, vf{});
    for (i64 c = 0; xu && o.data && c < C; ++c) {
      i64 token = xu[c * D];
      if (token != mask && token >= begin && token < end) q[token - begin] += 1.0f / (float)C;
    }
  }
};

void forward_slot(const void* pass, i64 i, char* scratch) {
  const MixturePass& a = *(const MixturePass*)pass;
  const Mixture& m = a.mixture;
  const Statistics& st = a.statistics;
  bool targets = wants_targets(a), whole = stores_exponentials(a);
  Slot slot(a, i, {scratch}, whole);
  i64 N = slot.N, V = slot.V, s = slot.s, J = st.targets;

  if (m.draws) slot.find_q_draws(0, V, false, true);
  slot.find_rows();
  for (i64 n = 0; n < N; ++n) {
    const Row& z = slot.rows[n];
    float &sum_shift = st.student.shift[s * N + n], &sum_total = st.student.total[s * N + n];
    if (!m.all_known) sum_shift = row_shift(z);
    float shift = slot.shift[n] = sum_shift;
    i64 ahead = n + 1 < N ? slot.rows[n + 1].data - z.data : 0;
    double total = 0;
    if (whole) total = exp_row<true>(z, 0, V, shift, slot.e + n * slot.stride, ahead);
    else if (!m.all_known) total = exp_row<false>(z, 0, V, shift, nullptr);
    if (!m.all_known) sum_total = (float)total;
    slot.total[n] = sum_total;
  }
  bool alive = slot.prepare();
  for (i64 j = 0; j < J; ++j)
    slot.find_log_prob(*slot.token(j), whole, st.log_prob + (s * J + j) * N);
  if (!targets) return;

  slot.find_q_teacher(0, V, m.all_known);
  if (!m.draws) slot.find_q_draws(0, V, m.sums_known, false);
  if (!alive)  // it counts as if q were 0
    for (i64 v = 0; v < V; v += W) store(slot.q_teacher + v, vf{}), store(slot.q_draws + v, vf{});
  vf teacher_weight = all(m.teacher_weight[slot.b]);
  vf consistency_weight = all(m.consistency_weight[slot.b]);
  float* q_kept = s < st.q.count ? st.q.data + s * st.q.stride : nullptr;
  if (s < st.q_teacher.count)
    memcpy(st.q_teacher.data + s * st.q_teacher.stride, slot.q_teacher, V * sizeof(float));
  double broken = 0;  // NaN where the sum of a row is: so are divergences from it, whatever q is
  for (i64 n = 0; n < N; ++n) broken += 0.0 * slot.total[n];
  double teacher_kl = broken, consistency_kl = broken;
  double* divergence = slot.mass;  // one of the two at a time
  for (i64 n = 0; n < N; ++n) slot.mass[n] = 0;

  for (i64 begin = 0; m.marginal && begin < V; begin += slot.columns) {
    i64 end = begin + slot.columns < V ? begin + slot.columns : V, count = end - begin;
    const float* e = whole ? slot.e + begin : slot.exponentials(begin, end);
    slot.mixture_of(e, count);
    vf kl_t{}, kl_u{};
    for (i64 v = 0; v < count; v += W) {
      if (v % (16 * W) == 0) {  // sums of few terms first: their rounding errors add up less
        teacher_kl += sum(kl_t), consistency_kl += sum(kl_u);
        kl_t = kl_u = vf{};
      }
      vf mix = load(slot.mix + v);
      vf q_t = load(slot.q_teacher + begin + v), q_u = load(slot.q_draws + begin + v);
      vf q = teacher_weight * q_t + consistency_weight * q_u;
      store(slot.q + v, q);
      vi needed = (q_t != 0.0f) | (q_u != 0.0f);
      if (__builtin_expect(any(needed & (mix < TINY)), 0)) {
        vf log_mix = slot.log_marginal(begin + v);
        kl_t += select(q_t != 0.0f, q_t * (vlog(q_t) - log_mix), vf{});
        kl_u += select(q_u != 0.0f, q_u * (vlog(q_u) - log_mix), vf{});
        for (i64 n = 0; n < N; ++n)
          slot.mass[n] += sum(select(q != 0.0f, q * load(slot.parts + n * W), vf{}));
        store(slot.mix + v, vf{});
        continue;
      }
      vf inverse = select(needed, 1.0f / mix, vf{});
      kl_t += select(q_t != 0.0f, q_t * vlog(q_t * inverse), vf{});
      kl_u += select(q_u != 0.0f, q_u * vlog(q_u * inverse), vf{});
      store(slot.mix + v, q * inverse);
    }
    teacher_kl += sum(kl_t), consistency_kl += sum(kl_u);
    for (i64 n = 0; n < N; ++n)
      slot.mass[n] += slot.weight[n] * dot(slot.mix, e + n * slot.stride, count);
    if (q_kept) memcpy(q_kept + begin, slot.q, count * sizeof(float));
  }
  if (m.marginal) {
    st.teacher_kl[s] = (float)teacher_kl, st.consistency_kl[s] = (float)consistency_kl;
    for (i64 n = 0; n < N; ++n) st.mass[s * N + n] = (float)slot.mass[n];
  }
  if (!m.component) return;

  for (i64 n = 0; n < N; ++n) divergence[n] = 0.0 * slot.total[n];
  for (i64 begin = 0; begin < V; begin += slot.columns) {
    i64 end = begin + slot.columns < V ? begin + slot.columns : V;
    for (i64 v = begin; v < end; v += W) store(slot.q + v - begin, vlog(load(slot.q_teacher + v)));
    for (i64 n = 0; n < N; ++n) {
      vf kl{}, run{};
      for (i64 v = begin; v < end; v += W) {
        vf q_t = load(slot.q_teacher + v);
        vf l = (logits_of(slot.rows[n], v) - slot.shift[n]) - slot.log_total[n];
        run += select(q_t != 0.0f, q_t * (load(slot.q + v - begin) - l), vf{});
        if ((v - begin) % (16 * W) == 0) kl += run, run = vf{};
      }
      divergence[n] += sum(kl + run);
    }
  }
  for (i64 n = 0; n < N; ++n) st.divergence[s * N + n] = (float)divergence[n];
}

void backward_slot(const void* pass, i64 i, char* scratch) {
  const MixturePass& a = *(const MixturePass*)pass;
  const Mixture& m = a.mixture;
  const Statistics& st = a.statistics;
  const Factors& f = a.factors;
  Slot slot(a, i, {scratch}, false);
  i64 N = slot.N, V = slot.V, s = slot.s, J = st.targets;
  for (i64 n = 0; n < N; ++n) {
    slot.shift[n] = st.student.shift[s * N + n];
    slot.total[n] = st.student.total[s * N + n];
  }
  slot.find_rows();
  for (i64 n = 0; n < 2 * N; ++n) slot.slopes[n] = 0;
  bool alive = slot.prepare();  // without any class it counts as if q were 0
  bool marginal = alive && m.marginal && f.marginal[s] != 0.0f, component = false;
  for (i64 n = 0; alive && m.component && n < N; ++n) component |= f.component[s * N + n] != 0.0f;
  bool kept = (!marginal || s < st.q.count) && (!component || s < st.q_teacher.count);
  vf teacher_weight = all(m.teacher_weight[slot.b]);
  vf consistency_weight = all(m.consistency_weight[slot.b]);

  // A large gradient in memory of its own; in place the lines are in the cache already.
  bool streams = a.gradient.stride_i == 0 && a.gradient.data != a.z.data &&
                 a.visit.slots * N * V * size_of(a.gradient.dtype) >= STREAMED_BYTES;

  for (i64 begin = 0; begin < V; begin += slot.columns) {
    i64 end = begin + slot.columns < V ? begin + slot.columns : V, count = end - begin;
    float* e = slot.exponentials(begin, end);
    const float *q = slot.q, *q_teacher = slot.q_teacher;
    if ((marginal || component) && kept) {
      if (marginal) copy_padded(st.q.data + s * st.q.stride + begin, count, slot.q);
      if (component)
        copy_padded(st.q_teacher.data + s * st.q_teacher.stride + begin, count, slot.q_teacher);
    } else if (marginal || component) {
      slot.find_q_teacher(begin, end, true), slot.find_q_draws(begin, end, true, false);
      for (i64 v = 0; v < count; v += W)
        store(slot.q + v, teacher_weight * load(slot.q_teacher + v) +
                              consistency_weight * load(slot.q_draws + v));
    }

    i64 underflows = 0;
    if (marginal) {
      slot.mixture_of(e, count);
      vf factor = all(f.marginal[s]);
      for (i64 v = 0; v < count; v += W) {
        vf x = load(q + v), mix = load(slot.mix + v);
        vi needed = x != 0.0f, underflow = needed & (mix < TINY);
        underflows += any(underflow);
        store(slot.mix + v, select(needed & ~underflow, factor * x / mix, vf{}));
      }
    }
    for (i64 n = 0; n < N; ++n) {
      float total = slot.total[n];
      vf p = all(total == 0.0f ? 0.0f : f.probability[s * N + n] / total), w = all(slot.weight[n]);
      float* row = e + n * slot.stride;
      if (marginal)
        for (i64 v = 0; v < count; v += W)
          store(row + v, load(row + v) * (p - load(slot.mix + v) * w));
      else
        for (i64 v = 0; v < count; v += W) store(row + v, load(row + v) * p);
      if (!component || f.component[s * N + n] == 0.0f) continue;
      vf c = all(f.component[s * N + n]);
      for (i64 v = 0; v < count; v += W) store(row + v, load(row + v) - c * load(q_teacher + v));
    }
    // What the select above left out, from logarithms: -marginal q r.
    for (i64 v = 0; underflows && v < count; v += W) {
      vf x = load(q + v);
      vi left = (x != 0.0f) & (load(slot.mix + v) == 0.0f);
      if (!any(left)) continue;
      slot.log_marginal(begin + v);
      for (i64 n = 0; n < N; ++n) {
        vf term = f.marginal[s] * x * load(slot.parts + n * W);
        float* p = e + n * slot.stride + v;
        store(p, load(p) - select(left, term, vf{}));
      }
    }
    for (i64 j = 0; j < J; ++j) {
      i64 x = *slot.token(j) - begin;
      if (x >= 0 && x < count)
        for (i64 n = 0; n < N; ++n) e[n * slot.stride + x] += f.kappa[(s * J + j) * N + n];
    }
    for (i64 n = 0; n < N; ++n) {
      float* row = e + n * slot.stride;
      if (m.mask_id >= begin && m.mask_id < end) row[m.mask_id - begin] = 0.0f;
      i64 at = offset_of(a.gradient, i, slot.b, n, slot.d);
      double* slopes = slot.slopes + 2 * n;
      if (a.gradient.dtype != LOGISTIC) {
        write_row(row, a.gradient.data + at, a.gradient.dtype, begin, count, streams);
        continue;
      }
      slot.rows[n].bins.add_slopes(row, begin, count, &slopes[0], &slopes[1]);
      *(float*)(a.gradient.data + at) = (float)slopes[0];
      *(float*)(a.gradient.log_scale + at) = (float)slopes[1];
    }
  }
}

void clear_slot(const void* pass, i64 i, char*) {
  const ClearPass& a = *(const ClearPass*)pass;
  i64 s = a.visit.first + i, index = a.visit.rows ? a.visit.rows[s] : s;
  i64 b = index / a.visit.positions, d = index % a.visit.positions;
  static const char zeros[1 << 14] = {};
  i64 N = a.gradient.components, bytes = a.vocabulary * size_of(a.gradient.dtype);
  bool streams = a.visit.slots * N * bytes >= STREAMED_BYTES;
  for (i64 n = 0; n < N; ++n) {
    char* row = a.gradient.data + offset_of(a.gradient, i, b, n, d);
    if (!streams) memset(row, 0, bytes);
    for (i64 at = 0; streams && at < bytes; at += sizeof(zeros))
      stream(row + at, zeros, bytes - at < (i64)sizeof(zeros) ? bytes - at : sizeof(zeros));
  }
}

}  // namespace
