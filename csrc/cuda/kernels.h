// The CUDA kernels with a C ABI: no torch in here, nor in what implements it, so that nvcc compiles them in seconds and
// ctypes can call them. Each returns what the launch returned; all work on the given stream and wait for nothing.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/jobs.h"

namespace megavid {

// How gradients of tables are summed: tokens are cut into chunks, a thread adds up one column of one chunk, and the
// caller adds the chunks. No atomics: the order depends on shapes and rows alone.
struct Sums {
  int64_t tokens;        // T
  int64_t chunk_tokens;  // tokens of a chunk; the last chunk has what is left
  // [T] each, written by the kernel of the tokens and read by that of the tables; null where a kernel needs none.
  float* mean_inner;
  float* mean_product;
};

}  // namespace megavid

// The jobs' run_shift, run_scale, run_gate and run_weight are [chunks, rows, D] here, zeroed by the caller;
// run_start is not read.
extern "C" {
cudaError_t megavid_cuda_modulated_norm_forward(const megavid::ModulatedNorm*, int64_t tokens, cudaStream_t);
cudaError_t megavid_cuda_modulated_norm_backward(const megavid::ModulatedNorm*, const megavid::Sums*, cudaStream_t);
cudaError_t megavid_cuda_gated_residual_norm_forward(const megavid::GatedResidualNorm*, int64_t tokens, cudaStream_t);
cudaError_t megavid_cuda_gated_residual_norm_backward(const megavid::GatedResidualNorm*, const megavid::Sums*,
                                                      cudaStream_t);
cudaError_t megavid_cuda_gated_residual_forward(const megavid::GatedResidual*, int64_t tokens, cudaStream_t);
cudaError_t megavid_cuda_gated_residual_backward(const megavid::GatedResidual*, const megavid::Sums*, cudaStream_t);
cudaError_t megavid_cuda_sum_of_squares_forward(const megavid::SumOfSquares*, int64_t tokens, cudaStream_t);
cudaError_t megavid_cuda_sum_of_squares_backward(const megavid::SumOfSquares*, int64_t tokens, cudaStream_t);
cudaError_t megavid_cuda_norm_rope_forward(const megavid::NormRope*, int64_t tokens, cudaStream_t);
cudaError_t megavid_cuda_norm_rope_backward(const megavid::NormRope*, const megavid::Sums*, cudaStream_t);
cudaError_t megavid_cuda_expert_activation_forward(const megavid::ExpertActivation*, int64_t rows, cudaStream_t);
cudaError_t megavid_cuda_expert_activation_fp8(const megavid::ExpertActivationFp8*, int64_t rows, cudaStream_t);
// Sums: its tokens are rows.
cudaError_t megavid_cuda_expert_activation_backward(const megavid::ExpertActivation*, const megavid::Sums*,
                                                    cudaStream_t);
cudaError_t megavid_cuda_moe_index(const megavid::MoeIndex*, cudaStream_t);
cudaError_t megavid_cuda_moe_scatter_gates(const megavid::MoeIndex*, cudaStream_t);
cudaError_t megavid_cuda_moe_gather(const megavid::MoeRows*, int64_t rows, cudaStream_t);
cudaError_t megavid_cuda_moe_combine(const megavid::MoeRows*, int64_t tokens, cudaStream_t);
cudaError_t megavid_cuda_router_topk_forward(const megavid::RouterTopk*, cudaStream_t);
cudaError_t megavid_cuda_router_topk_backward(const megavid::RouterTopk*, cudaStream_t);
// Blocks of kAmaxNumbers numbers.
cudaError_t megavid_cuda_fp8_amax(const megavid::QuantizeFp8*, int64_t blocks, cudaStream_t);
cudaError_t megavid_cuda_quantize_fp8(const megavid::QuantizeFp8*, int64_t blocks, cudaStream_t);
cudaError_t megavid_cuda_quantize_fp8_tiles(const megavid::QuantizeFp8Tiles*, cudaStream_t);
}
