// windows: patches of a batch of images at real positions, sampled bilinearly.
#pragma once
#include <cmath>
#include <cstdint>

#include "shift.h"
#include "types.h"

namespace srt {

constexpr int64_t kMaxWindows = int64_t{1} << 26;  // of one call, B * N
// Bounds of the values, in pixels: a center may lie beyond the largest image on both sides. With at
// most kMaxPixels samples an axis, all positions are below 2^45.
constexpr int64_t kMaxCenter = int64_t{1} << 25;
constexpr int64_t kMaxScale = int64_t{1} << 20;  // in size: negative scales mirror a window

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

// The gradients of the centers and of the scale of each window, both [B, N, 2], in float64. `out`
// holds that of the windows, in the dtype of the image, and is only read; not for u8. At a whole
// pixel the derivative is the one to the right. Of a window that is 0 (on a device) both are 0.
void windows_backward_points_cpu(const WindowsArgs& args, double* grad_centers, double* grad_scale,
                                 const Parallel& parallel);

// The values of one axis of a window that is not 0; on a device they are not validated.
SRT_HD inline bool window_is_valid(double center, double scale) {
  return std::fabs(center) <= static_cast<double>(kMaxCenter) &&
         std::fabs(scale) <= static_cast<double>(kMaxScale);  // written so that NaN fails
}

// The position of sample i of an axis, counted in pixels from the centre of pixel 0.
SRT_HD_INLINE double window_position(double center, double scale, int64_t i, int64_t size) {
  return center + (static_cast<double>(i) - static_cast<double>(size - 1) / 2) * scale - 0.5;
}

// What a position reads: pixel `first` with weight 1 - fraction and, unless the fraction is 0, the
// next one with weight `fraction`. At scale 1 all samples of an axis have the fraction of the first
// one, and their pixels follow each other.
struct WindowTap {
  int64_t first;
  double fraction;  // 0, or from kWholePixel on and not above 1 - kWholePixel
};

SRT_HD_INLINE WindowTap window_tap(double position) {
  const double below = std::floor(position), fraction = position - below;
  const bool whole = fraction < kWholePixel || 1 - fraction < kWholePixel;
  return {static_cast<int64_t>(whole ? std::floor(position + 0.5) : below), whole ? 0 : fraction};
}

}  // namespace srt
