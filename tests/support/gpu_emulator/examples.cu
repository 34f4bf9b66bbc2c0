// Kernels that are right, and kernels that are wrong in ways that a GPU may let pass: what the emulator makes of them.
#include <cassert>
#include <string>

namespace {

// out[block] = sum of the block's numbers, by halves.
template <bool kWaits>
__global__ void sum(const float* x, float* out) {
  __shared__ float parts[64];
  parts[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  for (unsigned half = 32; half > 0; half /= 2) {
    if (kWaits) __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = parts[0];
}

__global__ void sum_of_warps(const float* x, float* out) {
  extern __shared__ float parts[];
  float value = x[blockIdx.x * 64 + threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = parts[0] + parts[1];
}

// Reads what no thread of its block has written.
__global__ void unwritten(const float*, float* out) {
  __shared__ float parts[64];
  if (threadIdx.x == 0 && blockIdx.x == 0) parts[0] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = parts[0];
}

__global__ void shuffle_after_some_left(const float* x, float* out) {
  if (threadIdx.x % 32 > 7) return;
  const float value = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
  if (threadIdx.x == 0) out[blockIdx.x] = value;
}

__global__ void barriers_in_both_branches(const float* x, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[blockIdx.x] = x[0];
}

__global__ void warp_that_parts(const float* x, float* out) {
  if (threadIdx.x % 2 == 0) __syncwarp();
  out[blockIdx.x] = __shfl_xor_sync(0xffffffffu, x[0], 1);
}

__global__ void writes_beyond(const float* x, float* out) {
  extern __shared__ float parts[];
  if (threadIdx.x < 3) parts[threadIdx.x] = x[0];
  __syncthreads();
  out[blockIdx.x] = parts[0];
}

__global__ void refuses(const float* x, float* out) {
  assert(x[0] < 0.0f);
  out[blockIdx.x] = x[0];
}

}  // namespace

extern "C" const char* run(const char* name, const float* x, float* out, unsigned blocks) {
  const std::string kernel = name;
  void* stream = nullptr;
  if (kernel == "sum") sum<true><<<blocks, 64, 0, stream>>>(x, out);
  if (kernel == "sum without barriers") sum<false><<<blocks, 64, 0, stream>>>(x, out);
  if (kernel == "sum of warps") sum_of_warps<<<blocks, 64, 2 * sizeof(float), stream>>>(x, out);
  if (kernel == "unwritten") unwritten<<<blocks, 64, 0, stream>>>(x, out);
  if (kernel == "shuffle after some left") shuffle_after_some_left<<<blocks, 64, 0, stream>>>(x, out);
  if (kernel == "barriers in both branches") barriers_in_both_branches<<<blocks, 64, 0, stream>>>(x, out);
  if (kernel == "warp that parts") warp_that_parts<<<blocks, 64, 0, stream>>>(x, out);
  if (kernel == "writes beyond") writes_beyond<<<blocks, 64, 2 * sizeof(float), stream>>>(x, out);
  if (kernel == "no blocks") refuses<<<0, 64, 0, stream>>>(x, out);
  if (kernel == "tall grid") refuses<<<dim3(1, 70000), 64, 0, stream>>>(x, out);
  if (kernel == "wide block") refuses<<<blocks, 2048, 0, stream>>>(x, out);
  if (kernel == "much memory") refuses<<<blocks, 64, 50000, stream>>>(x, out);
  if (kernel == "refuses") refuses<<<blocks, 64, 0, stream>>>(x, out);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}
