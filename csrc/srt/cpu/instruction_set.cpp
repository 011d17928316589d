// Compiled once for each instruction set; SRT_ISA names it (CMakeLists.txt has the flags).
#include "mean-inl.h"
#include "mean_backward-inl.h"
#include "per_view-inl.h"

namespace srt::cpu {

#define SRT_STRING_(x) #x
#define SRT_STRING(x) SRT_STRING_(x)

namespace {
template <class T, class Acc = typename AccumulatorOf<T>::type>
constexpr EnsembleKernels<Acc> kEnsemble = {mean<T, T>,
                                            mean<T, Acc>,
                                            reduce_values<T, Median<T, Acc>>,
                                            reduce_values<T, Moments<T, Acc>>,
                                            reduce_values<T, StreamMedian<Acc>>,
                                            reduce_values<T, StreamMoments<Acc>>,
                                            mean_backward<T, Acc>};
}  // namespace

const Kernels SRT_ISA = {SRT_STRING(SRT_ISA),   kBlockBytes,          kMaxTile,
                         kEnsemble<float>,      kEnsemble<Half>,      kEnsemble<BFloat16>,
                         kEnsemble<double>,     shift<float>,         shift<Half>,
                         shift<BFloat16>,       shift<double>,        shift<uint8_t>,
                         shift_backward<float>, shift_backward<Half>, shift_backward<BFloat16>,
                         shift_backward<double>};

}  // namespace srt::cpu
