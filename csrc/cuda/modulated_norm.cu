// LayerNorm (or RMSNorm) over the width, then * (1 + scale) + shift with each token's row of a table.
//
// Memory traffic per token: forward reads x and writes y; backward reads x and grad_y twice (for the token, and for the
// columns of the tables) and writes grad_x.
#include "device.cuh"

namespace megavid {
namespace cuda {
namespace {

template <typename T, bool kCentered>
__global__ void __launch_bounds__(kThreads) forward(ModulatedNorm job) {
  const int64_t token = blockIdx.x, width = job.width;
  const T* x = row_of<T>(job.x, token, width);
  T* y = row_of<T>(job.y, token, width);
  const int64_t row = checked(job.row[token], job.rows);
  const float *shift = job.shift + row * width, *scale = job.scale + row * width;
  const Moments m = moments<T, kCentered>(x, width, job.eps);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    store(y + i, (load(x[i]) - m.mean) * m.rstd * (1.0f + scale[i]) + shift[i]);
  }
  if (threadIdx.x == 0) {
    job.mean[token] = m.mean;
    job.rstd[token] = m.rstd;
  }
}

template <typename T, bool kCentered>
__global__ void __launch_bounds__(kThreads) backward(ModulatedNorm job) {
  const int64_t token = blockIdx.x, width = job.width;
  const T* x = row_of<T>(job.x, token, width);
  const T* grad_y = row_of<T>(job.grad_y, token, width);
  T* grad_x = row_of<T>(job.grad_x, token, width);
  const float* scale = job.scale + checked(job.row[token], job.rows) * width;
  const float mean = job.mean[token], rstd = job.rstd[token];
  const Means m = inner_means<T, kCentered>(x, grad_y, scale, mean, rstd, width);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const float inner = load(grad_y[i]) * (1.0f + scale[i]);
    store(grad_x + i, rstd * (inner - m.inner - (load(x[i]) - mean) * rstd * m.product));
  }
}

// What a token adds to the gradients of shift and scale.
template <typename T>
struct Terms {
  ModulatedNorm job;
  __device__ void operator()(int64_t token, int64_t column, float* found) const {
    const float grad = load(row_of<T>(job.grad_y, token, job.width)[column]);
    found[0] = grad;
    found[1] = grad * (load(row_of<T>(job.x, token, job.width)[column]) - job.mean[token]) * job.rstd[token];
  }
};

template <typename T>
cudaError_t run_forward(const ModulatedNorm& job, int64_t tokens, cudaStream_t stream) {
  return launch(job.is_centered ? forward<T, true> : forward<T, false>, tokens, stream, job);
}

template <typename T>
cudaError_t run_backward(const ModulatedNorm& job, const Sums& sums, cudaStream_t stream) {
  const auto kernel = job.is_centered ? backward<T, true> : backward<T, false>;
  if (const cudaError_t error = launch(kernel, sums.tokens, stream, job)) return error;
  const Tables<2> tables{{{job.row, job.rows, job.run_shift}, {job.row, job.rows, job.run_scale}}};
  return launch_sums(Terms<T>{job}, tables, sums, job.width, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace megavid

MEGAVID_ENTRY(modulated_norm_forward, ModulatedNorm, run_forward)
MEGAVID_ENTRY_SUMS(modulated_norm_backward, ModulatedNorm, run_backward)
