// Checks the arguments of ensemble and its variants and turns them into EnsembleArgs.
#include "ensemble.h"

#include <algorithm>

namespace srt::glue {
namespace {

EnsembleInputs inputs_of(const ArrayView& tokens, const ViewArguments& given) {
  std::optional<ArrayView> weights;
  if (given.weights) weights = view_of(*given.weights);
  return {tokens,      view_of(given.offsets), weights,        given.grid,
          given.patch, given.stride,           given.upsample, given.border};
}

}  // namespace

ArrayView tokens_of(const char* op, const Tensor& grad, const ViewArguments& given) {
  if (grad.dim() != 4)
    fail(op, "grad must have 4 dimensions, [B, C, H', W']", format_shape(shape_of(grad)));
  ArrayView tokens = view_of(grad);
  check_dtype(op, "grad", tokens, /*allow_uint8=*/false);
  const auto size = [&](size_t i) { return std::clamp<int64_t>(given.grid[i], 0, kMaxPixels); };
  const int64_t views = given.offsets.dim() > 0 ? given.offsets.size(0) : 0;
  const int64_t count = given.grid.size() == 2 ? size(0) * size(1) : 0;
  tokens.data = nullptr;
  tokens.shape = {views, grad.size(0), count, grad.size(1)};
  tokens.strides = {0, 0, 0, 1};
  return tokens;
}

EnsembleCall::EnsembleCall(const char* name, const Tensor& given_input, const ArrayView& view,
                           const ViewArguments& given, Reduce reduce, bool stream, int64_t least)
    : CheckedEnsemble(name, inputs_of(view, given), reduce, stream, least),
      input(given_input),
      device_offsets(on_device(given.offsets)),
      device_weights(on_device(given.weights)) {}

Tensor EnsembleCall::new_out() const {
  return empty_strided(out_shape, out_strides, input.scalar_type(), input);
}

Tensor EnsembleCall::set_gradient() {
  if (shape_of(input) != out_shape)
    fail(op, "grad must be " + format_shape(out_shape), format_shape(shape_of(input)));
  Tensor dense = input;
  if (out_shape[1] > 1 && input.stride(1) != 1) {
    dense = new_out();
    torch::stable::copy_(dense, input);
  }
  if (dense.numel() > 0) check_aligned(op, "grad", view_of(dense));
  args.out = const_cast<void*>(dense.const_data_ptr());
  for (int d = 0; d < 4; ++d) args.out_strides[d] = dense.stride(d);
  return dense;
}

}  // namespace srt::glue
