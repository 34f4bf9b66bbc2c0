// Where every row of moe_permute stands; backward, the gradient of the gates.
//
// The map is read three times: counted by chunks of tokens, then numbered, then listed by token.
#include "device.cuh"

namespace megavid {
namespace cuda {
namespace {

// counts[chunk, expert]: one thread an expert, side by side on a token's row of the map.
__global__ void count(MoeIndex job) {
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x, chunk = blockIdx.y;
  if (expert >= job.experts) return;
  const int64_t begin = chunk * kIndexTokens;
  const int64_t end = begin + kIndexTokens < job.tokens ? begin + kIndexTokens : job.tokens;
  int64_t found = 0;
  for (int64_t token = begin; token < end; ++token) found += job.map[token * job.experts + expert];
  job.chunk_row[chunk * job.experts + expert] = found;
}

// Counts to first rows: of every expert, of every chunk within it. One block; experts are few.
__global__ void number(MoeIndex job) {
  const int64_t chunks = (job.tokens + kIndexTokens - 1) / kIndexTokens;
  for (int64_t expert = threadIdx.x; expert < job.experts; expert += kThreads) {
    int64_t total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int64_t* at = job.chunk_row + chunk * job.experts + expert;
      const int64_t found = *at;
      *at = total;
      total += found;
    }
    job.rows_of_expert[expert] = (total + job.alignment - 1) / job.alignment * job.alignment;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int64_t begin = 0;
  for (int64_t expert = 0; expert < job.experts; ++expert) {
    job.begin_of_expert[expert] = begin;
    begin += job.rows_of_expert[expert];
  }
  assert(begin <= job.num_rows);  // else nothing after this runs, so nothing is written beyond the last row
}

// Every row's token and gate, and every pair's row.
__global__ void fill(MoeIndex job) {
  const int64_t expert = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x, chunk = blockIdx.y;
  if (expert >= job.experts) return;
  int64_t row = job.begin_of_expert[expert] + job.chunk_row[chunk * job.experts + expert];
  const int64_t begin = chunk * kIndexTokens;
  const int64_t end = begin + kIndexTokens < job.tokens ? begin + kIndexTokens : job.tokens;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t pair = token * job.experts + expert;
    if (!job.map[pair]) continue;
    job.token[row] = token;
    job.row_probability[row] = job.probability[pair];
    job.row_of_pair[pair] = static_cast<int32_t>(row++);
  }
}

// The rows of each token, lowest expert first. One thread a token.
__global__ void list(MoeIndex job) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= job.tokens) return;
  int64_t place = job.first[token];
  for (int64_t expert = 0; expert < job.experts; ++expert) {
    const int64_t pair = token * job.experts + expert;
    if (job.map[pair]) job.row[place++] = job.row_of_pair[pair];
  }
}

// Gradient of the gates: every row's number to its token and expert. One thread a pair.
__global__ void scatter(MoeIndex job) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= job.num_rows || job.token[row] < 0) return;
  int64_t expert = 0, end = job.rows_of_expert[0];
  while (row >= end) end += job.rows_of_expert[++expert];
  job.grad_probability[job.token[row] * job.experts + expert] = job.grad_row_probability[row];
}

unsigned blocks_of(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

}  // namespace
}  // namespace cuda
}  // namespace megavid

cudaError_t megavid_cuda_moe_index(const megavid::MoeIndex* job, cudaStream_t stream) {
  using namespace megavid::cuda;
  if (job->experts == 0) return cudaSuccess;
  const dim3 grid(blocks_of(job->experts, kColumns), blocks_of(job->tokens, megavid::kIndexTokens));
  if (job->tokens > 0) count<<<grid, kColumns, 0, stream>>>(*job);
  number<<<1, kThreads, 0, stream>>>(*job);
  if (job->tokens > 0) {
    fill<<<grid, kColumns, 0, stream>>>(*job);
    list<<<blocks_of(job->tokens, kThreads), kThreads, 0, stream>>>(*job);
  }
  return cudaGetLastError();
}

cudaError_t megavid_cuda_moe_scatter_gates(const megavid::MoeIndex* job, cudaStream_t stream) {
  using namespace megavid::cuda;
  if (job->num_rows == 0 || job->experts == 0) return cudaSuccess;
  scatter<<<blocks_of(job->num_rows, kThreads), kThreads, 0, stream>>>(*job);
  return cudaGetLastError();
}
