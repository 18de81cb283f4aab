"""What `mutate_kernels` breaks in the C++ passes."""

from __future__ import annotations

from .mutations import Mutation

LOSS, DRAW = "test_loss_conformance.py", "test_draw_conformance.py"
VECTORS, PASSES = "test_cpu_vectors.py", "test_cpu_passes.py"


def _rows(name: str, before: str, after: str, tests: str, select: str) -> Mutation:
    return Mutation(name, "kernels/cpu/rows.h", before, after, tests, select)


def _mixture(name: str, before: str, after: str, select: str) -> Mutation:
    return Mutation(name, "kernels/cpu/mixture.h", before, after, LOSS, f"cpu and {select}")


def _logistic(name: str, before: str, after: str, select: str) -> Mutation:
    return Mutation(
        f"logistic: {name}", "kernels/cpu/logistic.h", before, after, LOSS, f"cpu and {select}"
    )


def _draw(name: str, before: str, after: str, select: str) -> Mutation:
    return Mutation(f"draw: {name}", "kernels/cpu/draw.h", before, after, DRAW, f"cpu and {select}")


def _vec(name: str, before: str, after: str, tests: str, select: str) -> Mutation:
    return Mutation(name, "kernels/cpu/vec.h", before, after, tests, select)


CPU = [
    _rows(
        "rows at the strides of another dimension",
        "b * o.stride_b + c * o.stride_c",
        "b * o.stride_c + c * o.stride_b",
        LOSS,
        "cpu and settings",
    ),
    _rows(
        "mask column counted",
        "hole = row.mask >= begin && row.mask < end ? row.mask : end;",
        "hole = end;",
        LOSS,
        "cpu and settings",
    ),
    _rows(
        "shift: the mask column may be the largest",
        "i64 hole = row.mask < 0 ? row.V : row.mask;",
        "i64 hole = row.V;",
        LOSS,
        "cpu and mask_column",
    ),
    _rows(
        "shift: the tail left out",
        "if (v < end) best = vmax(columns.tail",
        "if (end < 0) best = vmax(columns.tail",
        LOSS,
        "cpu and any_column",
    ),
    _rows(
        "lanes beyond the last column counted",
        "vexp(load_tail<T>(p + v, (int)count, -INF) - shift)",
        "vexp(load_tail<T>(p + v, (int)count, 0.0f) - shift)",
        LOSS,
        "cpu and settings",
    ),
    _rows(
        "every second vector left out of the sum",
        "s0 += e0, s1 += e1;",
        "s0 += e0;",
        LOSS,
        "cpu and settings",
    ),
    _rows(
        "last column of a gradient not written",
        "store_tail<T>(to + v, load(from + v), (int)(n - v))",
        "store_tail<T>(to + v, load(from + v), (int)(n - v) - 1)",
        LOSS,
        "cpu and settings",
    ),
    _mixture(
        "weights of the components ignored",
        "vexp(load(log_weight + n)) / sum",
        "1.0f / sum",
        "every_head",
    ),
    _mixture(
        "NaN of a student dropped where q is 0",
        "broken += 0.0 * slot.total[n]",
        "broken += 0.0",
        "without_a_sum",
    ),
    _mixture(
        "tokens of the first position",
        "slot.find_log_prob(*slot.token(j),",
        "slot.find_log_prob(*(slot.token(j) - slot.d),",
        "settings",
    ),
    _mixture(
        "divergence of the draws with q of the teacher",
        "q_u * vlog(q_u * inverse)",
        "q_u * vlog(q_t * inverse)",
        "settings",
    ),
    _mixture(
        "mass without the weight of its component",
        "slot.mass[n] += slot.weight[n] * dot(",
        "slot.mass[n] += dot(",
        "settings",
    ),
    _mixture(
        "no logarithms where probabilities underflow",
        "any(needed & (mix < TINY))",
        "any(needed & (mix < 0.0f))",
        "underflow",
    ),
    _mixture(
        "no gradient where probabilities underflow",
        "store(p, load(p) - select(left, term, vf{}));",
        "store(p, load(p));",
        "underflow",
    ),
    _mixture(
        "component divergence without the last run of columns",
        "divergence[n] += sum(kl + run);",
        "divergence[n] += sum(kl);",
        "every_head",
    ),
    _mixture(
        "component term without its factor",
        "load(row + v) - c * load(q_teacher + v)",
        "load(row + v) - load(q_teacher + v)",
        "every_head",
    ),
    _mixture(
        "coinciding targets overwrite one another",
        "e[n * slot.stride + x] += f.kappa",
        "e[n * slot.stride + x] = f.kappa",
        "settings",
    ),
    Mutation(
        "targets of a later block in the first",
        "kernels/cpu/mixture.h",
        "*slot.token(j) - begin;",
        "*slot.token(j);",
        PASSES,
        "losses_of_every_width and plain and 2050",
    ),
    _mixture(
        "shown tokens not one-hot",
        "q[token - begin] += 1.0f / (float)C;",
        "q[token - begin] += 0.0f;",
        "every_head",
    ),
    _mixture(
        "mean over the components of the teacher not divided",
        "1.0f / (total * (float)C)",
        "1.0f / total",
        "sizes",
    ),
    _mixture(
        "q kept for another slot",
        "st.q.data + s * st.q.stride : nullptr",
        "st.q.data + i * st.q.stride : nullptr",
        "several_chunks",
    ),
    _mixture(
        "slots counted from the chunk",
        "s(a.visit.first + i)",
        "s(i)",
        "several_chunks",
    ),
    _mixture(
        "weight of the first example",
        "all(m.teacher_weight[slot.b])",
        "all(m.teacher_weight[0])",
        "settings",
    ),
    _mixture(
        "weight of a row without a class",
        "select(empty, vf{}, vexp(load(log_weight",
        "select(vi{}, vf{}, vexp(load(log_weight",
        "minus_infinity",
    ),
    _vec(
        "bf16 rounded towards zero",
        "(bits + 0x7fff + ((bits >> 16) & 1)) >> 16",
        "bits >> 16",
        PASSES,
        "rounded_once and plain",
    ),
    _vec(
        "denormal numbers of fp16 lost",
        "size < 0x38800000 ? denormal : normal",
        "size < 0x38800000 ? vu{} : normal",
        PASSES,
        "rounded_once and plain",
    ),
    _vec("exp: a coefficient", "8.3688507e-3f", "8.4688507e-3f", VECTORS, "exp and plain"),
    _vec(
        "exp: denormal results",
        "vi half = whole >> 1;",
        "vi half = whole;",
        VECTORS,
        "exp and plain",
    ),
    _vec(
        "exp: NaN lost",
        "vmax(all(-88.0f), x)",
        "vmax(x, all(-88.0f))",
        VECTORS,
        "infinities and avx2",
    ),
    _vec("exp: no bound below", "vmax(all(-88.0f), x)", "x", VECTORS, "exp and plain"),
    _vec("log: denormal numbers", "(small & 25)", "(small & 24)", VECTORS, "log and plain"),
    _draw(
        "one random number for all blocks",
        "random[g % BLOCK] * reached",
        "random[0] * reached",
        "torch_backend",
    ),
    _draw("blocks chosen without the running sum", "* reached < mass", "* mass < mass", "softmax"),
    _draw(
        "random numbers of a later group from the first",
        "BLOCKS, g / 4, (left",
        "BLOCKS, 0, (left",
        "tails_are_those",
    ),
    _draw(
        "race with the numbers of the first block",
        "TOKENS, first_column / 4,",
        "TOKENS, 0,",
        "torch_backend",
    ),
    _draw(
        "race without its exponentials", "select(none, u, -vlog(rest) * u)", "1.0f", "torch_backend"
    ),
    _draw("1 - u rounded", "weight * taken)", "weight * u)", "precision"),
    _draw("step left out", "c3 = vq{} + (law.step & low)", "c3 = vq{}", "torch_backend"),
    _draw(
        "upper half of the key left out",
        "c2 = vq{} + (row >> 32)",
        "c2 = vq{}",
        "(torch_backend or steps)",
    ),
    _draw(
        "ties to the highest id", "if (found < 0 && any(x == peak))", "if (any(x == peak))", "ties"
    ),
    _draw(
        "lanes beyond the last column",
        "columns.tail(begin + v, n - v)",
        "vmax(columns.tail(begin + v, n - v), all(9.0f))",
        "every_length",
    ),
    _draw(
        "mask column of a later block counted",
        "if (row.mask >= begin && row.mask",
        "if (begin == 0 && row.mask >= begin && row.mask",
        "mask_column",
    ),
    _draw(
        "raw probability at the drawing temperature",
        "if (!tempered) raw = s.total;",
        "raw = s.total;",
        "every_option",
    ),
    _draw("temperature of the first row", "a.temperature[r]", "a.temperature[0]", "every_option"),
    _draw(
        "guidance without its 1", "a.guidance[i * C + c] + 1.0f", "a.guidance[i * C + c]", "option"
    ),
    _draw(
        "excluded tokens return with guidance",
        "select(given == -INF, given, y + scale * (given - y))",
        "y + scale * (given - y)",
        "excluded",
    ),
    _draw(
        "entropy without its weights",
        "vmax(gap, all(-1e5f)) * e;",
        "vmax(gap, all(-1e5f));",
        "every_option",
    ),
    _draw(
        "margin at temperature 1", "(second - s.shift) / T", "(second - s.shift)", "every_option"
    ),
    Mutation(
        "draw: strips not scaled to the largest logit",
        "kernels/cpu/draw.h",
        "blocks.total[g] * blocks.factor[g / (STRIP / BLOCK)]",
        "blocks.total[g]",
        PASSES,
        "draws_of_every_width and plain and 2050",
    ),
    Mutation(
        "draw: largest logit of the strip before",
        "kernels/cpu/draw.h",
        "columns.logits(v + i * W + STRIP), best",
        "columns.logits(v + i * W), best",
        PASSES,
        "draws_of_every_width and plain and 2050",
    ),
    Mutation(
        "draw: entropy of a strip at temperature 1",
        "kernels/cpu/draw.h",
        "blocks.total[g] * scaled;",
        "blocks.total[g] * gap;",
        PASSES,
        "draws_of_every_width and plain and 2050",
    ),
    _mixture(
        "targets drawn with the key of another position",
        "i64 key = (b * C + c) * D + d;",
        "i64 key = (b * C + c) * D;",
        "may_be_heads",
    ),
    Mutation(
        "strips of the drawn rows not scaled to the largest logit",
        "kernels/cpu/mixture.h",
        "draws ? inverse * blocks.factor[v / STRIP] : inverse",
        "inverse",
        PASSES,
        "draw_their_targets and plain and 2050",
    ),
    _logistic(
        "slope of the other tail",
        "{by_left - by_right,",
        "{by_left + by_right,",
        "every_head",
    ),
    _logistic(
        'clamp "min" like "left"',
        "return both ? e.left + e.right >= 0.0f : vi{};",
        "return vi{};",
        "every_head",
    ),
    _logistic(
        "eps left out of the exponentials",
        "(select(up, below, above) * mass + eps)",
        "(select(up, below, above) * mass)",
        "every_head",
    ),
    _logistic(
        "slope of the width",
        "- width * by_width",
        "",
        "every_head",
    ),
    _rows(
        "bins beyond the last counted",
        "return first(count, whole(v), 0.0f);",
        "return whole(v);",
        LOSS,
        "cpu and every_head",
    ),
    Mutation(
        "threads: the last share left out",
        "kernels/cpu/library.cpp",
        "if (first >= region.slots) break;",
        "if (first + region.batch > region.slots) break;",
        LOSS,
        "cpu and settings",
    ),
    Mutation(
        "threads share their scratch memory",
        "kernels/cpu/library.cpp",
        "  char* scratch = nullptr;",
        "  static char* scratch = nullptr;",
        PASSES,
        "threads",
    ),
    Mutation(
        "scratch memory without the exponentials",
        "kernels/cpu/mixture.h",
        "e = arena.floats(N * stride);",
        "e = arena.floats(0);",
        PASSES,
        "every_width",
    ),
    _rows(
        "streamed rows without their end",
        "  memcpy(to + v, from + v, bytes - v);",
        "",
        PASSES,
        "large_gradients",
    ),
    _rows(
        "streamed rows in the dtype of the sums",
        "for (; dtype != FP32 && v < n; v += W)",
        "for (; dtype == 9 && v < n; v += W)",
        PASSES,
        "large_gradients",
    ),
    Mutation(
        "memory that is used again is not cleared",
        "kernels/cpu/mixture.h",
        "for (i64 at = 0; streams && at < bytes;",
        "for (i64 at = 0; streams && at < 0;",
        PASSES,
        "large_gradients",
    ),
    Mutation(
        "draw: of stored blocks the first one raced",
        "kernels/cpu/draw.h",
        "stored + first_column",
        "stored",
        PASSES,
        "draw_their_targets",
    ),
]
