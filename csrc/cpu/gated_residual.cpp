// y = x + update * gate, with each token's row of a table of gates.
//
// Memory traffic per token: forward reads x and update and writes y; backward reads the gradient and update and writes
// the gradient of update. Gradients of the table are summed run by run, as in modulated_norm.cpp.
#include "kernels.h"
#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {
namespace {

template <typename T>
void forward(const GatedResidual& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(job.x) + token * width;
    const T* update = static_cast<const T*>(job.update) + token * width;
    const float* gate = job.gate + job.row[token] * width;
    T* y = static_cast<T*>(job.y) + token * width;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(y + i, load(x[i]) + load(update[i]) * gate[i]);
  }
}

template <typename T>
void backward(const GatedResidual& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  for (int64_t run = begin; run < end; ++run) {
    float* grad_gate = job.run_gate + run * width;
    for (int64_t i = 0; i < width; ++i) grad_gate[i] = 0.0f;
    for (int64_t token = job.run_start[run]; token < job.run_start[run + 1]; ++token) {
      const T* update = static_cast<const T*>(job.update) + token * width;
      const T* grad_y = static_cast<const T*>(job.grad_y) + token * width;
      const float* gate = job.gate + job.row[token] * width;
      T* grad_update = static_cast<T*>(job.grad_update) + token * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        const float grad = load(grad_y[i]);
        store(grad_update + i, grad * gate[i]);
        grad_gate[i] += grad * load(update[i]);
      }
    }
  }
}

}  // namespace
}  // namespace MEGAVID_ISA
}  // namespace megavid

MEGAVID_ENTRY(gated_residual_forward, GatedResidual, forward)
MEGAVID_ENTRY(gated_residual_backward, GatedResidual, backward)
