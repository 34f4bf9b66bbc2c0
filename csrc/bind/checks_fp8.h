// Checks and jobs of the ops of eight-bit floats, for every device.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "checks.h"

namespace megavid {

inline void check_wide(const char* op, const Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op,
                   ": x must be float32 or bfloat16, got ", x.scalar_type());
}

inline void check_format(const char* op, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat8_e4m3fn || dtype == at::kFloat8_e5m2, op,
                   ": dtype must be float8_e4m3fn or float8_e5m2, got ", dtype);
}

inline void check_scale_format(const char* op, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kFloat8_e8m0fnu, op,
                   ": scale_dtype must be float32 or float8_e8m0fnu, got ", dtype);
}

inline void check_tile(const char* op, const char* name, int64_t side) {
  TORCH_CHECK_VALUE(side >= 1 && side <= kTileSide && (side & (side - 1)) == 0, op, ": ", name,
                    " must be a power of two from 1 to ", kTileSide, ", got ", side);
}

// Tiles of a row, of which a GPU's warp takes one.
inline void check_row_tile(const char* op, int64_t tile) {
  TORCH_CHECK_VALUE(tile == 32 || tile == 64 || tile == 128, op, ": tile must be 32, 64 or 128, got ", tile);
}

inline void check_quantize(const Tensor& x, const Tensor& scale, at::ScalarType dtype) {
  const char* op = "quantize_fp8";
  check_wide(op, x);
  check_format(op, dtype);
  TORCH_CHECK_VALUE(scale.numel() == 1, op, ": scale must be one number, got ", scale.sizes());
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, op, ": scale must be float32, got ", scale.scalar_type());
  check_device(op, x, scale);
}

inline void check_quantize_tiles(const Tensor& x, int64_t tile_rows, int64_t tile_columns, at::ScalarType dtype,
                                 at::ScalarType scale_dtype) {
  const char* op = "quantize_fp8_tiles";
  check_wide(op, x);
  check_format(op, dtype);
  check_scale_format(op, scale_dtype);
  TORCH_CHECK_VALUE(x.dim() >= 2, op, ": x must be [..., rows, columns], got ", x.sizes());
  check_tile(op, "tile_rows", tile_rows);
  check_tile(op, "tile_columns", tile_columns);
}

// x without gaps, in whatever order its numbers stand.
inline Tensor dense(const Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.contiguous(); }

inline QuantizeFp8 fp8_job(const Tensor& x) {
  QuantizeFp8 job{};
  job.x = x.const_data_ptr();
  job.numbers = x.numel();
  job.is_bf16 = x.scalar_type() == at::kBFloat16;
  return job;
}

// Scales are floats, or bytes of an exponent: a job has a place for either.
template <typename Job>
inline void give_scale(Job& job, const Tensor& scale) {
  if (scale.scalar_type() == at::kFloat) {
    job.scale = scale.mutable_data_ptr<float>();
  } else {
    job.scale_byte = static_cast<uint8_t*>(scale.mutable_data_ptr());
  }
}

inline int64_t amax_chunks(const Tensor& x) { return (x.numel() + kAmaxNumbers - 1) / kAmaxNumbers; }

// What quantize_fp8_tiles works on: x as [B, R, C], rows or columns of which stand together in memory, and what it gives.
struct TilesCall {
  TilesCall(const Tensor& given, int64_t tile_rows, int64_t tile_columns, at::ScalarType dtype,
            at::ScalarType scale_dtype) {
    const int64_t rows = given.size(-2), columns = given.size(-1);
    auto sizes = given.sizes().vec();
    data = at::empty(sizes, given.options().dtype(dtype));
    sizes[sizes.size() - 2] = (rows + tile_rows - 1) / tile_rows;
    sizes[sizes.size() - 1] = (columns + tile_columns - 1) / tile_columns;
    scale = at::empty(sizes, given.options().dtype(scale_dtype));
    if (data.numel() == 0) return;
    x = given.dim() == 3 ? given : given.reshape({-1, rows, columns});
    job.is_transposed = x.stride(2) != 1 && x.stride(1) == 1;
    if (x.stride(2) != 1 && !job.is_transposed) x = x.contiguous();
    job.x = x.const_data_ptr();
    job.x_matrix = x.stride(0);
    job.x_row = job.is_transposed ? x.stride(2) : x.stride(1);
    job.data = static_cast<uint8_t*>(data.mutable_data_ptr());
    give_scale(job, scale);
    job.matrices = x.size(0);
    job.rows = job.is_transposed ? columns : rows;
    job.width = job.is_transposed ? rows : columns;
    job.tile_rows = job.is_transposed ? tile_columns : tile_rows;
    job.tile_columns = job.is_transposed ? tile_rows : tile_columns;
    job.is_bf16 = x.scalar_type() == at::kBFloat16;
    job.is_e5m2 = dtype == at::kFloat8_e5m2;
  }

  Tensor x;  // undefined where there is nothing to do
  Tensor data;
  Tensor scale;
  QuantizeFp8Tiles job{};
};

// What expert_activation_fp8 works on and gives.
struct ActivationFp8Call {
  ActivationFp8Call(const ExpertActivation& activation, const Tensor& up, int64_t tile, at::ScalarType scale_dtype)
      : data(at::empty(up.sizes(), up.options().dtype(at::kFloat8_e4m3fn))),
        scale(at::empty({up.size(0), (up.size(1) + tile - 1) / tile}, up.options().dtype(scale_dtype))) {
    job.activation = activation;
    job.data = static_cast<uint8_t*>(data.mutable_data_ptr());
    give_scale(job, scale);
    job.tile = tile;
    job.is_bf16 = activation.is_bf16;
  }

  Tensor data;
  Tensor scale;
  ExpertActivationFp8 job{};
};

}  // namespace megavid
