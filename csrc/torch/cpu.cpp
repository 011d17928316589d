// Registers the ops for the CPU.
#include "ops.h"

namespace srt::glue {
namespace {

struct Cpu {
  static void shift(ShiftCall& call) { shift_cpu(call.args, torch_parallel()); }
  static void shift_backward(ShiftCall& call, void* grad_image) {
    shift_backward_cpu(call.args, grad_image, torch_parallel());
  }
  static void windows(WindowsCall& call) { windows_cpu(call.args, torch_parallel()); }
  static Tensor windows_backward_image(WindowsCall& call) {
    const Tensor grad_image = call.new_image();
    windows_backward_image_cpu(call.args, grad_image.mutable_data_ptr(), torch_parallel());
    return grad_image;
  }
  static void windows_backward_points(WindowsCall& call, double* grad_centers, double* grad_scale) {
    windows_backward_points_cpu(call.args, grad_centers, grad_scale, torch_parallel());
  }
  static void ensemble(EnsembleCall& call) { ensemble_cpu(call.args, torch_parallel()); }
  static void mean_backward(EnsembleCall& call, void* grad_tokens) {
    mean_backward_cpu(call.args, grad_tokens, torch_parallel());
  }
};

}  // namespace
}  // namespace srt::glue

STABLE_TORCH_LIBRARY_IMPL(srt, CPU, m) { SRT_IMPLEMENT_OPS(m, srt::glue::Ops<srt::glue::Cpu>); }
