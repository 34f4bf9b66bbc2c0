// Which instruction set the CPU kernels use: the widest that this machine and this build have, asked for once.
#pragma once

namespace megavid {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

inline Isa isa() {
  static const Isa found = detect_isa();
  return found;
}

inline const char* isa_name() {
  switch (isa()) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace megavid

#if defined(__x86_64__)
#define MEGAVID_CALL(name, ...)                                             \
  (megavid::isa() == megavid::Isa::kAvx512 ? name##_avx512(__VA_ARGS__)     \
   : megavid::isa() == megavid::Isa::kAvx2 ? name##_avx2(__VA_ARGS__)       \
                                           : name##_baseline(__VA_ARGS__))
#else
#define MEGAVID_CALL(name, ...) name##_baseline(__VA_ARGS__)
#endif
