// Checks and jobs of the ops of expert layers, for every device.
#pragma once

#include <optional>

#include "checks.h"

namespace megavid {

inline bool is_bf16(const Tensor& x) { return x.scalar_type() == at::kBFloat16; }

inline Tensor contiguous_or_none(const std::optional<Tensor>& x) {
  return x.has_value() ? x->contiguous() : Tensor();
}

inline void check_matrix(const char* op, const char* name, const Tensor& x, const char* shape) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": ", name, " must be ", shape, ", got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op, ": ", name,
                   " must be float32 or bfloat16, got ", x.scalar_type());
}

inline void check_vector(const char* op, const char* name, const Tensor& x, int64_t size, at::ScalarType dtype,
                         const Tensor& like) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == size, op, ": ", name, " must be [", size, "], got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ", x.scalar_type());
  check_device(op, like, x);
}

inline void check_activation(const char* op, const Tensor& up, const std::optional<Tensor>& gate,
                             const std::optional<Tensor>& up_bias, const std::optional<Tensor>& gate_bias,
                             const Tensor& expert, const Tensor& probability) {
  check_matrix(op, "up", up, "[S, M]");
  if (gate.has_value()) check_like(op, "gate", *gate, up);
  TORCH_CHECK_VALUE(gate.has_value() || !gate_bias.has_value(), op, ": gate_bias is given, and no gate");
  for (const auto& [name, bias] : {std::pair("up_bias", &up_bias), std::pair("gate_bias", &gate_bias)}) {
    if (!bias->has_value()) continue;
    const Tensor& table = **bias;
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == up.size(1), op, ": ", name, " must be [e, ", up.size(1),
                      "], got ", table.sizes());
    TORCH_CHECK_TYPE(table.scalar_type() == up.scalar_type(), op, ": ", name, " must be ", up.scalar_type(), ", got ",
                     table.scalar_type());
    check_device(op, up, table);
  }
  if (up_bias.has_value() && gate_bias.has_value()) check_like(op, "gate_bias", *gate_bias, *up_bias);
  check_vector(op, "expert", expert, up.size(0), at::kLong, up);
  check_vector(op, "probability", probability, up.size(0), at::kFloat, up);
}

inline void check_permute(const Tensor& x, const Tensor& probability, const Tensor& map, int64_t num_rows,
                          int64_t alignment) {
  const char* op = "moe_permute";
  check_matrix(op, "x", x, "[T, D]");
  TORCH_CHECK_TYPE(map.scalar_type() == at::kBool, op, ": map must be bool, got ", map.scalar_type());
  TORCH_CHECK_VALUE(map.dim() == 2 && map.size(0) == x.size(0), op, ": map must be [", x.size(0), ", E], got ",
                    map.sizes());
  TORCH_CHECK_VALUE(probability.sizes() == map.sizes(), op, ": probability must be ", map.sizes(), ", got ",
                    probability.sizes());
  TORCH_CHECK_TYPE(probability.scalar_type() == at::kFloat, op, ": probability must be Float, got ",
                   probability.scalar_type());
  TORCH_CHECK_VALUE(num_rows >= 0, op, ": num_rows must be at least 0, got ", num_rows);
  TORCH_CHECK_VALUE(alignment >= 1, op, ": alignment must be at least 1, got ", alignment);
  check_device(op, x, map);
  check_device(op, x, probability);
}

// Rows [S, D] and the indices that lead to them.
inline void check_rows(const char* op, const Tensor& rows, const Tensor& token, const Tensor& first,
                       const Tensor& row) {
  check_matrix(op, "x", rows, "[S, D]");
  check_vector(op, "token", token, rows.size(0), at::kLong, rows);
  check_vector(op, "row", row, rows.size(0), at::kLong, rows);
  TORCH_CHECK_VALUE(first.dim() == 1 && first.size(0) >= 1, op, ": first must be [T + 1], got ", first.sizes());
  TORCH_CHECK_TYPE(first.scalar_type() == at::kLong, op, ": first must be Long, got ", first.scalar_type());
  check_device(op, rows, first);
}

inline void check_weight(const char* op, const Tensor& rows, const std::optional<Tensor>& weight) {
  if (weight.has_value()) check_vector(op, "weight", *weight, rows.size(0), at::kFloat, rows);
}

inline void check_router(const Tensor& scores, const std::optional<Tensor>& bias, const Tensor& bucket,
                         int64_t num_buckets, int64_t top_k, int64_t num_groups, int64_t top_groups) {
  const char* op = "router_topk";
  TORCH_CHECK_VALUE(scores.dim() == 2, op, ": scores must be [T, E], got ", scores.sizes());
  TORCH_CHECK_TYPE(scores.scalar_type() == at::kFloat, op, ": scores must be Float, got ", scores.scalar_type());
  const int64_t experts = scores.size(1);
  if (bias.has_value()) check_vector(op, "bias", *bias, experts, at::kFloat, scores);
  check_vector(op, "bucket", bucket, scores.size(0), at::kLong, scores);
  TORCH_CHECK_VALUE(num_buckets >= 1, op, ": num_buckets must be at least 1, got ", num_buckets);
  TORCH_CHECK_VALUE(num_groups >= 1 && experts % num_groups == 0 && top_groups >= 1 && top_groups <= num_groups, op,
                    ": ", top_groups, " of ", num_groups, " groups do not fit ", experts, " experts");
  const int64_t most = experts / num_groups * top_groups;
  TORCH_CHECK_VALUE(top_k >= 1 && top_k <= most, op, ": top_k must be 1 to ", most, ", got ", top_k);
}

inline ExpertActivation activation_job(const Tensor& up, const Tensor& gate, const Tensor& up_bias,
                                       const Tensor& gate_bias, const Tensor& expert, const Tensor& probability) {
  ExpertActivation job{};
  job.up = up.const_data_ptr();
  job.gate = gate.defined() ? gate.const_data_ptr() : nullptr;
  job.up_bias = up_bias.defined() ? up_bias.const_data_ptr() : nullptr;
  job.gate_bias = gate_bias.defined() ? gate_bias.const_data_ptr() : nullptr;
  job.expert = expert.const_data_ptr<int64_t>();
  job.probability = probability.const_data_ptr<float>();
  job.experts = up_bias.defined() ? up_bias.size(0) : gate_bias.defined() ? gate_bias.size(0) : 0;
  job.width = up.size(1);
  job.is_bf16 = is_bf16(up);
  return job;
}

// From tokens to rows (token is given) or from rows to tokens (first and row are).
inline MoeRows rows_job(const Tensor& from, const Tensor& to) {
  MoeRows job{};
  job.from = from.const_data_ptr();
  job.to = to.mutable_data_ptr();
  job.width = from.size(1);
  job.is_bf16 = is_bf16(from);
  return job;
}

inline RouterTopk router_job(const Tensor& scores, int64_t top_k, double scale) {
  RouterTopk job{};
  job.scores = scores.const_data_ptr<float>();
  job.tokens = scores.size(0);
  job.experts = scores.size(1);
  job.top_k = top_k;
  job.scale = static_cast<float>(scale);
  return job;
}

}  // namespace megavid
