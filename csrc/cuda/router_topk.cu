// Group limit, bias, top-k, gates and counts of each token's experts, given their scores. One warp a token.
//
// Only comparisons and single additions decide, in the order of megavid.ops.moe_math, so the choice is bit for bit that
// of plain torch; equal scores go to the lower number. Counts are whole numbers: adding them in any order is exact.
#include "device.cuh"

namespace megavid {
namespace cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr float kLeast = -INFINITY;

// The number of the largest of count values that a warp holds in shared memory, the first among equals; -1: none.
__device__ inline int largest(const float* values, int count) {
  float most = kLeast;
  int best = -1;
  for (int i = threadIdx.x & 31; i < count; i += 32) {
    if (values[i] > most) {
      most = values[i];
      best = i;
    }
  }
  for (int distance = 16; distance > 0; distance >>= 1) {
    const float other = __shfl_xor_sync(kAll, most, distance);
    const int number = __shfl_xor_sync(kAll, best, distance);
    if (number >= 0 && (best < 0 || other > most || (other == most && number < best))) {
      most = other;
      best = number;
    }
  }
  return best;
}

// A lane sums the best scores of a group, best first; its group's copy is in `spare`.
__device__ inline void keep_top_groups(const RouterTopk& job, float* selection, float* spare, float* sums) {
  const int lane = threadIdx.x & 31, groups = static_cast<int>(job.num_groups);
  const int size = static_cast<int>(job.experts / job.num_groups);
  int best = static_cast<int>(job.top_k / job.top_groups);
  best = best < 1 ? 1 : best > size ? size : best;
  for (int g = lane; g < groups; g += 32) {
    float* group = spare + g * size;
    for (int i = 0; i < size; ++i) group[i] = selection[g * size + i];
    float sum = 0.0f;
    for (int k = 0; k < best; ++k) {
      int found = -1;
      for (int i = 0; i < size; ++i) {
        if (group[i] > (found < 0 ? kLeast : group[found])) found = i;
      }
      if (found < 0) break;
      sum = k == 0 ? group[found] : sum + group[found];
      group[found] = kLeast;
    }
    sums[g] = sum;
  }
  __syncwarp();
  for (int k = 0; k < job.top_groups; ++k) {
    const int found = largest(sums, groups);
    __syncwarp();
    if (lane == 0 && found >= 0) sums[found] = NAN;  // taken: no comparison finds it again
    __syncwarp();
  }
  for (int i = lane; i < job.experts; i += 32) {
    const float sum = sums[i / size];
    if (sum == sum) selection[i] = kLeast;
  }
  __syncwarp();
}

__global__ void __launch_bounds__(kThreads) forward(RouterTopk job) {
  extern __shared__ float shared[];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (token >= job.tokens) return;
  const int lane = threadIdx.x & 31, experts = static_cast<int>(job.experts);
  float* selection = shared + (threadIdx.x >> 5) * (2 * job.experts + job.num_groups);
  float *spare = selection + experts, *sums = spare + experts;
  const float* scores = job.scores + token * experts;
  float* probability = job.probability + token * experts;
  bool* map = job.map + token * experts;
  const int64_t bucket = checked(job.bucket[token] + 1, job.buckets + 1) - 1;  // from -1
  for (int i = lane; i < experts; i += 32) {
    selection[i] = job.bias == nullptr ? scores[i] : scores[i] + job.bias[i];
    probability[i] = 0.0f;
    map[i] = false;
  }
  __syncwarp();
  if (bucket < 0) return;
  if (job.top_groups < job.num_groups) keep_top_groups(job, selection, spare, sums);
  float sum = 0.0f;
  for (int64_t k = 0; k < job.top_k; ++k) {
    const int found = largest(selection, experts);
    if (found < 0) break;  // scores that are not numbers
    __syncwarp();
    sum += scores[found];
    if (lane == 0) {
      selection[found] = kLeast;
      map[found] = true;
      atomicAdd(job.counts + bucket * experts + found, 1.0f);
    }
    __syncwarp();
  }
  const float divisor = job.top_k == 1 ? 1.0f : sum + kSmallestSum;
  for (int i = lane; i < experts; i += 32) {
    if (map[i]) probability[i] = scores[i] / divisor * job.scale;
  }
}

__device__ inline float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance >>= 1) value += __shfl_xor_sync(kAll, value, distance);
  return value;
}

__global__ void __launch_bounds__(kThreads) backward(RouterTopk job) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + (threadIdx.x >> 5);
  if (token >= job.tokens) return;
  const int lane = threadIdx.x & 31, experts = static_cast<int>(job.experts);
  const float *scores = job.scores + token * experts, *grad = job.grad + token * experts;
  const bool* map = job.map + token * experts;
  float sum = 0.0f, product = 0.0f;
  for (int i = lane; i < experts; i += 32) {
    if (!map[i]) continue;
    sum += scores[i];
    product += grad[i] * scores[i];
  }
  const float divisor = job.top_k == 1 ? 1.0f : warp_sum(sum) + kSmallestSum;
  const float mean = job.top_k == 1 ? 0.0f : warp_sum(product) / divisor;
  float* grad_scores = job.grad_scores + token * experts;
  for (int i = lane; i < experts; i += 32) grad_scores[i] = map[i] ? (grad[i] - mean) / divisor * job.scale : 0.0f;
}

}  // namespace
}  // namespace cuda
}  // namespace megavid

cudaError_t megavid_cuda_router_topk_forward(const megavid::RouterTopk* job, cudaStream_t stream) {
  using namespace megavid::cuda;
  if (job->tokens == 0) return cudaSuccess;
  const size_t shared = kWarps * (2 * job->experts + job->num_groups) * sizeof(float);
  const unsigned blocks = static_cast<unsigned>((job->tokens + kWarps - 1) / kWarps);
  if (shared > 48 << 10) {  // beyond this a kernel has to ask: from some 760 experts on
    const int bytes = static_cast<int>(shared);
    const cudaError_t error = cudaFuncSetAttribute(forward, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  forward<<<blocks, kThreads, shared, stream>>>(*job);
  return cudaGetLastError();
}

cudaError_t megavid_cuda_router_topk_backward(const megavid::RouterTopk* job, cudaStream_t stream) {
  using namespace megavid::cuda;
  if (job->tokens == 0) return cudaSuccess;
  backward<<<static_cast<unsigned>((job->tokens + kWarps - 1) / kWarps), kThreads, 0, stream>>>(*job);
  return cudaGetLastError();
}
