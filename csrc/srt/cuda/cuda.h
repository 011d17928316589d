// The CUDA entry points. All pointers are of the current device unless a name says host; everything
// is enqueued on `stream`, nothing waits for it, and all of it can be captured in a CUDA graph.
// Each throws srt::Error where a launch fails.
#pragma once
#include <cstdint>

#include "../ensemble.h"
#include "../shift.h"
#include "../windows.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace srt {

// The offsets or the weights of the views, dense: in the memory of the host, where they have been
// checked, or on the device, unchecked. A view whose device values the host would refuse (an
// offset or a weight that is not finite, an offset beyond 2^20 px, a weight that is negative or
// below 2^-80 of the largest) covers nothing.
struct ViewArray {
  const double* host;  // read before the call returns; null where `device` is given
  const void* device;
  DType dtype;  // of `device`: f32 or f64
};

// For tests. A workspace is one allocation of several pieces, so memcheck cannot see a kernel that
// writes beyond one piece into the next. If this is set, there is a gap behind each piece, and it
// is called once per gap, before the first kernel that uses the workspace.
inline void (*workspace_gap)(void* gap, int64_t bytes) = nullptr;

// Bytes of device memory, aligned to 256, that ensemble_cuda needs besides its arguments, all of
// which must be set; free to reuse in stream order.
int64_t ensemble_cuda_workspace(const EnsembleArgs& args, const ViewArray& offsets,
                                const ViewArray& weights);

// offsets [V, 2] (dy, dx), pixels; weights [V] or both pointers null for ones. The pointers to
// offsets and weights in `args` are not read. f32, f16, bf16 and f64. `op` names the operator in
// messages.
void ensemble_cuda(const char* op, const EnsembleArgs& args, const ViewArray& offsets,
                   const ViewArray& weights, void* workspace, CUstream_st* stream);

// As mean_backward_cpu.
int64_t mean_backward_cuda_workspace(const EnsembleArgs& args, const ViewArray& offsets,
                                     const ViewArray& weights);
void mean_backward_cuda(const char* op, const EnsembleArgs& args, const ViewArray& offsets,
                        const ViewArray& weights, void* grad_tokens, void* workspace,
                        CUstream_st* stream);

int64_t shift_cuda_workspace(const ShiftArgs& args);

// offsets [V, 2] (dy, dx), pixels; the pointer in `args` is not read. Every dtype. A view that
// covers nothing is 0.
void shift_cuda(const ShiftArgs& args, const ViewArray& offsets, void* workspace,
                CUstream_st* stream);

// As shift_backward_cpu.
int64_t shift_backward_cuda_workspace(const ShiftArgs& args);
void shift_backward_cuda(const ShiftArgs& args, const ViewArray& offsets, void* grad_image,
                         void* workspace, CUstream_st* stream);

int64_t windows_cuda_workspace(const WindowsArgs& args, const ViewArray& centers,
                               const ViewArray& scale);

// centers [B, N, 2] (y, x), pixels; scale [2], or with args.scale_of_each [B, N, 2], pixels from
// sample to sample, or both pointers null for ones. The pointers to them in `args` are not read.
// Every dtype. A window with a value on the device that the host would refuse (windows.h) is 0.
void windows_cuda(const WindowsArgs& args, const ViewArray& centers, const ViewArray& scale,
                  void* workspace, CUstream_st* stream);

// As windows_backward_image_cpu.
int64_t windows_backward_image_cuda_workspace(const WindowsArgs& args, const ViewArray& centers,
                                              const ViewArray& scale);
void windows_backward_image_cuda(const WindowsArgs& args, const ViewArray& centers,
                                 const ViewArray& scale, void* grad_image, void* workspace,
                                 CUstream_st* stream);

// As windows_backward_points_cpu.
int64_t windows_backward_points_cuda_workspace(const WindowsArgs& args, const ViewArray& centers,
                                               const ViewArray& scale);
void windows_backward_points_cuda(const WindowsArgs& args, const ViewArray& centers,
                                  const ViewArray& scale, double* grad_centers, double* grad_scale,
                                  void* workspace, CUstream_st* stream);

}  // namespace srt
