// The handlers of csrc/xla/cuda.cu, over kernels that run on the CPU. XLA calls them for its CPU
// device; the stream and the scratch memory of a GPU are replaced here. test_host_shim.py loads
// this library in a subprocess.
#include <mutex>

#include "../../csrc/xla/cuda.cu"
#include "host.cpp"

namespace {

XLA_FFI_Error* stream(XLA_FFI_Stream_Get_Args* args) {
  args->stream = host_device.stream;
  return nullptr;
}

// Filled, so that a kernel that reads memory which no kernel has written returns NaN.
XLA_FFI_Error* allocate(XLA_FFI_DeviceMemory_Allocate_Args* args) {
  const size_t bytes = (args->size + args->alignment - 1) / args->alignment * args->alignment;
  args->data = std::aligned_alloc(args->alignment, bytes);
  std::memset(args->data, 0xff, bytes);
  return nullptr;
}

XLA_FFI_Error* release(XLA_FFI_DeviceMemory_Free_Args* args) {
  std::free(args->data);
  return nullptr;
}

std::mutex one_call;  // the kernels share static memory
int calls = 0;

XLA_FFI_Error* on_host(XLA_FFI_Handler* handler, XLA_FFI_CallFrame* frame) {
  const std::lock_guard<std::mutex> lock(one_call);
  XLA_FFI_Api api = *frame->api;
  api.XLA_FFI_Stream_Get = stream;
  api.XLA_FFI_DeviceMemory_Allocate = allocate;
  api.XLA_FFI_DeviceMemory_Free = release;
  XLA_FFI_CallFrame call = *frame;
  call.api = &api;
  ++calls;
  return handler(&call);
}

}  // namespace

EXPORT int handler_calls() { return calls; }

#undef SRT_XLA_HANDLER
#define SRT_XLA_HANDLER(name) \
  EXPORT XLA_FFI_Error* host_##name(XLA_FFI_CallFrame* frame) { return on_host(srt_##name, frame); }
SRT_XLA_HANDLERS
