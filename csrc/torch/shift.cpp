#include "shift.h"

namespace srt::glue {
namespace {

Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// One view of a gradient [V, B, C, H, W].
ArrayView image_of(const char* op, const Tensor& grad, const Tensor& offsets) {
  ArrayView view = view_of(grad);
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

// One image is small beside its views: a strided one is made dense first.
ShiftCall::ShiftCall(const Tensor& given, const Tensor& offsets, const std::string& padding,
                     const std::string& interpolation)
    : CheckedShift("shift", "image", view_of(given), view_of(offsets), padding, interpolation,
                   /*allow_uint8=*/true),
      image(dense(given)),
      device_offsets(on_device(offsets)) {
  args.image = image.const_data_ptr();
}

Tensor ShiftCall::new_out() const { return empty(out_shape, image.scalar_type(), image); }

ShiftBackwardCall::ShiftBackwardCall(const Tensor& given, const Tensor& offsets,
                                     const std::string& padding, const std::string& interpolation)
    : CheckedShift("_shift_backward", "grad", image_of("_shift_backward", given, offsets),
                   view_of(offsets), padding, interpolation, /*allow_uint8=*/false),
      grad(dense(given)),
      device_offsets(on_device(offsets)) {
  args.out = const_cast<void*>(grad.const_data_ptr());
}

Tensor ShiftBackwardCall::new_grad_image() const {
  return empty({out_shape.begin() + 1, out_shape.end()}, grad.scalar_type(), grad);
}

}  // namespace srt::glue
