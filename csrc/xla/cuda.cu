// The handlers for CUDA. They run on XLA's stream, with scratch memory from its allocator, and do
// not synchronise.
#include "../srt/cuda/common.cuh"
#include "handlers.h"

namespace srt::xla {
namespace {

using cuda::kThreads;

constexpr const char* kDevice = "cuda";

// The values in an operand of the program, or at `host`, those of an attribute.
ViewArray pointers(const double* host, const std::optional<ArrayView>& numbers) {
  if (!numbers || numbers->device != kDevice) return {host, nullptr, DType::f64};
  return {nullptr, numbers->data, numbers->dtype == "float64" ? DType::f64 : DType::f32};
}

__global__ void __launch_bounds__(kThreads) round_kernel(const double* from, int64_t n, float* to) {
  SRT_FOR_THREAD(i, n) { to[i] = static_cast<float>(from[i]); }
}

struct Cuda {
  CUstream_st* stream;
  ffi::ScratchAllocator& scratch;

  void* workspace(int64_t bytes) const {
    if (bytes == 0) return nullptr;
    const std::optional<void*> memory = scratch.Allocate(static_cast<size_t>(bytes), 256);
    if (!memory)
      throw std::runtime_error("srt: XLA could not allocate " + std::to_string(bytes) +
                               " bytes of scratch memory on the GPU");
    return *memory;
  }

  double* doubles(const ArrayView& result) const {
    if (result.dtype == "float64") return static_cast<double*>(const_cast<void*>(result.data));
    return static_cast<double*>(workspace(element_count(result) * 8));
  }
  void zero(double* weight, const ArrayView& result) const {
    const auto bytes = static_cast<size_t>(element_count(result)) * sizeof(double);
    cuda::check("mean_sums", cudaMemsetAsync(weight, 0, bytes, stream));
  }
  void round(const char* op, const double* from, const ArrayView& result) const {
    if (result.data == from) return;
    const int64_t n = element_count(result);
    cuda::launch(op, round_kernel, div_up(n, kThreads), stream, from, n,
                 static_cast<float*>(const_cast<void*>(result.data)));
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
                               double* of_centers, double* of_scale) const {
    const ViewArray centers = pointers(call.args.centers, places.first);
    const ViewArray scale = pointers(call.args.scale, places.second);
    const int64_t bytes = windows_backward_points_cuda_workspace(call.args, centers, scale);
    windows_backward_points_cuda(call.args, centers, scale, of_centers, of_scale, workspace(bytes),
                                 stream);
  }
};

// XLA makes the device of `stream` current. It frees the scratch memory when this function returns
// and reuses it in stream order.
template <void (*handler)(Cuda&, Call)>
ffi::Error on_stream(CUstream_st* stream, ffi::ScratchAllocator scratch,
                     ffi::RemainingArgs operands, ffi::RemainingRets results,
                     ffi::Dictionary attributes) {
  Cuda backend{stream, scratch};
  return error_of([&] { handler(backend, Call(kDevice, operands, results, attributes)); });
}

}  // namespace
}  // namespace srt::xla

using namespace srt::xla;

// The handlers do not have the trait for CUDA graphs: their scratch memory is freed on return, and
// a graph would keep its address.
#define SRT_XLA_HANDLER(name)                                                   \
  SRT_XLA_EXPORT XLA_FFI_Error* srt_##name(XLA_FFI_CallFrame*);                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(srt_##name, (on_stream<&Handlers<Cuda>::name>), \
                                ffi::Ffi::Bind()                                \
                                    .Ctx<ffi::PlatformStream<CUstream_st*>>()   \
                                    .Ctx<ffi::ScratchAllocator>()               \
                                    .RemainingArgs()                            \
                                    .RemainingRets()                            \
                                    .Attrs());
SRT_XLA_HANDLERS
