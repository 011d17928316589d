#include "../srt/shift.h"

#include "common.h"

namespace srt::glue {
namespace {

Tensor shift(const Tensor& image, const Tensor& offsets, const std::string& padding,
             const std::string& interpolation) {
  ShiftArgs args{};
  args.dtype = element_type("shift", "image", image, /*allow_uint8=*/true);
  const std::vector<int64_t> shape = shape_of(image);
  check_shift(shape, shape_of(offsets), static_cast<int64_t>(image.element_size()));
  args.padding = parse_padding(padding);
  args.interpolation = parse_interpolation(interpolation);
  const std::vector<double> values = host_values("shift", "offsets", offsets);
  check_offsets("shift", values.data(), static_cast<int64_t>(values.size()));

  // One image is small beside its views: a strided one is made dense first.
  const Tensor dense = image.is_contiguous() ? image : torch::stable::contiguous(image);
  args.image = dense.const_data_ptr();
  args.planes = shape[0] * shape[1];
  args.height = shape[2];
  args.width = shape[3];
  args.views = offsets.size(0);
  args.offsets = values.data();
  const Tensor out =
      empty({args.views, shape[0], shape[1], shape[2], shape[3]}, image.scalar_type());
  args.out = out.mutable_data_ptr();
  shift_cpu(args, torch_parallel());
  return out;
}

}  // namespace
}  // namespace srt::glue

STABLE_TORCH_LIBRARY_IMPL(srt, CPU, m) { m.impl("shift", TORCH_BOX(&srt::glue::shift)); }
