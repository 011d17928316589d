// The CUDA ops, over kernels that run on the CPU. They are registered for CPU tensors, instead of
// the CPU kernels, and treat every tensor as one on the device. test_host_shim.py loads this
// library in a subprocess.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "host.cpp"

// Replaces torch's function, which would look for a GPU.
static int guards = 0;
extern "C" AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(++guards);
  return AOTI_TORCH_SUCCESS;
}
extern "C" AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return AOTI_TORCH_SUCCESS;
}
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  if (guards == 0) abort();  // the current device is not yet that of the input
  *stream = host_device.stream;
  return AOTI_TORCH_SUCCESS;
}
EXPORT int live_guards() { return guards; }

#define is_cpu is_cuda
#define CUDA CPU
#include "../../csrc/srt/cpu/populate.cpp"
#include "../../csrc/torch/common.cpp"
#include "../../csrc/torch/cuda.cpp"
#include "../../csrc/torch/ensemble.cpp"
#include "../../csrc/torch/shift.cpp"
#include "../../csrc/torch/windows.cpp"
