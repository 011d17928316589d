// The ops on the CPU.
#include "ops.h"
#include "shift.h"

namespace srt::glue {
namespace {

// torch's intra-op threads.
Parallel torch_parallel() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()),
          [](int64_t n, Parallel::Body body, void* context) {
            STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
          }};
}

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
