// Sum of the squares of each token's numbers, in fp32: what RMSNorm across heads adds up between ranks.
#include "device.cuh"

namespace megavid {
namespace cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) forward(SumOfSquares job) {
  const int64_t token = blockIdx.x;
  const T* x = row_of<T>(job.x, token, job.x_stride);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < job.width; i += kThreads) {
    const float value = load(x[i]);
    sum += value * value;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) job.sums[token] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward(SumOfSquares job) {
  const int64_t token = blockIdx.x;
  const T* x = row_of<T>(job.x, token, job.x_stride);
  T* grad_x = row_of<T>(job.grad_x, token, job.width);
  const float grad = 2.0f * job.grad[token];
  for (int64_t i = threadIdx.x; i < job.width; i += kThreads) store(grad_x + i, grad * load(x[i]));
}

template <typename T>
cudaError_t run_forward(const SumOfSquares& job, int64_t tokens, cudaStream_t stream) {
  return launch(forward<T>, tokens, stream, job);
}

template <typename T>
cudaError_t run_backward(const SumOfSquares& job, int64_t tokens, cudaStream_t stream) {
  return launch(backward<T>, tokens, stream, job);
}

}  // namespace
}  // namespace cuda
}  // namespace megavid

MEGAVID_ENTRY(sum_of_squares_forward, SumOfSquares, run_forward)
MEGAVID_ENTRY(sum_of_squares_backward, SumOfSquares, run_backward)
