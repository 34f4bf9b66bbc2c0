// Registers the CPU kernels of expert layers with torch's dispatcher; cpu.cpp does those of blocks.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "checks_fp8.h"
#include "checks_moe.h"
#include "isa.h"
#include "register.h"
#include "runs.h"

namespace megavid {
namespace {

using Optional = std::optional<Tensor>;

void check_experts(const char* op, const Tensor& expert, const Tensor& up_bias, const Tensor& gate_bias) {
  for (const Tensor* bias : {&up_bias, &gate_bias}) {
    if (bias->defined()) check_rows_in_range(op, expert, bias->size(0), "expert");
  }
}

Tensor expert_activation(const Tensor& up_, const Optional& gate_, const Optional& up_bias_, const Optional& gate_bias_,
                         const Tensor& expert_, const Tensor& probability_) {
  const char* op = "expert_activation";
  check_activation(op, up_, gate_, up_bias_, gate_bias_, expert_, probability_);
  const Tensor up = up_.contiguous(), expert = expert_.contiguous(), probability = probability_.contiguous();
  const Tensor gate = contiguous_or_none(gate_), up_bias = contiguous_or_none(up_bias_);
  const Tensor gate_bias = contiguous_or_none(gate_bias_);
  check_experts(op, expert, up_bias, gate_bias);
  Tensor y = at::empty_like(up);
  ExpertActivation job = activation_job(up, gate, up_bias, gate_bias, expert, probability);
  job.y = y.mutable_data_ptr();
  at::parallel_for(0, up.size(0), kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_expert_activation_forward, job, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor> expert_activation_fp8(const Tensor& up_, const Optional& gate_, const Optional& up_bias_,
                                                 const Optional& gate_bias_, const Tensor& expert_,
                                                 const Tensor& probability_, int64_t tile,
                                                 at::ScalarType scale_dtype) {
  const char* op = "expert_activation_fp8";
  check_activation(op, up_, gate_, up_bias_, gate_bias_, expert_, probability_);
  check_row_tile(op, tile);
  check_scale_format(op, scale_dtype);
  const Tensor up = up_.contiguous(), expert = expert_.contiguous(), probability = probability_.contiguous();
  const Tensor gate = contiguous_or_none(gate_), up_bias = contiguous_or_none(up_bias_);
  const Tensor gate_bias = contiguous_or_none(gate_bias_);
  check_experts(op, expert, up_bias, gate_bias);
  const ActivationFp8Call call(activation_job(up, gate, up_bias, gate_bias, expert, probability), up, tile, scale_dtype);
  const ExpertActivationFp8& job = call.job;
  at::parallel_for(0, up.size(0), kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_expert_activation_fp8, job, begin, end);
  });
  return {call.data, call.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_activation_backward(
    const Tensor& grad_y_, const Tensor& up_, const Optional& gate_, const Optional& up_bias_,
    const Optional& gate_bias_, const Tensor& expert_, const Tensor& probability_) {
  const char* op = "expert_activation_backward";
  check_activation(op, up_, gate_, up_bias_, gate_bias_, expert_, probability_);
  check_like(op, "grad_y", grad_y_, up_);
  const Tensor up = up_.contiguous(), expert = expert_.contiguous(), probability = probability_.contiguous();
  const Tensor gate = contiguous_or_none(gate_), up_bias = contiguous_or_none(up_bias_);
  const Tensor gate_bias = contiguous_or_none(gate_bias_), grad_y = grad_y_.contiguous();
  check_experts(op, expert, up_bias, gate_bias);
  const std::vector<int64_t> starts = run_starts(expert, expert);
  const int64_t runs = static_cast<int64_t>(starts.size()) - 1;
  const Tensor none = at::empty({0}, up.options());
  const at::TensorOptions wide = up.options().dtype(at::kFloat);
  Tensor grad_up = at::empty_like(up), grad_gate = gate.defined() ? at::empty_like(gate) : none;
  Tensor grad_probability = at::empty_like(probability);
  Tensor run_up = up_bias.defined() ? at::empty({runs, up.size(1)}, wide) : Tensor();
  Tensor run_gate = gate_bias.defined() ? at::empty({runs, up.size(1)}, wide) : Tensor();
  ExpertActivation job = activation_job(up, gate, up_bias, gate_bias, expert, probability);
  job.grad_y = grad_y.const_data_ptr();
  job.grad_up = grad_up.mutable_data_ptr();
  job.grad_gate = gate.defined() ? grad_gate.mutable_data_ptr() : nullptr;
  job.grad_probability = grad_probability.mutable_data_ptr<float>();
  job.run_start = starts.data();
  job.run_up = run_up.defined() ? run_up.mutable_data_ptr<float>() : nullptr;
  job.run_gate = run_gate.defined() ? run_gate.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_expert_activation_backward, job, begin, end);
  });
  const auto bias = [&](const Tensor& table, const Tensor& sums) {
    return table.defined() ? sum_runs(expert, starts, sums, table).to(table.scalar_type()) : none;
  };
  return {grad_up, grad_gate, bias(up_bias, run_up), bias(gate_bias, run_gate), grad_probability};
}

// Calls with every expert of a token, in order. Most of a map is false: eight at a time are skipped.
template <typename Visit>
void visit_experts(const bool* map, int64_t experts, const Visit& visit) {
  int64_t expert = 0;
  for (; expert + 8 <= experts; expert += 8) {
    uint64_t eight;
    std::memcpy(&eight, map + expert, sizeof(eight));
    if (eight == 0) continue;
    for (int64_t i = expert; i < expert + 8; ++i) {
      if (map[i]) visit(i);
    }
  }
  for (; expert < experts; ++expert) {
    if (map[expert]) visit(expert);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_permute(const Tensor& x_, const Tensor& probability_,
                                                                       const Tensor& map_, int64_t num_rows,
                                                                       int64_t alignment) {
  check_permute(x_, probability_, map_, num_rows, alignment);
  const Tensor x = x_.contiguous(), probability = probability_.contiguous(), map = map_.contiguous();
  const int64_t tokens = x.size(0), experts = map.size(1);
  const bool* chosen = map.const_data_ptr<bool>();
  Tensor counts = at::zeros({experts}, x.options().dtype(at::kLong));
  int64_t* count = counts.mutable_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t) visit_experts(chosen + t * experts, experts, [&](int64_t e) { ++count[e]; });
  std::vector<int64_t> next(experts);  // the next row of each expert
  int64_t needed = 0;
  for (int64_t e = 0; e < experts; ++e) {
    next[e] = needed;
    count[e] = (count[e] + alignment - 1) / alignment * alignment;
    needed += count[e];
  }
  TORCH_CHECK_VALUE(needed <= num_rows, "moe_permute: num_rows must be at least ", needed, ", got ", num_rows);
  Tensor token = at::full({num_rows}, -1, counts.options()), row = at::full({num_rows}, -1, counts.options());
  Tensor first = at::empty({tokens + 1}, counts.options());
  Tensor row_probability = at::zeros({num_rows}, probability.options());
  int64_t *of_row = token.mutable_data_ptr<int64_t>(), *of_token = row.mutable_data_ptr<int64_t>();
  int64_t *begin_of = first.mutable_data_ptr<int64_t>(), place = 0;
  float* gate = row_probability.mutable_data_ptr<float>();
  const float* gates = probability.const_data_ptr<float>();
  for (int64_t t = 0; t < tokens; ++t) {
    begin_of[t] = place;
    visit_experts(chosen + t * experts, experts, [&](int64_t e) {
      const int64_t at = next[e]++;
      of_row[at] = t;
      of_token[place++] = at;
      gate[at] = gates[t * experts + e];
    });
  }
  begin_of[tokens] = place;
  Tensor rows = at::empty({num_rows, x.size(1)}, x.options());
  MoeRows job = rows_job(x, rows);
  job.token = of_row;
  at::parallel_for(0, num_rows, kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_moe_gather, job, begin, end);
  });
  return {rows, row_probability, token, first, row, counts};
}

