// Registers the CUDA kernels of eight-bit floats with torch's dispatcher. Twin of cpu_fp8.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "../cuda/kernels.h"
#include "checks_fp8.h"
#include "launch.h"
#include "register.h"

namespace megavid {
namespace {

Tensor fp8_amax(const Tensor& x_) {
  check_wide("fp8_amax", x_);
  const Launch launch("fp8_amax", x_);
  const at::TensorOptions wide = x_.options().dtype(at::kFloat);
  if (x_.numel() == 0) return at::zeros({}, wide);
  const Tensor x = dense(x_);
  Tensor largest = at::empty({amax_chunks(x)}, wide);
  QuantizeFp8 job = fp8_job(x);
  job.amax = largest.mutable_data_ptr<float>();
  launch.check(megavid_cuda_fp8_amax(&job, amax_chunks(x), launch.stream));
  return at::amax(largest);
}

Tensor quantize_fp8(const Tensor& x_, const Tensor& scale, at::ScalarType dtype) {
  check_quantize(x_, scale, dtype);
  const Launch launch("quantize_fp8", x_);
  const Tensor x = dense(x_);
  Tensor data = at::empty_like(x, x.options().dtype(dtype));
  QuantizeFp8 job = fp8_job(x);
  job.scale = scale.const_data_ptr<float>();
  job.data = static_cast<uint8_t*>(data.mutable_data_ptr());
  job.is_e5m2 = dtype == at::kFloat8_e5m2;
  launch.check(megavid_cuda_quantize_fp8(&job, amax_chunks(x), launch.stream));
  return data;
}

std::tuple<Tensor, Tensor> quantize_fp8_tiles(const Tensor& x, int64_t tile_rows, int64_t tile_columns,
                                              at::ScalarType dtype, at::ScalarType scale_dtype) {
  check_quantize_tiles(x, tile_rows, tile_columns, dtype, scale_dtype);
  const Launch launch("quantize_fp8_tiles", x);
  const TilesCall call(x, tile_rows, tile_columns, dtype, scale_dtype);
  if (call.x.defined()) launch.check(megavid_cuda_quantize_fp8_tiles(&call.job, launch.stream));
  return {call.data, call.scale};
}

}  // namespace
}  // namespace megavid

TORCH_LIBRARY_IMPL(megavid, CUDA, m) { MEGAVID_IMPL_FP8(m) }
