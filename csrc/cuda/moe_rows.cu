// Rows sorted by expert and the tokens that they are of: tokens to rows, and sums of a token's rows.
//
// moe_permute gathers forward and combines backward, moe_unpermute the other way round. Memory traffic: gathering reads a
// token for each of its rows and writes the rows, and reads the rows' own numbers where weights take a gradient; combining
// reads the rows and writes the tokens.
#include "device.cuh"

namespace megavid {
namespace cuda {
namespace {

// to[row] = weight[row] * from[token[row]]; zeros in rows that only fill up. One block a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) gather_rows(MoeRows job) {
  const int64_t row = blockIdx.x, width = job.width, token = job.token[row];
  T* to = row_of<T>(job.to, row, width);
  const bool is_weighted = job.weight != nullptr;
  if (token < 0) {
    for (int64_t i = threadIdx.x; i < width; i += kThreads) store(to + i, 0.0f);
    if (is_weighted && threadIdx.x == 0) job.grad_weight[row] = 0.0f;
    return;
  }
  const T* from = row_of<T>(job.from, token, width);
  if (!is_weighted) {
    for (int64_t i = threadIdx.x; i < width; i += kThreads) to[i] = from[i];
    return;
  }
  const T* x = row_of<T>(job.x, row, width);
  const float weight = job.weight[row];
  float product = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const float value = load(from[i]);
    product += value * load(x[i]);
    store(to + i, value * weight);
  }
  const float total = block_sum(product);
  if (threadIdx.x == 0) job.grad_weight[row] = total;
}

// to[token] = sum of weight[row] * from[row] over the token's rows in their order, in fp32. One block a token.
template <typename T>
__global__ void __launch_bounds__(kThreads) combine_rows(MoeRows job) {
  const int64_t token = blockIdx.x, width = job.width;
  const int64_t first = job.first[token], last = job.first[token + 1];
  T* to = row_of<T>(job.to, token, width);
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    float sum = 0.0f;
    for (int64_t place = first; place < last; ++place) {
      const int64_t row = job.row[place];
      const float value = load(row_of<T>(job.from, row, width)[i]);
      sum += job.weight == nullptr ? value : job.weight[row] * value;
    }
    store(to + i, sum);
  }
}

template <typename T>
cudaError_t run_gather(const MoeRows& job, int64_t rows, cudaStream_t stream) {
  return launch(gather_rows<T>, rows, stream, job);
}

template <typename T>
cudaError_t run_combine(const MoeRows& job, int64_t tokens, cudaStream_t stream) {
  return launch(combine_rows<T>, tokens, stream, job);
}

}  // namespace
}  // namespace cuda
}  // namespace megavid

MEGAVID_ENTRY(moe_gather, MoeRows, run_gather)
MEGAVID_ENTRY(moe_combine, MoeRows, run_combine)
