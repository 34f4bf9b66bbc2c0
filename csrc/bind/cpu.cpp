// Registers the CPU kernels with torch's dispatcher: checks, memory and threads. Schemas are megavid/ops' own.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "checks_fp8.h"
#include "isa.h"
#include "register.h"
#include "runs.h"

namespace megavid {
namespace {

std::tuple<Tensor, Tensor, Tensor> modulated_norm(const Tensor& x_, const Tensor& shift_, const Tensor& scale_,
                                                  const Tensor& row_, double eps, bool is_centered) {
  check_row_table("modulated_norm", x_, "shift", shift_, "row", row_);
  check_like("modulated_norm", "scale", scale_, shift_);
  const Tensor x = x_.contiguous(), shift = shift_.contiguous(), scale = scale_.contiguous(), row = row_.contiguous();
  check_rows_in_range("modulated_norm", row, scale.size(0));
  Tensor y = at::empty_like(x);
  Tensor mean = at::empty({x.size(0)}, shift.options()), rstd = at::empty_like(mean);
  ModulatedNorm job = norm_job(x, scale, row, mean, rstd, is_centered);
  job.shift = shift.const_data_ptr<float>();
  job.y = y.mutable_data_ptr();
  job.eps = static_cast<float>(eps);
  at::parallel_for(0, x.size(0), kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_modulated_norm_forward, job, begin, end);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> modulated_norm_backward(const Tensor& grad_y_, const Tensor& x_,
                                                           const Tensor& scale_, const Tensor& row_,
                                                           const Tensor& mean, const Tensor& rstd, bool is_centered) {
  check_row_table("modulated_norm_backward", x_, "scale", scale_, "row", row_);
  check_like("modulated_norm_backward", "grad_y", grad_y_, x_);
  const Tensor x = x_.contiguous(), scale = scale_.contiguous(), row = row_.contiguous();
  const Tensor grad_y = grad_y_.contiguous();
  const std::vector<int64_t> starts = run_starts(row, row);
  const int64_t runs = static_cast<int64_t>(starts.size()) - 1;
  Tensor grad_x = at::empty_like(x);
  Tensor run_shift = at::empty({runs, x.size(1)}, scale.options()), run_scale = at::empty_like(run_shift);
  ModulatedNorm job = norm_job(x, scale, row, mean, rstd, is_centered);
  job.grad_y = grad_y.const_data_ptr();
  job.grad_x = grad_x.mutable_data_ptr();
  job.run_start = starts.data();
  job.run_shift = run_shift.mutable_data_ptr<float>();
  job.run_scale = run_scale.mutable_data_ptr<float>();
  at::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_modulated_norm_backward, job, begin, end);
  });
  return {grad_x, sum_runs(row, starts, run_shift, scale), sum_runs(row, starts, run_scale, scale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm(const Tensor& x_, const Tensor& update_,
                                                               const std::optional<Tensor>& gate_,
                                                               const Tensor& gate_row_, const Tensor& shift_,
                                                               const Tensor& scale_, const Tensor& row_, double eps,
                                                               bool is_centered) {
  const char* op = "gated_residual_norm";
  check_row_table(op, x_, "shift", shift_, "row", row_);
  check_like(op, "scale", scale_, shift_);
  check_like(op, "update", update_, x_);
  const Tensor x = x_.contiguous(), update = update_.contiguous(), shift = shift_.contiguous();
  const Tensor scale = scale_.contiguous(), row = row_.contiguous(), gate_row = gate_row_.contiguous();
  check_rows_in_range(op, row, scale.size(0));
  Tensor gate;
  if (gate_.has_value()) {
    gate = gate_->contiguous();
    check_row_table(op, x_, "gate", gate, "gate_row", gate_row_);
    check_rows_in_range(op, gate_row, gate.size(0), "gate_row");
  }
  Tensor residual = at::empty_like(x), y = at::empty_like(x);
  Tensor mean = at::empty({x.size(0)}, shift.options()), rstd = at::empty_like(mean);
  GatedResidualNorm job{};
  job.norm = norm_job(residual, scale, row, mean, rstd, is_centered);
  job.norm.shift = shift.const_data_ptr<float>();
  job.norm.y = y.mutable_data_ptr();
  job.norm.eps = static_cast<float>(eps);
  job.x = x.const_data_ptr();
  job.is_bf16 = job.norm.is_bf16;
  job.update = update.const_data_ptr();
  job.gate = gate.defined() ? gate.const_data_ptr<float>() : nullptr;
  job.gate_row = gate_row.const_data_ptr<int64_t>();
  job.residual = residual.mutable_data_ptr();
  at::parallel_for(0, x.size(0), kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_gated_residual_norm_forward, job, begin, end);
  });
  return {residual, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_norm_backward(
    const Tensor& grad_residual_, const Tensor& grad_y_, const Tensor& residual_, const Tensor& update_,
    const std::optional<Tensor>& gate_, const Tensor& gate_row_, const Tensor& scale_, const Tensor& row_,
    const Tensor& mean, const Tensor& rstd, bool is_centered) {
  const char* op = "gated_residual_norm_backward";
  check_row_table(op, residual_, "scale", scale_, "row", row_);
  check_like(op, "grad_residual", grad_residual_, residual_);
  check_like(op, "grad_y", grad_y_, residual_);
  check_like(op, "update", update_, residual_);
  if (gate_.has_value()) check_row_table(op, residual_, "gate", *gate_, "gate_row", gate_row_);
  const Tensor residual = residual_.contiguous(), update = update_.contiguous(), scale = scale_.contiguous();
  const Tensor row = row_.contiguous(), gate_row = gate_row_.contiguous();
  const Tensor grad_residual = grad_residual_.contiguous(), grad_y = grad_y_.contiguous();
  const Tensor gate = gate_.has_value() ? gate_->contiguous() : Tensor();
  const std::vector<int64_t> starts = run_starts(row, gate.defined() ? gate_row : row);
  const int64_t runs = static_cast<int64_t>(starts.size()) - 1;
  Tensor grad_x = at::empty_like(residual);
  // Without a gate, x and update have the same gradient: autograd is given one tensor twice, and an empty one for gate.
  Tensor grad_update = gate.defined() ? at::empty_like(residual) : grad_x;
  Tensor run_shift = at::empty({runs, residual.size(1)}, scale.options()), run_scale = at::empty_like(run_shift);
  Tensor run_gate = gate.defined() ? at::empty_like(run_shift) : Tensor();
  GatedResidualNorm job{};
  job.norm = norm_job(residual, scale, row, mean, rstd, is_centered);
  job.norm.grad_y = grad_y.const_data_ptr();
  job.norm.grad_x = grad_x.mutable_data_ptr();
  job.norm.run_start = starts.data();
  job.norm.run_shift = run_shift.mutable_data_ptr<float>();
  job.norm.run_scale = run_scale.mutable_data_ptr<float>();
  job.is_bf16 = job.norm.is_bf16;
  job.update = update.const_data_ptr();
  job.gate = gate.defined() ? gate.const_data_ptr<float>() : nullptr;
  job.gate_row = gate_row.const_data_ptr<int64_t>();
  job.grad_residual = grad_residual.const_data_ptr();
  job.grad_update = grad_update.mutable_data_ptr();
  job.run_gate = gate.defined() ? run_gate.mutable_data_ptr<float>() : nullptr;
  at::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_gated_residual_norm_backward, job, begin, end);
  });
  Tensor grad_gate = gate.defined() ? sum_runs(gate_row, starts, run_gate, gate) : at::empty({0}, scale.options());
  return {grad_x, gate.defined() ? grad_update : at::empty({0}, residual.options()), grad_gate,
          sum_runs(row, starts, run_shift, scale), sum_runs(row, starts, run_scale, scale)};
}

