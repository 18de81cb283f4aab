// The exported functions: which instruction set runs, and the one parallel region of a pass.
#include <cstdlib>
#include <cstring>

#include "isa.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#define DI4C_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// torch_parallel_for of torch's stable C interface: the threads are torch's own.
typedef int32_t (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*),
                               void*);
ParallelFor parallel_for = nullptr;
const Functions* functions = &di4c_plain;

enum Failure { NO_MEMORY = 1, NO_THREADS = 2, DIFFERS = 3 };

struct Region {
  void (*slot)(const void*, int64_t, char*);
  const void* pass;
  int64_t slots, batch, scratch;
  int64_t next;    // the first slot that nobody has taken
  int64_t failed;  // threads that got no memory
};

// While it lives, results below the smallest normal number are 0: they count for nothing, and each
// vector with one would cost as much as 40 others.
struct FlushDenormals {
#if defined(__SSE2__)
  unsigned before = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(before | 0x8000); }
  ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// Threads take slots as they go, so one whose core is busy takes fewer.
void work(int64_t, int64_t, void* context) {
  Region& region = *(Region*)context;
  FlushDenormals flush;
  char* scratch = nullptr;
  for (;;) {
    int64_t first = __atomic_fetch_add(&region.next, region.batch, __ATOMIC_RELAXED);
    if (first >= region.slots) break;
    if (!scratch) {
      scratch = (char*)aligned_alloc(64, (size_t)(region.scratch + 127) / 64 * 64);
      if (!scratch) {
        __atomic_store_n(&region.failed, 1, __ATOMIC_RELAXED);
        break;
      }
    }
    int64_t last = first + region.batch;
    for (int64_t i = first; i < last && i < region.slots; ++i)
      region.slot(region.pass, i, scratch);
  }
  free(scratch);
#if defined(__SSE2__)
  _mm_sfence();  // before others read what was streamed
#endif
}

// Run all slots; `elements` is about how many logits one of them touches. Returns 0 or a Failure.
int32_t run(void (*slot)(const void*, int64_t, char*), const void* pass, int64_t slots,
            int64_t elements, int64_t scratch, int64_t threads) {
  constexpr int64_t share = 1 << 14;  // elements worth taking at a time, some ten microseconds
  int64_t batch = elements < share ? share / (elements + 1) : 1;
  Region region = {slot, pass, slots, batch, scratch, 0, 0};
  int64_t shares = (slots + batch - 1) / batch;
  if (threads > shares) threads = shares;
  if (threads <= 1 || !parallel_for) work(0, 1, &region);
  else if (parallel_for(0, threads, 1, work, &region) != 0) return NO_THREADS;
  return region.failed ? NO_MEMORY : 0;
}

}  // namespace

// Takes torch's parallel_for, and the highest instruction set allowed (0 plain, 1 AVX2,
// 2 AVX-512). Returns the one that this CPU and its operating system run.
DI4C_EXPORT int32_t di4c_start(ParallelFor function, int32_t highest) {
  parallel_for = function;
  functions = &di4c_plain;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (highest >= 2 && avx512) return functions = &di4c_avx512, 2;
  if (highest >= 1 && avx2) return functions = &di4c_avx2, 1;
#endif
  (void)highest;
  return 0;
}

DI4C_EXPORT int32_t di4c_forward(const MixturePass* a, int64_t words) {
  if (words * 8 != sizeof(*a)) return DIFFERS;
  return run(functions->forward, a, a->visit.slots, a->z.components * a->mixture.vocabulary,
             functions->mixture_scratch(a, true), a->visit.threads);
}

DI4C_EXPORT int32_t di4c_backward(const MixturePass* a, int64_t words) {
  if (words * 8 != sizeof(*a)) return DIFFERS;
  return run(functions->backward, a, a->visit.slots, a->z.components * a->mixture.vocabulary,
             functions->mixture_scratch(a, false), a->visit.threads);
}

DI4C_EXPORT int32_t di4c_clear(const ClearPass* a, int64_t words) {
  if (words * 8 != sizeof(*a)) return DIFFERS;
  return run(functions->clear, a, a->visit.slots, a->gradient.components * a->vocabulary, 0,
             a->visit.threads);
}

DI4C_EXPORT int32_t di4c_draw(const DrawPass* a, int64_t words) {
  if (words * 8 != sizeof(*a)) return DIFFERS;
  return run(functions->draw, a, a->visit.slots, a->x.components * a->vocabulary,
             functions->draw_scratch(a), a->visit.threads);
}

DI4C_EXPORT int32_t di4c_joint(const JointPass* a, int64_t words) {
  if (words * 8 != sizeof(*a)) return DIFFERS;
  const Terms& t = a->terms;
  int32_t failure = run(functions->joint, a, t.batch * (t.targets + 1),
                        t.slots / (t.batch + 1) * t.components, 16 * t.components + 1024, t.threads);
  for (int64_t b = 0; !failure && b < t.batch; ++b) functions->loss(a, b, nullptr);
  return failure;
}

DI4C_EXPORT int32_t di4c_factors(const FactorsPass* a, int64_t words) {
  if (words * 8 != sizeof(*a)) return DIFFERS;
  const Terms& t = a->terms;
  return run(functions->factors, a, t.slots, t.targets * t.components, 4 * t.components + 1024,
             t.threads);
}

// y = exp(x) or, with which = 1, log(x) of n numbers.
DI4C_EXPORT void di4c_map(int64_t which, const float* x, float* y, int64_t n) {
  functions->map(which, x, y, n);
}
