// The handlers that XLA calls for the ops of srt_ext.jax, over a Backend that runs the checked
// calls (cpu.cpp, cuda.cu). A handler checks its arguments by the same rules as the other
// bindings.
//
// Operands are the data, then those of offsets, weights, centers and scale that are arrays of the
// program. Those known when the program is traced are attributes of the same names, float64.
#pragma once
#include <xla/ffi/api/ffi.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../srt/validation.h"

namespace srt::xla {

namespace ffi = ::xla::ffi;
using List = std::vector<int64_t>;

// Strides in elements of a dense array.
inline List dense_strides(const List& shape) {
  List strides(shape.size());
  uint64_t step = 1;
  for (size_t d = shape.size(); d-- > 0; step *= static_cast<uint64_t>(shape[d]))
    strides[d] = static_cast<int64_t>(step);
  return strides;
}

inline const char* dtype_name(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F64:
      return "float64";
    case ffi::DataType::U8:
      return "uint8";
    default:
      return "a type that is not supported";
  }
}

// The operands, results and attributes of one call.
class Call {
 public:
  Call(const char* device, ffi::RemainingArgs operands, ffi::RemainingRets results,
       ffi::Dictionary attributes)
      : device_(device), operands_(operands), results_(results), attributes_(attributes) {}

  ArrayView operand() {
    return view_of(operands_.get<ffi::AnyBuffer>(next_operand_++).value(), device_);
  }

  ArrayView result() {
    return view_of(*results_.get<ffi::AnyBuffer>(next_result_++).value(), device_);
  }

  // Numbers of the given shape, in which one size may be -1, and is then inferred; nothing if the
  // call has none of this name.
  std::optional<ArrayView> numbers(const char* name, List shape) {
    if (!attributes_.contains(name)) {
      if (next_operand_ == operands_.size()) return std::nullopt;
      return operand();
    }
    const auto values = attributes_.get<ffi::Span<const double>>(name).value();
    int64_t known = 1;
    for (const int64_t size : shape) known *= size;
    const int64_t count = static_cast<int64_t>(values.size());
    if (known < 0) std::replace(shape.begin(), shape.end(), int64_t{-1}, count / -known);
    return ArrayView{values.begin(), shape, dense_strides(shape), 8, "float64"};
  }

  std::string_view word(const char* name) const {
    return attributes_.get<std::string_view>(name).value();
  }

  List pair(const char* name) const {
    const auto values = attributes_.get<ffi::Span<const int64_t>>(name).value();
    return {values.begin(), values.end()};
  }

 private:
  static ArrayView view_of(const ffi::AnyBuffer& buffer, const char* device) {
    const auto sizes = buffer.dimensions();
    const List shape(sizes.begin(), sizes.end());
    return {buffer.untyped_data(),
            shape,
            dense_strides(shape),
            static_cast<int64_t>(ffi::ByteWidth(buffer.element_type())),
            dtype_name(buffer.element_type()),
            device};
  }

  const char* device_;
  ffi::RemainingArgs operands_;
  ffi::RemainingRets results_;
  ffi::Dictionary attributes_;
  size_t next_operand_ = 0, next_result_ = 0;
};

// Offsets and weights of one call, or centers and scale.
struct Numbers {
  ArrayView first;
  std::optional<ArrayView> second;
};

// A view [B, C, H, W] of an array [B, H, W, C]. Fields are channels last, the fastest layout.
inline ArrayView channels_first(ArrayView array) {
  const List shape = array.shape, strides = array.strides;
  array.shape = {shape[0], shape[3], shape[1], shape[2]};
  array.strides = {strides[0], strides[3], strides[1], strides[2]};
  return array;
}

struct EnsembleCall {
  const List grid, patch, stride;
  const Numbers views;
  CheckedEnsemble checked;

  EnsembleCall(const char* op, Call& call, ArrayView tokens, Reduce reduce, bool stream = false)
      : grid(call.pair("grid")),
        patch(call.pair("patch")),
        stride(call.pair("stride")),
        views{call.numbers("offsets", {-1, 2}).value(), call.numbers("weights", {-1})},
        checked(op,
                {tokens, views.first, views.second, grid, patch, stride, call.word("upsample"),
                 call.word("border")},
                reduce, stream) {}
};

inline int64_t element_count(const ArrayView& array) {
  int64_t count = 1;
  for (const int64_t size : array.shape) count *= size;
  return count;
}

// Backend::doubles returns memory for the elements of a result, float32 or float64, in float64:
// that of the result if it is float64. Backend::round then writes the result if it is float32.
template <class Backend>
struct Handlers {
  // The mean or median [B, H', W', C].
  static void ensemble(Backend& backend, Call call) {
    const ArrayView tokens = call.operand();
    EnsembleCall given("ensemble", call, tokens, parse_reduce(call.word("reduce")));
    const ArrayView out = call.result();
    given.checked.set_result(const_cast<void*>(out.data));
    backend.ensemble(given, {out});
  }

  // The mean and the variance, [B, H', W', C] each.
  static void moments(Backend& backend, Call call) {
    const ArrayView tokens = call.operand();
    EnsembleCall given("ensemble_moments", call, tokens, Reduce::moments);
    const ArrayView mean = call.result(), variance = call.result();
    given.checked.set_result(const_cast<void*>(mean.data), const_cast<void*>(variance.data));
    backend.ensemble(given, {mean, variance});
  }

