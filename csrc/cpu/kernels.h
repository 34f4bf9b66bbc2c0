// The CPU kernels, as plain functions over raw memory: no torch in here, nor in what implements it.
//
// Every kernel works on a range of its outermost loop, so that the caller decides about threads.
#pragma once

#include "../common/jobs.h"

#define MEGAVID_DECLARE(name, Job)                          \
  void name##_baseline(const megavid::Job&, int64_t, int64_t); \
  void name##_avx2(const megavid::Job&, int64_t, int64_t);     \
  void name##_avx512(const megavid::Job&, int64_t, int64_t);

MEGAVID_DECLARE(megavid_modulated_norm_forward, ModulatedNorm)
MEGAVID_DECLARE(megavid_modulated_norm_backward, ModulatedNorm)
MEGAVID_DECLARE(megavid_gated_residual_norm_forward, GatedResidualNorm)
MEGAVID_DECLARE(megavid_gated_residual_norm_backward, GatedResidualNorm)
MEGAVID_DECLARE(megavid_gated_residual_forward, GatedResidual)
MEGAVID_DECLARE(megavid_gated_residual_backward, GatedResidual)
MEGAVID_DECLARE(megavid_sum_of_squares_forward, SumOfSquares)
MEGAVID_DECLARE(megavid_sum_of_squares_backward, SumOfSquares)
MEGAVID_DECLARE(megavid_norm_rope_forward, NormRope)
MEGAVID_DECLARE(megavid_norm_rope_backward, NormRope)
MEGAVID_DECLARE(megavid_expert_activation_forward, ExpertActivation)
MEGAVID_DECLARE(megavid_expert_activation_backward, ExpertActivation)
MEGAVID_DECLARE(megavid_expert_activation_fp8, ExpertActivationFp8)
MEGAVID_DECLARE(megavid_moe_gather, MoeRows)
MEGAVID_DECLARE(megavid_moe_combine, MoeRows)
MEGAVID_DECLARE(megavid_router_topk_forward, RouterTopk)
MEGAVID_DECLARE(megavid_router_topk_backward, RouterTopk)
MEGAVID_DECLARE(megavid_fp8_amax, QuantizeFp8)
MEGAVID_DECLARE(megavid_quantize_fp8, QuantizeFp8)
MEGAVID_DECLARE(megavid_quantize_fp8_tiles, QuantizeFp8Tiles)
