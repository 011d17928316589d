// The ops on the CPU.
#include "ops.h"
#include "shift.h"

namespace srt::glue {
namespace {

Tensor shift(const Tensor& image, const Tensor& offsets, const std::string& padding,
             const std::string& interpolation) {
  ShiftCall call(image, offsets, padding, interpolation);
  const Tensor out = call.new_out();
  call.args.out = out.mutable_data_ptr();
  shift_cpu(call.args, torch_parallel());
  return out;
}

void run(EnsembleCall& call) { ensemble_cpu(call.args, torch_parallel()); }

}  // namespace
}  // namespace srt::glue

STABLE_TORCH_LIBRARY_IMPL(srt, CPU, m) {
  m.impl("shift", TORCH_BOX(&srt::glue::shift));
  SRT_IMPLEMENT_ENSEMBLE(m, srt::glue::EnsembleOps<&srt::glue::run>);
}
