#include "ensemble.h"

#include <algorithm>

namespace srt::glue {
namespace {

[[noreturn]] void fail(const char* op, const std::string& rule, const std::string& got) {
  throw Error("srt::" + std::string(op) + ": " + rule + "; got " + got);
}

}  // namespace

EnsembleCall::EnsembleCall(const char* name, const ViewArguments& given, Reduce reduce, bool stream)
    : op(name), tokens(given.tokens) {
  args.reduce = reduce;
  args.dtype = element_type(op, "tokens", tokens, /*allow_uint8=*/false);
  const std::vector<int64_t> shape = shape_of(tokens);
  std::vector<int64_t> weights_shape;
  if (given.weights) weights_shape = shape_of(*given.weights);
  const Field field = check_ensemble(op, shape, shape_of(given.offsets), given.grid, given.patch,
                                     given.weights ? &weights_shape : nullptr, given.stride,
                                     static_cast<int64_t>(tokens.element_size()));
  check_dense(op, view_of(tokens));
  args.upsample = parse_upsample(op, given.upsample);
  args.border = parse_border(op, given.border);
  offsets = view_numbers(op, "offsets", given.offsets, tokens);
  if (!offsets.device) {
    check_offsets(op, offsets.host.data(), static_cast<int64_t>(offsets.host.size()));
    args.offsets = offsets.host.data();
  }
  if (given.weights) {
    weights = view_numbers(op, "weights", *given.weights, tokens);
    if (!weights->device) {
      check_weights(op, weights->host.data(), static_cast<int64_t>(weights->host.size()), stream);
      args.weights = weights->host.data();
    }
  }
  args.tokens = tokens.const_data_ptr();
  args.views = shape[0];
  args.batch = shape[1];
  args.channels = shape[3];
  for (int d = 0; d < 3; ++d) args.token_strides[d] = tokens.stride(d);
  std::copy_n(field.grid, 2, args.grid);
  std::copy_n(field.patch, 2, args.patch);
  std::copy_n(field.stride, 2, args.stride);
  out_shape = {args.batch, args.channels, field.cells[0], field.cells[1]};
}

Tensor EnsembleCall::new_out() const {
  const int64_t channels = out_shape[1], height = out_shape[2], width = out_shape[3];
  const std::vector<int64_t> strides{height * width * channels, 1, width * channels, channels};
  return empty_strided(out_shape, strides, tokens.scalar_type(), tokens);
}

void EnsembleCall::set_out(const Tensor& out) {
  args.out = out.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) args.out_strides[d] = out.stride(d);
}

void EnsembleCall::set_variance(const Tensor& variance) {
  args.variance = variance.mutable_data_ptr();
}

void EnsembleCall::check_placed(const char* name, const Tensor& tensor, ScalarType dtype,
                                const std::string& dtype_rule) const {
  const std::string subject = name;
  if (tensor.scalar_type() != dtype)
    fail(op, subject + " must " + dtype_rule, dtype_name(tensor.scalar_type()));
  if (!same_device(tensor, tokens))
    fail(op, subject + " must be on the device of tokens", "another device");
}

void EnsembleCall::check_out(const Tensor& out) const {
  check_placed("out", out, tokens.scalar_type(),
               "have the dtype of tokens, " + dtype_name(tokens.scalar_type()));
  check_written(op, "out", view_of(out), out_shape, view_of(tokens));
}

Tensor EnsembleCall::set_gradient(const Tensor& grad) {
  check_placed("grad", grad, tokens.scalar_type(),
               "have the dtype of tokens, " + dtype_name(tokens.scalar_type()));
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

void EnsembleCall::set_state(const Tensor& field, const Tensor* variance, const Tensor& seen) {
  const bool median = args.reduce == Reduce::median;
  const bool f64 = tokens.scalar_type() == ScalarType::Double;
  const ScalarType dtype = f64 ? ScalarType::Double : ScalarType::Float;
  const std::string rule = f64 ? "be float64, as tokens are" : "be float32";
  check_placed(median ? "window" : "mean", field, dtype, rule);
  check_placed(median ? "count" : "weight", seen, ScalarType::Double, "be float64");
  if (variance) check_placed("var", *variance, dtype, rule);
  std::optional<ArrayView> var;
  if (variance) var = view_of(*variance);
  check_state(op, view_of(field), var ? &*var : nullptr, view_of(seen), args.reduce, out_shape,
              view_of(tokens));
  if (variance) set_variance(*variance);
  args.out = field.mutable_data_ptr();
  const int64_t first = median ? 1 : 0;
  for (int64_t d = 0; d < 4; ++d) args.out_strides[d] = field.stride(first + d);
  if (median) args.plane_stride = field.stride(0);
  args.total_weight = static_cast<double*>(seen.mutable_data_ptr());
}

Tensor new_grad_tokens(const char* op, const Tensor& grad, const Tensor& offsets,
                       const std::vector<int64_t>& grid, const std::vector<int64_t>& patch,
                       const std::vector<int64_t>& stride) {
  if (grad.dim() != 4)
    fail(op, "grad must have 4 dimensions, [B, C, H', W']", format_shape(shape_of(grad)));
  const auto element_size = static_cast<int64_t>(grad.element_size());
  element_type(op, "grad", grad, /*allow_uint8=*/false);
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
