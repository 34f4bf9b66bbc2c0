// Sum of the squares of each token's numbers, in fp32: what RMSNorm across heads adds up between ranks.
//
// Memory traffic per token: forward reads x; backward reads x and writes its gradient. Eager torch writes the squares,
// and of bf16 a copy in fp32, which autograd keeps.
#include "kernels.h"
#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {
namespace {

template <typename T>
void forward(const SumOfSquares& job, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(job.x) + token * job.x_stride;
    job.sums[token] = total(job.width, [=](int64_t i) { return load(x[i]) * load(x[i]); });
  }
}

template <typename T>
void backward(const SumOfSquares& job, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const T* x = static_cast<const T*>(job.x) + token * job.x_stride;
    T* grad_x = static_cast<T*>(job.grad_x) + token * job.width;
    const float grad = 2.0f * job.grad[token];
#pragma omp simd
    for (int64_t i = 0; i < job.width; ++i) store(grad_x + i, grad * load(x[i]));
  }
}

}  // namespace
}  // namespace MEGAVID_ISA
}  // namespace megavid

MEGAVID_ENTRY(sum_of_squares_forward, SumOfSquares, forward)
MEGAVID_ENTRY(sum_of_squares_backward, SumOfSquares, backward)
