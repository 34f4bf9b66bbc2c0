// Numbers rounded to eight bits, with one scale given, or with a scale of every tile's own; and their largest magnitude.
//
// Memory traffic per number: read once, one byte written; largest magnitude: read once. A block reads its tiles a second
// time for their bytes, from the first- or second-level cache. Largest magnitudes meet in shared memory, by atomics: a
// maximum is the same in any order. Transposed matrices are written through shared memory.
#include "../common/fp8.h"
#include "device.cuh"

namespace megavid {
namespace cuda {
namespace {

constexpr int kLeastRows = 32;  // of a block of tiles, where tiles are lower
constexpr int kBufferRow = kTileSide + 4;  // bytes: neighbouring rows begin in neighbouring banks

__device__ inline int32_t largest_of_warp(int32_t value) { return __reduce_max_sync(0xffffffffu, value); }

template <typename T>
__global__ void __launch_bounds__(kThreads) amax(QuantizeFp8 job) {
  __shared__ int32_t largest;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  const T* x = static_cast<const T*>(job.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kAmaxNumbers;
  const int64_t end = begin + kAmaxNumbers < job.numbers ? begin + kAmaxNumbers : job.numbers;
  int32_t own = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) own = max(own, magnitude_of(load(x[i])));
  own = largest_of_warp(own);
  if ((threadIdx.x & 31) == 0) atomicMax(&largest, own);
  __syncthreads();
  if (threadIdx.x == 0) job.amax[blockIdx.x] = float_of(largest);
}

template <typename Format, typename T>
__global__ void __launch_bounds__(kThreads) quantize(QuantizeFp8 job) {
  const T* x = static_cast<const T*>(job.x);
  const float inverse = 1.0f / *job.scale;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kAmaxNumbers;
  const int64_t end = begin + kAmaxNumbers < job.numbers ? begin + kAmaxNumbers : job.numbers;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    job.data[i] = static_cast<uint8_t>(byte_of<Format>(load(x[i]) * inverse));
  }
}

// A block has kTileSide columns and `height` rows, whole tiles but for the edges of the matrix.
template <typename Format, typename T>
__global__ void __launch_bounds__(kThreads) tiles(QuantizeFp8Tiles job, int height, int64_t bands, int64_t strips) {
  // Of each tile the bits of its largest magnitude, then of the reciprocal of its scale.
  __shared__ int32_t found[kLeastRows * kTileSide];
  __shared__ uint8_t buffer[kTileSide * kBufferRow];
  const int64_t matrix = blockIdx.x / strips / bands, top = blockIdx.x / strips % bands * height;
  const int64_t first = blockIdx.x % strips * kTileSide;
  const int rows = static_cast<int>(job.rows - top < height ? job.rows - top : height);
  const int columns = static_cast<int>(job.width - first < kTileSide ? job.width - first : kTileSide);
  const int tile_rows = static_cast<int>(job.tile_rows), tile_columns = static_cast<int>(job.tile_columns);
  const int across = static_cast<int>(kTileSide) / tile_columns, tiles = height / tile_rows * across;
  const T* x = static_cast<const T*>(job.x) + matrix * job.x_matrix + top * job.x_row + first;
  for (int i = threadIdx.x; i < tiles; i += kThreads) found[i] = 0;
  __syncthreads();
  // A warp has 32 numbers of one row; beyond the edges they are 0.
  const int numbers = height * static_cast<int>(kTileSide);
  for (int i = threadIdx.x; i < numbers; i += kThreads) {
    const int row = i / static_cast<int>(kTileSide), column = i % static_cast<int>(kTileSide);
    int32_t size = row < rows && column < columns ? magnitude_of(load(x[row * job.x_row + column])) : 0;
    int32_t* tile = found + row / tile_rows * across + column / tile_columns;
    if (tile_columns >= 32) size = largest_of_warp(size);
    if (tile_columns < 32 || (threadIdx.x & 31) == 0) atomicMax(tile, size);
  }
  __syncthreads();
  const int64_t all_down = (job.rows + tile_rows - 1) / tile_rows;
  const int64_t all_across = (job.width + tile_columns - 1) / tile_columns;
  for (int i = threadIdx.x; i < tiles; i += kThreads) {
    const int64_t down = top / tile_rows + i / across, right = first / tile_columns + i % across;
    const int32_t exponent = exponent_of<Format>(found[i]);
    found[i] = bits_of(inverse_of(exponent));
    if (down >= all_down || right >= all_across) continue;
    const int64_t place = matrix * all_down * all_across +
                          (job.is_transposed ? right * all_down + down : down * all_across + right);
    if (job.scale != nullptr) {
      job.scale[place] = scale_of(exponent);
    } else {
      job.scale_byte[place] = static_cast<uint8_t>(exponent);
    }
  }
  __syncthreads();
  uint8_t* data = job.data + matrix * job.rows * job.width;
  for (int i = threadIdx.x; i < numbers; i += kThreads) {
    const int row = i / static_cast<int>(kTileSide), column = i % static_cast<int>(kTileSide);
    if (row >= rows || column >= columns) continue;
    const float inverse = float_of(found[row / tile_rows * across + column / tile_columns]);
    const uint8_t byte = static_cast<uint8_t>(byte_of<Format>(load(x[row * job.x_row + column]) * inverse));
    if (job.is_transposed) {
      buffer[column * kBufferRow + row] = byte;
    } else {
      data[(top + row) * job.width + first + column] = byte;
    }
  }
  if (!job.is_transposed) return;
  __syncthreads();
  for (int i = threadIdx.x; i < numbers; i += kThreads) {
    const int column = i / height, row = i % height;
    if (row < rows && column < columns) {
      data[(first + column) * job.rows + top + row] = buffer[column * kBufferRow + row];
    }
  }
}

template <typename T>
cudaError_t run_amax(const QuantizeFp8& job, int64_t blocks, cudaStream_t stream) {
  return launch(amax<T>, blocks, stream, job);
}

template <typename T>
cudaError_t run_quantize(const QuantizeFp8& job, int64_t blocks, cudaStream_t stream) {
  return launch(job.is_e5m2 ? quantize<E5M2, T> : quantize<E4M3, T>, blocks, stream, job);
}

template <typename T>
cudaError_t run_tiles(const QuantizeFp8Tiles& job, int64_t blocks, int height, int64_t bands, int64_t strips,
                      cudaStream_t stream) {
  return launch(job.is_e5m2 ? tiles<E5M2, T> : tiles<E4M3, T>, blocks, stream, job, height, bands, strips);
}

}  // namespace
}  // namespace cuda
}  // namespace megavid

MEGAVID_ENTRY(fp8_amax, QuantizeFp8, run_amax)
MEGAVID_ENTRY(quantize_fp8, QuantizeFp8, run_quantize)

cudaError_t megavid_cuda_quantize_fp8_tiles(const megavid::QuantizeFp8Tiles* job, cudaStream_t stream) {
  using namespace megavid::cuda;
  const int height = job->tile_rows < kLeastRows ? kLeastRows : static_cast<int>(job->tile_rows);
  const int64_t bands = (job->rows + height - 1) / height;
  const int64_t strips = (job->width + megavid::kTileSide - 1) / megavid::kTileSide;
  const int64_t blocks = job->matrices * bands * strips;
  if (blocks == 0) return cudaSuccess;
  return job->is_bf16 ? run_tiles<BFloat16>(*job, blocks, height, bands, strips, stream)
                      : run_tiles<float>(*job, blocks, height, bands, strips, stream);
}
