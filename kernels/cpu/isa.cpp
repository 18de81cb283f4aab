// The passes for one instruction set; compiled once for each, with DI4C_ISA as its name.
#include "draw.h"
#include "isa.h"
#include "joint.h"
#include "mixture.h"

namespace {

i64 mixture_scratch(const void* pass, bool forward) {
  const MixturePass& a = *(const MixturePass*)pass;
  return Slot::scratch_bytes(a, forward && stores_exponentials(a));
}

void map(i64 which, const float* x, float* y, i64 n) {
  for (i64 v = 0; v < n; v += W) {
    vf value = n - v >= W ? load(x + v) : load_tail<Fp32>(x + v, (int)(n - v), 0.0f);
    value = which == 0 ? vexp(value) : which == 1 ? vexp_any(value) : vlog(value);
    if (n - v >= W) store(y + v, value);
    else store_tail<Fp32>(y + v, value, (int)(n - v));
  }
}

}  // namespace

extern const Functions DI4C_ISA;
const Functions DI4C_ISA = {forward_slot, backward_slot, clear_slot,      draw_slot,    joint_slot,
                            loss_slot,    factors_slot,  mixture_scratch, draw_scratch, map};
