#include "core/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace pyreg {

namespace {

Isa detect() {
  Isa best = Isa::baseline;
#if defined(PYREG_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      best = Isa::avx512;
    }
  }
#endif
  const char* wanted = std::getenv("PYREG_ISA");
  if (wanted == nullptr) return best;
  for (Isa isa : {Isa::baseline, Isa::avx2}) {
    if (isa < best && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
  }
  return best;
}

}  // namespace

Isa selected_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "unknown";
}

}  // namespace pyreg
