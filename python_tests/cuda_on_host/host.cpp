// The entry points of the CUDA sources that backends.py calls, linked with the objects that g++
// compiles from the sources. Every function returns null or an error message.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../../csrc/srt/cuda/cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

thread_local std::string message;

template <class Body>
const char* guarded(Body body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

EXPORT HostDevice* device() { return &host_device; }

// Calls `gap` with the bytes between the pieces of each workspace.
EXPORT void watch_workspace(void (*gap)(void*, int64_t)) { srt::workspace_gap = gap; }

// Without a workspace, stores its size in `bytes`.
EXPORT const char* ensemble(const srt::EnsembleArgs* args, const srt::ViewArray* offsets,
                            const srt::ViewArray* weights, void* workspace, int64_t* bytes) {
  return guarded([&] {
    if (workspace) {
      srt::ensemble_cuda("ensemble", *args, *offsets, *weights, workspace, host_device.stream);
    } else {
      *bytes = srt::ensemble_cuda_workspace(*args, *offsets, *weights);
    }
  });
}

EXPORT const char* mean_backward(void* grad_tokens, const srt::EnsembleArgs* args,
                                 const srt::ViewArray* offsets, const srt::ViewArray* weights,
                                 void* workspace, int64_t* bytes) {
  return guarded([&] {
    if (workspace) {
      srt::mean_backward_cuda("_mean_backward", *args, *offsets, *weights, grad_tokens, workspace,
                              host_device.stream);
    } else {
      *bytes = srt::mean_backward_cuda_workspace(*args, *offsets, *weights);
    }
  });
}

EXPORT const char* shift_backward(void* grad_image, const srt::ShiftArgs* args,
                                  const srt::ViewArray* offsets, void* workspace, int64_t* bytes) {
  return guarded([&] {
    if (workspace) {
      srt::shift_backward_cuda(*args, *offsets, grad_image, workspace, host_device.stream);
    } else {
      *bytes = srt::shift_backward_cuda_workspace(*args);
    }
  });
}

EXPORT const char* shift(const srt::ShiftArgs* args, const srt::ViewArray* offsets, void* workspace,
                         int64_t* bytes) {
  return guarded([&] {
    if (workspace) {
      srt::shift_cuda(*args, *offsets, workspace, host_device.stream);
    } else {
      *bytes = srt::shift_cuda_workspace(*args);
    }
  });
}

EXPORT const char* windows(const srt::WindowsArgs* args, const srt::ViewArray* centers,
                           const srt::ViewArray* scale, void* workspace, int64_t* bytes) {
  return guarded([&] {
    if (workspace) {
      srt::windows_cuda(*args, *centers, *scale, workspace, host_device.stream);
    } else {
      *bytes = srt::windows_cuda_workspace(*args, *centers, *scale);
    }
  });
}

EXPORT const char* windows_backward_image(void* grad_image, const srt::WindowsArgs* args,
                                          const srt::ViewArray* centers,
                                          const srt::ViewArray* scale, void* workspace,
                                          int64_t* bytes) {
  return guarded([&] {
    if (workspace) {
      srt::windows_backward_image_cuda(*args, *centers, *scale, grad_image, workspace,
                                       host_device.stream);
    } else {
      *bytes = srt::windows_backward_image_cuda_workspace(*args, *centers, *scale);
    }
  });
}

EXPORT const char* windows_backward_points(double* grad_centers, double* grad_scale,
                                           const srt::WindowsArgs* args,
                                           const srt::ViewArray* centers,
                                           const srt::ViewArray* scale, void* workspace,
                                           int64_t* bytes) {
  return guarded([&] {
    if (workspace) {
      srt::windows_backward_points_cuda(*args, *centers, *scale, grad_centers, grad_scale,
                                        workspace, host_device.stream);
    } else {
      *bytes = srt::windows_backward_points_cuda_workspace(*args, *centers, *scale);
    }
  });
}
