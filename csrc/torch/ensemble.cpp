#include "ensemble.h"

#include <algorithm>
#include <utility>

namespace srt::glue {
namespace {

[[noreturn]] void fail(const std::string& rule, const std::string& got) {
  throw Error("srt::ensemble: " + rule + "; got " + got);
}

// Address range [begin, end) of a tensor's elements.
std::pair<const char*, const char*> extent(const Tensor& tensor) {
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) == 0) return {begin, begin};
    last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

}  // namespace

EnsembleCall::EnsembleCall(const Tensor& tokens, const Tensor& offsets_tensor,
                           const std::vector<int64_t>& grid, const std::vector<int64_t>& patch,
                           const std::optional<Tensor>& weights_tensor, const std::string& reduce,
                           const std::string& upsample, const std::string& border,
                           const std::vector<int64_t>& stride) {
  args.dtype = element_type("ensemble", "tokens", tokens, /*allow_uint8=*/false);
  const std::vector<int64_t> shape = shape_of(tokens);
  std::vector<int64_t> weights_shape;
  if (weights_tensor) weights_shape = shape_of(*weights_tensor);
  const Field field = check_ensemble(shape, shape_of(offsets_tensor), grid, patch,
                                     weights_tensor ? &weights_shape : nullptr, stride,
                                     static_cast<int64_t>(tokens.element_size()));
  if (tokens.stride(3) != 1 && shape[3] > 1)
    fail("tokens must be dense in the last dimension",
         "stride " + std::to_string(tokens.stride(3)));
  check_reduce(reduce);
  args.upsample = parse_upsample(upsample);
  args.border = parse_border(border);
  offsets = view_numbers("ensemble", "offsets", offsets_tensor, tokens);
  if (!offsets.device) {
    check_offsets("ensemble", offsets.host.data(), static_cast<int64_t>(offsets.host.size()));
    args.offsets = offsets.host.data();
  }
  if (weights_tensor) {
    weights = view_numbers("ensemble", "weights", *weights_tensor, tokens);
    if (!weights->device) {
      check_weights(weights->host.data(), static_cast<int64_t>(weights->host.size()));
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

Tensor EnsembleCall::new_out(const Tensor& tokens) const {
  const int64_t channels = out_shape[1], height = out_shape[2], width = out_shape[3];
  const std::vector<int64_t> strides{height * width * channels, 1, width * channels, channels};
  return empty_strided(out_shape, strides, tokens.scalar_type(), tokens);
}

void EnsembleCall::set_out(const Tensor& out) {
  args.out = out.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) args.out_strides[d] = out.stride(d);
}

void EnsembleCall::check_out(const Tensor& out, const Tensor& tokens) const {
  if (out.scalar_type() != tokens.scalar_type())
    fail("out must have the dtype of tokens, " + dtype_name(tokens.scalar_type()),
         dtype_name(out.scalar_type()));
  if (!same_device(out, tokens)) fail("out must be on the device of tokens", "another device");
  if (shape_of(out) != out_shape)
    fail("out must be " + format_shape(out_shape), format_shape(shape_of(out)));
  if (out.numel() == 0) return;
  // Sufficient, and true of every view that slicing and permuting make.
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < 4; ++d)
    if (out.size(d) > 1) dims.emplace_back(out.stride(d), out.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t span = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < span)
      fail("out must not overlap itself (each stride must step over what the smaller ones span)",
           "strides " + format_shape({out.stride(0), out.stride(1), out.stride(2), out.stride(3)}));
    span += (size - 1) * stride;
  }
  const auto a = extent(out), b = extent(tokens);
  if (a.first < b.second && b.first < a.second)
    fail("out must not share memory with tokens", "a view of the same memory");
}

}  // namespace srt::glue
