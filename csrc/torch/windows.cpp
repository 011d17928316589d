// Checks the arguments of windows and of its gradients and turns them into WindowsArgs.
#include "windows.h"

#include <algorithm>

namespace srt::glue {
namespace {

WindowsInputs inputs_of(const ArrayView& image, const std::vector<int64_t>& size,
                        const WindowPlaces& places) {
  std::optional<ArrayView> scale;
  if (places.scale) scale = view_of(*places.scale);
  return {image, view_of(places.centers), size, scale, places.padding};
}

}  // namespace

std::vector<int64_t> window_size(const char* op, const Tensor& grad) {
  if (grad.dim() != 5)
    fail(op, "grad must have 5 dimensions, [B, N, C, Ph, Pw]", format_shape(shape_of(grad)));
  return {grad.size(3), grad.size(4)};
}

ArrayView image_of(const char* op, const Tensor& grad, const std::vector<int64_t>& pixels) {
  window_size(op, grad);
  if (pixels.size() != 2) fail(op, "pixels must be two integers, (H, W)", format_shape(pixels));
  ArrayView image = view_of(grad);
  check_dtype(op, "grad", image, /*allow_uint8=*/false);
  image.data = nullptr;
  image.shape = {grad.size(0), grad.size(2), pixels[0], pixels[1]};
  image.strides = {0, 0, 0, 0};
  return image;
}

WindowsCall::WindowsCall(const char* name, const Tensor& given, const ArrayView& image,
                         const std::vector<int64_t>& size, const WindowPlaces& places,
                         bool allow_uint8)
    : CheckedWindows(name, inputs_of(image, size, places), allow_uint8),
      op(name),
      input(given),
      device_centers(on_device(places.centers)),
      device_scale(on_device(places.scale)) {}

Tensor WindowsCall::set_gradient(const Tensor& grad) {
  const ArrayView given = view_of(grad);
  if (given.dtype != view_of(input).dtype)
    fail(op, "grad must have the dtype of image", given.dtype, Error::Kind::type);
  if (given.device != view_of(input).device)
    fail(op, "grad must be on the device of image", given.device);
  if (given.shape != out_shape)
    fail(op, "grad must be " + format_shape(out_shape), format_shape(given.shape));
  const Tensor dense = grad.is_contiguous() ? grad : torch::stable::contiguous(grad);
  if (dense.numel() > 0) check_aligned(op, "grad", view_of(dense));
  args.out = const_cast<void*>(dense.const_data_ptr());
  return dense;
}

}  // namespace srt::glue
