// Mean and deviation of one token's numbers, as LayerNorm and RMSNorm take them.
#pragma once

#include <cmath>

#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {

struct Moments {
  float mean;
  float rstd;
};

// Two passes, so that a large mean costs no digits; the numbers are in the first-level cache.
template <bool kCentered>
Moments moments(const float* wide, int64_t width, float eps) {
  float mean = 0.0f;
  if (kCentered) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += wide[i];
    mean = sum / static_cast<float>(width);
  }
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) {
    const float centered = wide[i] - mean;
    squares += centered * centered;
  }
  return {mean, 1.0f / std::sqrt(squares / static_cast<float>(width) + eps)};
}

}  // namespace MEGAVID_ISA
}  // namespace megavid
