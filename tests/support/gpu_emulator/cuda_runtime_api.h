// What the CUDA kernels' C ABI and its bindings need of CUDA's own header, for a build that runs them on a CPU.
#pragma once

struct dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

enum cudaError_t { cudaSuccess = 0, cudaErrorAssert = 710 };
using cudaStream_t = void*;

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t);
