// LayerNorm (or RMSNorm) over the width, then * (1 + scale) + shift with each token's row of a table.
//
// Memory traffic per token, in numbers of the width: forward reads x and writes y, the table's row and one copy of x
// in fp32 stay in the first-level cache; backward reads x and grad_y and writes grad_x. Eager torch moves six times as
// much.
//
// Gradients of the table are summed run by run: a run is a stretch of tokens of one row, at most kRunTokens long. The
// caller cuts the runs by that rule alone, so sums do not depend on the number of threads.
#include "kernels.h"
#include "moments.h"
#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {
namespace {

template <typename T, bool kCentered>
void forward(const ModulatedNorm& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  Scratch buffer(width);
  float* wide = buffer.data();
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(job.x) + token * width;
    T* y = static_cast<T*>(job.y) + token * width;
    const float* shift = job.shift + job.row[token] * width;
    const float* scale = job.scale + job.row[token] * width;
    const Moments m = moments<kCentered>(width, job.eps, wide, [=](int64_t i) { return load(x[i]); });
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      store(y + i, (wide[i] - m.mean) * m.rstd * (1.0f + scale[i]) + shift[i]);
    }
    job.mean[token] = m.mean;
    job.rstd[token] = m.rstd;
  }
}

template <typename T, bool kCentered>
void backward(const ModulatedNorm& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  Scratch buffer(2 * width);
  float *normed = buffer.data(), *inner = normed + width;
  for (int64_t run = begin; run < end; ++run) {
    float* grad_shift = job.run_shift + run * width;
    float* grad_scale = job.run_scale + run * width;
    for (int64_t i = 0; i < width; ++i) grad_shift[i] = grad_scale[i] = 0.0f;
    for (int64_t token = job.run_start[run]; token < job.run_start[run + 1]; ++token) {
      const T* x = static_cast<const T*>(job.x) + token * width;
      const T* grad_y = static_cast<const T*>(job.grad_y) + token * width;
      T* grad_x = static_cast<T*>(job.grad_x) + token * width;
      const float* scale = job.scale + job.row[token] * width;
      const float rstd = job.rstd[token];
      const Means m = inner_gradient<kCentered>(x, grad_y, scale, job.mean[token], rstd, width, normed, inner, grad_shift,
                                                grad_scale);
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        store(grad_x + i, rstd * (inner[i] - m.inner - normed[i] * m.product));
      }
    }
  }
}

template <typename T>
void run_forward(const ModulatedNorm& job, int64_t begin, int64_t end) {
  job.is_centered ? forward<T, true>(job, begin, end) : forward<T, false>(job, begin, end);
}

template <typename T>
void run_backward(const ModulatedNorm& job, int64_t begin, int64_t end) {
  job.is_centered ? backward<T, true>(job, begin, end) : backward<T, false>(job, begin, end);
}

}  // namespace
}  // namespace MEGAVID_ISA
}  // namespace megavid

MEGAVID_ENTRY(modulated_norm_forward, ModulatedNorm, run_forward)
MEGAVID_ENTRY(modulated_norm_backward, ModulatedNorm, run_backward)
