// What every CPU kernel shares: number formats, and the name of the instruction set it is compiled for.
//
// Each kernel file is compiled once for every instruction set (MEGAVID_ISA = baseline, avx2, avx512) and its functions
// carry that name; kernels.h chooses at run time. Loops are plain C++ that the compiler vectorises: `omp simd` allows
// it to reorder a sum, nothing else does, so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#define MEGAVID_JOIN_(a, b) a##_##b
#define MEGAVID_JOIN(a, b) MEGAVID_JOIN_(a, b)
// The name of a function of this file in the instruction set that it is being compiled for.
#define MEGAVID_NAME(name) MEGAVID_JOIN(name, MEGAVID_ISA)

// Defines megavid_NAME, as kernels.h declares it: `function` for the number format of the job.
#define MEGAVID_ENTRY(name, Job, function)                                                     \
  void MEGAVID_NAME(megavid_##name)(const megavid::Job& job, int64_t begin, int64_t end) {     \
    using namespace megavid::MEGAVID_ISA;                                                      \
    job.is_bf16 ? function<BFloat16>(job, begin, end) : function<float>(job, begin, end);      \
  }

namespace megavid {
namespace MEGAVID_ISA {

// bfloat16 as stored: the upper half of a float, rounded to nearest, ties to even.
struct BFloat16 {
  uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(BFloat16 value) {
  uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

inline void store(float* place, float value) { *place = value; }

inline void store(BFloat16* place, float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  // NaN keeps its sign and stays NaN; rounding could carry it into infinity.
  uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  uint32_t quiet = (wide >> 16) | 0x40u;
  place->bits = static_cast<uint16_t>((wide & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// Sums are taken in so many parts, each of every 64th number, and those then added up: one sum alone waits for each of
// its additions, and the order would be another one in every instruction set.
constexpr int64_t kParts = 64;

// f(0) + ... + f(width - 1).
template <typename Number>
inline float total(int64_t width, Number f) {
  float part[kParts] = {};
  int64_t begin = 0;
  for (; begin + kParts <= width; begin += kParts) {
#pragma omp simd
    for (int64_t i = 0; i < kParts; ++i) part[i] += f(begin + i);
  }
  for (int64_t i = 0; begin + i < width; ++i) part[i] += f(begin + i);
  for (int64_t half = kParts / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

// Arguments that exponential() takes as they are; what lies beyond is taken for the nearest of them.
struct Range {
  float least;
  float most;
};

// -87 to 88, read from memory once before a loop: of constants in the loop the compiler works out e^-87 and e^88 and
// chooses between three results, in more than twice the time of two comparisons before one.
inline Range exponential_range() {
  const volatile float least = -87.0f, most = 88.0f;
  return {least, most};
}

// e^x within one unit of the last place, e^-87 and e^88 beyond the range; NaN stays NaN. Plain arithmetic, so
// that loops around it are vectorised, which those around std::exp are not.
//
// e^x = 2^n e^r with n = round(x / log 2); log 2 in two parts, of which n times the first is exact; e^r by the polynomial
// of Cephes' expf (S. Moshier).
inline float exponential(float x, Range range) {
  x = x < range.least ? range.least : x;
  x = x > range.most ? range.most : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the whole number in the lowest bits
  const float shifted = x * 1.44269504088896341f + round;
  const float n = shifted - round;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// Scratch numbers of one call. Not std::vector: its functions are shared between all instruction sets by the linker,
// which may keep the copy that this machine cannot run.
class Scratch {
 public:
  explicit Scratch(int64_t numbers) : data_(static_cast<float*>(std::malloc(numbers * sizeof(float)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() { return data_; }

 private:
  float* data_;
};

}  // namespace MEGAVID_ISA
}  // namespace megavid