Tensor gated_residual(const Tensor& x_, const Tensor& update_, const Tensor& gate_, const Tensor& row_) {
  check_row_table("gated_residual", x_, "gate", gate_, "row", row_);
  check_like("gated_residual", "update", update_, x_);
  const Tensor x = x_.contiguous(), update = update_.contiguous(), gate = gate_.contiguous(), row = row_.contiguous();
  check_rows_in_range("gated_residual", row, gate.size(0));
  Tensor y = at::empty_like(x);
  GatedResidual job = gate_job(update, gate, row);
  job.x = x.const_data_ptr();
  job.y = y.mutable_data_ptr();
  at::parallel_for(0, x.size(0), kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_gated_residual_forward, job, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad_y_, const Tensor& update_, const Tensor& gate_,
                                                   const Tensor& row_) {
  check_row_table("gated_residual_backward", update_, "gate", gate_, "row", row_);
  check_like("gated_residual_backward", "grad_y", grad_y_, update_);
  const Tensor grad_y = grad_y_.contiguous(), update = update_.contiguous();
  const Tensor gate = gate_.contiguous(), row = row_.contiguous();
  const std::vector<int64_t> starts = run_starts(row, row);
  const int64_t runs = static_cast<int64_t>(starts.size()) - 1;
  Tensor grad_update = at::empty_like(update), run_gate = at::empty({runs, update.size(1)}, gate.options());
  GatedResidual job = gate_job(update, gate, row);
  job.grad_y = grad_y.const_data_ptr();
  job.grad_update = grad_update.mutable_data_ptr();
  job.run_start = starts.data();
  job.run_gate = run_gate.mutable_data_ptr<float>();
  at::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_gated_residual_backward, job, begin, end);
  });
  return {grad_update, sum_runs(row, starts, run_gate, gate)};
}

Tensor sum_of_squares(const Tensor& x) {
  check_rows_of_numbers("sum_of_squares", x);
  Tensor sums = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  SumOfSquares job = squares_job(x);
  job.sums = sums.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0), kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_sum_of_squares_forward, job, begin, end);
  });
  return sums;
}

Tensor sum_of_squares_backward(const Tensor& grad_, const Tensor& x) {
  check_squares_gradient(grad_, x);
  const Tensor grad = grad_.contiguous();
  Tensor grad_x = at::empty(x.sizes(), x.options());
  SumOfSquares job = squares_job(x);
  job.grad = grad.const_data_ptr<float>();
  job.grad_x = grad_x.mutable_data_ptr();
  at::parallel_for(0, x.size(0), kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_sum_of_squares_backward, job, begin, end);
  });
  return grad_x;
}

