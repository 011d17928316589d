// The ops on CUDA: on the current stream of the device of the input, without waiting for it.
#include "../srt/cuda/cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ensemble.h"
#include "shift.h"

namespace srt::glue {
namespace {

CUstream_st* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<CUstream_st*>(stream);
}

ViewNumbers pointers(const Numbers& numbers) {
  if (!numbers.device) return {numbers.host.data(), nullptr, DType::f64};
  const bool f64 = numbers.device->scalar_type() == ScalarType::Double;
  return {nullptr, numbers.device->const_data_ptr(), f64 ? DType::f64 : DType::f32};
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
  shift_cuda(call.args, pointers(call.offsets), workspace.mutable_data_ptr(),
             current_stream(image));
  return out;
}

void run(EnsembleCall& call, const Tensor& tokens, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(tokens.get_device_index());
  call.set_out(out);
  const ViewNumbers offsets = pointers(call.offsets);
  const ViewNumbers weights = call.weights ? pointers(*call.weights) : ViewNumbers{};
  const Tensor workspace =
      new_workspace(ensemble_mean_cuda_workspace(call.args, offsets, weights), tokens);
  ensemble_mean_cuda(call.args, offsets, weights, workspace.mutable_data_ptr(),
                     current_stream(tokens));
}

Tensor ensemble(const Tensor& tokens, const Tensor& offsets, const std::vector<int64_t>& grid,
                const std::vector<int64_t>& patch, const std::optional<Tensor>& weights,
                const std::string& reduce, const std::string& upsample, const std::string& border,
                const std::vector<int64_t>& stride) {
  EnsembleCall call(tokens, offsets, grid, patch, weights, reduce, upsample, border, stride);
  const Tensor out = call.new_out(tokens);
  run(call, tokens, out);
  return out;
}

void ensemble_out(const Tensor& tokens, const Tensor& offsets, const std::vector<int64_t>& grid,
                  const std::vector<int64_t>& patch, const std::optional<Tensor>& weights,
                  const std::string& reduce, const std::string& upsample, const std::string& border,
                  const std::vector<int64_t>& stride, const Tensor& out) {
  EnsembleCall call(tokens, offsets, grid, patch, weights, reduce, upsample, border, stride);
  call.check_out(out, tokens);
  run(call, tokens, out);
}

}  // namespace
}  // namespace srt::glue

STABLE_TORCH_LIBRARY_IMPL(srt, CUDA, m) {
  m.impl("shift", TORCH_BOX(&srt::glue::shift));
  m.impl("ensemble", TORCH_BOX(&srt::glue::ensemble));
  m.impl("ensemble.out", TORCH_BOX(&srt::glue::ensemble_out));
}
