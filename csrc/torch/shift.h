// The arguments of shift and of its gradient, for every backend.
#pragma once
#include <string>
#include <vector>

#include "common.h"

namespace srt::glue {

struct ShiftCall : CheckedShift {
  Tensor image;  // dense
  std::optional<Tensor> device_offsets;

  ShiftCall(const Tensor& image, const Tensor& offsets, const std::string& padding,
            const std::string& interpolation);

  Tensor new_out() const;
};

struct ShiftBackwardCall : CheckedShift {
  Tensor grad;  // [V, B, C, H, W], dense
  std::optional<Tensor> device_offsets;

  ShiftBackwardCall(const Tensor& grad, const Tensor& offsets, const std::string& padding,
                    const std::string& interpolation);

  Tensor new_grad_image() const;
};

}  // namespace srt::glue
