// Checks the arguments of shift and of its gradient and turns them into ShiftArgs.
#include "shift.h"

namespace srt::glue {
namespace {

// Describes the image, or one view [B, C, H, W] of a gradient [V, B, C, H, W].
ArrayView image_of(const Tensor& given, const Tensor& offsets, bool backward) {
  ArrayView view = view_of(given);
  if (!backward) return view;
  const char* const op = "_shift_backward";
  if (view.shape.size() != 5)
    fail(op, "grad must have 5 dimensions, [V, B, C, H, W]", format_shape(view.shape));
  if (offsets.dim() > 0 && offsets.size(0) != view.shape[0])
    fail(op, "offsets must be [V, 2] with V = " + std::to_string(view.shape[0]),
         format_shape(shape_of(offsets)));
  view.shape.erase(view.shape.begin());
  view.strides.erase(view.strides.begin());
  return view;
}

}  // namespace

// A non-contiguous image is copied first: an image is small compared with its views.
ShiftCall::ShiftCall(const Tensor& given, const Tensor& offsets, const std::string& padding,
                     const std::string& interpolation, bool is_backward)
    : CheckedShift(is_backward ? "_shift_backward" : "shift", is_backward ? "grad" : "image",
                   image_of(given, offsets, is_backward), view_of(offsets), padding, interpolation,
                   /*allow_uint8=*/!is_backward),
      input(given.is_contiguous() ? given : torch::stable::contiguous(given)),
      backward(is_backward),
      device_offsets(on_device(offsets)) {
  if (input.numel() > 0)
    check_aligned(is_backward ? "_shift_backward" : "shift", is_backward ? "grad" : "image",
                  view_of(input));
  args.image = input.const_data_ptr();
  if (backward) args.out = const_cast<void*>(args.image);
}

Tensor ShiftCall::new_result() const {
  return empty({out_shape.begin() + (backward ? 1 : 0), out_shape.end()}, input.scalar_type(),
               input);
}

}  // namespace srt::glue
