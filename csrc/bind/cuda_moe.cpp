// Registers the CUDA kernels of expert layers with torch's dispatcher. Twin of cpu_moe.cpp.
//
// What depends on numbers (experts, buckets, whether the rows are enough) is checked by the kernels: here that would wait
// for the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>

#include "../cuda/kernels.h"
#include "checks_fp8.h"
#include "checks_moe.h"
#include "launch.h"
#include "register.h"

namespace megavid {
namespace {

using Optional = std::optional<Tensor>;

Tensor expert_activation(const Tensor& up_, const Optional& gate_, const Optional& up_bias_, const Optional& gate_bias_,
                         const Tensor& expert_, const Tensor& probability_) {
  const char* op = "expert_activation";
  check_activation(op, up_, gate_, up_bias_, gate_bias_, expert_, probability_);
  const Launch launch(op, up_);
  const Tensor up = up_.contiguous(), expert = expert_.contiguous(), probability = probability_.contiguous();
  const Tensor gate = contiguous_or_none(gate_), up_bias = contiguous_or_none(up_bias_);
  const Tensor gate_bias = contiguous_or_none(gate_bias_);
  Tensor y = at::empty_like(up);
  ExpertActivation job = activation_job(up, gate, up_bias, gate_bias, expert, probability);
  job.y = y.mutable_data_ptr();
  launch.check(megavid_cuda_expert_activation_forward(&job, up.size(0), launch.stream));
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
  const Launch launch(op, up_);
  const Tensor up = up_.contiguous(), expert = expert_.contiguous(), probability = probability_.contiguous();
  const Tensor gate = contiguous_or_none(gate_), up_bias = contiguous_or_none(up_bias_);
  const Tensor gate_bias = contiguous_or_none(gate_bias_);
  const ActivationFp8Call call(activation_job(up, gate, up_bias, gate_bias, expert, probability), up, tile, scale_dtype);
  const ExpertActivationFp8& job = call.job;
  launch.check(megavid_cuda_expert_activation_fp8(&job, up.size(0), launch.stream));
  return {call.data, call.scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_activation_backward(
    const Tensor& grad_y_, const Tensor& up_, const Optional& gate_, const Optional& up_bias_,
    const Optional& gate_bias_, const Tensor& expert_, const Tensor& probability_) {
  const char* op = "expert_activation_backward";
  check_activation(op, up_, gate_, up_bias_, gate_bias_, expert_, probability_);
  check_like(op, "grad_y", grad_y_, up_);
  const Launch launch(op, up_);
  const Tensor up = up_.contiguous(), expert = expert_.contiguous(), probability = probability_.contiguous();
  const Tensor gate = contiguous_or_none(gate_), up_bias = contiguous_or_none(up_bias_);
  const Tensor gate_bias = contiguous_or_none(gate_bias_), grad_y = grad_y_.contiguous();
  const Tensor none = at::empty({0}, up.options()), wide = at::empty({0, up.size(1)}, probability.options());
  Tensor grad_up = at::empty_like(up), grad_gate = gate.defined() ? at::empty_like(gate) : none;
  Tensor grad_probability = at::empty_like(probability);
  ExpertActivation job = activation_job(up, gate, up_bias, gate_bias, expert, probability);
  const Sums sums = sums_of(up.size(0), job.experts, up.size(1));
  Tensor ups = partial_of(sums, up_bias.defined() ? job.experts : 0, wide);
  Tensor gates = partial_of(sums, gate_bias.defined() ? job.experts : 0, wide);
  job.grad_y = grad_y.const_data_ptr();
  job.grad_up = grad_up.mutable_data_ptr();
  job.grad_gate = gate.defined() ? grad_gate.mutable_data_ptr() : nullptr;
  job.grad_probability = grad_probability.mutable_data_ptr<float>();
  job.run_up = up_bias.defined() ? ups.mutable_data_ptr<float>() : nullptr;
  job.run_gate = gate_bias.defined() ? gates.mutable_data_ptr<float>() : nullptr;
  launch.check(megavid_cuda_expert_activation_backward(&job, &sums, launch.stream));
  const auto bias = [&](const Tensor& table, const Tensor& partial) {
    return table.defined() ? partial.sum(0).to(table.scalar_type()) : none;
  };
  return {grad_up, grad_gate, bias(up_bias, ups), bias(gate_bias, gates), grad_probability};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_permute(const Tensor& x_, const Tensor& probability_,
                                                                       const Tensor& map_, int64_t num_rows,
                                                                       int64_t alignment) {
  check_permute(x_, probability_, map_, num_rows, alignment);
  const Launch launch("moe_permute", x_);
  const Tensor x = x_.contiguous(), probability = probability_.contiguous(), map = map_.contiguous();
  const int64_t tokens = x.size(0), experts = map.size(1), chunks = (tokens + kIndexTokens - 1) / kIndexTokens;
  const at::TensorOptions whole = x.options().dtype(at::kLong);
  Tensor token = at::full({num_rows}, -1, whole), row = at::full({num_rows}, -1, whole);
  Tensor first = at::zeros({tokens + 1}, whole);
  first.slice(0, 1).copy_(at::cumsum(at::sum(map, 1, false, at::kLong), 0));
  Tensor counts = at::zeros({experts}, whole), begins = at::empty({experts}, whole);
  Tensor chunk_row = at::empty({chunks, experts}, whole);
  Tensor pairs = at::empty({tokens, experts}, x.options().dtype(at::kInt));
  Tensor row_probability = at::zeros({num_rows}, probability.options());
  MoeIndex index{};
  index.map = map.const_data_ptr<bool>();
  index.probability = probability.const_data_ptr<float>();
  index.token = token.mutable_data_ptr<int64_t>();
  index.first = first.mutable_data_ptr<int64_t>();
  index.row = row.mutable_data_ptr<int64_t>();
  index.rows_of_expert = counts.mutable_data_ptr<int64_t>();
  index.begin_of_expert = begins.mutable_data_ptr<int64_t>();
  index.chunk_row = chunk_row.mutable_data_ptr<int64_t>();
  index.row_of_pair = pairs.mutable_data_ptr<int32_t>();
  index.row_probability = row_probability.mutable_data_ptr<float>();
  index.tokens = tokens;
  index.experts = experts;
  index.num_rows = num_rows;
  index.alignment = alignment;
  launch.check(megavid_cuda_moe_index(&index, launch.stream));
  Tensor rows = at::empty({num_rows, x.size(1)}, x.options());
  MoeRows job = rows_job(x, rows);
  job.token = token.const_data_ptr<int64_t>();
  launch.check(megavid_cuda_moe_gather(&job, num_rows, launch.stream));
  return {rows, row_probability, token, first, row, counts};
}

std::tuple<Tensor, Tensor> moe_permute_backward(const Tensor& grad_, const Tensor& grad_probability_,
                                                const Tensor& token_, const Tensor& first_, const Tensor& row_,
                                                const Tensor& counts_) {
  const char* op = "moe_permute_backward";
  check_rows(op, grad_, token_, first_, row_);
  check_vector(op, "grad_probability", grad_probability_, grad_.size(0), at::kFloat, grad_);
  const Launch launch(op, grad_);
  const Tensor grad = grad_.contiguous(), grad_probability = grad_probability_.contiguous();
  const Tensor token = token_.contiguous(), first = first_.contiguous(), row = row_.contiguous();
  const Tensor counts = counts_.contiguous();
  const int64_t tokens = first.size(0) - 1, experts = counts.size(0);
  Tensor grad_x = at::empty({tokens, grad.size(1)}, grad.options());
  Tensor gates = at::zeros({tokens, experts}, grad_probability.options());
  MoeRows job = rows_job(grad, grad_x);
  job.first = first.const_data_ptr<int64_t>();
  job.row = row.const_data_ptr<int64_t>();
  launch.check(megavid_cuda_moe_combine(&job, tokens, launch.stream));
  MoeIndex index{};
  index.token = const_cast<int64_t*>(token.const_data_ptr<int64_t>());
  index.rows_of_expert = const_cast<int64_t*>(counts.const_data_ptr<int64_t>());
  index.grad_row_probability = grad_probability.const_data_ptr<float>();
  index.grad_probability = gates.mutable_data_ptr<float>();
  index.experts = experts;
  index.num_rows = token.size(0);
  launch.check(megavid_cuda_moe_scatter_gates(&index, launch.stream));
  return {grad_x, gates};
}

Tensor moe_unpermute(const Tensor& x_, const Optional& weight_, const Tensor& token_, const Tensor& first_,
                     const Tensor& row_) {
  const char* op = "moe_unpermute";
  check_rows(op, x_, token_, first_, row_);
  check_weight(op, x_, weight_);
  const Launch launch(op, x_);
  const Tensor x = x_.contiguous(), weight = contiguous_or_none(weight_);
  const Tensor first = first_.contiguous(), row = row_.contiguous();
  Tensor tokens = at::empty({first.size(0) - 1, x.size(1)}, x.options());
  MoeRows job = rows_job(x, tokens);
  job.first = first.const_data_ptr<int64_t>();
  job.row = row.const_data_ptr<int64_t>();
  job.weight = weight.defined() ? weight.const_data_ptr<float>() : nullptr;
  launch.check(megavid_cuda_moe_combine(&job, tokens.size(0), launch.stream));
  return tokens;
}

std::tuple<Tensor, Tensor> moe_unpermute_backward(const Tensor& grad_, const Optional& x_, const Optional& weight_,
                                                  const Tensor& token_) {
  const char* op = "moe_unpermute_backward";
  check_matrix(op, "grad", grad_, "[T, D]");
  check_vector(op, "token", token_, token_.numel(), at::kLong, grad_);
  const Launch launch(op, grad_);
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
  launch.check(megavid_cuda_moe_gather(&job, token.size(0), launch.stream));
  return {rows, weight.defined() ? grad_weight : at::empty({0}, grad.options())};
}

std::tuple<Tensor, Tensor, Tensor> router_topk(const Tensor& scores_, const Optional& bias_, const Tensor& bucket_,
                                               int64_t num_buckets, int64_t top_k, int64_t num_groups,
                                               int64_t top_groups, double scale) {
  check_router(scores_, bias_, bucket_, num_buckets, top_k, num_groups, top_groups);
  const Launch launch("router_topk", scores_);
  const Tensor scores = scores_.contiguous(), bias = contiguous_or_none(bias_), bucket = bucket_.contiguous();
  Tensor probability = at::empty_like(scores), map = at::empty(scores.sizes(), scores.options().dtype(at::kBool));
  Tensor counts = at::zeros({num_buckets, scores.size(1)}, scores.options());
  RouterTopk job = router_job(scores, top_k, scale);
  job.bias = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  job.bucket = bucket.const_data_ptr<int64_t>();
  job.probability = probability.mutable_data_ptr<float>();
  job.map = map.mutable_data_ptr<bool>();
  job.counts = counts.mutable_data_ptr<float>();
  job.buckets = num_buckets;
  job.num_groups = num_groups;
  job.top_groups = top_groups;
  launch.check(megavid_cuda_router_topk_forward(&job, launch.stream));
  return {probability, map, counts};
}

Tensor router_topk_backward(const Tensor& grad_, const Tensor& scores_, const Tensor& map_, int64_t top_k,
                            double scale) {
  const char* op = "router_topk_backward";
  check_like(op, "grad", grad_, scores_);
  TORCH_CHECK_VALUE(map_.sizes() == scores_.sizes(), op, ": map must be ", scores_.sizes(), ", got ", map_.sizes());
  const Launch launch(op, scores_);
  const Tensor grad = grad_.contiguous(), scores = scores_.contiguous(), map = map_.contiguous();
  Tensor grad_scores = at::empty_like(scores);
  RouterTopk job = router_job(scores, top_k, scale);
  job.map = const_cast<bool*>(map.const_data_ptr<bool>());
  job.grad = grad.const_data_ptr<float>();
  job.grad_scores = grad_scores.mutable_data_ptr<float>();
  launch.check(megavid_cuda_router_topk_backward(&job, launch.stream));
  return grad_scores;
}

}  // namespace
}  // namespace megavid

TORCH_LIBRARY_IMPL(megavid, CUDA, m) { MEGAVID_IMPL_MOE(m) }
