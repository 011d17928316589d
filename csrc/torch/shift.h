// The arguments of shift, checked; for every backend.
#pragma once
#include <string>
#include <vector>

#include "../srt/shift.h"
#include "common.h"

namespace srt::glue {

// Owns what `args` points to, except what is written. args.offsets is null where they lie on the
// device.
struct ShiftCall {
  Numbers offsets;
  Tensor image;  // dense
  ShiftArgs args{};
  std::vector<int64_t> out_shape;

  ShiftCall(const Tensor& image, const Tensor& offsets, const std::string& padding,
            const std::string& interpolation);

  Tensor new_out() const;
};

// The same, for its gradient [V, B, C, H, W].
struct ShiftBackwardCall {
  Numbers offsets;
  Tensor grad;  // dense
  ShiftArgs args{};

  ShiftBackwardCall(const Tensor& grad, const Tensor& offsets, const std::string& padding,
                    const std::string& interpolation);

  Tensor new_grad_image() const;
};

}  // namespace srt::glue
