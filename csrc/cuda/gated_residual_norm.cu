// residual = x + update * gate, and its modulated norm, both written in one pass.
//
// The norm is of the residual as stored, so that the two outputs belong together in bf16 too. A thread reads only those
// numbers of the residual that it wrote itself.
#include "device.cuh"

namespace megavid {
namespace cuda {
namespace {

// The gates of a token, or null.
__device__ inline const float* gate_of(const GatedResidualNorm& job, int64_t token) {
  if (job.gate == nullptr) return nullptr;
  return job.gate + checked(job.gate_row[token], job.gate_rows) * job.norm.width;
}

template <typename T, bool kCentered>
__global__ void __launch_bounds__(kThreads) forward(GatedResidualNorm job) {
  const ModulatedNorm& norm = job.norm;
  const int64_t token = blockIdx.x, width = norm.width;
  const T* x = row_of<T>(job.x, token, width);
  const T* update = row_of<T>(job.update, token, width);
  const float* gate = gate_of(job, token);
  T* residual = row_of<T>(job.residual, token, width);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    store(residual + i, load(x[i]) + load(update[i]) * (gate == nullptr ? 1.0f : gate[i]));
  }
  const Moments m = moments<T, kCentered>(residual, width, norm.eps);
  T* y = row_of<T>(norm.y, token, width);
  const int64_t row = checked(norm.row[token], norm.rows);
  const float *shift = norm.shift + row * width, *scale = norm.scale + row * width;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    store(y + i, (load(residual[i]) - m.mean) * m.rstd * (1.0f + scale[i]) + shift[i]);
  }
  if (threadIdx.x == 0) {
    norm.mean[token] = m.mean;
    norm.rstd[token] = m.rstd;
  }
}

// The gradient that reaches x, of one number.
template <typename T>
__device__ float grad_of_x(const GatedResidualNorm& job, int64_t token, int64_t i, float mean_inner,
                           float mean_product) {
  const ModulatedNorm& norm = job.norm;
  const int64_t width = norm.width;
  const float rstd = norm.rstd[token];
  const float normed = (load(row_of<T>(norm.x, token, width)[i]) - norm.mean[token]) * rstd;
  const float inner = load(row_of<T>(norm.grad_y, token, width)[i]) * (1.0f + norm.scale[norm.row[token] * width + i]);
  return load(row_of<T>(job.grad_residual, token, width)[i]) + rstd * (inner - mean_inner - normed * mean_product);
}

template <typename T, bool kCentered>
__global__ void __launch_bounds__(kThreads) backward(GatedResidualNorm job, Sums sums) {
  const ModulatedNorm& norm = job.norm;
  const int64_t token = blockIdx.x, width = norm.width;
  const T* residual = row_of<T>(norm.x, token, width);
  const T* grad_y = row_of<T>(norm.grad_y, token, width);
  const float* scale = norm.scale + checked(norm.row[token], norm.rows) * width;
  const Means m = inner_means<T, kCentered>(residual, grad_y, scale, norm.mean[token], norm.rstd[token], width);
  T* grad_x = row_of<T>(norm.grad_x, token, width);
  T* grad_update = row_of<T>(job.grad_update, token, width);
  const float* gate = gate_of(job, token);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const float grad = grad_of_x<T>(job, token, i, m.inner, m.product);
    store(grad_x + i, grad);
    if (gate != nullptr) store(grad_update + i, grad * gate[i]);  // without a gate, grad_x serves both
  }
  if (threadIdx.x == 0) {
    sums.mean_inner[token] = m.inner;
    sums.mean_product[token] = m.product;
  }
}

// What a token adds to the gradients of shift and scale, and of the gate where there is one. The gate's needs the
// gradient of x before it was rounded: it is computed again from two numbers of the token.
template <typename T, bool kGated>
struct Terms {
  GatedResidualNorm job;
  const float *mean_inner, *mean_product;
  __device__ void operator()(int64_t token, int64_t column, float* found) const {
    const ModulatedNorm& norm = job.norm;
    const float grad = load(row_of<T>(norm.grad_y, token, norm.width)[column]);
    const float residual = load(row_of<T>(norm.x, token, norm.width)[column]);
    found[0] = grad;
    found[1] = grad * (residual - norm.mean[token]) * norm.rstd[token];
    if (kGated) {
      found[2] = grad_of_x<T>(job, token, column, mean_inner[token], mean_product[token]) *
                 load(row_of<T>(job.update, token, norm.width)[column]);
    }
  }
};

template <typename T>
cudaError_t run_forward(const GatedResidualNorm& job, int64_t tokens, cudaStream_t stream) {
  return launch(job.norm.is_centered ? forward<T, true> : forward<T, false>, tokens, stream, job);
}

template <typename T>
cudaError_t run_backward(const GatedResidualNorm& job, const Sums& sums, cudaStream_t stream) {
  const ModulatedNorm& norm = job.norm;
  const auto kernel = norm.is_centered ? backward<T, true> : backward<T, false>;
  if (const cudaError_t error = launch(kernel, sums.tokens, stream, job, sums)) return error;
  const Table shift{norm.row, norm.rows, norm.run_shift}, scale{norm.row, norm.rows, norm.run_scale};
  if (job.gate == nullptr) {
    const Terms<T, false> terms{job, sums.mean_inner, sums.mean_product};
    return launch_sums(terms, Tables<2>{{shift, scale}}, sums, norm.width, stream);
  }
  const Table gate{job.gate_row, job.gate_rows, job.run_gate};
  const Terms<T, true> terms{job, sums.mean_inner, sums.mean_product};
  return launch_sums(terms, Tables<3>{{shift, scale, gate}}, sums, norm.width, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace megavid

MEGAVID_ENTRY(gated_residual_norm_forward, GatedResidualNorm, run_forward)
MEGAVID_ENTRY_SUMS(gated_residual_norm_backward, GatedResidualNorm, run_backward)
