// Compiled once for each instruction set; SRT_ISA names it (CMakeLists.txt has the flags).
#include "inner.h"

namespace srt::cpu {

#define SRT_STRING_(x) #x
#define SRT_STRING(x) SRT_STRING_(x)

const Kernels SRT_ISA = {SRT_STRING(SRT_ISA), kBlockBytes,           mean<float, float>,
                         mean<Half, float>,   mean<BFloat16, float>, mean<double, double>,
                         shift<float>,        shift<Half>,           shift<BFloat16>,
                         shift<double>,       shift<uint8_t>};

}  // namespace srt::cpu
