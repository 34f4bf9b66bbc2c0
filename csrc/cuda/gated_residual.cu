// y = x + update * gate, with each token's row of a table of gates.
//
// Memory traffic per token: forward reads x and update and writes y; backward reads the gradient twice and update once,
// and writes the gradient of update.
#include "device.cuh"

namespace megavid {
namespace cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) forward(GatedResidual job) {
  const int64_t token = blockIdx.x, width = job.width;
  const T* x = row_of<T>(job.x, token, width);
  const T* update = row_of<T>(job.update, token, width);
  const float* gate = job.gate + checked(job.row[token], job.rows) * width;
  T* y = row_of<T>(job.y, token, width);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) store(y + i, load(x[i]) + load(update[i]) * gate[i]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward(GatedResidual job) {
  const int64_t token = blockIdx.x, width = job.width;
  const T* grad_y = row_of<T>(job.grad_y, token, width);
  const float* gate = job.gate + checked(job.row[token], job.rows) * width;
  T* grad_update = row_of<T>(job.grad_update, token, width);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) store(grad_update + i, load(grad_y[i]) * gate[i]);
}

template <typename T>
struct Terms {
  GatedResidual job;
  __device__ void operator()(int64_t token, int64_t column, float* found) const {
    const float grad = load(row_of<T>(job.grad_y, token, job.width)[column]);
    found[0] = grad * load(row_of<T>(job.update, token, job.width)[column]);
  }
};

template <typename T>
cudaError_t run_forward(const GatedResidual& job, int64_t tokens, cudaStream_t stream) {
  return launch(forward<T>, tokens, stream, job);
}

template <typename T>
cudaError_t run_backward(const GatedResidual& job, const Sums& sums, cudaStream_t stream) {
  if (const cudaError_t error = launch(backward<T>, sums.tokens, stream, job)) return error;
  const Tables<1> tables{{{job.row, job.rows, job.run_gate}}};
  return launch_sums(Terms<T>{job}, tables, sums, job.width, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace megavid

MEGAVID_ENTRY(gated_residual_forward, GatedResidual, run_forward)
MEGAVID_ENTRY_SUMS(gated_residual_backward, GatedResidual, run_backward)
