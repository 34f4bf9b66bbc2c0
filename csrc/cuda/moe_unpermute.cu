// The weighted sum of each token's rows; backward, each row's share of its token's gradient, and its weight's.
//
// Memory traffic: forward reads the rows and writes the tokens; backward reads a token for each of its rows and writes
// the rows, and reads the rows again where weights take a gradient.
#include "rows.cuh"

using megavid::cuda::BFloat16;

cudaError_t megavid_cuda_moe_unpermute_forward(const megavid::MoeRows* job, int64_t tokens, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  return job->is_bf16 ? megavid::cuda::launch_combine<BFloat16>(*job, tokens, stream)
                      : megavid::cuda::launch_combine<float>(*job, tokens, stream);
}

cudaError_t megavid_cuda_moe_unpermute_backward(const megavid::MoeRows* job, int64_t rows, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return job->is_bf16 ? megavid::cuda::launch_gather<BFloat16>(*job, rows, stream)
                      : megavid::cuda::launch_gather<float>(*job, rows, stream);
}