std::tuple<Tensor, Tensor> moe_permute_backward(const Tensor& grad_, const Tensor& grad_probability_,
                                                const Tensor& token_, const Tensor& first_, const Tensor& row_,
                                                const Tensor& counts_) {
  const char* op = "moe_permute_backward";
  check_rows(op, grad_, token_, first_, row_);
  check_vector(op, "grad_probability", grad_probability_, grad_.size(0), at::kFloat, grad_);
  const Tensor grad = grad_.contiguous(), grad_probability = grad_probability_.contiguous();
  const Tensor token = token_.contiguous(), first = first_.contiguous(), row = row_.contiguous();
  const Tensor counts = counts_.contiguous();
  const int64_t tokens = first.size(0) - 1, experts = counts.size(0);
  Tensor grad_x = at::empty({tokens, grad.size(1)}, grad.options());
  Tensor gates = at::zeros({tokens, experts}, grad_probability.options());
  MoeRows job = rows_job(grad, grad_x);
  job.first = first.const_data_ptr<int64_t>();
  job.row = row.const_data_ptr<int64_t>();
  at::parallel_for(0, tokens, kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_moe_combine, job, begin, end);
  });
  const int64_t *of_row = token.const_data_ptr<int64_t>(), *count = counts.const_data_ptr<int64_t>();
  const float* from = grad_probability.const_data_ptr<float>();
  float* to = gates.mutable_data_ptr<float>();
  int64_t at = 0;
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t i = 0; i < count[e]; ++i, ++at) {
      if (of_row[at] >= 0) to[of_row[at] * experts + e] = from[at];
    }
  }
  return {grad_x, gates};
}

