// The ops on CUDA: on the current stream of the device of the input, without waiting for it.
#include "../srt/cuda/cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops.h"
#include "shift.h"

namespace srt::glue {
namespace {

CUstream_st* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  SRT_SHIM_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<CUstream_st*>(stream);
}

// Of the host, or of the device if they lie there.
ViewArray pointers(const double* host, const std::optional<Tensor>& device) {
  if (!device) return {host, nullptr, DType::f64};
  const bool f64 = device->scalar_type() == ScalarType::Double;
  return {nullptr, device->const_data_ptr(), f64 ? DType::f64 : DType::f32};
}

// Freed on return and reused in the order of the stream, as torch's own temporaries are.
Tensor new_workspace(int64_t bytes, const Tensor& like) {
  return empty({bytes}, ScalarType::Byte, like);
}

Tensor shift(const Tensor& image, const Tensor& offsets, const std::string& padding,
             const std::string& interpolation) {
  ShiftCall call(image, offsets, padding, interpolation);
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  const Tensor out = call.new_out();
  call.args.out = out.mutable_data_ptr();
  const Tensor workspace = new_workspace(shift_cuda_workspace(call.args), image);
  shift_cuda(call.args, pointers(call.args.offsets, call.device_offsets),
             workspace.mutable_data_ptr(), current_stream(image));
  return out;
}

Tensor shift_backward(const Tensor& grad, const Tensor& offsets, const std::string& padding,
                      const std::string& interpolation) {
  ShiftBackwardCall call(grad, offsets, padding, interpolation);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const Tensor grad_image = call.new_grad_image();
  const Tensor workspace = new_workspace(shift_backward_cuda_workspace(call.args), grad);
  shift_backward_cuda(call.args, pointers(call.args.offsets, call.device_offsets),
                      grad_image.mutable_data_ptr(), workspace.mutable_data_ptr(),
                      current_stream(grad));
  return grad_image;
}

void run(EnsembleCall& call) {
  const torch::stable::accelerator::DeviceGuard guard(call.input.get_device_index());
  const ViewArray offsets = pointers(call.args.offsets, call.device_offsets);
  const ViewArray weights = pointers(call.args.weights, call.device_weights);
  const Tensor workspace =
      new_workspace(ensemble_cuda_workspace(call.args, offsets, weights), call.input);
  ensemble_cuda(call.op, call.args, offsets, weights, workspace.mutable_data_ptr(),
                current_stream(call.input));
}

void run_backward(EnsembleCall& call, const Tensor& grad_tokens) {
  const torch::stable::accelerator::DeviceGuard guard(grad_tokens.get_device_index());
  const ViewArray offsets = pointers(call.args.offsets, call.device_offsets);
  const ViewArray weights = pointers(call.args.weights, call.device_weights);
  const Tensor workspace =
      new_workspace(mean_backward_cuda_workspace(call.args, offsets, weights), grad_tokens);
  mean_backward_cuda(call.op, call.args, offsets, weights, grad_tokens.mutable_data_ptr(),
                     workspace.mutable_data_ptr(), current_stream(grad_tokens));
}

using Ops = EnsembleOps<&run, &run_backward>;

}  // namespace
}  // namespace srt::glue

STABLE_TORCH_LIBRARY_IMPL(srt, CUDA, m) {
  m.impl("shift", TORCH_BOX(&srt::glue::shift));
  m.impl("_shift_backward", TORCH_BOX(&srt::glue::shift_backward));
  SRT_IMPLEMENT_ENSEMBLE(m, srt::glue::Ops);
}