  // The mean [B, H', W', C], undefined where no view counts, and the weight [H', W'] of a stream of
  // one chunk.
  static void mean_weight(Backend& backend, Call call) {
    const ArrayView tokens = call.operand();
    EnsembleCall given("mean_sums", call, tokens, Reduce::mean, /*stream=*/true);
    const ArrayView mean = channels_first(call.result()), weight = call.result();
    ArrayView doubles = weight;
    doubles.data = backend.doubles(weight);
    doubles.element_size = sizeof(double);
    doubles.dtype = "float64";
    given.checked.set_state({mean, doubles});
    backend.zero(given.checked.args.total_weight, weight);
    backend.ensemble(given, {mean});
    backend.round("mean_sums", given.checked.args.total_weight, weight);
  }

  // The gradient of the tokens [V, B, N, C], for that of the mean [B, H', W', C].
  static void mean_backward(Backend& backend, Call call) {
    const ArrayView grad = call.operand(), grad_tokens = call.result();
    ArrayView tokens = grad_tokens;
    tokens.data = nullptr;
    EnsembleCall given("_mean_backward", call, tokens, Reduce::mean);
    given.checked.set_result(const_cast<void*>(grad.data));
    backend.mean_backward(given, grad_tokens);
  }

  static void shift(Backend& backend, Call call) {
    const ArrayView image = call.operand();
    const Numbers offsets{call.numbers("offsets", {-1, 2}).value(), std::nullopt};
    CheckedShift checked("shift", "image", image, offsets.first, call.word("padding"),
                         call.word("interpolation"), /*allow_uint8=*/true);
    const ArrayView out = call.result();
    checked.args.image = image.data;
    checked.args.out = const_cast<void*>(out.data);
    backend.shift(checked, offsets, out);
  }

  static void shift_backward(Backend& backend, Call call) {
    const ArrayView grad = call.operand(), grad_image = call.result();
    const Numbers offsets{call.numbers("offsets", {-1, 2}).value(), std::nullopt};
    CheckedShift checked("_shift_backward", "grad", grad_image, offsets.first, call.word("padding"),
                         call.word("interpolation"), /*allow_uint8=*/false);
    checked.args.out = const_cast<void*>(grad.data);
    backend.shift_backward(checked, offsets, grad_image);
  }

  static void windows(Backend& backend, Call call) {
    const ArrayView image = image_operand(call);
    const Numbers places = windows_places(call, image);
    const List size = call.pair("size");
    CheckedWindows checked("windows",
                           {image, places.first, size, places.second, call.word("padding")},
                           /*allow_uint8=*/true);
    const ArrayView out = call.result();
    checked.args.out = const_cast<void*>(out.data);
    backend.windows(checked, places, out);
  }

  static void windows_backward_image(Backend& backend, Call call) {
    const ArrayView grad = call.operand(), grad_image = call.result();
    ArrayView image = grad_image;
    image.data = nullptr;
    const Numbers places = windows_places(call, image);
    const List size{grad.shape[3], grad.shape[4]};
    CheckedWindows checked("_windows_backward_image",
                           {image, places.first, size, places.second, call.word("padding")},
                           /*allow_uint8=*/false);
    checked.args.out = const_cast<void*>(grad.data);
    backend.windows_backward_image(checked, places, grad_image);
  }

  // The gradients of centers and scale, [B, N, 2] each.
  static void windows_backward_points(Backend& backend, Call call) {
    const ArrayView grad = call.operand();
    const ArrayView image = image_operand(call);
    const Numbers places = windows_places(call, image);
    const List size{grad.shape[3], grad.shape[4]};
    CheckedWindows checked("_windows_backward_points",
                           {image, places.first, size, places.second, call.word("padding")},
                           /*allow_uint8=*/false);
    checked.args.out = const_cast<void*>(grad.data);
    const ArrayView centers = call.result(), scale = call.result();
    double *const of_centers = backend.doubles(centers), *const of_scale = backend.doubles(scale);
    backend.windows_backward_points(checked, places, of_centers, of_scale);
    backend.round("windows", of_centers, centers);
    backend.round("windows", of_scale, scale);
  }

 private:
  // The image of windows, [B, C, H, W] or, with many channels, [B, H, W, C].
  static ArrayView image_operand(Call& call) {
    const ArrayView image = call.operand();
    return call.word("layout") == "channels_last" ? channels_first(image) : image;
  }

  static Numbers windows_places(Call& call, const ArrayView& image) {
    ArrayView centers = call.numbers("centers", {image.shape[0], -1, 2}).value();
    std::optional<ArrayView> scale =
        call.numbers("scale", call.word("scales") == "each" ? centers.shape : List{2});
    return {centers, scale};
  }
};

// Runs `body` and returns its exceptions as errors of XLA.
template <class Body>
ffi::Error error_of(Body&& body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const Error& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const std::bad_alloc& error) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, error.what());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

}  // namespace srt::xla

#define SRT_XLA_EXPORT extern "C" __attribute__((visibility("default")))

// Each backend defines SRT_XLA_HANDLER(name), which defines the exported function srt_<name>.
#define SRT_XLA_HANDLERS                  \
  SRT_XLA_HANDLER(ensemble)               \
  SRT_XLA_HANDLER(moments)                \
  SRT_XLA_HANDLER(mean_weight)            \
  SRT_XLA_HANDLER(mean_backward)          \
  SRT_XLA_HANDLER(shift)                  \
  SRT_XLA_HANDLER(shift_backward)         \
  SRT_XLA_HANDLER(windows)                \
  SRT_XLA_HANDLER(windows_backward_image) \
  SRT_XLA_HANDLER(windows_backward_points)
