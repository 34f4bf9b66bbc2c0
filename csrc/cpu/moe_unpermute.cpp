// The weighted sum of each token's rows; backward, each row's share of its token's gradient, and its weight's.
//
// Memory traffic: forward reads the rows and writes the tokens; backward reads a token for each of its rows and writes
// the rows, and reads the rows again where weights take a gradient.
#include "rows.h"

void MEGAVID_NAME(megavid_moe_unpermute_forward)(const megavid::MoeRows& job, int64_t begin, int64_t end) {
  using namespace megavid::MEGAVID_ISA;
  job.is_bf16 ? combine_rows<BFloat16>(job, begin, end) : combine_rows<float>(job, begin, end);
}

void MEGAVID_NAME(megavid_moe_unpermute_backward)(const megavid::MoeRows& job, int64_t begin, int64_t end) {
  using namespace megavid::MEGAVID_ISA;
  job.is_bf16 ? gather_rows<BFloat16>(job, begin, end) : gather_rows<float>(job, begin, end);
}
