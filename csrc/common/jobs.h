// What a kernel is given, on CPU and CUDA alike: raw pointers, sizes, formats. No torch in here.
#pragma once

#include <cstdint>

namespace megavid {

// Tokens of a run: a stretch of tokens of one table row whose gradients are summed in order.
// (CUDA sums by chunks of tokens instead, and writes [chunks, R, D] where [runs, D] stands below.)
constexpr int64_t kRunTokens = 64;

// One call of modulated_norm over T tokens of a width D. Pointers that a direction does not use may be null.
struct ModulatedNorm {
  const void* x;           // [T, D], fp32 or bf16
  const float* shift;      // [R, D]
  const float* scale;      // [R, D]
  const int64_t* row;      // [T], in [0, R)
  void* y;                 // [T, D] forward
  float* mean;             // [T]; zero for RMSNorm
  float* rstd;             // [T]
  const void* grad_y;      // [T, D] backward
  void* grad_x;            // [T, D] backward
  const int64_t* run_start;  // [runs + 1] first token of each run, then T
  float* run_shift;        // [runs, D] gradient of shift, run by run
  float* run_scale;        // [runs, D]
  int64_t width;           // D
  float eps;
  bool is_centered;        // LayerNorm; false: RMSNorm
  bool is_bf16;            // x, y and their gradients
};

// One call of gated_residual_norm: residual = x + update * gate, then what ModulatedNorm does of the residual.
struct GatedResidualNorm {
  ModulatedNorm norm;        // x is the residual: written in forward, read in backward; grad_x is the stream's gradient
  const void* x;             // [T, D] forward
  const void* update;        // [T, D], dtype of x
  const float* gate;         // [G, D], or null: 1
  const int64_t* gate_row;   // [T]
  void* residual;            // [T, D] forward
  const void* grad_residual;  // [T, D] backward: gradient of the residual from elsewhere
  void* grad_update;         // [T, D] backward
  float* run_gate;           // [runs, D] gradient of gate, run by run; the runs split where either row changes
};

// One call of gated_residual: y = x + update * gate.
struct GatedResidual {
  const void* x;             // [T, D] forward, fp32 or bf16
  const void* update;        // [T, D]
  const float* gate;         // [G, D]
  const int64_t* row;        // [T]
  void* y;                   // [T, D] forward
  const void* grad_y;        // [T, D] backward
  void* grad_update;         // [T, D] backward; the gradient of x is grad_y
  const int64_t* run_start;  // [runs + 1]
  float* run_gate;           // [runs, D]
  int64_t width;             // D
  bool is_bf16;
};

// One call of sum_of_squares over the last dim.
struct SumOfSquares {
  const void* x;       // [T, n] with rows x_stride apart, fp32 or bf16
  int64_t x_stride;
  float* sums;         // [T] forward
  const float* grad;   // [T] backward
  void* grad_x;        // [T, n] backward
  int64_t width;       // n
  bool is_bf16;
};

// One call of norm_rope for q or k: RMSNorm given the sum of squares, times weight, then rotation of pairs.
struct NormRope {
  const void* x;        // [T, n] with rows x_stride apart, fp32 or bf16
  int64_t x_stride;
  const float* sums;    // [T] sum of squares over all numbers of the norm
  const float* weight;  // [n]
  const float* cosine;  // [T, A / 2]
  const float* sine;    // [T, A / 2]
  void* y;              // [T, n] forward
  const void* grad_y;   // [T, n] backward
  void* grad_x;         // [T, n] backward
  float* grad_sums;     // [T] backward
  float* run_weight;    // [runs, n] gradient of weight, by kRunTokens tokens
  int64_t tokens;       // T
  int64_t width;        // n, on this rank
  int64_t head_size;    // A
  float norm_width;     // numbers that the sum is over
  float eps;
  bool is_bf16;
};

}  // namespace megavid
