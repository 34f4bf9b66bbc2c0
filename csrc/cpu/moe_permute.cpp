// Tokens to rows sorted by expert; backward, the sum of each token's rows.
//
// Memory traffic: forward reads a token for each of its rows and writes the rows; backward reads the rows and writes the
// tokens. Eager torch adds row by row into the tokens, and in bf16 rounds every sum on the way.
#include "rows.h"

void MEGAVID_NAME(megavid_moe_permute_forward)(const megavid::MoeRows& job, int64_t begin, int64_t end) {
  using namespace megavid::MEGAVID_ISA;
  job.is_bf16 ? gather_rows<BFloat16>(job, begin, end) : gather_rows<float>(job, begin, end);
}

void MEGAVID_NAME(megavid_moe_permute_backward)(const megavid::MoeRows& job, int64_t begin, int64_t end) {
  using namespace megavid::MEGAVID_ISA;
  job.is_bf16 ? combine_rows<BFloat16>(job, begin, end) : combine_rows<float>(job, begin, end);
}
