// Registers the CUDA kernels with torch's dispatcher: checks, memory and the current stream. Twin of cpu.cpp.
//
// Rows are checked against their tables by the kernels: here that would wait for the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../cuda/kernels.h"
#include "checks_fp8.h"
#include "launch.h"
#include "register.h"

namespace megavid {
namespace {

std::tuple<Tensor, Tensor, Tensor> modulated_norm(const Tensor& x_, const Tensor& shift_, const Tensor& scale_,
                                                  const Tensor& row_, double eps, bool is_centered) {
  check_row_table("modulated_norm", x_, "shift", shift_, "row", row_);
  check_like("modulated_norm", "scale", scale_, shift_);
  const Launch launch("modulated_norm", x_);
  const Tensor x = x_.contiguous(), shift = shift_.contiguous(), scale = scale_.contiguous(), row = row_.contiguous();
  Tensor y = at::empty_like(x);
  Tensor mean = at::empty({x.size(0)}, shift.options()), rstd = at::empty_like(mean);
  ModulatedNorm job = norm_job(x, scale, row, mean, rstd, is_centered);
  job.shift = shift.const_data_ptr<float>();
  job.y = y.mutable_data_ptr();
  job.eps = static_cast<float>(eps);
  launch.check(megavid_cuda_modulated_norm_forward(&job, x.size(0), launch.stream));
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> modulated_norm_backward(const Tensor& grad_y_, const Tensor& x_,
                                                           const Tensor& scale_, const Tensor& row_,
                                                           const Tensor& mean, const Tensor& rstd, bool is_centered) {
  check_row_table("modulated_norm_backward", x_, "scale", scale_, "row", row_);
  check_like("modulated_norm_backward", "grad_y", grad_y_, x_);
  const Launch launch("modulated_norm_backward", x_);
  const Tensor x = x_.contiguous(), scale = scale_.contiguous(), row = row_.contiguous();
  const Tensor grad_y = grad_y_.contiguous();
  const Sums sums = sums_of(x.size(0), scale.size(0), x.size(1));
  Tensor grad_x = at::empty_like(x);
  Tensor shifts = partial_of(sums, scale.size(0), scale), scales = partial_of(sums, scale.size(0), scale);
  ModulatedNorm job = norm_job(x, scale, row, mean, rstd, is_centered);
  job.grad_y = grad_y.const_data_ptr();
  job.grad_x = grad_x.mutable_data_ptr();
  job.run_shift = shifts.mutable_data_ptr<float>();
  job.run_scale = scales.mutable_data_ptr<float>();
  launch.check(megavid_cuda_modulated_norm_backward(&job, &sums, launch.stream));
  return {grad_x, shifts.sum(0), scales.sum(0)};
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
  if (gate_.has_value()) check_row_table(op, x_, "gate", *gate_, "gate_row", gate_row_);
  const Launch launch(op, x_);
  const Tensor x = x_.contiguous(), update = update_.contiguous(), shift = shift_.contiguous();
  const Tensor scale = scale_.contiguous(), row = row_.contiguous(), gate_row = gate_row_.contiguous();
  const Tensor gate = gate_.has_value() ? gate_->contiguous() : Tensor();
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
  job.gate_rows = gate.defined() ? gate.size(0) : 0;
  job.residual = residual.mutable_data_ptr();
  launch.check(megavid_cuda_gated_residual_norm_forward(&job, x.size(0), launch.stream));
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
  const Launch launch(op, residual_);
  const Tensor residual = residual_.contiguous(), update = update_.contiguous(), scale = scale_.contiguous();
  const Tensor row = row_.contiguous(), gate_row = gate_row_.contiguous();
  const Tensor grad_residual = grad_residual_.contiguous(), grad_y = grad_y_.contiguous();
  const Tensor gate = gate_.has_value() ? gate_->contiguous() : Tensor();
  const int64_t gate_rows = gate.defined() ? gate.size(0) : 0;
  Sums sums = sums_of(residual.size(0), std::max(scale.size(0), gate_rows), residual.size(1));
  Tensor grad_x = at::empty_like(residual);
  // Without a gate, x and update have the same gradient: autograd is given one tensor twice, and an empty one for gate.
  Tensor grad_update = gate.defined() ? at::empty_like(residual) : grad_x;
  Tensor shifts = partial_of(sums, scale.size(0), scale), scales = partial_of(sums, scale.size(0), scale);
  Tensor gates = partial_of(sums, gate_rows, scale);
  Tensor mean_inner = at::empty_like(mean), mean_product = at::empty_like(mean);
  sums.mean_inner = mean_inner.mutable_data_ptr<float>();
  sums.mean_product = mean_product.mutable_data_ptr<float>();
  GatedResidualNorm job{};
  job.norm = norm_job(residual, scale, row, mean, rstd, is_centered);
  job.norm.grad_y = grad_y.const_data_ptr();
  job.norm.grad_x = grad_x.mutable_data_ptr();
  job.norm.run_shift = shifts.mutable_data_ptr<float>();
  job.norm.run_scale = scales.mutable_data_ptr<float>();
  job.is_bf16 = job.norm.is_bf16;
  job.update = update.const_data_ptr();
  job.gate = gate.defined() ? gate.const_data_ptr<float>() : nullptr;
  job.gate_row = gate_row.const_data_ptr<int64_t>();
  job.gate_rows = gate.defined() ? gate.size(0) : 0;
  job.grad_residual = grad_residual.const_data_ptr();
  job.grad_update = grad_update.mutable_data_ptr();
  job.run_gate = gates.mutable_data_ptr<float>();
  launch.check(megavid_cuda_gated_residual_norm_backward(&job, &sums, launch.stream));
  return {grad_x, gate.defined() ? grad_update : at::empty({0}, residual.options()),
          gate.defined() ? gates.sum(0) : at::empty({0}, scale.options()), shifts.sum(0), scales.sum(0)};
}

Tensor gated_residual(const Tensor& x_, const Tensor& update_, const Tensor& gate_, const Tensor& row_) {
  check_row_table("gated_residual", x_, "gate", gate_, "row", row_);
  check_like("gated_residual", "update", update_, x_);
  const Launch launch("gated_residual", x_);
  const Tensor x = x_.contiguous(), update = update_.contiguous(), gate = gate_.contiguous(), row = row_.contiguous();
  Tensor y = at::empty_like(x);
  GatedResidual job = gate_job(update, gate, row);
  job.x = x.const_data_ptr();
  job.y = y.mutable_data_ptr();
  launch.check(megavid_cuda_gated_residual_forward(&job, x.size(0), launch.stream));
  return y;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad_y_, const Tensor& update_, const Tensor& gate_,
                                                   const Tensor& row_) {
  check_row_table("gated_residual_backward", update_, "gate", gate_, "row", row_);
  check_like("gated_residual_backward", "grad_y", grad_y_, update_);
  const Launch launch("gated_residual_backward", update_);
  const Tensor grad_y = grad_y_.contiguous(), update = update_.contiguous();
  const Tensor gate = gate_.contiguous(), row = row_.contiguous();
  const Sums sums = sums_of(update.size(0), gate.size(0), update.size(1));
  Tensor grad_update = at::empty_like(update), gates = partial_of(sums, gate.size(0), gate);
  GatedResidual job = gate_job(update, gate, row);
  job.grad_y = grad_y.const_data_ptr();
  job.grad_update = grad_update.mutable_data_ptr();
  job.run_gate = gates.mutable_data_ptr<float>();
  launch.check(megavid_cuda_gated_residual_backward(&job, &sums, launch.stream));
  return {grad_update, gates.sum(0)};
}

Tensor sum_of_squares(const Tensor& x) {
  check_rows_of_numbers("sum_of_squares", x);
  const Launch launch("sum_of_squares", x);
  Tensor sums = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  SumOfSquares job = squares_job(x);
  job.sums = sums.mutable_data_ptr<float>();
  launch.check(megavid_cuda_sum_of_squares_forward(&job, x.size(0), launch.stream));
  return sums;
}

Tensor sum_of_squares_backward(const Tensor& grad_, const Tensor& x) {
  check_squares_gradient(grad_, x);
  const Launch launch("sum_of_squares_backward", x);
  const Tensor grad = grad_.contiguous();
  Tensor grad_x = at::empty(x.sizes(), x.options());
  SumOfSquares job = squares_job(x);
  job.grad = grad.const_data_ptr<float>();
  job.grad_x = grad_x.mutable_data_ptr();
  launch.check(megavid_cuda_sum_of_squares_backward(&job, x.size(0), launch.stream));
  return grad_x;
}

Tensor norm_rope(const Tensor& x, const Tensor& sums_, const Tensor& weight_, const Tensor& cosine_,
                 const Tensor& sine_, int64_t norm_width, double eps) {
  check_norm_rope("norm_rope", x, sums_, weight_, cosine_, sine_);
  const Launch launch("norm_rope", x);
  const Tensor sums = sums_.contiguous(), weight = weight_.contiguous();
  const Tensor cosine = cosine_.contiguous(), sine = sine_.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  NormRope job = rope_job(x, sums, weight, cosine, sine, norm_width, eps);
  job.y = y.mutable_data_ptr();
  launch.check(megavid_cuda_norm_rope_forward(&job, x.size(0), launch.stream));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> norm_rope_backward(const Tensor& grad_y_, const Tensor& x, const Tensor& sums_,
                                                      const Tensor& weight_, const Tensor& cosine_,
                                                      const Tensor& sine_, int64_t norm_width, double eps) {
  check_norm_rope("norm_rope_backward", x, sums_, weight_, cosine_, sine_);
  check_like("norm_rope_backward", "grad_y", grad_y_, x);
  const Launch launch("norm_rope_backward", x);
  const Tensor sums = sums_.contiguous(), weight = weight_.contiguous(), grad_y = grad_y_.contiguous();
  const Tensor cosine = cosine_.contiguous(), sine = sine_.contiguous();
  const Sums columns = sums_of(x.size(0), 1, x.size(1));
  Tensor grad_x = at::empty(x.sizes(), x.options()), grad_sums = at::empty_like(sums);
  Tensor weights = partial_of(columns, 1, weight);
  NormRope job = rope_job(x, sums, weight, cosine, sine, norm_width, eps);
  job.grad_y = grad_y.const_data_ptr();
  job.grad_x = grad_x.mutable_data_ptr();
  job.grad_sums = grad_sums.mutable_data_ptr<float>();
  job.run_weight = weights.mutable_data_ptr<float>();
  launch.check(megavid_cuda_norm_rope_backward(&job, &columns, launch.stream));
  return {grad_x, grad_sums, weights.sum(0).squeeze(0)};
}

Tensor fp8_amax(const Tensor& x_) {
  check_wide("fp8_amax", x_);
  const Launch launch("fp8_amax", x_);
  const at::TensorOptions wide = x_.options().dtype(at::kFloat);
  if (x_.numel() == 0) return at::zeros({}, wide);
  const Tensor x = dense(x_);
  Tensor largest = at::empty({amax_chunks(x)}, wide);
  QuantizeFp8 job = fp8_job(x);
  job.amax = largest.mutable_data_ptr<float>();
  launch.check(megavid_cuda_fp8_amax(&job, amax_chunks(x), launch.stream));
  return at::amax(largest);
}

Tensor quantize_fp8(const Tensor& x_, const Tensor& scale, at::ScalarType dtype) {
  check_quantize(x_, scale, dtype);
  const Launch launch("quantize_fp8", x_);
  const Tensor x = dense(x_);
  Tensor data = at::empty_like(x, x.options().dtype(dtype));
  QuantizeFp8 job = fp8_job(x);
  job.scale = scale.const_data_ptr<float>();
  job.data = static_cast<uint8_t*>(data.mutable_data_ptr());
  job.is_e5m2 = dtype == at::kFloat8_e5m2;
  launch.check(megavid_cuda_quantize_fp8(&job, amax_chunks(x), launch.stream));
  return data;
}

std::tuple<Tensor, Tensor> quantize_fp8_tiles(const Tensor& x, int64_t tile_rows, int64_t tile_columns,
                                              at::ScalarType dtype, at::ScalarType scale_dtype) {
  check_quantize_tiles(x, tile_rows, tile_columns, dtype, scale_dtype);
  const Launch launch("quantize_fp8_tiles", x);
  const TilesCall call(x, tile_rows, tile_columns, dtype, scale_dtype);
  if (call.x.defined()) launch.check(megavid_cuda_quantize_fp8_tiles(&call.job, launch.stream));
  return {call.data, call.scale};
}

}  // namespace
}  // namespace megavid

TORCH_LIBRARY_IMPL(megavid, CUDA, m) { MEGAVID_IMPL_BLOCKS(m) MEGAVID_IMPL_FP8(m) }
