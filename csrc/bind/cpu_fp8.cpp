// Registers the CPU kernels of eight-bit floats with torch's dispatcher; cpu.cpp does those of blocks.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "../cpu/kernels.h"
#include "checks_fp8.h"
#include "isa.h"
#include "register.h"
#include "runs.h"

namespace megavid {
namespace {

Tensor fp8_amax(const Tensor& x_) {
  check_wide("fp8_amax", x_);
  const at::TensorOptions wide = x_.options().dtype(at::kFloat);
  if (x_.numel() == 0) return at::zeros({}, wide);
  const Tensor x = dense(x_);
  Tensor largest = at::empty({amax_chunks(x)}, wide);
  QuantizeFp8 job = fp8_job(x);
  job.amax = largest.mutable_data_ptr<float>();
  at::parallel_for(0, largest.numel(), 1, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_fp8_amax, job, begin, end);
  });
  return at::amax(largest);
}

Tensor quantize_fp8(const Tensor& x_, const Tensor& scale, at::ScalarType dtype) {
  check_quantize(x_, scale, dtype);
  const Tensor x = dense(x_);
  Tensor data = at::empty_like(x, x.options().dtype(dtype));
  QuantizeFp8 job = fp8_job(x);
  job.scale = scale.const_data_ptr<float>();
  job.data = static_cast<uint8_t*>(data.mutable_data_ptr());
  job.is_e5m2 = dtype == at::kFloat8_e5m2;
  at::parallel_for(0, x.numel(), kAmaxNumbers, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_quantize_fp8, job, begin, end);
  });
  return data;
}

std::tuple<Tensor, Tensor> quantize_fp8_tiles(const Tensor& x, int64_t tile_rows, int64_t tile_columns,
                                              at::ScalarType dtype, at::ScalarType scale_dtype) {
  check_quantize_tiles(x, tile_rows, tile_columns, dtype, scale_dtype);
  const TilesCall call(x, tile_rows, tile_columns, dtype, scale_dtype);
  const QuantizeFp8Tiles& job = call.job;
  if (call.x.defined()) {
    const int64_t bands = (job.rows + job.tile_rows - 1) / job.tile_rows;
    const int64_t strips = job.matrices * bands * ((job.width + kTileSide - 1) / kTileSide);
    const int64_t grain = (kAmaxNumbers + job.tile_rows * kTileSide - 1) / (job.tile_rows * kTileSide);
    at::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
      MEGAVID_CALL(megavid_quantize_fp8_tiles, job, begin, end);
    });
  }
  return {call.data, call.scale};
}

}  // namespace
}  // namespace megavid

TORCH_LIBRARY_IMPL(megavid, CPU, m) { MEGAVID_IMPL_FP8(m) }
