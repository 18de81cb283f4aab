// The plain C interface of the passes: what di4c_fast/passes/cpu.py fills in. The words are those
// of di4c_fast/passes/base.py. Arrays are contiguous but for the rows of operands; statistics are
// fp32, addressed by slot first + i for i < slots; sizes and strides count elements.
#pragma once

#include <cstdint>

struct Operand {  // rows of logits, or of their gradient; data is null where there is none
  char* data;
  int64_t stride_i, stride_b, stride_c, stride_d;
  int64_t components;
  int64_t dtype;  // Dtype of vec.h
  // Of bins of a logistic: data holds mu, one number per row, and log_scale lies alike.
  char* log_scale;
  double eps;
  int64_t both;  // clamp "min"
};

struct Visit {
  const int64_t* rows;  // flat position of every slot; null: slot s is position s
  int64_t first, slots, positions;
  int64_t threads;
};

struct Sums {  // [A, C]
  float *shift, *total;
};

struct Kept {  // rows of q, those of slots 0 .. count - 1
  float* data;
  int64_t count, stride;
};

struct Mixture {
  int64_t vocabulary;
  int64_t mask_id;            // -1: none
  const int64_t* xu;          // [B, K, D] or null
  const float* log_weights;   // [B, N]
  const float *teacher_weight, *consistency_weight;  // [B]
  int64_t marginal, component;
  int64_t sums_known;   // of u,
  int64_t all_known;    // and of all rows: `forward` finds none
  int64_t draws, seed;  // forward draws the last K target rows from u
};

struct Statistics {
  int64_t* tokens;  // [B, J, D]
  int64_t targets;        // J
  Sums student, teacher, consistency;
  float* log_prob;                        // [A, J, N]
  float* mass;                            // [A, N]
  float *teacher_kl, *consistency_kl;     // [A]
  float* divergence;                      // [A, N]
  Kept q, q_teacher;
};

struct Factors {
  const float* probability;  // [A, N]
  const float* marginal;     // [A]
  const float* component;    // [A, N]
  const float* kappa;        // [A, J, N]
};

struct MixturePass {
  Operand z, t, u, gradient;
  Visit visit;
  Mixture mixture;
  Statistics statistics;
  Factors factors;
};

struct ClearPass {
  Operand gradient;
  Visit visit;
  int64_t vocabulary;
};

struct DrawPass {  // one draw for each of the R rows, by slot, then by component
  Operand x, y;    // y: unconditional logits of guidance
  Visit visit;
  int64_t vocabulary, mask_id, seed, step;
  int64_t wanted;  // Wanted of draw.h
  const int64_t* keys;
  const float *temperature, *guidance;
  int64_t *token, *argmax;
  float *shift, *total, *log_weight, *entropy, *margin, *raw_prob;
};

struct Terms {  // what the joint terms and the factors of the gradient know of a problem
  const int64_t* rows;  // flat position of every slot, ascending; null: slot s is position s
  int64_t slots, positions, batch, targets, components, teachers, threads;
  const float* log_weights;  // [B, N]
  const float *data_weight, *teacher_weight, *consistency_weight, *component_weight;  // [B]
  // Of statistics: log_prob [A, J, N], and [A, N] each but for the KL terms [A] and the sums of the
  // teacher's M rows [A, M]. Null where they are not asked for.
  const float *log_prob, *total, *mass, *teacher_kl, *consistency_kl, *divergence, *teacher_total;
  int64_t correlation;
};

// One task for each example and target row, and one more per example for what is a sum over
// positions. Without data_weight there is no loss.
struct JointPass {
  Terms terms;
  float *rows, *loss, *component, *teacher_kl, *consistency_kl;  // [B, J], and [B] each
  float *difference, *weights, *counted;                         // [A, J, N], [B, J, N], [B, J]
};

struct FactorsPass {
  Terms terms;
  const float* difference;               // [A, J, N]
  const float *rows_gradient, *gradient;  // [B, J], and [B] of the loss; null: 0
  float *probability, *marginal, *component, *kappa;  // those of `Factors`
};
