// Instantiates all CPU kernels. CMakeLists.txt compiles this file once for each instruction set,
// with its compiler flags and SRT_ISA set to its name.
#include "dispatch.h"
#include "mean-inl.h"
#include "mean_backward-inl.h"
#include "per_view-inl.h"
#include "shift-inl.h"
#include "shift_backward-inl.h"
#include "windows-inl.h"
#include "windows_backward-inl.h"

namespace srt::cpu {

#define SRT_STRING_(x) #x
#define SRT_STRING(x) SRT_STRING_(x)

namespace {
// In the order of the members of KernelsOf in dispatch.h.
template <class T, class Acc = typename AccumulatorOf<T>::type>
constexpr KernelsOf<T> kKernels = {mean<T, T>,
                                   mean<T, Acc>,
                                   per_view<T, Median<T, Acc>>,
                                   per_view<T, Moments<T, Acc>>,
                                   per_view<T, StreamMedian<Acc>>,
                                   per_view<T, Moments<Acc, Acc>>,
                                   mean_backward<T, Acc>,
                                   shift<T>,
                                   shift_backward<T>,
                                   windows<T>,
                                   windows_backward<T>,
                                   windows_points<T>};
}  // namespace

const Kernels SRT_ISA = {kKernels<float>,
                         kKernels<Half>,
                         kKernels<BFloat16>,
                         kKernels<double>,
                         {shift<uint8_t>, windows<uint8_t>},
                         SRT_STRING(SRT_ISA),
                         kBlockBytes,
                         kMaxTile};

}  // namespace srt::cpu
