// What the CUDA bindings share: the device and stream of a launch, and how sums over tokens are cut into chunks.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>

#include "../cuda/kernels.h"

namespace megavid {

using at::Tensor;

// Of a table's gradient: at most so many chunks, of at least so many tokens, whose sums take at most so many numbers.
inline constexpr int64_t kMostChunks = 256, kLeastTokens = 64, kMostNumbers = int64_t{1} << 24;

// The device of x is current while this stands; calls are checked on its current stream.
struct Launch {
  Launch(const char* op, const Tensor& x) : op(op), guard(x.device()), stream(c10::cuda::getCurrentCUDAStream()) {}

  void check(cudaError_t error) const {
    TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
  }

  const char* op;
  const c10::cuda::CUDAGuard guard;
  const cudaStream_t stream;
};

// For tables of at most so many rows: by shapes alone, so that sums are the same in every run.
inline Sums sums_of(int64_t tokens, int64_t rows, int64_t width) {
  const int64_t numbers = std::max<int64_t>(1, rows * width);
  const int64_t wanted = std::min({(tokens + kLeastTokens - 1) / kLeastTokens, kMostChunks, kMostNumbers / numbers});
  const int64_t chunks = std::max<int64_t>(1, wanted);
  Sums sums{};
  sums.tokens = tokens;
  sums.chunk_tokens = std::max<int64_t>(1, (tokens + chunks - 1) / chunks);
  return sums;
}

inline Tensor partial_of(const Sums& sums, int64_t rows, const Tensor& table) {
  const int64_t chunks = (sums.tokens + sums.chunk_tokens - 1) / sums.chunk_tokens;
  return at::zeros({chunks, rows, table.size(-1)}, table.options());
}

}  // namespace megavid
