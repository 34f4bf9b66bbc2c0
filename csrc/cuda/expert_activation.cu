// An expert's activation: GELU-tanh of up, or SiLU of gate times up, biases added before and the probability after.
//
// Memory traffic per row: forward reads up (and gate) and writes y; backward reads them and the gradient and writes
// their gradients, which the sums of the biases read again.
#include "device.cuh"

namespace megavid {
namespace cuda {
namespace {

// As csrc/cpu/expert_activation.cpp.
constexpr float kTwoRoot = 2 * 0.7978845608028654f, kCubic = 0.044715f;

struct Sigmoid {
  float value;
  float rest;
};

__device__ inline Sigmoid sigmoid(float x) {
  const float e = expf(fminf(-x, 88.0f));
  const float value = 1.0f / (1.0f + e);
  return {value, e * value};
}

template <typename T>
__device__ inline float with_bias(const T* x, const T* bias, int64_t i) {
  return load(x[i]) + (bias == nullptr ? 0.0f : load(bias[i]));
}

template <typename T>
__device__ inline const T* bias_of(const void* table, const ExpertActivation& job, int64_t row) {
  return table == nullptr ? nullptr : row_of<T>(table, checked(job.expert[row], job.experts), job.width);
}

template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads) forward(ExpertActivation job) {
  const int64_t row = blockIdx.x, width = job.width;
  const T *up = row_of<T>(job.up, row, width), *up_bias = bias_of<T>(job.up_bias, job, row);
  const T *gate = kGated ? row_of<T>(job.gate, row, width) : nullptr, *gate_bias = bias_of<T>(job.gate_bias, job, row);
  T* y = row_of<T>(job.y, row, width);
  const float probability = job.probability[row];
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const float u = with_bias(up, up_bias, i);
    if (kGated) {
      const float g = with_bias(gate, gate_bias, i);
      store(y + i, g * sigmoid(g).value * u * probability);
    } else {
      store(y + i, u * sigmoid(kTwoRoot * (u + kCubic * u * u * u)).value * probability);
    }
  }
}

template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads) backward(ExpertActivation job) {
  const int64_t row = blockIdx.x, width = job.width;
  const T *up = row_of<T>(job.up, row, width), *up_bias = bias_of<T>(job.up_bias, job, row);
  const T *gate = kGated ? row_of<T>(job.gate, row, width) : nullptr, *gate_bias = bias_of<T>(job.gate_bias, job, row);
  const T* grad_y = row_of<T>(job.grad_y, row, width);
  T* grad_up = row_of<T>(job.grad_up, row, width);
  T* grad_gate = kGated ? row_of<T>(job.grad_gate, row, width) : nullptr;
  const float probability = job.probability[row];
  float product = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const float u = with_bias(up, up_bias, i), grad = load(grad_y[i]);
    if (kGated) {
      const float g = with_bias(gate, gate_bias, i);
      const Sigmoid s = sigmoid(g);
      product += grad * g * s.value * u;
      store(grad_up + i, grad * probability * g * s.value);
      store(grad_gate + i, grad * probability * u * s.value * (1.0f + g * s.rest));
    } else {
      const Sigmoid s = sigmoid(kTwoRoot * (u + kCubic * u * u * u));
      const float slope = s.value + u * s.value * s.rest * kTwoRoot * (1.0f + 3 * kCubic * u * u);
      product += grad * u * s.value;
      store(grad_up + i, grad * probability * slope);
    }
  }
  const float total = block_sum(product);
  if (threadIdx.x == 0) job.grad_probability[row] = total;
}

// What a row adds to the gradient of a bias: its gradient as it was written.
template <typename T>
struct Terms {
  const void* grad;
  int64_t width;
  __device__ void operator()(int64_t row, int64_t column, float* found) const {
    found[0] = load(row_of<T>(grad, row, width)[column]);
  }
};

template <typename T>
cudaError_t run_forward(const ExpertActivation& job, int64_t rows, cudaStream_t stream) {
  return launch(job.gate != nullptr ? forward<T, true> : forward<T, false>, rows, stream, job);
}

template <typename T>
cudaError_t run_backward(const ExpertActivation& job, const Sums& sums, cudaStream_t stream) {
  const auto kernel = job.gate != nullptr ? backward<T, true> : backward<T, false>;
  if (const cudaError_t error = launch(kernel, sums.tokens, stream, job)) return error;
  if (job.run_up != nullptr) {
    const Tables<1> table{{{job.expert, job.experts, job.run_up}}};
    const cudaError_t error = launch_sums(Terms<T>{job.grad_up, job.width}, table, sums, job.width, stream);
    if (error != cudaSuccess) return error;
  }
  if (job.run_gate == nullptr) return cudaSuccess;
  const Tables<1> table{{{job.expert, job.experts, job.run_gate}}};
  return launch_sums(Terms<T>{job.grad_gate, job.width}, table, sums, job.width, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace megavid

MEGAVID_ENTRY(expert_activation_forward, ExpertActivation, run_forward)
MEGAVID_ENTRY_SUMS(expert_activation_backward, ExpertActivation, run_backward)
