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

// Writes number(i), which is called once for each of a token's numbers, to wide[i]. Two passes, so that a large mean costs
// no digits; wide is in the first-level cache.
template <bool kCentered, typename Number>
Moments moments(int64_t width, float eps, float* wide, Number number) {
  const auto fetch = [=](int64_t i) { return wide[i] = number(i); };
  float mean = 0.0f, squares;
  if (kCentered) {
    mean = total(width, fetch) / static_cast<float>(width);
    squares = total(width, [=](int64_t i) { return (wide[i] - mean) * (wide[i] - mean); });
  } else {
    squares = total(width, [=](int64_t i) {
      const float value = fetch(i);
      return value * value;
    });
  }
  return {mean, 1.0f / std::sqrt(squares / static_cast<float>(width) + eps)};
}

// Means over a token's numbers that the gradient of its norm is less: of inner, and of inner * normed.
struct Means {
  float inner;
  float product;
};

// normed = (x - mean) * rstd and inner = grad_y * (1 + scale) of a token, which adds to the gradients of shift and scale.
template <bool kCentered, typename T>
Means inner_gradient(const T* x, const T* grad_y, const float* scale, float mean, float rstd, int64_t width,
                     float* normed, float* inner, float* grad_shift, float* grad_scale) {
  float sum = 0.0f, product = 0.0f;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < width; ++i) {
    const float grad = load(grad_y[i]);
    normed[i] = (load(x[i]) - mean) * rstd;
    inner[i] = grad * (1.0f + scale[i]);
    sum += inner[i];
    product += inner[i] * normed[i];
    grad_shift[i] += grad;
    grad_scale[i] += grad * normed[i];
  }
  return {kCentered ? sum / static_cast<float>(width) : 0.0f, product / static_cast<float>(width)};
}

}  // namespace MEGAVID_ISA
}  // namespace megavid
