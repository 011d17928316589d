// The arguments of shift and of its gradient, for every backend.
#pragma once
#include <optional>
#include <string>

#include "common.h"

namespace srt::glue {

struct ShiftCall : CheckedShift {
  Tensor input;  // the image [B, C, H, W], or the gradient [V, B, C, H, W] of its views; dense
  bool backward;
  std::optional<Tensor> device_offsets;

  ShiftCall(const Tensor& given, const Tensor& offsets, const std::string& padding,
            const std::string& interpolation, bool backward);

  // Allocates the views [V, B, C, H, W], or the gradient of the image [B, C, H, W].
  Tensor new_result() const;
};

}  // namespace srt::glue
