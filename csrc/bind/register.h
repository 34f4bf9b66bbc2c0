// The ops that every device has, most with their backward pass: one list, so that no binding leaves one out.
#pragma once

#include <torch/library.h>

// Of the functions megavid::NAME and megavid::NAME_backward of the file that this stands in.
#define MEGAVID_IMPL(m, name)           \
  m.impl(#name, &megavid::name);        \
  m.impl(#name "_backward", &megavid::name##_backward);

#define MEGAVID_IMPL_BLOCKS(m) \
  MEGAVID_IMPL(m, modulated_norm) \
  MEGAVID_IMPL(m, gated_residual_norm) \
  MEGAVID_IMPL(m, gated_residual) \
  MEGAVID_IMPL(m, sum_of_squares) \
  MEGAVID_IMPL(m, norm_rope)

#define MEGAVID_IMPL_MOE(m) \
  MEGAVID_IMPL(m, expert_activation) \
  MEGAVID_IMPL(m, moe_permute) \
  MEGAVID_IMPL(m, moe_unpermute) \
  MEGAVID_IMPL(m, router_topk)   \
  m.impl("expert_activation_fp8", &megavid::expert_activation_fp8);

// Without gradients: what is in eight bits has none.
#define MEGAVID_IMPL_FP8(m)                                   \
  m.impl("fp8_amax", &megavid::fp8_amax);                     \
  m.impl("quantize_fp8", &megavid::quantize_fp8);             \
  m.impl("quantize_fp8_tiles", &megavid::quantize_fp8_tiles);
