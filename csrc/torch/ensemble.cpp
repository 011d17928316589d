#include "ensemble.h"

#include <algorithm>

namespace srt::glue {

EnsembleInputs ViewArguments::inputs() const {
  std::optional<ArrayView> weight;
  if (weights) weight = view_of(*weights);
  return {view_of(tokens), view_of(offsets), weight, grid, patch, stride, upsample, border};
}

EnsembleCall::EnsembleCall(const char* name, const ViewArguments& given, Reduce reduce, bool stream,
                           int64_t least)
    : CheckedEnsemble(name, given.inputs(), reduce, stream, least),
      input(given.tokens),
      device_offsets(on_device(given.offsets)),
      device_weights(on_device(given.weights)) {}

Tensor EnsembleCall::new_out() const {
  return empty_strided(out_shape, out_strides, input.scalar_type(), input);
}

Tensor EnsembleCall::set_gradient(const Tensor& grad) {
  check_placed(op, "grad", view_of(grad), tokens.dtype, "have the dtype of tokens, " + tokens.dtype,
               tokens);
  if (shape_of(grad) != out_shape)
    fail(op, "grad must be " + format_shape(out_shape), format_shape(shape_of(grad)));
  Tensor dense = grad;
  if (out_shape[1] > 1 && grad.stride(1) != 1) {
    dense = new_out();
    torch::stable::copy_(dense, grad);
  }
  args.out = const_cast<void*>(dense.const_data_ptr());
  for (int d = 0; d < 4; ++d) args.out_strides[d] = dense.stride(d);
  return dense;
}

Tensor new_grad_tokens(const char* op, const Tensor& grad, const Tensor& offsets,
                       const std::vector<int64_t>& grid, const std::vector<int64_t>& patch,
                       const std::vector<int64_t>& stride) {
  if (grad.dim() != 4)
    fail(op, "grad must have 4 dimensions, [B, C, H', W']", format_shape(shape_of(grad)));
  const auto element_size = static_cast<int64_t>(grad.element_size());
  check_dtype(op, "grad", view_of(grad), /*allow_uint8=*/false);
  int64_t count = 0;
  if (grid.size() == 2)
    count =
        std::clamp<int64_t>(grid[0], 0, kMaxPixels) * std::clamp<int64_t>(grid[1], 0, kMaxPixels);
  std::vector<int64_t> shape = shape_of(offsets);
  shape.resize(1);
  shape.insert(shape.end(), {grad.size(0), count, grad.size(1)});
  check_ensemble(op, shape, shape_of(offsets), grid, patch, nullptr, stride, element_size);
  return empty(shape, grad.scalar_type(), grad);
}

}  // namespace srt::glue
