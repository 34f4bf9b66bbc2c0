// What the CPU bindings share: the grain of threads, checks of rows, and sums of tables' gradients run by run.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros_like.h>

#include <vector>

#include "../common/jobs.h"
#include "checks.h"

namespace megavid {

// Tokens that one thread takes at least; below, threads cost more than they bring.
inline constexpr int64_t kGrain = 16;

inline void check_rows_in_range(const char* op, const Tensor& row, int64_t rows, const char* name = "row") {
  const int64_t* data = row.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < row.numel(); ++i) {
    TORCH_CHECK_VALUE(data[i] >= 0 && data[i] < rows, op, ": ", name, " must be in [0, ", rows, "), got ", data[i]);
  }
}

// First token of every run, then T: a run ends where a row changes, and after kRunTokens tokens.
inline std::vector<int64_t> run_starts(const Tensor& row, const Tensor& other) {
  const int64_t *one = row.const_data_ptr<int64_t>(), *two = other.const_data_ptr<int64_t>();
  std::vector<int64_t> starts;
  for (int64_t token = 0; token < row.numel(); ++token) {
    const bool is_first = token == 0 || one[token] != one[token - 1] || two[token] != two[token - 1];
    if (is_first || token - starts.back() == kRunTokens) starts.push_back(token);
  }
  starts.push_back(row.numel());
  return starts;
}

// The gradient of a table like `table`: every run's numbers added to its row, in the order of the runs.
inline Tensor sum_runs(const Tensor& row, const std::vector<int64_t>& starts, const Tensor& runs, const Tensor& table) {
  Tensor sums = at::zeros_like(table, table.options().dtype(at::kFloat));
  const int64_t* rows = row.const_data_ptr<int64_t>();
  const float* source = runs.const_data_ptr<float>();
  float* target = sums.mutable_data_ptr<float>();
  const int64_t width = table.size(1);
  at::parallel_for(0, width, 512, [&](int64_t begin, int64_t end) {
    for (size_t run = 0; run + 1 < starts.size(); ++run) {
      float* to = target + rows[starts[run]] * width;
      const float* from = source + static_cast<int64_t>(run) * width;
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    }
  });
  return sums;
}

}  // namespace megavid
