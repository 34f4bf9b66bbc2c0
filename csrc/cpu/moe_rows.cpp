// Rows sorted by expert and the tokens that they are of: tokens to rows, and sums of a token's rows.
//
// moe_permute gathers forward and combines backward, moe_unpermute the other way round. Memory traffic: gathering reads a
// token for each of its rows and writes the rows, and reads the rows' own numbers where weights take a gradient; combining
// reads the rows and writes the tokens. Eager torch adds row by row into the tokens, and in bf16 rounds every sum.
#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {
namespace {

// to[row] = weight[row] * from[token[row]] for a range of rows; zeros in rows that only fill up.
template <typename T>
void gather_rows(const MoeRows& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  for (int64_t row = begin; row < end; ++row) {
    T* to = static_cast<T*>(job.to) + row * width;
    const int64_t token = job.token[row];
    if (token < 0) {
      std::memset(to, 0, width * sizeof(T));
      if (job.grad_weight != nullptr) job.grad_weight[row] = 0.0f;
      continue;
    }
    const T* from = static_cast<const T*>(job.from) + token * width;
    if (job.weight == nullptr) {
      std::memcpy(to, from, width * sizeof(T));
      continue;
    }
    const float weight = job.weight[row];
    const T* x = static_cast<const T*>(job.x) + row * width;
    float product = 0.0f;
#pragma omp simd reduction(+ : product)
    for (int64_t i = 0; i < width; ++i) {
      const float value = load(from[i]);
      product += value * load(x[i]);
      store(to + i, value * weight);
    }
    job.grad_weight[row] = product;
  }
}

// to[token] = sum of weight[row] * from[row] over the token's rows in their order, in fp32, for a range of tokens.
template <typename T>
void combine_rows(const MoeRows& job, int64_t begin, int64_t end) {
  const int64_t width = job.width;
  Scratch buffer(width);
  float* sum = buffer.data();
  for (int64_t token = begin; token < end; ++token) {
    T* to = static_cast<T*>(job.to) + token * width;
    const int64_t first = job.first[token], last = job.first[token + 1];
    if (first == last) {
      std::memset(to, 0, width * sizeof(T));
      continue;
    }
    for (int64_t place = first; place < last; ++place) {
      const int64_t row = job.row[place];
      const T* from = static_cast<const T*>(job.from) + row * width;
      const float weight = job.weight == nullptr ? 1.0f : job.weight[row];
      if (place == first) {
        for (int64_t i = 0; i < width; ++i) sum[i] = weight * load(from[i]);
      } else {
        for (int64_t i = 0; i < width; ++i) sum[i] += weight * load(from[i]);
      }
    }
    for (int64_t i = 0; i < width; ++i) store(to + i, sum[i]);
  }
}

}  // namespace
}  // namespace MEGAVID_ISA
}  // namespace megavid

MEGAVID_ENTRY(moe_gather, MoeRows, gather_rows)
MEGAVID_ENTRY(moe_combine, MoeRows, combine_rows)
