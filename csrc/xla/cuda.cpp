// The handlers for CUDA. They run on XLA's stream, with scratch memory from its allocator, and do
// not synchronise.
#include "../srt/cuda/cuda.h"

#include <cuda_runtime.h>

#include "handlers.h"

namespace srt::xla {
namespace {

constexpr const char* kDevice = "cuda";

// The values in an operand of the program, or at `host`, those of an attribute.
ViewArray pointers(const double* host, const std::optional<ArrayView>& numbers) {
  if (!numbers || numbers->device != kDevice) return {host, nullptr, DType::f64};
  return {nullptr, numbers->data, numbers->dtype == "float64" ? DType::f64 : DType::f32};
}

struct Cuda {
  CUstream_st* stream;
  ffi::ScratchAllocator& scratch;

  void* workspace(int64_t bytes) const {
    if (bytes == 0) return nullptr;
    const std::optional<void*> memory = scratch.Allocate(static_cast<size_t>(bytes), 256);
    if (!memory) throw std::bad_alloc();
    return *memory;
  }

  void zero(const ArrayView& weight) const {
    const auto bytes = static_cast<size_t>(weight.shape[0] * weight.shape[1]) * sizeof(double);
    const cudaError_t error = cudaMemsetAsync(const_cast<void*>(weight.data), 0, bytes, stream);
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("srt::mean_sums: CUDA: ") + cudaGetErrorString(error));
  }

  void ensemble(const EnsembleCall& call, const std::vector<ArrayView>&) const {
    const EnsembleArgs& args = call.checked.args;
    const ViewArray offsets = pointers(args.offsets, call.views.first);
    const ViewArray weights = pointers(args.weights, call.views.second);
    ensemble_cuda(call.checked.op, args, offsets, weights,
                  workspace(ensemble_cuda_workspace(args, offsets, weights)), stream);
  }
  void mean_backward(const EnsembleCall& call, const ArrayView& grad_tokens) const {
    const EnsembleArgs& args = call.checked.args;
    const ViewArray offsets = pointers(args.offsets, call.views.first);
    const ViewArray weights = pointers(args.weights, call.views.second);
    mean_backward_cuda(call.checked.op, args, offsets, weights, const_cast<void*>(grad_tokens.data),
                       workspace(mean_backward_cuda_workspace(args, offsets, weights)), stream);
  }
  void shift(const CheckedShift& call, const Numbers& offsets, const ArrayView&) const {
    shift_cuda(call.args, pointers(call.args.offsets, offsets.first),
               workspace(shift_cuda_workspace(call.args)), stream);
  }
  void shift_backward(const CheckedShift& call, const Numbers& offsets,
                      const ArrayView& grad_image) const {
    shift_backward_cuda(call.args, pointers(call.args.offsets, offsets.first),
                        const_cast<void*>(grad_image.data),
                        workspace(shift_backward_cuda_workspace(call.args)), stream);
  }
  void windows(const CheckedWindows& call, const Numbers& places, const ArrayView&) const {
    const ViewArray centers = pointers(call.args.centers, places.first);
    const ViewArray scale = pointers(call.args.scale, places.second);
    windows_cuda(call.args, centers, scale,
                 workspace(windows_cuda_workspace(call.args, centers, scale)), stream);
  }
  void windows_backward_image(const CheckedWindows& call, const Numbers& places,
                              const ArrayView& grad_image) const {
    const ViewArray centers = pointers(call.args.centers, places.first);
    const ViewArray scale = pointers(call.args.scale, places.second);
    const int64_t bytes = windows_backward_image_cuda_workspace(call.args, centers, scale);
    windows_backward_image_cuda(call.args, centers, scale, const_cast<void*>(grad_image.data),
                                workspace(bytes), stream);
  }
  void windows_backward_points(const CheckedWindows& call, const Numbers& places,
                               const ArrayView& grad_centers, const ArrayView& grad_scale) const {
    const ViewArray centers = pointers(call.args.centers, places.first);
    const ViewArray scale = pointers(call.args.scale, places.second);
    const int64_t bytes = windows_backward_points_cuda_workspace(call.args, centers, scale);
    windows_backward_points_cuda(
        call.args, centers, scale, static_cast<double*>(const_cast<void*>(grad_centers.data)),
        static_cast<double*>(const_cast<void*>(grad_scale.data)), workspace(bytes), stream);
  }
};

// XLA makes the device of `stream` current. It frees the scratch memory when this function returns
// and reuses it in stream order.
template <void (*handler)(const Cuda&, Call)>
ffi::Error on_stream(CUstream_st* stream, ffi::ScratchAllocator scratch,
                     ffi::RemainingArgs operands, ffi::RemainingRets results,
                     ffi::Dictionary attributes) {
  return error_of(
      [&] { handler({stream, scratch}, Call(kDevice, operands, results, attributes)); });
}

}  // namespace
}  // namespace srt::xla

using namespace srt::xla;

// A call only launches kernels, so XLA may capture it in a CUDA graph.
#define SRT_XLA_HANDLER(name)                                                   \
  SRT_XLA_EXPORT XLA_FFI_Error* srt_##name(XLA_FFI_CallFrame*);                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(srt_##name, (on_stream<&Handlers<Cuda>::name>), \
                                ffi::Ffi::Bind()                                \
                                    .Ctx<ffi::PlatformStream<CUstream_st*>>()   \
                                    .Ctx<ffi::ScratchAllocator>()               \
                                    .RemainingArgs()                            \
                                    .RemainingRets()                            \
                                    .Attrs(),                                   \
                                {ffi::Traits::kCmdBufferCompatible});
SRT_XLA_HANDLERS
