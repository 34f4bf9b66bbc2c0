// residual = x + update * gate, and its modulated norm, both written in one pass.
//
// Memory traffic per token: forward reads x and update and writes the residual and y; backward reads the residual,
// update, grad_y and the stream's own gradient, and writes the gradients of x and update. Eager torch moves ten times
// as much. The norm is of the residual as stored, so that the two outputs belong together in bf16 too.
#include "kernels.h"
#include "moments.h"
#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {
namespace {

template <typename T, bool kCentered, bool kGated>
void forward(const GatedResidualNorm& job, int64_t begin, int64_t end) {
  const ModulatedNorm& norm = job.norm;
  const int64_t width = norm.width;
  Scratch buffer(width);
  float* wide = buffer.data();
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(job.x) + token * width;
    const T* update = static_cast<const T*>(job.update) + token * width;
    T* residual = static_cast<T*>(job.residual) + token * width;
    T* y = static_cast<T*>(norm.y) + token * width;
    const float* gate = kGated ? job.gate + job.gate_row[token] * width : nullptr;
    const float* shift = norm.shift + norm.row[token] * width;
    const float* scale = norm.scale + norm.row[token] * width;
    const Moments m = moments<kCentered>(width, norm.eps, wide, [=](int64_t i) {
      T stored;
      store(&stored, load(x[i]) + (kGated ? load(update[i]) * gate[i] : load(update[i])));
      residual[i] = stored;
      return load(stored);
    });
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      store(y + i, (wide[i] - m.mean) * m.rstd * (1.0f + scale[i]) + shift[i]);
    }
    norm.mean[token] = m.mean;
    norm.rstd[token] = m.rstd;
  }
}

template <typename T, bool kCentered>
void backward(const GatedResidualNorm& job, int64_t begin, int64_t end) {
  const ModulatedNorm& norm = job.norm;
  const int64_t width = norm.width;
  Scratch buffer(2 * width);
  float *normed = buffer.data(), *inner = normed + width;
  for (int64_t run = begin; run < end; ++run) {
    float* grad_shift = norm.run_shift + run * width;
    float* grad_scale = norm.run_scale + run * width;
    float* grad_gate = job.gate != nullptr ? job.run_gate + run * width : nullptr;
    for (int64_t i = 0; i < width; ++i) grad_shift[i] = grad_scale[i] = 0.0f;
    for (int64_t i = 0; grad_gate != nullptr && i < width; ++i) grad_gate[i] = 0.0f;
    for (int64_t token = norm.run_start[run]; token < norm.run_start[run + 1]; ++token) {
      const T* residual = static_cast<const T*>(norm.x) + token * width;
      const T* grad_y = static_cast<const T*>(norm.grad_y) + token * width;
      const T* grad_residual = static_cast<const T*>(job.grad_residual) + token * width;
      const T* update = static_cast<const T*>(job.update) + token * width;
      T* grad_x = static_cast<T*>(norm.grad_x) + token * width;
      T* grad_update = static_cast<T*>(job.grad_update) + token * width;
      const float* scale = norm.scale + norm.row[token] * width;
      const float rstd = norm.rstd[token];
      const Means m = inner_gradient<kCentered>(residual, grad_y, scale, norm.mean[token], rstd, width, normed, inner, grad_shift,
                                                grad_scale);
      if (grad_gate != nullptr) {
        const float* gate = job.gate + job.gate_row[token] * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          const float grad = load(grad_residual[i]) + rstd * (inner[i] - m.inner - normed[i] * m.product);
          store(grad_x + i, grad);
          store(grad_update + i, grad * gate[i]);
          grad_gate[i] += grad * load(update[i]);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          // x and update have the same gradient: one tensor serves both.
          store(grad_x + i, load(grad_residual[i]) + rstd * (inner[i] - m.inner - normed[i] * m.product));
        }
      }
    }
  }
}

template <typename T, bool kGated>
void run_forward_of(const GatedResidualNorm& job, int64_t begin, int64_t end) {
  job.norm.is_centered ? forward<T, true, kGated>(job, begin, end) : forward<T, false, kGated>(job, begin, end);
}

template <typename T>
void run_forward(const GatedResidualNorm& job, int64_t begin, int64_t end) {
  job.gate != nullptr ? run_forward_of<T, true>(job, begin, end) : run_forward_of<T, false>(job, begin, end);
}

template <typename T>
void run_backward(const GatedResidualNorm& job, int64_t begin, int64_t end) {
  job.norm.is_centered ? backward<T, true>(job, begin, end) : backward<T, false>(job, begin, end);
}

}  // namespace
}  // namespace MEGAVID_ISA
}  // namespace megavid

MEGAVID_ENTRY(gated_residual_norm_forward, GatedResidualNorm, run_forward)
MEGAVID_ENTRY(gated_residual_norm_backward, GatedResidualNorm, run_backward)
