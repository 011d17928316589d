// The arguments of windows and of its gradients, for every backend.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "common.h"

namespace srt::glue {

// What these ops take besides an image or a gradient.
struct WindowPlaces {
  const Tensor& centers;
  const std::optional<Tensor>& scale;
  const std::string& padding;
};

// The image [B, C, H, W] that a gradient `grad` [B, N, C, Ph, Pw] of its windows belongs to, with
// `pixels` (H, W). There is no memory: it is not read.
ArrayView image_of(const char* op, const Tensor& grad, const std::vector<int64_t>& pixels);
// (Ph, Pw) of a gradient.
std::vector<int64_t> window_size(const char* op, const Tensor& grad);

struct WindowsCall : CheckedWindows {
  const char* op;
  const Tensor& input;  // the image, or the gradient of its windows
  std::optional<Tensor> device_centers, device_scale;

  WindowsCall(const char* op, const Tensor& input, const ArrayView& image,
              const std::vector<int64_t>& size, const WindowPlaces& places, bool allow_uint8);

  // `grad` is the gradient of the windows, which is read; the tensor returned must outlive it.
  Tensor set_gradient(const Tensor& grad);
  // For the gradient of the image.
  Tensor new_image() const {
    return empty({args.batch, args.channels, args.height, args.width}, input.scalar_type(), input);
  }
};

}  // namespace srt::glue
