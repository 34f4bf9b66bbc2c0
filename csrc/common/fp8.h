// Rounding to eight-bit floats, on CPU and CUDA alike, in integers: no device needs instructions for it, and all of them
// give the same bytes. megavid/ops/fp8.py is the reference.
//
// Everything is in the namespace of what is being compiled: an instruction set of a CPU, or cuda (csrc/README.md).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MEGAVID_SPACE cuda
#define MEGAVID_INLINE __device__ inline
#else
#define MEGAVID_SPACE MEGAVID_ISA
#define MEGAVID_INLINE inline
#endif

namespace megavid {
namespace MEGAVID_SPACE {

// kLargest: the largest finite number.
struct E4M3 {
  static constexpr int kMantissa = 3, kBias = 7;
  static constexpr float kLargest = 448.0f;
};

struct E5M2 {
  static constexpr int kMantissa = 2, kBias = 15;
  static constexpr float kLargest = 57344.0f;
};

constexpr int32_t kInfinity = 0x7f800000;  // bits of a float; NaN is above

MEGAVID_INLINE int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

MEGAVID_INLINE float float_of(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Bits without the sign: they are in the order of the magnitudes, infinity and NaN above all numbers.
MEGAVID_INLINE int32_t magnitude_of(float value) { return bits_of(value) & 0x7fffffff; }

// The byte of a number: to nearest, ties to even; what is beyond the largest number becomes it; NaN becomes 0x7f, with its
// sign. Without branches, so that loops around it are vectorised: the magnitude plus 2^(23 - kMantissa) times its own
// power of two has steps of the format's at that power, so that the addition rounds, and its last bits count the steps.
template <typename Format>
MEGAVID_INLINE int32_t byte_of(float value) {
  constexpr int32_t shift = 23 - Format::kMantissa;
  constexpr int32_t normal = (128 - Format::kBias) << 23;  // the least power of two with a full mantissa
  const int32_t all = magnitude_of(value), largest = bits_of(Format::kLargest);
  const int32_t size = all < largest ? all : largest;
  const int32_t own = size & kInfinity, power = own > normal ? own : normal;
  const int32_t to_add = power + (shift << 23);
  const int32_t steps = bits_of(float_of(size) + float_of(to_add)) - to_add;
  const int32_t byte = steps + ((power - normal) >> shift);
  const int32_t is_nan = (kInfinity - all) >> 31;  // all ones, or none
  return byte | (is_nan & 0x7f) | ((bits_of(value) >> 24) & 0x80);
}

// A power of two that brings numbers of at most this magnitude into the range, as the exponent of a float: 2^(this - 127).
// 2^0 for zero; 255, which is NaN, where the magnitude is not finite.
template <typename Format>
MEGAVID_INLINE int32_t exponent_of(int32_t magnitude) {
  // Of the next power of two above the quotient; one that has no full mantissa is below 2^-126, the least scale.
  const int32_t quotient = bits_of(float_of(magnitude) / Format::kLargest);
  const int32_t exponent = quotient == 0 ? 127 : (quotient >> 23) + 1;
  return magnitude >= kInfinity ? 255 : exponent;
}

MEGAVID_INLINE float scale_of(int32_t exponent) { return float_of(exponent == 255 ? 0x7fc00000 : exponent << 23); }

// The reciprocal, exact.
MEGAVID_INLINE float inverse_of(int32_t exponent) {
  return float_of(exponent == 255 ? 0x7fc00000 : (254 - exponent) << 23);
}

}  // namespace MEGAVID_SPACE
}  // namespace megavid
