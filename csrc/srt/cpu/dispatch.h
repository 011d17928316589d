// Tables of kernel functions, one per instruction set, and the selection between them at run time.
#pragma once
#include <cstdint>

#include "plan.h"

namespace srt::cpu {

// Runs tasks [begin, end) of a plan. `scratch` belongs to the calling worker and is 64-byte
// aligned.
template <class Plan>
using Kernel = void (*)(const Plan& plan, int64_t begin, int64_t end, void* scratch);

// The kernels for tokens and images of type T. In a stream, `out` has the accumulator type.
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
  int64_t block_bytes;  // of a block of channels that is processed at once, at most
  int64_t max_tile;     // outputs of a TileTable, at most

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

// The selected set: the widest that this processor supports, unless another was forced.
const Kernels& kernels();
// Forces a set by name; "auto" selects the widest again. Returns false if this processor does not
// support a set of that name.
bool force_kernels(const char* name);
// The names that force_kernels accepts on this processor, narrowest first, separated by commas.
const char* available_kernels();

}  // namespace srt::cpu
