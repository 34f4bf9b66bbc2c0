// An expert's activation: GELU-tanh of up, or SiLU of gate times up, biases added before and the probability after.
//
// Memory traffic per row: forward reads up (and gate) and writes y; backward reads them and the gradient and writes
// their gradients, which the sums of the biases read again. Forward to eight bits writes a byte and the scales in place
// of y, which stays in registers.
#include "../common/fp8.h"
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
__device__ inline float activated(const T* up, const T* up_bias, const T* gate, const T* gate_bias, int64_t i,
                                  float probability) {
  const float u = with_bias(up, up_bias, i);
  if (!kGated) return u * sigmoid(kTwoRoot * (u + kCubic * u * u * u)).value * probability;
  const float g = with_bias(gate, gate_bias, i);
  return g * sigmoid(g).value * u * probability;
}

template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads) forward(ExpertActivation job) {
  const int64_t row = blockIdx.x, width = job.width;
  const T *up = row_of<T>(job.up, row, width), *up_bias = bias_of<T>(job.up_bias, job, row);
  const T *gate = kGated ? row_of<T>(job.gate, row, width) : nullptr, *gate_bias = bias_of<T>(job.gate_bias, job, row);
  T* y = row_of<T>(job.y, row, width);
  const float probability = job.probability[row];
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    store(y + i, activated<T, kGated>(up, up_bias, gate, gate_bias, i, probability));
  }
}

// One warp a tile: each thread has a number of every 32.
template <typename T, bool kGated>
__global__ void __launch_bounds__(kThreads) forward_fp8(ExpertActivationFp8 all) {
  const ExpertActivation& job = all.activation;
  const int64_t row = blockIdx.x, width = job.width, tiles = (width + all.tile - 1) / all.tile;
  const T *up = row_of<T>(job.up, row, width), *up_bias = bias_of<T>(job.up_bias, job, row);
  const T *gate = kGated ? row_of<T>(job.gate, row, width) : nullptr, *gate_bias = bias_of<T>(job.gate_bias, job, row);
  const float probability = job.probability[row];
  const int lane = threadIdx.x & 31;
  for (int64_t tile = threadIdx.x >> 5; tile < tiles; tile += kWarps) {
    float value[kTileSide / 32];
    int32_t largest = 0;
    for (int k = 0; k < kTileSide / 32; ++k) {
      const int64_t i = tile * all.tile + k * 32 + lane;
      if (k * 32 >= all.tile || i >= width) continue;
      T narrow;
      store(&narrow, activated<T, kGated>(up, up_bias, gate, gate_bias, i, probability));
      value[k] = load(narrow);
      largest = max(largest, magnitude_of(value[k]));
    }
    const int32_t exponent = exponent_of<E4M3>(__reduce_max_sync(0xffffffffu, largest));
    const float inverse = inverse_of(exponent);
    for (int k = 0; k < kTileSide / 32; ++k) {
      const int64_t i = tile * all.tile + k * 32 + lane;
      if (k * 32 >= all.tile || i >= width) continue;
      all.data[row * width + i] = static_cast<uint8_t>(byte_of<E4M3>(value[k] * inverse));
    }
    if (lane != 0) continue;
    if (all.scale != nullptr) {
      all.scale[row * tiles + tile] = scale_of(exponent);
    } else {
      all.scale_byte[row * tiles + tile] = static_cast<uint8_t>(exponent);
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
cudaError_t run_fp8(const ExpertActivationFp8& job, int64_t rows, cudaStream_t stream) {
  return launch(job.activation.gate != nullptr ? forward_fp8<T, true> : forward_fp8<T, false>, rows, stream, job);
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
MEGAVID_ENTRY(expert_activation_fp8, ExpertActivationFp8, run_fp8)
MEGAVID_ENTRY_SUMS(expert_activation_backward, ExpertActivation, run_backward)
