// The CUDA entry points. Pointers refer to memory of the current device unless their name contains
// `host`. All work is enqueued on `stream`; the calls do not synchronise and can be captured in a
// CUDA graph. They throw srt::Error if a launch fails.
#pragma once
#include <cstdint>

#include "../ensemble.h"
#include "../shift.h"
#include "../windows.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace srt {

// A dense array of offsets or weights of the views: on the host, already validated, or on the
// device, not validated. A view with an invalid device value covers nothing. Invalid are offsets
// and weights that are not finite, offsets beyond 2^20 pixels, and weights that are negative or
// below 2^-80 times the largest.
struct ViewArray {
  const double* host;  // read before the call returns; null if `device` is given
  const void* device;
  DType dtype;  // of `device`: f32 or f64
};

// For tests. A workspace is one allocation of several pieces, so memcheck cannot detect a kernel
// that writes beyond one piece into the next. If this callback is set, a gap follows each piece,
// and the callback is called once per gap, before the first kernel that uses the workspace.
inline void (*workspace_gap)(void* gap, int64_t bytes) = nullptr;

// The size in bytes of the workspace that ensemble_cuda needs. All arguments must be set as for the
// call. The workspace must be aligned to 256 bytes and can be reused in stream order.
int64_t ensemble_cuda_workspace(const EnsembleArgs& args, const ViewArray& offsets,
                                const ViewArray& weights);

// As ensemble_cpu, on the device. offsets [V, 2] (dy, dx), pixels; weights [V], or both pointers
// null for ones. The pointers to offsets and weights in `args` are not read. Supports f32, f16,
// bf16 and f64. `op` is the name of the operator in error messages.
void ensemble_cuda(const char* op, const EnsembleArgs& args, const ViewArray& offsets,
                   const ViewArray& weights, void* workspace, CUstream_st* stream);

// As mean_backward_cpu (ensemble.h); grad_tokens [V, B, h*w, C].
int64_t mean_backward_cuda_workspace(const EnsembleArgs& args, const ViewArray& offsets,
                                     const ViewArray& weights);
void mean_backward_cuda(const char* op, const EnsembleArgs& args, const ViewArray& offsets,
                        const ViewArray& weights, void* grad_tokens, void* workspace,
                        CUstream_st* stream);

int64_t shift_cuda_workspace(const ShiftArgs& args);

// As shift_cpu, on the device. offsets [V, 2] (dy, dx), pixels; the pointer in `args` is not read.
// Supports every dtype. A view with an invalid offset is filled with 0.
void shift_cuda(const ShiftArgs& args, const ViewArray& offsets, void* workspace,
                CUstream_st* stream);

// As shift_backward_cpu (shift.h); grad_image [B*C, H, W].
int64_t shift_backward_cuda_workspace(const ShiftArgs& args);
void shift_backward_cuda(const ShiftArgs& args, const ViewArray& offsets, void* grad_image,
                         void* workspace, CUstream_st* stream);

int64_t windows_cuda_workspace(const WindowsArgs& args, const ViewArray& centers,
                               const ViewArray& scale);

// As windows_cpu, on the device. centers [B, N, 2] (y, x), pixels; scale [2], or with
// args.scale_of_each [B, N, 2], pixels per sample, or both pointers null for ones. The pointers to
// them in `args` are not read. Supports every dtype. A window with an invalid device value
// (windows.h) is filled with 0.
void windows_cuda(const WindowsArgs& args, const ViewArray& centers, const ViewArray& scale,
                  void* workspace, CUstream_st* stream);

// As windows_backward_image_cpu (windows.h); grad_image [B, C, H, W].
int64_t windows_backward_image_cuda_workspace(const WindowsArgs& args, const ViewArray& centers,
                                              const ViewArray& scale);
void windows_backward_image_cuda(const WindowsArgs& args, const ViewArray& centers,
                                 const ViewArray& scale, void* grad_image, void* workspace,
                                 CUstream_st* stream);

// As windows_backward_points_cpu (windows.h); grad_centers and grad_scale [B, N, 2].
int64_t windows_backward_points_cuda_workspace(const WindowsArgs& args, const ViewArray& centers,
                                               const ViewArray& scale);
void windows_backward_points_cuda(const WindowsArgs& args, const ViewArray& centers,
                                  const ViewArray& scale, double* grad_centers, double* grad_scale,
                                  void* workspace, CUstream_st* stream);

}  // namespace srt
