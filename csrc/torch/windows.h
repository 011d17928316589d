// The arguments of windows and of its gradients, for every backend.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "common.h"

namespace srt::glue {

// The arguments that these ops share, except the image and the gradient.
struct WindowPlaces {
  const Tensor& centers;
  const std::optional<Tensor>& scale;
  const std::string& padding;
};

// Describes the image [B, C, H, W] whose windows have the gradient `grad` [B, N, C, Ph, Pw];
// `pixels` is (H, W). The view has no memory, because the image is not read.
ArrayView image_of(const char* op, const Tensor& grad, const std::vector<int64_t>& pixels);
// (Ph, Pw) of a gradient [B, N, C, Ph, Pw].
std::vector<int64_t> window_size(const char* op, const Tensor& grad);

struct WindowsCall : CheckedWindows {
  const char* op;
  const Tensor& input;  // the image, or the gradient of its windows
  std::optional<Tensor> device_centers, device_scale;

  WindowsCall(const char* op, const Tensor& input, const ArrayView& image,
              const std::vector<int64_t>& size, const WindowPlaces& places, bool allow_uint8);

  // Sets args.out to the gradient of the windows, copied if it is not contiguous. The returned
  // tensor owns the memory and must outlive the call.
  Tensor set_gradient(const Tensor& grad);
  // Allocates the gradient of the image [B, C, H, W].
  Tensor new_image() const {
    return empty({args.batch, args.channels, args.height, args.width}, input.scalar_type(), input);
  }
};

}  // namespace srt::glue
