// RMSNorm of queries or keys, given their sum of squares, then rotation of neighbouring pairs by 3D RoPE's angles.
//
// Memory traffic per token: forward reads x and writes y; backward reads x and grad_y twice (for the token, and for the
// columns of the weight) and writes grad_x.
#include "device.cuh"

namespace megavid {
namespace cuda {
namespace {

__device__ inline float scale_of(const NormRope& job, int64_t token) {
  return 1.0f / sqrtf(job.sums[token] / job.norm_width + job.eps);
}

// A thread works on pairs, so that it rotates what it has read.
template <typename T>
__global__ void __launch_bounds__(kThreads) forward(NormRope job) {
  const int64_t token = blockIdx.x, half = job.head_size / 2;
  const T* x = row_of<T>(job.x, token, job.x_stride);
  T* y = row_of<T>(job.y, token, job.width);
  const float scale = scale_of(job, token);
  for (int64_t pair = threadIdx.x; pair < job.width / 2; pair += kThreads) {
    const float cosine = job.cosine[token * half + pair % half], sine = job.sine[token * half + pair % half];
    const float even = load(x[2 * pair]) * scale * job.weight[2 * pair];
    const float odd = load(x[2 * pair + 1]) * scale * job.weight[2 * pair + 1];
    store(y + 2 * pair, even * cosine - odd * sine);
    store(y + 2 * pair + 1, even * sine + odd * cosine);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) backward(NormRope job) {
  const int64_t token = blockIdx.x, half = job.head_size / 2;
  const T* x = row_of<T>(job.x, token, job.x_stride);
  const T* grad_y = row_of<T>(job.grad_y, token, job.width);
  T* grad_x = row_of<T>(job.grad_x, token, job.width);
  const float scale = scale_of(job, token);
  float grad_scale = 0.0f;
  for (int64_t pair = threadIdx.x; pair < job.width / 2; pair += kThreads) {
    const float cosine = job.cosine[token * half + pair % half], sine = job.sine[token * half + pair % half];
    const int64_t even = 2 * pair, odd = even + 1;
    const float of_even = load(grad_y[even]), of_odd = load(grad_y[odd]);
    const float inner_even = (of_even * cosine + of_odd * sine) * job.weight[even];
    const float inner_odd = (of_odd * cosine - of_even * sine) * job.weight[odd];
    grad_scale += inner_even * load(x[even]) + inner_odd * load(x[odd]);
    store(grad_x + even, inner_even * scale);
    store(grad_x + odd, inner_odd * scale);
  }
  grad_scale = block_sum(grad_scale);
  // scale = (sum / width + eps)^(-1/2)
  if (threadIdx.x == 0) job.grad_sums[token] = grad_scale * -0.5f * scale * scale * scale / job.norm_width;
}

// What a token adds to the gradient of the weight.
template <typename T>
struct Terms {
  NormRope job;
  __device__ void operator()(int64_t token, int64_t column, float* found) const {
    const int64_t half = job.head_size / 2, angle = token * half + column / 2 % half;
    const T* grad_y = row_of<T>(job.grad_y, token, job.width);
    const float of_even = load(grad_y[column & ~int64_t{1}]), of_odd = load(grad_y[column | 1]);
    const float cosine = job.cosine[angle], sine = job.sine[angle];
    const float grad = column & 1 ? of_odd * cosine - of_even * sine : of_even * cosine + of_odd * sine;
    found[0] = grad * load(row_of<T>(job.x, token, job.x_stride)[column]) * scale_of(job, token);
  }
};

template <typename T>
cudaError_t run_forward(const NormRope& job, int64_t tokens, cudaStream_t stream) {
  return launch(forward<T>, tokens, stream, job);
}

template <typename T>
cudaError_t run_backward(const NormRope& job, const Sums& sums, cudaStream_t stream) {
  if (const cudaError_t error = launch(backward<T>, sums.tokens, stream, job)) return error;
  const Tables<1> tables{{{nullptr, 1, job.run_weight}}};
  return launch_sums(Terms<T>{job}, tables, sums, job.width, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace megavid

MEGAVID_ENTRY(norm_rope_forward, NormRope, run_forward)
MEGAVID_ENTRY_SUMS(norm_rope_backward, NormRope, run_backward)