Tensor moe_unpermute(const Tensor& x_, const Optional& weight_, const Tensor& token_, const Tensor& first_,
                     const Tensor& row_) {
  const char* op = "moe_unpermute";
  check_rows(op, x_, token_, first_, row_);
  check_weight(op, x_, weight_);
  const Tensor x = x_.contiguous(), weight = contiguous_or_none(weight_);
  const Tensor first = first_.contiguous(), row = row_.contiguous();
  Tensor tokens = at::empty({first.size(0) - 1, x.size(1)}, x.options());
  MoeRows job = rows_job(x, tokens);
  job.first = first.const_data_ptr<int64_t>();
  job.row = row.const_data_ptr<int64_t>();
  job.weight = weight.defined() ? weight.const_data_ptr<float>() : nullptr;
  at::parallel_for(0, tokens.size(0), kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_moe_combine, job, begin, end);
  });
  return tokens;
}

std::tuple<Tensor, Tensor> moe_unpermute_backward(const Tensor& grad_, const Optional& x_, const Optional& weight_,
                                                  const Tensor& token_) {
  const char* op = "moe_unpermute_backward";
  check_matrix(op, "grad", grad_, "[T, D]");
  check_vector(op, "token", token_, token_.numel(), at::kLong, grad_);
  const Tensor grad = grad_.contiguous(), token = token_.contiguous();
  const Tensor x = contiguous_or_none(x_), weight = contiguous_or_none(weight_);
  Tensor rows = at::empty({token.size(0), grad.size(1)}, grad.options());
  Tensor grad_weight = at::empty({weight.defined() ? token.size(0) : 0}, grad.options().dtype(at::kFloat));
  MoeRows job = rows_job(grad, rows);
  job.token = token.const_data_ptr<int64_t>();
  if (weight.defined()) {
    TORCH_CHECK_VALUE(x.defined(), op, ": x must be given where weight is");
    check_like(op, "x", x, rows);
    check_weight(op, x, weight);
    job.x = x.const_data_ptr();
    job.weight = weight.const_data_ptr<float>();
    job.grad_weight = grad_weight.mutable_data_ptr<float>();
  }
  at::parallel_for(0, token.size(0), kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_moe_gather, job, begin, end);
  });
  return {rows, weight.defined() ? grad_weight : at::empty({0}, grad.options())};
}

std::tuple<Tensor, Tensor, Tensor> router_topk(const Tensor& scores_, const Optional& bias_, const Tensor& bucket_,
                                               int64_t num_buckets, int64_t top_k, int64_t num_groups,
                                               int64_t top_groups, double scale) {
  check_router(scores_, bias_, bucket_, num_buckets, top_k, num_groups, top_groups);
  const Tensor scores = scores_.contiguous(), bias = contiguous_or_none(bias_), bucket = bucket_.contiguous();
  const int64_t tokens = scores.size(0), chunks = (tokens + kCountTokens - 1) / kCountTokens;
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t found = bucket.const_data_ptr<int64_t>()[t];
    TORCH_CHECK_VALUE(found >= -1 && found < num_buckets, "router_topk: bucket must be in [-1, ", num_buckets,
                      "), got ", found);
  }
  Tensor probability = at::empty_like(scores), map = at::empty(scores.sizes(), scores.options().dtype(at::kBool));
  Tensor counts = at::zeros({chunks, num_buckets, scores.size(1)}, scores.options());
  RouterTopk job = router_job(scores, top_k, scale);
  job.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  job.bucket = bucket.const_data_ptr<int64_t>();
  job.probability = probability.mutable_data_ptr<float>();
  job.map = map.mutable_data_ptr<bool>();
  job.counts = counts.mutable_data_ptr<float>();
  job.buckets = num_buckets;
  job.num_groups = num_groups;
  job.top_groups = top_groups;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_router_topk_forward, job, begin, end);
  });
  return {probability, map, counts.sum(0)};
}

Tensor router_topk_backward(const Tensor& grad_, const Tensor& scores_, const Tensor& map_, int64_t top_k,
                            double scale) {
  const char* op = "router_topk_backward";
  check_like(op, "grad", grad_, scores_);
  TORCH_CHECK_VALUE(map_.sizes() == scores_.sizes(), op, ": map must be ", scores_.sizes(), ", got ", map_.sizes());
  const Tensor grad = grad_.contiguous(), scores = scores_.contiguous(), map = map_.contiguous();
  Tensor grad_scores = at::empty_like(scores);
  RouterTopk job = router_job(scores, top_k, scale);
  job.map = const_cast<bool*>(map.const_data_ptr<bool>());
  job.grad = grad.const_data_ptr<float>();
  job.grad_scores = grad_scores.mutable_data_ptr<float>();
  at::parallel_for(0, scores.size(0), kCountTokens, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_router_topk_backward, job, begin, end);
  });
  return grad_scores;
}

}  // namespace
}  // namespace megavid

TORCH_LIBRARY_IMPL(megavid, CPU, m) { MEGAVID_IMPL_MOE(m) }
