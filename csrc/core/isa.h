// CPU kernels are compiled once for each instruction set and chosen at run time.
//
// A <op>_cpu.cpp is compiled with PYREG_ISA set to one of the names below and puts everything it defines into
// `namespace pyreg::PYREG_ISA`. Code with inline definitions that such a file includes lives in that namespace
// too, so that the linker can never pick, say, an AVX-512 copy of a function for a machine without it.
#pragma once

namespace pyreg {

enum class Isa { baseline, avx2, avx512 };

// The best instruction set that this build has and this processor runs; PYREG_ISA=baseline|avx2|avx512 in the
// environment lowers it.
Isa selected_isa();
const char* isa_name(Isa isa);

}  // namespace pyreg

// Declares `void name(const Args&)` for every device: pyreg::cpu::name picks the instruction set, pyreg::cuda::name
// is the CUDA kernel's launcher.
#if defined(PYREG_X86)
#define PYREG_DECLARE_KERNEL(name, Args)      \
  namespace baseline {                        \
  void name(const Args& args);                \
  }                                           \
  namespace avx2 {                            \
  void name(const Args& args);                \
  }                                           \
  namespace avx512 {                          \
  void name(const Args& args);                \
  }                                           \
  namespace cpu {                             \
  static inline void name(const Args& args) { \
    switch (selected_isa()) {                 \
      case Isa::avx512:                       \
        return avx512::name(args);            \
      case Isa::avx2:                         \
        return avx2::name(args);              \
      case Isa::baseline:                     \
        return baseline::name(args);          \
    }                                         \
  }                                           \
  }                                           \
  namespace cuda {                            \
  void name(const Args& args);                \
  }
#else
#define PYREG_DECLARE_KERNEL(name, Args)                                     \
  namespace baseline {                                                       \
  void name(const Args& args);                                               \
  }                                                                          \
  namespace cpu {                                                            \
  static inline void name(const Args& args) { return baseline::name(args); } \
  }                                                                          \
  namespace cuda {                                                           \
  void name(const Args& args);                                               \
  }
#endif
