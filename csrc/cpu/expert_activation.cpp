// An expert's activation: GELU-tanh of up, or SiLU of gate times up, biases added before and the probability after.
//
// Memory traffic per row: forward reads up (and gate) and writes y; backward reads them and the gradient and writes
// their gradients. The biases of a row's expert stay in the first-level cache. Gradients of the biases are summed run
// by run, as in modulated_norm.cpp.
//
// Forward to eight bits writes a byte and the scales in place of y, of which one row is in the first-level cache.
#include "fp8_tiles.h"
#include "kernels.h"
#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {
namespace {

// A table's row in fp32, fetched when the row changes; zeros where there is no table.
template <typename T>
class BiasRow {
 public:
  BiasRow(const void* table, int64_t width) : table_(static_cast<const T*>(table)), width_(width), wide_(width) {
    for (int64_t i = 0; i < width; ++i) wide_.data()[i] = 0.0f;
  }
  const float* of(const int64_t* expert, int64_t row) {
    if (table_ != nullptr && expert[row] != now_) {
      now_ = expert[row];
      const T* from = table_ + now_ * width_;
      for (int64_t i = 0; i < width_; ++i) wide_.data()[i] = load(from[i]);
    }
    return wide_.data();
  }

 private:
  const T* table_;
  const int64_t width_;
  int64_t now_ = -1;
  Scratch wide_;
};

// GELU-tanh(u) = u * sigmoid(2 z), z = sqrt(2 / pi) (u + 0.044715 u^3).
constexpr float kTwoRoot = 2 * 0.7978845608028654f, kCubic = 0.044715f;

// e^-x / (1 + e^-x) beside 1 / (1 + e^-x): neither loses digits where the other is near 1.
struct Sigmoid {
  float value;
  float rest;
};

inline Sigmoid sigmoid(float x, Range range) {
  const float e = exponential(-x, range);
  const float value = 1.0f / (1.0f + e);
  return {value, e * value};
}

// One row. Not inlined: both outputs come from the same instructions, so that they are the same to the last bit.
template <typename T, bool kGated>
__attribute__((noinline)) void activate(const ExpertActivation& job, int64_t row, Range range, const float* of_up,
                                        const float* of_gate, T* y) {
  const int64_t width = job.width;
  const T* up = static_cast<const T*>(job.up) + row * width;
  const T* gate = kGated ? static_cast<const T*>(job.gate) + row * width : nullptr;
  const float probability = job.probability[row];
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float u = load(up[i]) + of_up[i];
    if (kGated) {
      const float g = load(gate[i]) + of_gate[i];
      store(y + i, g * sigmoid(g, range).value * u * probability);
    } else {
      store(y + i, u * sigmoid(kTwoRoot * (u + kCubic * u * u * u), range).value * probability);
    }
  }
}

template <typename T, bool kGated>
void forward(const ExpertActivation& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  const Range range = exponential_range();
  BiasRow<T> up_bias(job.up_bias, width), gate_bias(job.gate_bias, kGated ? width : 0);
  for (int64_t row = begin; row < end; ++row) {
    const float *of_up = up_bias.of(job.expert, row), *of_gate = kGated ? gate_bias.of(job.expert, row) : nullptr;
    activate<T, kGated>(job, row, range, of_up, of_gate, static_cast<T*>(job.y) + row * width);
  }
}

template <typename T, bool kGated>
void forward_fp8(const ExpertActivationFp8& job, int64_t begin, int64_t end) {
  const int64_t width = job.activation.width, tiles = (width + job.tile - 1) / job.tile;
  const Range range = exponential_range();
  BiasRow<T> up_bias(job.activation.up_bias, width), gate_bias(job.activation.gate_bias, kGated ? width : 0);
  Scratch buffer(width);
  T* y = reinterpret_cast<T*>(buffer.data());
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* expert = job.activation.expert;
    const float *of_up = up_bias.of(expert, row), *of_gate = kGated ? gate_bias.of(expert, row) : nullptr;
    activate<T, kGated>(job.activation, row, range, of_up, of_gate, y);
    for (int64_t first = 0; first < width; first += job.tile) {
      const int64_t numbers = width - first < job.tile ? width - first : job.tile;
      const int64_t place = row * tiles + first / job.tile;
      int32_t exponent = 0;
      find_largest(y + first, 0, 1, numbers, job.tile, &exponent);
      exponent = exponent_of<E4M3>(exponent);
      if (job.scale != nullptr) {
        job.scale[place] = scale_of(exponent);
      } else {
        job.scale_byte[place] = static_cast<uint8_t>(exponent);
      }
      const float inverse = inverse_of(exponent);
      round_numbers<E4M3>(y + first, [=](int64_t) { return inverse; }, job.data + row * width + first, numbers);
    }
  }
}