Tensor norm_rope(const Tensor& x, const Tensor& sums_, const Tensor& weight_, const Tensor& cosine_,
                 const Tensor& sine_, int64_t norm_width, double eps) {
  check_norm_rope("norm_rope", x, sums_, weight_, cosine_, sine_);
  const Tensor sums = sums_.contiguous(), weight = weight_.contiguous();
  const Tensor cosine = cosine_.contiguous(), sine = sine_.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  NormRope job = rope_job(x, sums, weight, cosine, sine, norm_width, eps);
  job.y = y.mutable_data_ptr();
  at::parallel_for(0, x.size(0), kGrain, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_norm_rope_forward, job, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> norm_rope_backward(const Tensor& grad_y_, const Tensor& x, const Tensor& sums_,
                                                      const Tensor& weight_, const Tensor& cosine_,
                                                      const Tensor& sine_, int64_t norm_width, double eps) {
  check_norm_rope("norm_rope_backward", x, sums_, weight_, cosine_, sine_);
  check_like("norm_rope_backward", "grad_y", grad_y_, x);
  const Tensor sums = sums_.contiguous(), weight = weight_.contiguous(), grad_y = grad_y_.contiguous();
  const Tensor cosine = cosine_.contiguous(), sine = sine_.contiguous();
  const int64_t runs = (x.size(0) + kRunTokens - 1) / kRunTokens;
  Tensor grad_x = at::empty(x.sizes(), x.options()), grad_sums = at::empty_like(sums);
  Tensor run_weight = at::empty({runs, x.size(1)}, weight.options());
  NormRope job = rope_job(x, sums, weight, cosine, sine, norm_width, eps);
  job.grad_y = grad_y.const_data_ptr();
  job.grad_x = grad_x.mutable_data_ptr();
  job.grad_sums = grad_sums.mutable_data_ptr<float>();
  job.run_weight = run_weight.mutable_data_ptr<float>();
  at::parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_norm_rope_backward, job, begin, end);
  });
  return {grad_x, grad_sums, run_weight.sum(0)};
}

Tensor fp8_amax(const Tensor& x_) {
  check_wide("fp8_amax", x_);
  const at::TensorOptions wide = x_.options().dtype(at::kFloat);
  if (x_.numel() == 0) return at::zeros({}, wide);
  const Tensor x = dense(x_);
  Tensor largest = at::empty({amax_chunks(x)}, wide);
  QuantizeFp8 job = fp8_job(x);
  job.amax = largest.mutable_data_ptr<float>();
  at::parallel_for(0, largest.numel(), 1, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_fp8_amax, job, begin, end);
  });
  return at::amax(largest);
}

Tensor quantize_fp8(const Tensor& x_, const Tensor& scale, at::ScalarType dtype) {
  check_quantize(x_, scale, dtype);
  const Tensor x = dense(x_);
  Tensor data = at::empty_like(x, x.options().dtype(dtype));
  QuantizeFp8 job = fp8_job(x);
  job.scale = scale.const_data_ptr<float>();
  job.data = static_cast<uint8_t*>(data.mutable_data_ptr());
  job.is_e5m2 = dtype == at::kFloat8_e5m2;
  at::parallel_for(0, x.numel(), kAmaxNumbers, [&](int64_t begin, int64_t end) {
    MEGAVID_CALL(megavid_quantize_fp8, job, begin, end);
  });
  return data;
}

std::tuple<Tensor, Tensor> quantize_fp8_tiles(const Tensor& x, int64_t tile_rows, int64_t tile_columns,
                                              at::ScalarType dtype, at::ScalarType scale_dtype) {
  check_quantize_tiles(x, tile_rows, tile_columns, dtype, scale_dtype);
  const TilesCall call(x, tile_rows, tile_columns, dtype, scale_dtype);
  const QuantizeFp8Tiles& job = call.job;
  if (call.x.defined()) {
    const int64_t bands = (job.rows + job.tile_rows - 1) / job.tile_rows;
    const int64_t strips = job.matrices * bands * ((job.width + kTileSide - 1) / kTileSide);
    const int64_t grain = (kAmaxNumbers + job.tile_rows * kTileSide - 1) / (job.tile_rows * kTileSide);
    at::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
      MEGAVID_CALL(megavid_quantize_fp8_tiles, job, begin, end);
    });
  }
  return {call.data, call.scale};
}

}  // namespace
}  // namespace megavid

TORCH_LIBRARY_IMPL(megavid, CPU, m) { MEGAVID_IMPL_BLOCKS(m) MEGAVID_IMPL_FP8(m) }

// Of the library itself: they take no tensor, so no device either.
TORCH_LIBRARY_IMPL(megavid, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", [] { return std::string(megavid::isa_name()); });
  m.impl("built_with", [] { return std::string(MEGAVID_TORCH); });
  m.impl("built_from", [] { return std::string(MEGAVID_SOURCES); });
}
