#include "shift.h"

namespace srt::glue {

ShiftCall::ShiftCall(const Tensor& given, const Tensor& offsets_tensor, const std::string& padding,
                     const std::string& interpolation)
    : image(given) {
  args.dtype = element_type("shift", "image", given, /*allow_uint8=*/true);
  const std::vector<int64_t> shape = shape_of(given);
  check_shift(shape, shape_of(offsets_tensor), static_cast<int64_t>(given.element_size()));
  args.padding = parse_padding(padding);
  args.interpolation = parse_interpolation(interpolation);
  offsets = view_numbers("shift", "offsets", offsets_tensor, given);
  if (!offsets.device)
    check_offsets("shift", offsets.host.data(), static_cast<int64_t>(offsets.host.size()));

  // One image is small beside its views: a strided one is made dense first.
  if (!image.is_contiguous()) image = torch::stable::contiguous(image);
  args.image = image.const_data_ptr();
  args.planes = shape[0] * shape[1];
  args.height = shape[2];
  args.width = shape[3];
  args.views = offsets_tensor.size(0);
  if (!offsets.device) args.offsets = offsets.host.data();
  out_shape = {args.views, shape[0], shape[1], shape[2], shape[3]};
}

Tensor ShiftCall::new_out() const { return empty(out_shape, image.scalar_type(), image); }

ShiftBackwardCall::ShiftBackwardCall(const Tensor& given, const Tensor& offsets_tensor,
                                     const std::string& padding, const std::string& interpolation)
    : grad(given) {
  const char* const op = "_shift_backward";
  args.dtype = element_type(op, "grad", given, /*allow_uint8=*/false);
  const std::vector<int64_t> shape = shape_of(given);
  if (shape.size() != 5)
    throw Error("srt::_shift_backward: grad must have 5 dimensions, [V, B, C, H, W]; got " +
                format_shape(shape));
  check_shift({shape.begin() + 1, shape.end()}, shape_of(offsets_tensor),
              static_cast<int64_t>(given.element_size()));
  if (offsets_tensor.size(0) != shape[0])
    throw Error("srt::_shift_backward: offsets must be [V, 2] with V = " +
                std::to_string(shape[0]) + "; got " + format_shape(shape_of(offsets_tensor)));
  args.padding = parse_padding(padding);
  args.interpolation = parse_interpolation(interpolation);
  offsets = view_numbers(op, "offsets", offsets_tensor, given);
  if (!offsets.device) {
    check_offsets(op, offsets.host.data(), static_cast<int64_t>(offsets.host.size()));
    args.offsets = offsets.host.data();
  }
  if (!grad.is_contiguous()) grad = torch::stable::contiguous(grad);
  args.out = const_cast<void*>(grad.const_data_ptr());
  args.planes = shape[1] * shape[2];
  args.height = shape[3];
  args.width = shape[4];
  args.views = shape[0];
}

Tensor ShiftBackwardCall::new_grad_image() const {
  std::vector<int64_t> shape = shape_of(grad);
  shape.erase(shape.begin());
  return empty(shape, grad.scalar_type(), grad);
}

}  // namespace srt::glue
