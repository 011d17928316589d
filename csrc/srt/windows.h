// windows: samples N windows of each image of a batch at real-valued positions, bilinearly.
#pragma once
#include <cmath>
#include <cstdint>

#include "shift.h"
#include "types.h"

namespace srt {

constexpr int64_t kMaxWindows = int64_t{1} << 26;  // B * N of one call
// Limits of centers and scales, in pixels. A center may be outside of even the largest image. With
// at most kMaxPixels samples per axis, all positions are below 2^45.
constexpr int64_t kMaxCenter = int64_t{1} << 25;
constexpr int64_t kMaxScale = int64_t{1} << 20;  // of the absolute value: negative scales mirror

// Sample (i, j) of a window is at position center + ((i, j) - (size - 1) / 2) * scale, in pixels;
// the centre of a pixel is its index + 0.5.
struct WindowsArgs {
  DType dtype;        // of the image: every one
  const void* image;  // [B, C, H, W]
  int64_t batch, channels, height, width;
  int64_t image_strides[4];  // of B, C, H and W, in elements
  int64_t count;             // N, windows per image
  int64_t size[2];           // (Ph, Pw), samples
  const double* centers;     // [B, N, 2] (y, x), pixels
  const double* scale;       // pixels per sample: [B, N, 2] or [2]; null for 1
  bool scale_of_each;        // whether `scale` is [B, N, 2]
  Padding padding;
  void* out;  // [B, N, C, Ph, Pw], dense
};

void windows_cpu(const WindowsArgs& args, const Parallel& parallel);

// The gradient of windows with respect to the image. Writes grad_image [B, C, H, W], dense.
// args.out is the gradient of the windows [B, N, C, Ph, Pw], only read; the image and its strides
// are not used. Each pixel is summed in the order of the windows, so the result is bitwise equal
// for any number of threads. Does not support u8.
void windows_backward_image_cpu(const WindowsArgs& args, void* grad_image,
                                const Parallel& parallel);

// The gradients of windows with respect to the center and the scale of each window. Writes
// grad_centers and grad_scale, both [B, N, 2]. args.out is the gradient of the windows [B, N, C,
// Ph, Pw], in the dtype of the image, only read. At a whole pixel, the derivative is the right-hand
// one. Both are 0 for an invalid window, which only a device can have. Does not support u8.
void windows_backward_points_cpu(const WindowsArgs& args, double* grad_centers, double* grad_scale,
                                 const Parallel& parallel);

// Whether the values of one axis of a window are valid. Values on a device are not validated by the
// host; a window with an invalid value is filled with 0.
SRT_HD inline bool window_is_valid(double center, double scale) {
  return std::fabs(center) <= static_cast<double>(kMaxCenter) &&
         std::fabs(scale) <= static_cast<double>(kMaxScale);  // written so that NaN fails
}

// The position of sample i along an axis, in pixels from the centre of pixel 0.
SRT_HD_INLINE double window_position(double center, double scale, int64_t i, int64_t size) {
  return center + (static_cast<double>(i) - static_cast<double>(size - 1) / 2) * scale - 0.5;
}

// The pixels that a position reads: `first` with weight 1 - fraction and, unless the fraction is 0,
// the next one with weight `fraction`. At scale 1, all samples of an axis have the same fraction,
// and their pixels are consecutive.
struct WindowTap {
  int64_t first;
  double fraction;  // 0, or in [kWholePixel, 1 - kWholePixel]
};

SRT_HD_INLINE WindowTap window_tap(double position) {
  const double below = std::floor(position), fraction = position - below;
  const bool whole = fraction < kWholePixel || 1 - fraction < kWholePixel;
  return {static_cast<int64_t>(whole ? std::floor(position + 0.5) : below), whole ? 0 : fraction};
}

}  // namespace srt
