// windows: patches of a batch of images at real positions, sampled bilinearly.
#pragma once
#include <cmath>
#include <cstdint>

#include "shift.h"
#include "types.h"

namespace srt {

// Sample (i, j) of a window lies at center + ((i, j) - (size - 1) / 2) * scale, in pixels; the
// centre of a pixel is its index + 0.5.
struct WindowsArgs {
  DType dtype;        // of the image: any
  const void* image;  // [B, C, H, W]
  int64_t batch, channels, height, width;
  int64_t image_strides[4];  // of B, C, H and W, in elements
  int64_t count;             // windows of an image, N
  int64_t size[2];           // (Ph, Pw), samples
  const double* centers;     // [B, N, 2] (y, x), pixels
  const double* scale;       // pixels from sample to sample: [B, N, 2], or [2]; null for 1
  bool scale_of_each;        // whether `scale` is [B, N, 2]
  Padding padding;
  void* out;  // [B, N, C, Ph, Pw], dense
};

void windows_cpu(const WindowsArgs& args, const Parallel& parallel);

// The gradient of the image, [B, C, H, W], dense; not for u8. `out` holds that of the windows and
// is only read; `image` and its strides are not used. Each pixel is summed in the order of the
// windows, so that the result has the same bits for any number of threads.
void windows_backward_image_cpu(const WindowsArgs& args, void* grad_image,
                                const Parallel& parallel);

// The gradients of the centers and of the scale, both [B, N, 2], in float64; either may be null.
// `out` holds that of the windows and is only read. At a whole pixel the derivative is the one to
// the right.
void windows_backward_points_cpu(const WindowsArgs& args, double* grad_centers, double* grad_scale,
                                 const Parallel& parallel);

}  // namespace srt
