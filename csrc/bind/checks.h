// What the bindings of all devices share: checks that name the argument, and jobs filled in from tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include "../common/jobs.h"

namespace megavid {

using at::Tensor;

// Kernels read raw pointers: every tensor has to be where x is.
inline void check_device(const char* op, const Tensor& x, const Tensor& other) {
  TORCH_CHECK_VALUE(x.device() == other.device(), op, ": x is on ", x.device(), ", another argument on ",
                    other.device());
}

inline void check_row_table(const char* op, const Tensor& x, const char* name, const Tensor& table,
                            const char* row_name, const Tensor& row) {
  TORCH_CHECK_VALUE(x.dim() == 2, op, ": x must be [T, D], got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op,
                   ": x must be float32 or bfloat16, got ", x.scalar_type());
  TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat, op, ": ", name, " must be float32, got ", table.scalar_type());
  TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == x.size(1), op, ": ", name, " must be [R, ", x.size(1),
                    "], got ", table.sizes());
  check_device(op, x, table);
  check_device(op, x, row);
  TORCH_CHECK_TYPE(row.scalar_type() == at::kLong, op, ": ", row_name, " must be int64, got ", row.scalar_type());
  TORCH_CHECK_VALUE(row.dim() == 1 && row.size(0) == x.size(0), op, ": ", row_name, " must be [", x.size(0),
                    "], got ", row.sizes());
}

inline void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK_VALUE(tensor.sizes() == x.sizes(), op, ": ", name, " must be ", x.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), op, ": ", name, " must be ", x.scalar_type(), ", got ",
                   tensor.scalar_type());
  check_device(op, x, tensor);
}

inline void check_rows_of_numbers(const char* op, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.stride(1) == 1, op, ": x must be [T, n] with neighbouring numbers, got ",
                    x.sizes(), " with strides ", x.strides());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, op,
                   ": x must be float32 or bfloat16, got ", x.scalar_type());
}

inline void check_squares_gradient(const Tensor& grad, const Tensor& x) {
  const char* op = "sum_of_squares_backward";
  check_rows_of_numbers(op, x);
  TORCH_CHECK_VALUE(grad.dim() == 1 && grad.size(0) == x.size(0), op, ": grad must be [", x.size(0), "], got ",
                    grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kFloat, op, ": grad must be float32, got ", grad.scalar_type());
  check_device(op, x, grad);
}

inline void check_norm_rope(const char* op, const Tensor& x, const Tensor& sums, const Tensor& weight,
                            const Tensor& cosine, const Tensor& sine) {
  check_rows_of_numbers(op, x);
  for (const Tensor* each : {&sums, &weight, &cosine, &sine}) {
    TORCH_CHECK_TYPE(each->scalar_type() == at::kFloat, op, ": sums, weight, cosine and sine must be float32, got ",
                     each->scalar_type());
    check_device(op, x, *each);
  }
  TORCH_CHECK_VALUE(sums.dim() == 1 && sums.size(0) == x.size(0), op, ": sums must be [", x.size(0), "], got ",
                    sums.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 1 && weight.size(0) == x.size(1), op, ": weight must be [", x.size(1), "], got ",
                    weight.sizes());
  TORCH_CHECK_VALUE(cosine.dim() == 2 && cosine.size(0) == x.size(0) && cosine.sizes() == sine.sizes(), op,
                    ": cosine and sine must be [", x.size(0), ", A / 2], got ", cosine.sizes(), " and ", sine.sizes());
  TORCH_CHECK_VALUE(cosine.size(1) > 0 && x.size(1) % (2 * cosine.size(1)) == 0, op, ": heads of ",
                    2 * cosine.size(1), " numbers must divide the width ", x.size(1));
}

// What forward and backward of both norms fill in alike.
inline ModulatedNorm norm_job(const Tensor& x, const Tensor& scale, const Tensor& row, const Tensor& mean,
                              const Tensor& rstd, bool is_centered) {
  ModulatedNorm job{};
  job.x = x.const_data_ptr();
  job.scale = scale.const_data_ptr<float>();
  job.row = row.const_data_ptr<int64_t>();
  job.mean = const_cast<float*>(mean.const_data_ptr<float>());
  job.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  job.rows = scale.size(0);
  job.width = x.size(1);
  job.is_centered = is_centered;
  job.is_bf16 = x.scalar_type() == at::kBFloat16;
  return job;
}

inline GatedResidual gate_job(const Tensor& update, const Tensor& gate, const Tensor& row) {
  GatedResidual job{};
  job.update = update.const_data_ptr();
  job.gate = gate.const_data_ptr<float>();
  job.row = row.const_data_ptr<int64_t>();
  job.rows = gate.size(0);
  job.width = update.size(1);
  job.is_bf16 = update.scalar_type() == at::kBFloat16;
  return job;
}

inline SumOfSquares squares_job(const Tensor& x) {
  SumOfSquares job{};
  job.x = x.const_data_ptr();
  job.x_stride = x.stride(0);
  job.width = x.size(1);
  job.is_bf16 = x.scalar_type() == at::kBFloat16;
  return job;
}

inline NormRope rope_job(const Tensor& x, const Tensor& sums, const Tensor& weight, const Tensor& cosine,
                         const Tensor& sine, int64_t norm_width, double eps) {
  NormRope job{};
  job.x = x.const_data_ptr();
  job.x_stride = x.stride(0);
  job.sums = sums.const_data_ptr<float>();
  job.weight = weight.const_data_ptr<float>();
  job.cosine = cosine.const_data_ptr<float>();
  job.sine = sine.const_data_ptr<float>();
  job.tokens = x.size(0);
  job.width = x.size(1);
  job.head_size = 2 * cosine.size(1);
  job.norm_width = static_cast<float>(norm_width);
  job.eps = static_cast<float>(eps);
  job.is_bf16 = x.scalar_type() == at::kBFloat16;
  return job;
}

}  // namespace megavid
