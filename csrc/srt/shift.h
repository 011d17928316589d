// shift: computes all translated views of a batch of images, view_v(y, x) = image(y - dy, x - dx).
#pragma once
#include <cmath>
#include <cstdint>

#include "types.h"

namespace srt {

struct ShiftArgs {
  DType dtype;                    // every one
  const void* image;              // [B*C, H, W], dense
  int64_t planes, height, width;  // planes = B*C
  int64_t views;
  const double* offsets;  // [V, 2] (dy, dx), pixels
  Padding padding;
  Interpolation interpolation;
  void* out;  // [V, B*C, H, W], dense
};

void shift_cpu(const ShiftArgs& args, const Parallel& parallel);

// The gradient of shift with respect to the image. Writes grad_image [B*C, H, W], dense. args.out
// is the gradient of the views [V, B*C, H, W], only read; args.image is not used. Does not support
// u8.
void shift_backward_cpu(const ShiftArgs& args, void* grad_image, const Parallel& parallel);

// An offset this close to a whole pixel is treated as that whole pixel. The weights of its other
// taps can be as small as the square of the distance: they would vanish in float32, and 0 times a
// non-finite pixel is NaN.
constexpr double kWholePixel = 0x1p-40;

// One axis of one view: output pixel y is the sum over k < taps of weight[k] times source pixel
// y + first + k. The weights do not depend on y, and none of them is 0. A whole-pixel offset is one
// tap of weight 1, which the kernels copy bit for bit.
struct ShiftTaps {
  int64_t first;
  int32_t taps;
  double weight[4];
};

SRT_HD inline ShiftTaps shift_taps(double offset, Interpolation interpolation) {
  ShiftTaps t{};
  const double whole = std::floor(-offset), f = -offset - whole, g = 1 - f;
  if (interpolation == Interpolation::nearest || f < kWholePixel || g < kWholePixel) {
    t.first = static_cast<int64_t>(std::floor(0.5 - offset));
    t.taps = 1;
    t.weight[0] = 1;
  } else if (interpolation == Interpolation::bilinear) {
    t.first = static_cast<int64_t>(whole);
    t.taps = 2;
    t.weight[0] = g;
    t.weight[1] = f;
  } else {
    // Cubic convolution (Keys 1981) with a = -0.75, the constant that PyTorch uses. Written as
    // products with f or g, so that no weight becomes 0 by cancellation.
    const double a = -0.75;
    t.first = static_cast<int64_t>(whole) - 1;
    t.taps = 4;
    t.weight[0] = a * f * g * g;
    t.weight[1] = g * (-a + g * ((2 * a + 3) - (a + 2) * g));
    t.weight[2] = f * (-a + f * ((2 * a + 3) - (a + 2) * f));
    t.weight[3] = a * g * f * f;
  }
  return t;
}

// The source pixel at position i of a padded axis of n pixels; -1 for a padded zero.
SRT_HD_INLINE int64_t pad_index(int64_t i, int64_t n, Padding padding) {
  if (i >= 0 && i < n) return i;
  switch (padding) {
    case Padding::zeros:
      return -1;
    case Padding::border:
      return i < 0 ? 0 : n - 1;
    case Padding::circular:
      i %= n;
      return i < 0 ? i + n : i;
    case Padding::reflect:
      break;
  }
  if (n == 1) return 0;
  const int64_t period = 2 * (n - 1);
  i %= period;
  if (i < 0) i += period;
  return i < n ? i : period - i;
}

}  // namespace srt