template <typename T, bool kGated>
void backward(const ExpertActivation& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  const Range range = exponential_range();
  BiasRow<T> up_bias(job.up_bias, width), gate_bias(job.gate_bias, kGated ? width : 0);
  Scratch unused(2 * width);  // sums of a bias that is not there
  for (int64_t run = begin; run < end; ++run) {
    float* sum_up = job.run_up != nullptr ? job.run_up + run * width : unused.data();
    float* sum_gate = job.run_gate != nullptr ? job.run_gate + run * width : unused.data() + width;
    for (int64_t i = 0; i < width; ++i) sum_up[i] = sum_gate[i] = 0.0f;
    for (int64_t row = job.run_start[run]; row < job.run_start[run + 1]; ++row) {
      const T* up = static_cast<const T*>(job.up) + row * width;
      const T* gate = kGated ? static_cast<const T*>(job.gate) + row * width : nullptr;
      const T* grad_y = static_cast<const T*>(job.grad_y) + row * width;
      T* grad_up = static_cast<T*>(job.grad_up) + row * width;
      T* grad_gate = kGated ? static_cast<T*>(job.grad_gate) + row * width : nullptr;
      const float *of_up = up_bias.of(job.expert, row), *of_gate = kGated ? gate_bias.of(job.expert, row) : nullptr;
      const float probability = job.probability[row];
      float product = 0.0f;
#pragma omp simd reduction(+ : product)
      for (int64_t i = 0; i < width; ++i) {
        const float u = load(up[i]) + of_up[i];
        const float grad = load(grad_y[i]);
        if (kGated) {
          const float g = load(gate[i]) + of_gate[i];
          const Sigmoid s = sigmoid(g, range);
          const float slope = s.value * (1.0f + g * s.rest);
          const float to_up = grad * probability * g * s.value;
          const float to_gate = grad * probability * u * slope;
          product += grad * g * s.value * u;
          sum_up[i] += to_up;
          sum_gate[i] += to_gate;
          store(grad_up + i, to_up);
          store(grad_gate + i, to_gate);
        } else {
          const Sigmoid s = sigmoid(kTwoRoot * (u + kCubic * u * u * u), range);
          const float slope = s.value + u * s.value * s.rest * kTwoRoot * (1.0f + 3 * kCubic * u * u);
          const float to_up = grad * probability * slope;
          product += grad * u * s.value;
          sum_up[i] += to_up;
          store(grad_up + i, to_up);
        }
      }
      job.grad_probability[row] = product;
    }
  }
}

template <typename T>
void run_forward(const ExpertActivation& job, int64_t begin, int64_t end) {
  job.gate != nullptr ? forward<T, true>(job, begin, end) : forward<T, false>(job, begin, end);
}

template <typename T>
void run_fp8(const ExpertActivationFp8& job, int64_t begin, int64_t end) {
  job.activation.gate != nullptr ? forward_fp8<T, true>(job, begin, end) : forward_fp8<T, false>(job, begin, end);
}

template <typename T>
void run_backward(const ExpertActivation& job, int64_t begin, int64_t end) {
  job.gate != nullptr ? backward<T, true>(job, begin, end) : backward<T, false>(job, begin, end);
}

}  // namespace
}  // namespace MEGAVID_ISA
}  // namespace megavid

MEGAVID_ENTRY(expert_activation_forward, ExpertActivation, run_forward)
MEGAVID_ENTRY(expert_activation_fp8, ExpertActivationFp8, run_fp8)
MEGAVID_ENTRY(expert_activation_backward, ExpertActivation, run_backward)
