// CUDA's language for a C++ compiler: threads of a block are fibers, and run one at a time between two barriers.
//
// What it is strict about, beyond numbers: blocks, and threads between barriers, run in an order drawn anew each time, so
// that a missing barrier shows as a wrong number sooner or later; shared memory is full of NaN when a block begins; all
// lanes that a mask names must meet at the same line; threads that wait for each other in vain end the launch. What it
// knows nothing of: speed, caches, alignment, 32-bit limits of grids, and races within one instruction.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

namespace emulator {

// Of the thread that runs.
extern dim3 thread_index, block_index;

[[noreturn]] void fail(const char* what);
// Kernel by kernel as CUDA's <<<blocks, threads, shared, stream>>>; `body` calls it with its arguments.
void launch_body(void (*call)(const void*), const void* body, dim3 blocks, dim3 threads, size_t shared);

template <typename Body>
void launch(const Body& body, dim3 blocks, dim3 threads, size_t shared, cudaStream_t) {
  launch_body([](const void* it) { (*static_cast<const Body*>(it))(); }, &body, blocks, threads, shared);
}

// Memory of the block beyond what kernels declare.
void* shared_memory();
void allow_shared(size_t bytes);
void block_barrier(int line);
void warp_barrier(int line, unsigned mask);
// Every lane's value, after all lanes of the mask have given theirs; valid until the next exchange but one.
const uint32_t* exchange(int line, unsigned mask, uint32_t own);
unsigned lane();

template <typename T>
T shuffled(int line, unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) == 4, "four bytes");
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t* all = exchange(line, mask, bits);
  if (from > 31) from = lane();
  if (!(mask >> from & 1u)) fail("a shuffle from a lane that its mask leaves out");
  __builtin_memcpy(&value, all + from, 4);
  return value;
}

inline int largest(int line, unsigned mask, int value) {
  const uint32_t* all = exchange(line, mask, static_cast<uint32_t>(value));
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) && static_cast<int>(all[i]) > value) value = static_cast<int>(all[i]);
  }
  return value;
}

}  // namespace emulator

// Of kernels, only how much memory of a block they may be given.
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int bytes) {
  if (bytes > 227 << 10) return cudaErrorAssert;
  emulator::allow_shared(static_cast<size_t>(bytes));
  return cudaSuccess;
}

#define __global__
#define __device__
#define __launch_bounds__(threads)
// In a section of its own, which is filled with NaN before each block.
#define __shared__ static __attribute__((section("block_shared")))
#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define __syncthreads() emulator::block_barrier(__LINE__)
#define __syncwarp() emulator::warp_barrier(__LINE__, 0xffffffffu)
#define __shfl_xor_sync(mask, value, distance) \
  emulator::shuffled(__LINE__, mask, value, emulator::lane() ^ static_cast<unsigned>(distance))
#define __shfl_down_sync(mask, value, distance) \
  emulator::shuffled(__LINE__, mask, value, emulator::lane() + static_cast<unsigned>(distance))
#define __reduce_max_sync(mask, value) emulator::largest(__LINE__, mask, value)

// Kernels include these themselves from nvcc.
#include <cmath>
#include <cstring>

inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float atomicAdd(float* place, float value) {
  const float before = *place;
  *place += value;
  return before;
}

inline int atomicMax(int* place, int value) {
  const int before = *place;
  if (value > before) *place = value;
  return before;
}
