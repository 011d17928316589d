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

Tensor shift_backward(const Tensor& grad, const Tensor& offsets, const std::string& padding,
                      const std::string& interpolation) {
  ShiftBackwardCall call(grad, offsets, padding, interpolation);
  const Tensor grad_image = call.new_grad_image();
  shift_backward_cpu(call.args, grad_image.mutable_data_ptr(), torch_parallel());
  return grad_image;
}

void run(EnsembleCall& call) { ensemble_cpu(call.args, torch_parallel()); }
void run_backward(EnsembleCall& call, const Tensor& grad_tokens) {
  mean_backward_cpu(call.args, grad_tokens.mutable_data_ptr(), torch_parallel());
}

using Ops = EnsembleOps<&run, &run_backward>;

}  // namespace
}  // namespace srt::glue

STABLE_TORCH_LIBRARY_IMPL(srt, CPU, m) {
  m.impl("shift", TORCH_BOX(&srt::glue::shift));
  m.impl("_shift_backward", TORCH_BOX(&srt::glue::shift_backward));
  SRT_IMPLEMENT_ENSEMBLE(m, srt::glue::Ops);
}
