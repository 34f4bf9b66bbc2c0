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
  int64_t rows;            // R
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
  int64_t gate_rows;         // G; 0 without a gate
  bool is_bf16;              // of all but the tables
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
  int64_t rows;              // G
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

// One call of expert_activation over S rows: y = activation(up + bias) * probability.
struct ExpertActivation {
  const void* up;           // [S, M], fp32 or bf16
  const void* gate;         // [S, M], or null: GELU-tanh of up; else SiLU of gate, times up
  const void* up_bias;      // [e, M] dtype of up, or null
  const void* gate_bias;    // [e, M] likewise
  const int64_t* expert;    // [S], in [0, e); read where there is a bias
  const float* probability;  // [S]
  void* y;                  // [S, M] forward
  const void* grad_y;       // [S, M] backward
  void* grad_up;            // [S, M] backward
  void* grad_gate;          // [S, M] backward, where there is a gate
  float* grad_probability;  // [S] backward
  const int64_t* run_start;  // [runs + 1]: a run is a stretch of rows of one expert
  float* run_up;            // [runs, M] gradient of up_bias, or null
  float* run_gate;          // [runs, M] gradient of gate_bias, or null
  int64_t experts;          // e; 0 without a bias
  int64_t width;            // M
  bool is_bf16;
};

// One call of expert_activation_fp8: y of ExpertActivation rounded to e4m3, with a scale for each tile of a row.
struct ExpertActivationFp8 {
  ExpertActivation activation;  // y is not written
  uint8_t* data;                // [S, M]
  float* scale;                 // [S, ceil(M / tile)], or null:
  uint8_t* scale_byte;          // its exponent instead, as e8m0
  int64_t tile;                 // 32, 64 or 128
  bool is_bf16;                 // what y is rounded to before
};

// One call of moe_permute or moe_unpermute: S rows sorted by expert, and the T tokens that they are of.
struct MoeRows {
  const int64_t* token;   // [S] token of each row, -1: a row that only fills up
  const int64_t* first;   // [T + 1] where a token's rows begin in row
  const int64_t* row;     // [S] the rows of token after token
  const float* weight;    // [S] factor of each row, or null: 1
  const void* from;       // [T, D] where rows are written, [S, D] where tokens are; fp32 or bf16
  void* to;               // [S, D], [T, D]
  const void* x;          // [S, D] the rows whose weights take a gradient, or null
  float* grad_weight;     // [S] that gradient
  int64_t width;          // D
  bool is_bf16;
};

// Where every row stands, as kernels on a GPU find it out: by chunks of kIndexTokens tokens.
struct MoeIndex {
  const bool* map;           // [T, E]
  const float* probability;  // [T, E]
  int64_t* token;            // [S], -1 at first
  int64_t* first;            // [T + 1], given: from the counts of each token's experts
  int64_t* row;              // [S], -1 at first
  int64_t* rows_of_expert;   // [E]
  int64_t* begin_of_expert;  // [E] scratch
  int64_t* chunk_row;        // [chunks, E] scratch
  int32_t* row_of_pair;      // [T, E] scratch
  float* row_probability;    // [S], zero at first
  const float* grad_row_probability;  // [S] backward
  float* grad_probability;   // [T, E] backward, zero at first
  int64_t tokens;            // T
  int64_t experts;           // E
  int64_t num_rows;          // S; a GPU stops where the map needs more
  int64_t alignment;
};

constexpr int64_t kIndexTokens = 256;

// One call of router_topk over T tokens.
struct RouterTopk {
  const float* scores;     // [T, E]
  const float* bias;       // [E], or null
  const int64_t* bucket;   // [T] noise bucket, -1: padding, which goes nowhere
  float* probability;      // [T, E] forward
  bool* map;               // [T, E] written forward, read backward
  float* counts;           // [chunks, Q, E] forward, zeroed by the caller; CUDA: [Q, E]
  const float* grad;       // [T, E] backward
  float* grad_scores;      // [T, E] backward
  int64_t tokens;          // T
  int64_t experts;         // E
  int64_t buckets;         // Q
  int64_t top_k;
  int64_t num_groups;
  int64_t top_groups;
  float scale;             // factor on the gates
};

// Tokens of a chunk whose counts one thread of a CPU adds up.
constexpr int64_t kCountTokens = 1024;

// Added to a sum of scores before it divides; megavid.ops.moe_math.SMALLEST_SUM.
constexpr float kSmallestSum = 1e-20f;

// One call of fp8_amax or quantize_fp8 over n numbers, in the order they stand in memory.
struct QuantizeFp8 {
  const void* x;       // [n], fp32 or bf16
  const float* scale;  // [1] a power of two
  uint8_t* data;       // [n] bytes of e4m3 or e5m2
  float* amax;         // [chunks] largest magnitude of each kAmaxNumbers numbers
  int64_t numbers;     // n
  bool is_bf16;
  bool is_e5m2;
};

constexpr int64_t kAmaxNumbers = 16384;

// One call of quantize_fp8_tiles over B matrices of H rows of W numbers, as they stand in memory.
struct QuantizeFp8Tiles {
  const void* x;         // [B, H, W] with matrices x_matrix and rows x_row apart, fp32 or bf16
  int64_t x_matrix;
  int64_t x_row;
  uint8_t* data;         // [B, H, W], or transposed [B, W, H]
  float* scale;          // [B, ceil(H / tile_rows), ceil(W / tile_columns)], transposed likewise; or null:
  uint8_t* scale_byte;   // its exponent instead, as e8m0
  int64_t matrices;      // B
  int64_t rows;          // H
  int64_t width;         // W
  int64_t tile_rows;     // each a power of two, kTileSide at most
  int64_t tile_columns;
  bool is_transposed;    // write the transposed matrices
  bool is_bf16;
  bool is_e5m2;
};

constexpr int64_t kTileSide = 128;

}  // namespace megavid
