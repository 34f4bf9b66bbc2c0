// Group limit, bias, top-k, gates and counts of each token's experts, given their scores.
//
// Only comparisons and single additions decide, in the order of megavid.ops.moe_math: the choice is bit for bit that of
// plain torch, and equal scores go to the lower number. A token's scores stay in the first-level cache.
#include "kernels.h"
#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {
namespace {

// The number of the largest of count values, the first among equals; -1 where all are minus infinity.
inline int64_t largest(const float* values, int64_t count) {
  int64_t best = -1;
  float most = -__builtin_inff();
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] > most) {
      most = values[i];
      best = i;
    }
  }
  return best;
}

// Sets the selection outside of the best groups to minus infinity. A group counts with the sum of its best scores,
// added best first. `spare` has room for a group and for a number per group.
inline void keep_top_groups(const RouterTopk& job, float* selection, float* spare) {
  const int64_t size = job.experts / job.num_groups;
  int64_t best = job.top_k / job.top_groups;
  best = best < 1 ? 1 : best > size ? size : best;
  float *group = spare, *sums = spare + size;
  for (int64_t g = 0; g < job.num_groups; ++g) {
    for (int64_t i = 0; i < size; ++i) group[i] = selection[g * size + i];
    float sum = 0.0f;
    for (int64_t k = 0; k < best; ++k) {
      const int64_t found = largest(group, size);
      if (found < 0) break;
      sum = k == 0 ? group[found] : sum + group[found];
      group[found] = -__builtin_inff();
    }
    sums[g] = sum;
  }
  for (int64_t k = 0; k < job.top_groups; ++k) {
    const int64_t found = largest(sums, job.num_groups);
    if (found >= 0) sums[found] = __builtin_nanf("");  // taken: no comparison finds it again
  }
  for (int64_t g = 0; g < job.num_groups; ++g) {
    if (sums[g] != sums[g]) continue;
    for (int64_t i = 0; i < size; ++i) selection[g * size + i] = -__builtin_inff();
  }
}

// One chunk of kCountTokens tokens after the other.
void forward(const RouterTopk& job, int64_t begin, int64_t end) {
  const int64_t experts = job.experts;
  Scratch buffer(3 * experts + job.num_groups);
  float *selection = buffer.data(), *spare = selection + experts;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* counts = job.counts + chunk * job.buckets * experts;
    const int64_t last = (chunk + 1) * kCountTokens < job.tokens ? (chunk + 1) * kCountTokens : job.tokens;
    for (int64_t token = chunk * kCountTokens; token < last; ++token) {
      const float* scores = job.scores + token * experts;
      float* probability = job.probability + token * experts;
      bool* map = job.map + token * experts;
      for (int64_t i = 0; i < experts; ++i) {
        selection[i] = job.bias == nullptr ? scores[i] : scores[i] + job.bias[i];
        probability[i] = 0.0f;
        map[i] = false;
      }
      const int64_t bucket = job.bucket[token];
      if (bucket < 0) continue;
      if (job.top_groups < job.num_groups) keep_top_groups(job, selection, spare);
      float sum = 0.0f;
      for (int64_t k = 0; k < job.top_k; ++k) {
        const int64_t found = largest(selection, experts);
        if (found < 0) break;  // scores that are not numbers
        selection[found] = -__builtin_inff();
        map[found] = true;
        sum += scores[found];
        counts[bucket * experts + found] += 1.0f;
      }
      const float divisor = job.top_k == 1 ? 1.0f : sum + kSmallestSum;
      for (int64_t i = 0; i < experts; ++i) {
        if (map[i]) probability[i] = scores[i] / divisor * job.scale;
      }
    }
  }
}

void backward(const RouterTopk& job, int64_t begin, int64_t end) {
  const int64_t experts = job.experts;
  for (int64_t token = begin; token < end; ++token) {
    const float *scores = job.scores + token * experts, *grad = job.grad + token * experts;
    const bool* map = job.map + token * experts;
    float* grad_scores = job.grad_scores + token * experts;
    float sum = 0.0f, product = 0.0f;
    for (int64_t i = 0; i < experts; ++i) {
      if (!map[i]) continue;
      sum += scores[i];
      product += grad[i] * scores[i];
    }
    const float divisor = job.top_k == 1 ? 1.0f : sum + kSmallestSum;
    const float mean = job.top_k == 1 ? 0.0f : product / divisor;
    for (int64_t i = 0; i < experts; ++i) grad_scores[i] = map[i] ? (grad[i] - mean) / divisor * job.scale : 0.0f;
  }
}

}  // namespace
}  // namespace MEGAVID_ISA
}  // namespace megavid

void MEGAVID_NAME(megavid_router_topk_forward)(const megavid::RouterTopk& job, int64_t begin, int64_t end) {
  megavid::MEGAVID_ISA::forward(job, begin, end);
}

void MEGAVID_NAME(megavid_router_topk_backward)(const megavid::RouterTopk& job, int64_t begin, int64_t end) {
  megavid::MEGAVID_ISA::backward(job, begin, end);
}
