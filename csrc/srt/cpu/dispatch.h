// The kernels, one set for each instruction set, and the choice between them.
#pragma once
#include <cstdint>

#include "plan.h"

namespace srt::cpu {

// Runs tasks [begin, end). Scratch is the worker's own, 64-byte aligned.
template <class Plan>
using Kernel = void (*)(const Plan& plan, int64_t begin, int64_t end, void* scratch);

// For tokens and images of type T. In a stream `out` has the accumulator's type.
template <class T>
struct KernelsOf {
  using Acc = typename AccumulatorOf<T>::type;
  Kernel<MeanPlan<Acc>> mean, stream_mean;
  Kernel<PerViewPlan<Acc>> median, moments, stream_median, stream_moments;
  Kernel<MeanBackwardPlan<Acc>> mean_backward;
  Kernel<ShiftPlan> shift;
  Kernel<ShiftBackwardPlan> shift_backward;
  Kernel<WindowsPlan> windows;
  Kernel<WindowsBackwardPlan> windows_backward;
  Kernel<WindowsPointsPlan> windows_points;
};
template <>
struct KernelsOf<uint8_t> {
  Kernel<ShiftPlan> shift;
  Kernel<WindowsPlan> windows;
};

struct Kernels : KernelsOf<float>,
                 KernelsOf<Half>,
                 KernelsOf<BFloat16>,
                 KernelsOf<double>,
                 KernelsOf<uint8_t> {
  const char* name;
  int64_t block_bytes;  // of the channels that are treated together, at most
  int64_t max_tile;     // outputs of a TileTable

  template <class T>
  const KernelsOf<T>& of() const {
    return *this;
  }
};

extern const Kernels baseline;
#if defined(__x86_64__)
extern const Kernels avx2;
extern const Kernels avx512;
#endif

// The set in use: the widest one that this processor runs, unless another was forced.
const Kernels& kernels();
// Forces a set by name; "auto" returns to the widest. False if this machine has no such set.
bool force_kernels(const char* name);
// The names that force_kernels takes here, narrowest first, separated by commas.
const char* available_kernels();

}  // namespace srt::cpu
