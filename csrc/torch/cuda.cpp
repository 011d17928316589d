// Registers the ops for CUDA. They run on the current stream of the input's device and do not
// synchronise.
#include "../srt/cuda/cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops.h"

namespace srt::glue {
namespace {

using torch::stable::accelerator::DeviceGuard;

CUstream_st* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  SRT_SHIM_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<CUstream_st*>(stream);
}

// Refers to the values in `device`, or to those at `host` if there are none on the device.
ViewArray pointers(const double* host, const std::optional<Tensor>& device) {
  if (!device) return {host, nullptr, DType::f64};
  const bool f64 = device->scalar_type() == ScalarType::Double;
  return {nullptr, device->const_data_ptr(), f64 ? DType::f64 : DType::f32};
}

// Freed on return, while the kernels may still run. The caching allocator reuses it in stream
// order, as for torch's own temporaries.
Tensor new_workspace(int64_t bytes, const Tensor& like) {
  return empty({bytes}, ScalarType::Byte, like);
}

struct Places {
  ViewArray centers, scale;
  explicit Places(const WindowsCall& call)
      : centers(pointers(call.args.centers, call.device_centers)),
        scale(pointers(call.args.scale, call.device_scale)) {}
};

struct Cuda {
  static void shift(ShiftCall& call) {
    const DeviceGuard guard(call.input.get_device_index());
    const Tensor workspace = new_workspace(shift_cuda_workspace(call.args), call.input);
    shift_cuda(call.args, pointers(call.args.offsets, call.device_offsets),
               workspace.mutable_data_ptr(), current_stream(call.input));
  }

  static void shift_backward(ShiftCall& call, void* grad_image) {
    const DeviceGuard guard(call.input.get_device_index());
    const Tensor workspace = new_workspace(shift_backward_cuda_workspace(call.args), call.input);
    shift_backward_cuda(call.args, pointers(call.args.offsets, call.device_offsets), grad_image,
                        workspace.mutable_data_ptr(), current_stream(call.input));
  }

  static void windows(WindowsCall& call) {
    const DeviceGuard guard(call.input.get_device_index());
    const Places places(call);
    const Tensor workspace =
        new_workspace(windows_cuda_workspace(call.args, places.centers, places.scale), call.input);
    windows_cuda(call.args, places.centers, places.scale, workspace.mutable_data_ptr(),
                 current_stream(call.input));
  }

  static Tensor windows_backward_image(WindowsCall& call) {
    const DeviceGuard guard(call.input.get_device_index());
    const Places places(call);
    // The size of the workspace is computed first, because this checks the number of windows.
    const Tensor workspace = new_workspace(
        windows_backward_image_cuda_workspace(call.args, places.centers, places.scale), call.input);
    const Tensor grad_image = call.new_image();
    windows_backward_image_cuda(call.args, places.centers, places.scale,
                                grad_image.mutable_data_ptr(), workspace.mutable_data_ptr(),
                                current_stream(call.input));
    return grad_image;
  }

  static void windows_backward_points(WindowsCall& call, double* grad_centers, double* grad_scale) {
    const DeviceGuard guard(call.input.get_device_index());
    const Places places(call);
    const Tensor workspace = new_workspace(
        windows_backward_points_cuda_workspace(call.args, places.centers, places.scale),
        call.input);
    windows_backward_points_cuda(call.args, places.centers, places.scale, grad_centers, grad_scale,
                                 workspace.mutable_data_ptr(), current_stream(call.input));
  }

  static void ensemble(EnsembleCall& call) {
    const DeviceGuard guard(call.input.get_device_index());
    const ViewArray offsets = pointers(call.args.offsets, call.device_offsets);
    const ViewArray weights = pointers(call.args.weights, call.device_weights);
    const Tensor workspace =
        new_workspace(ensemble_cuda_workspace(call.args, offsets, weights), call.input);
    ensemble_cuda(call.op, call.args, offsets, weights, workspace.mutable_data_ptr(),
                  current_stream(call.input));
  }

  static void mean_backward(EnsembleCall& call, void* grad_tokens) {
    const DeviceGuard guard(call.input.get_device_index());
    const ViewArray offsets = pointers(call.args.offsets, call.device_offsets);
    const ViewArray weights = pointers(call.args.weights, call.device_weights);
    const Tensor workspace =
        new_workspace(mean_backward_cuda_workspace(call.args, offsets, weights), call.input);
    mean_backward_cuda(call.op, call.args, offsets, weights, grad_tokens,
                       workspace.mutable_data_ptr(), current_stream(call.input));
  }
};

}  // namespace
}  // namespace srt::glue

STABLE_TORCH_LIBRARY_IMPL(srt, CUDA, m) { SRT_IMPLEMENT_OPS(m, srt::glue::Ops<srt::glue::Cuda>); }
