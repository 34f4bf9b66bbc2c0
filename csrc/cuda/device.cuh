// What the CUDA kernels share: number formats, sums over a block, sums over tokens in a fixed order.
//
// One block works on one token, its threads side by side on the token's numbers. A number is read again where a second
// pass needs it: a token's numbers are in the first-level cache by then.
#pragma once

#include <cassert>
#include <cstdint>

#include "kernels.h"

namespace megavid {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kColumns = 128;  // threads of a block that sums columns

// bfloat16 as stored, rounded to nearest, ties to even: as csrc/cpu/simd.h, so that both devices round alike.
struct BFloat16 {
  uint16_t bits;
};

__device__ inline float load(float value) { return value; }

__device__ inline float load(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

__device__ inline void store(float* place, float value) { *place = value; }

__device__ inline void store(BFloat16* place, float value) {
  const uint32_t wide = __float_as_uint(value);
  const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  const uint32_t quiet = (wide >> 16) | 0x40u;
  place->bits = static_cast<uint16_t>((wide & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// Row `token` of a matrix of this width.
template <typename T>
__device__ inline const T* row_of(const void* matrix, int64_t token, int64_t width) {
  return static_cast<const T*>(matrix) + token * width;
}

template <typename T>
__device__ inline T* row_of(void* matrix, int64_t token, int64_t width) {
  return static_cast<T*>(matrix) + token * width;
}

// A token's row of a table, an expert or a bucket. The host would have to wait to check it: what is outside stops the
// kernel here, and the program at its next call of CUDA.
__device__ inline int64_t checked(int64_t row, int64_t rows) {
  assert(row >= 0 && row < rows);
  return row;
}

// The sum of every thread's value, in all threads of a block of kThreads, always in the same order.
__device__ inline float block_sum(float value) {
  __shared__ float parts[kWarps];
  for (int distance = 16; distance > 0; distance >>= 1) value += __shfl_down_sync(0xffffffffu, value, distance);
  __syncthreads();  // the sum before this one has been read
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < kWarps; ++warp) total += parts[warp];
  return total;
}

struct Moments {
  float mean;
  float rstd;
};

// Mean and deviation of a token's numbers, in two passes, so that a large mean costs no digits.
template <typename T, bool kCentered>
__device__ Moments moments(const T* x, int64_t width, float eps) {
  float mean = 0.0f;
  if (kCentered) {
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < width; i += kThreads) sum += load(x[i]);
    mean = block_sum(sum) / static_cast<float>(width);
  }
  float squares = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const float centered = load(x[i]) - mean;
    squares += centered * centered;
  }
  return {mean, 1.0f / sqrtf(block_sum(squares) / static_cast<float>(width) + eps)};
}

// Means over a token's numbers that the gradient of its norm is less: of inner = grad_y * (1 + scale), and of inner times
// the normed number.
struct Means {
  float inner;
  float product;
};

template <typename T, bool kCentered>
__device__ Means inner_means(const T* x, const T* grad_y, const float* scale, float mean, float rstd, int64_t width) {
  float sum = 0.0f, product = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const float inner = load(grad_y[i]) * (1.0f + scale[i]);
    sum += inner;
    product += inner * (load(x[i]) - mean) * rstd;
  }
  const float mean_inner = kCentered ? block_sum(sum) / static_cast<float>(width) : 0.0f;
  return {mean_inner, block_sum(product) / static_cast<float>(width)};
}

// One block of kThreads threads a token or row.
template <typename Kernel, typename... Args>
cudaError_t launch(Kernel* kernel, int64_t blocks, cudaStream_t stream, const Args&... args) {
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args...);
  return cudaGetLastError();
}

// One table whose gradient is summed: [chunks, rows, width], and every token's row (null: all in row 0).
struct Table {
  const int64_t* row;
  int64_t rows;
  float* partial;
};

template <int kTables>
struct Tables {
  Table of[kTables];
};

// partial[chunk, row[token], column] += terms(token, column), over the tokens of a chunk in their order. A thread owns
// its column of its chunk, and goes to memory only where the row changes.
template <int kTables, typename Terms>
__global__ void sum_columns(Terms terms, Tables<kTables> tables, int64_t tokens, int64_t chunk_tokens, int64_t width) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  if (column >= width) return;
  const int64_t chunk = blockIdx.y, begin = chunk * chunk_tokens;
  const int64_t end = begin + chunk_tokens < tokens ? begin + chunk_tokens : tokens;
  float sums[kTables] = {};
  int64_t rows[kTables] = {};
  const auto flush = [&](int k) {
    tables.of[k].partial[(chunk * tables.of[k].rows + rows[k]) * width + column] += sums[k];
    sums[k] = 0.0f;
  };
  for (int64_t token = begin; token < end; ++token) {
    float found[kTables];
    terms(token, column, found);
    for (int k = 0; k < kTables; ++k) {
      const int64_t row = tables.of[k].row == nullptr ? 0 : tables.of[k].row[token];
      if (row != rows[k]) {
        flush(k);
        rows[k] = row;
      }
      sums[k] += found[k];
    }
  }
  for (int k = 0; k < kTables; ++k) flush(k);
}

template <int kTables, typename Terms>
cudaError_t launch_sums(const Terms& terms, const Tables<kTables>& tables, const Sums& sums, int64_t width,
                        cudaStream_t stream) {
  if (width == 0) return cudaSuccess;
  const int64_t chunks = (sums.tokens + sums.chunk_tokens - 1) / sums.chunk_tokens;
  const dim3 grid(static_cast<unsigned>((width + kColumns - 1) / kColumns), static_cast<unsigned>(chunks));
  sum_columns<kTables><<<grid, kColumns, 0, stream>>>(terms, tables, sums.tokens, sums.chunk_tokens, width);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace megavid

// Defines megavid_cuda_NAME of kernels.h: `function` for the number format of the job, over tokens or rows, if any.
#define MEGAVID_ENTRY(name, Job, function)                                                                 \
  cudaError_t megavid_cuda_##name(const megavid::Job* job, int64_t tokens, cudaStream_t stream) {          \
    using namespace megavid::cuda;                                                                         \
    if (tokens == 0) return cudaSuccess;                                                                   \
    return job->is_bf16 ? function<BFloat16>(*job, tokens, stream) : function<float>(*job, tokens, stream); \
  }

// Likewise of one that sums over tokens.
#define MEGAVID_ENTRY_SUMS(name, Job, function)                                                            \
  cudaError_t megavid_cuda_##name(const megavid::Job* job, const megavid::Sums* sums, cudaStream_t stream) { \
    using namespace megavid::cuda;                                                                         \
    if (sums->tokens == 0) return cudaSuccess;                                                             \
    return job->is_bf16 ? function<BFloat16>(*job, *sums, stream) : function<float>(*job, *sums, stream);  \
  }
