#undef _FORTIFY_SOURCE  // it takes a jump to another stack for damage
#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
extern char __start_block_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_block_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emulator {

dim3 thread_index, block_index;

namespace {

constexpr size_t kStack = 64 * 1024;
constexpr unsigned kWarp = 32;
constexpr size_t kGuard = 64;  // bytes behind the memory of a block

enum class Waits { kNo, kBlock, kWarp, kForEver };

struct Fiber {
  jmp_buf place;
  bool has_begun = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  Waits waits;
  int line;
  unsigned mask;
  uint32_t given[2];
  unsigned exchanges;
};

std::vector<Fiber> fibers;
std::vector<char> dynamic_memory;
jmp_buf scheduler;
Fiber* running = nullptr;
void (*call)(const void*);
const void* body;
std::string failure;
size_t most_shared = 48 << 10;
std::mutex one_launch;
std::minstd_rand dice{20};

// To where another stack left off. Not swapcontext: that asks the kernel about signals each time.
void jump(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

// A fiber's life: one thread of a block, then of another.
void work() {
  while (true) {
    try {
      call(body);
    } catch (const std::exception& error) {
      if (failure.empty()) failure = error.what();
    }
    running->waits = Waits::kForEver;
    jump(running->place, scheduler);
  }
}

void wait(Waits waits, int line, unsigned mask) {
  Fiber* self = running;
  self->waits = waits;
  self->line = line;
  self->mask = mask;
  jump(self->place, scheduler);
}

void go_on(Fiber& fiber) {
  running = &fiber;
  thread_index = fiber.index;
  if (fiber.has_begun) return jump(scheduler, fiber.place);
  fiber.has_begun = true;
  ucontext_t first, unused;
  getcontext(&first);
  first.uc_stack.ss_sp = fiber.stack.get();
  first.uc_stack.ss_size = kStack;
  first.uc_link = nullptr;
  makecontext(&first, work, 0);
  if (_setjmp(scheduler) == 0) swapcontext(&unused, &first);
}

void begin(Fiber& fiber, unsigned number, dim3 threads) {
  fiber.index = dim3(number % threads.x, number / threads.x % threads.y, number / threads.x / threads.y);
  fiber.waits = Waits::kNo;
  fiber.exchanges = 0;
}

// Lets a warp go on whose lanes have all come to one line; what is wrong with them, if anything is.
std::string release_warp(unsigned first, unsigned count, bool* is_released) {
  const unsigned last = std::min(first + kWarp, count);
  for (unsigned i = first; i < last; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.waits != Waits::kWarp) continue;
    for (unsigned other = first; other < last; ++other) {
      if (!(fiber.mask >> (other - first) & 1u)) continue;
      if (fibers[other].waits == Waits::kForEver) {
        return "line " + std::to_string(fiber.line) + " waits for a lane that has left";
      }
      if (fibers[other].waits != Waits::kWarp) return "";
      if (fibers[other].line != fiber.line || fibers[other].mask != fiber.mask) {
        return "lanes of a warp wait at line " + std::to_string(fiber.line) + " and at line " +
               std::to_string(fibers[other].line);
      }
    }
    for (unsigned other = first; other < last; ++other) {
      if (fiber.mask >> (other - first) & 1u) fibers[other].waits = Waits::kNo;
    }
    *is_released = true;
    return "";
  }
  return "";
}

std::string release(unsigned count) {
  bool is_released = false;
  for (unsigned first = 0; first < count; first += kWarp) {
    const std::string wrong = release_warp(first, count, &is_released);
    if (!wrong.empty()) return wrong;
  }
  if (is_released) return "";
  for (unsigned i = 0; i < count; ++i) {
    if (fibers[i].waits == Waits::kNo) return "";
  }
  int line = 0;
  for (unsigned i = 0; i < count; ++i) {
    if (fibers[i].waits == Waits::kForEver) continue;  // CUDA waits for those that have not left
    if (fibers[i].waits != Waits::kBlock) return "threads wait at a barrier of the block and at one of a warp";
    if (line != 0 && fibers[i].line != line) return "threads wait at two barriers of the block";
    line = fibers[i].line;
  }
  for (unsigned i = 0; i < count; ++i) {
    if (fibers[i].waits == Waits::kBlock) fibers[i].waits = Waits::kNo;
  }
  return "";
}

// What a device says of a launch before it begins.
std::string refused(dim3 blocks, dim3 threads, size_t shared) {
  const auto count = [](dim3 of) { return uint64_t{of.x} * of.y * of.z; };
  if (count(blocks) == 0 || count(threads) == 0) return "a launch of nothing";
  if (blocks.x > 0x7fffffffu || blocks.y > 65535 || blocks.z > 65535) return "too many blocks";
  if (count(threads) > 1024) return "too many threads for a block";
  if (shared > most_shared) return "more memory of the block than the kernel has asked for";
  return "";
}

// One warp at a time, drawn anew after each barrier, so that one may be far ahead of another.
void run_block(dim3 threads) {
  const unsigned count = threads.x * threads.y * threads.z;
  for (unsigned i = 0; i < count; ++i) begin(fibers[i], i, threads);
  std::vector<unsigned> warps, lanes;
  while (failure.empty()) {
    warps.clear();
    for (unsigned i = 0; i < count; ++i) {
      const bool is_known = !warps.empty() && warps.back() == i / kWarp;
      if (fibers[i].waits == Waits::kNo && !is_known) warps.push_back(i / kWarp);
    }
    if (warps.empty()) return;
    const unsigned warp = warps[dice() % warps.size()];
    lanes.clear();
    for (unsigned i = warp * kWarp; i < std::min((warp + 1) * kWarp, count); ++i) {
      if (fibers[i].waits == Waits::kNo) lanes.push_back(i);
    }
    std::shuffle(lanes.begin(), lanes.end(), dice);
    for (unsigned lane : lanes) go_on(fibers[lane]);
    if (failure.empty()) failure = release(count);
  }
}

}  // namespace

void fail(const char* what) { throw std::runtime_error(what); }

void* shared_memory() { return dynamic_memory.data(); }

unsigned lane() { return static_cast<unsigned>(running - fibers.data()) % kWarp; }

void allow_shared(size_t bytes) { most_shared = bytes; }

void block_barrier(int line) { wait(Waits::kBlock, line, 0); }

void warp_barrier(int line, unsigned mask) {
  if (mask != 0xffffffffu) fail("a part of a warp: the emulator knows whole ones");
  wait(Waits::kWarp, line, mask);
}

const uint32_t* exchange(int line, unsigned mask, uint32_t own) {
  // Two places in turn: a lane that is ahead does not write over what others have still to read.
  const unsigned turn = running->exchanges++ % 2;
  running->given[turn] = own;
  warp_barrier(line, mask);
  static uint32_t all[kWarp];  // read before the next fiber runs
  const size_t first = (running - fibers.data()) / kWarp * kWarp;
  for (size_t i = 0; i < kWarp && first + i < fibers.size(); ++i) all[i] = fibers[first + i].given[turn];
  return all;
}

void launch_body(void (*given_call)(const void*), const void* given_body, dim3 blocks, dim3 threads, size_t shared) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (failure.empty()) failure = refused(blocks, threads, shared);  // nothing runs behind one that failed
  call = given_call;
  body = given_body;
  const unsigned count = threads.x * threads.y * threads.z;
  if (fibers.size() < count) fibers.resize(count);
  std::vector<unsigned> order(blocks.x * blocks.y * blocks.z);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), dice);
  for (unsigned number : order) {
    if (!failure.empty()) break;
    block_index = dim3(number % blocks.x, number / blocks.x % blocks.y, number / blocks.x / blocks.y);
    dynamic_memory.assign(shared + kGuard, static_cast<char>(0xff));
    if (__start_block_shared != nullptr) std::fill(__start_block_shared, __stop_block_shared, static_cast<char>(0xff));
    run_block(threads);
    const bool is_whole = std::all_of(dynamic_memory.end() - kGuard, dynamic_memory.end(), [](char c) { return c == static_cast<char>(0xff); });
    if (failure.empty() && !is_whole) failure = "a write beyond the memory of the block";
  }
  if (!failure.empty()) fibers.clear();  // they stand anywhere
}

}  // namespace emulator

static std::string last_failure;

cudaError_t cudaGetLastError() {
  if (emulator::failure.empty()) return cudaSuccess;
  last_failure = emulator::failure;
  emulator::failure.clear();
  return cudaErrorAssert;
}

const char* cudaGetErrorString(cudaError_t) { return last_failure.c_str(); }
