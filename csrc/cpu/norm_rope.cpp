// RMSNorm of queries or keys, given their sum of squares, then rotation of neighbouring pairs by 3D RoPE's angles.
//
// The sum of squares is an argument because tensor parallelism adds it up between ranks: Wan normalises across all
// heads. Memory traffic per token: forward reads x and writes y; backward reads x and grad_y and writes grad_x. The
// angles' cosines and sines are read once per token and serve all heads. Eager torch moves eight times as much.
#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {
namespace {

template <typename T>
void forward(const NormRope& job, int64_t begin, int64_t end) {
  const int64_t half = job.head_size / 2;
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(job.x) + token * job.x_stride;
    T* y = static_cast<T*>(job.y) + token * job.width;
    const float scale = 1.0f / std::sqrt(job.sums[token] / job.norm_width + job.eps);
    const float *cosine = job.cosine + token * half, *sine = job.sine + token * half;
    for (int64_t head = 0; head < job.width; head += job.head_size) {
      const float* weight = job.weight + head;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const float even = load(x[head + 2 * i]) * scale * weight[2 * i];
        const float odd = load(x[head + 2 * i + 1]) * scale * weight[2 * i + 1];
        store(y + head + 2 * i, even * cosine[i] - odd * sine[i]);
        store(y + head + 2 * i + 1, even * sine[i] + odd * cosine[i]);
      }
    }
  }
}

// One run is kRunTokens tokens, the last one what is left.
template <typename T>
void backward(const NormRope& job, int64_t begin, int64_t end) {
  const int64_t half = job.head_size / 2;
  for (int64_t run = begin; run < end; ++run) {
    float* grad_weight = job.run_weight + run * job.width;
    for (int64_t i = 0; i < job.width; ++i) grad_weight[i] = 0.0f;
    const int64_t last = (run + 1) * kRunTokens < job.tokens ? (run + 1) * kRunTokens : job.tokens;
    for (int64_t token = run * kRunTokens; token < last; ++token) {
      const T* x = static_cast<const T*>(job.x) + token * job.x_stride;
      const T* grad_y = static_cast<const T*>(job.grad_y) + token * job.width;
      T* grad_x = static_cast<T*>(job.grad_x) + token * job.width;
      const float scale = 1.0f / std::sqrt(job.sums[token] / job.norm_width + job.eps);
      const float *cosine = job.cosine + token * half, *sine = job.sine + token * half;
      float grad_scale = 0.0f;
      for (int64_t head = 0; head < job.width; head += job.head_size) {
        const float* weight = job.weight + head;
#pragma omp simd reduction(+ : grad_scale)
        for (int64_t i = 0; i < half; ++i) {
          const int64_t even = head + 2 * i, odd = even + 1;
          const float grad_even = load(grad_y[even]) * cosine[i] + load(grad_y[odd]) * sine[i];
          const float grad_odd = load(grad_y[odd]) * cosine[i] - load(grad_y[even]) * sine[i];
          const float x_even = load(x[even]), x_odd = load(x[odd]);
          const float inner_even = grad_even * weight[2 * i], inner_odd = grad_odd * weight[2 * i + 1];
          grad_scale += inner_even * x_even + inner_odd * x_odd;
          grad_weight[even] += grad_even * x_even * scale;
          grad_weight[odd] += grad_odd * x_odd * scale;
          store(grad_x + even, inner_even * scale);
          store(grad_x + odd, inner_odd * scale);
        }
      }
      // scale = (sum / width + eps)^(-1/2)
      job.grad_sums[token] = grad_scale * -0.5f * scale * scale * scale / job.norm_width;
    }
  }
}

}  // namespace
}  // namespace MEGAVID_ISA
}  // namespace megavid

MEGAVID_ENTRY(norm_rope_forward, NormRope, forward)
MEGAVID_ENTRY(norm_rope_backward, NormRope, backward)
