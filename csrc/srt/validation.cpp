// The rules for the arguments of every op. All bindings use them.
#include "validation.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <utility>

namespace srt {
namespace {

// The number as %g prints it, which is close to Python.
std::string format_number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

// A string of the caller in quotes: printable, at most 40 bytes.
std::string quote(std::string_view word) {
  size_t longest = 40;
  if (word.size() <= longest) {
    longest = word.size();
  } else {  // do not cut a UTF-8 character
    while (longest > 0 && (static_cast<unsigned char>(word[longest]) & 0xC0) == 0x80) --longest;
  }
  std::string text = "'";
  for (const char c : word.substr(0, longest)) {
    char escaped[8];
    const auto code = static_cast<unsigned char>(c);
    std::snprintf(escaped, sizeof(escaped), code < 0x20 || code == 0x7f ? "\\x%02x" : "%c", code);
    text += escaped;
  }
  return text + (longest < word.size() ? "...'" : "'");
}

// A size of 0 counts as 1, because the strides of an empty tensor are products of the other sizes.
bool product_overflows(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(product, std::max<int64_t>(1, size), &product)) return true;
  return false;
}

void check_pair(const char* op, const std::string& name, const std::vector<int64_t>& pair) {
  if (pair.size() != 2 || pair[0] < 1 || pair[1] < 1)
    fail(op, name + " must be an integer or a pair of integers (y, x), each >= 1",
         format_shape(pair));
}

std::string format_strides(const ArrayView& array) {
  return "strides " + format_shape(array.strides);
}

// Address range [begin, end) of the elements.
std::pair<uintptr_t, uintptr_t> extent(const ArrayView& array) {
  const uintptr_t data = reinterpret_cast<uintptr_t>(array.data);
  int64_t low = 0, high = 1;
  for (size_t d = 0; d < array.shape.size(); ++d) {
    if (array.shape[d] == 0) return {data, data};
    const int64_t last = (array.shape[d] - 1) * array.strides[d];
    (last < 0 ? low : high) += last;
  }
  return {data + static_cast<uintptr_t>(low * array.element_size),
          data + static_cast<uintptr_t>(high * array.element_size)};
}

bool share_memory(const ArrayView& a, const ArrayView& b) {
  const auto x = extent(a), y = extent(b);
  return x.first < y.second && y.first < x.second;
}

template <class Mode, size_t N>
Mode parse(const char* op, const std::string& name, std::string_view word,
           const std::pair<std::string_view, Mode> (&modes)[N]) {
  std::string rule = name + " must be one of ";
  for (size_t i = 0; i < N; ++i) {
    if (modes[i].first == word) return modes[i].second;
    rule += (i ? ", '" : "'") + std::string(modes[i].first) + "'";
  }
  fail(op, rule, quote(word));
}

Padding parse_padding(const char* op, std::string_view word) {
  return parse<Padding>(op, "padding", word,
                        {{"zeros", Padding::zeros},
                         {"border", Padding::border},
                         {"reflect", Padding::reflect},
                         {"circular", Padding::circular}});
}

std::vector<double> read_numbers(const ArrayView& array) {
  int64_t count = 1;
  for (const int64_t size : array.shape) count *= size;
  std::vector<double> numbers(static_cast<size_t>(count));
  const bool f32 = array.dtype == "float32";
  for (size_t i = 0; i < numbers.size(); ++i) {
    int64_t rest = static_cast<int64_t>(i), at = 0;
    for (size_t d = array.shape.size(); d-- > 0; rest /= array.shape[d])
      at += rest % array.shape[d] * array.strides[d];
    // These arrays may be unaligned. They are small, so a copy costs nothing.
    const char* const from = static_cast<const char*>(array.data) + at * array.element_size;
    float single = 0;
    std::memcpy(f32 ? static_cast<void*>(&single) : &numbers[i], from, f32 ? 4 : 8);
    if (f32) numbers[i] = static_cast<double>(single);
  }
  return numbers;
}

// Reads offsets, weights, centers or scale, whose shape has been checked, into `values` and returns
// its data; null if they are on a device.
const double* take_numbers(const char* op, const std::string& name, const ArrayView& numbers,
                           const ArrayView& input, std::vector<double>* values) {
  const bool host = numbers.device == "cpu";
  if (!host && numbers.device != input.device)
    fail(op, name + " must be on the CPU or on the device of the input", numbers.device);
  if (numbers.dtype != "float32" && numbers.dtype != "float64")
    fail(op, name + " must be float32 or float64", numbers.dtype, Error::Kind::type);
  if (!host) return nullptr;
  *values = read_numbers(numbers);
  return values->data();
}

// Checks centers or scale: finite, and at most 2^`bits` in magnitude.
void check_pixels(const char* op, const std::string& name, const ArrayView& numbers,
                  const std::vector<double>& values, int bits) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::fabs(values[i]) <= std::ldexp(1.0, bits)) continue;  // false for NaN
    std::vector<int64_t> at;
    int64_t rest = static_cast<int64_t>(i);
    for (size_t d = numbers.shape.size(); d-- > 0; rest /= numbers.shape[d])
      at.insert(at.begin(), rest % numbers.shape[d]);
    fail(op,
         name + " must be finite and at most 2^" + std::to_string(bits) + " pixels in magnitude",
         format_number(values[i]) + " at " + format_shape(at));
  }
}

void check_offsets(const char* op, const std::vector<double>& offsets) {
  for (size_t i = 0; i < offsets.size(); ++i) {
    // Also true for NaN.
    if (!(std::fabs(offsets[i]) <= static_cast<double>(kMaxOffset)))
      fail(op, "offsets must be finite and at most 2^20 pixels in magnitude",
           format_number(offsets[i]) + " at [" + std::to_string(i / 2) + ", " +
               std::to_string(i % 2) + "]");
  }
}

// The magnitude of the weights of a stream is between 2^-`bits` and 2^`bits`, if `bits` is not 0.
void check_weights(const char* op, const std::vector<double>& weights, int bits) {
  const auto got = [&](size_t i) {
    return format_number(weights[i]) + " at [" + std::to_string(i) + "]";
  };
  double largest = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!(weights[i] >= 0) || std::isinf(weights[i]))
      fail(op, "weights must be finite and >= 0", got(i));
    if (bits > 0 && weights[i] != 0 &&
        !(weights[i] >= std::ldexp(1.0, -bits) && weights[i] <= std::ldexp(1.0, bits)))
      fail(op,
           "weights must be 0 or between 2^-" + std::to_string(bits) + " and 2^" +
               std::to_string(bits),
           got(i));
    largest = std::max(largest, weights[i]);
  }
  // Smaller weights would vanish next to the largest in float32, but still count as coverage.
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] != 0 && weights[i] < largest * 0x1p-80)
      fail(op, "weights must be 0 or at least 2^-80 times the largest", got(i));
  }
}

// Checks an array that an op writes: its dtype, shape and device, that its elements do not overlap,
// and that it does not share memory with the tokens. `dtype_rule` follows "must" in the message.
void check_written(const char* op, const std::string& name, const ArrayView& written,
                   const std::string& dtype, const std::string& dtype_rule,
                   const std::vector<int64_t>& shape, const ArrayView& tokens) {
  if (written.dtype != dtype)
    fail(op, name + " must " + dtype_rule, written.dtype, Error::Kind::type);
  if (written.device != tokens.device)
    fail(op, name + " must be on the device of tokens", written.device);
  if (written.shape != shape)
    fail(op, name + " must be " + format_shape(shape), format_shape(written.shape));
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return;
  check_aligned(op, name, written);
  // Sufficient, and true for every view made by slicing with positive steps and permuting.
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (size_t d = 0; d < shape.size(); ++d)
    if (shape[d] > 1) dims.emplace_back(written.strides[d], shape[d]);
  std::sort(dims.begin(), dims.end());
  int64_t span = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < span)
      fail(op,
           name +
               " must not overlap itself: each stride must be at least the extent of the "
               "dimensions with smaller strides",
           format_strides(written));
    span += (size - 1) * stride;
  }
  if (share_memory(written, tokens))
    fail(op, name + " must not share memory with tokens", "overlapping memory");
}

// Checks all shapes. Returns the size [H', W'] of the field in cells.
std::vector<int64_t> check_shapes(const char* op, const EnsembleInputs& given, int64_t least) {
  const std::vector<int64_t>&tokens = given.tokens.shape, &offsets = given.offsets.shape;
  const std::vector<int64_t>&grid = given.grid, &patch = given.patch, &stride = given.stride;
  if (tokens.size() != 4)
    fail(op, "tokens must have 4 dimensions, [V, B, N, C]", format_shape(tokens));
  if (tokens[0] < least) fail(op, "tokens must hold at least one view", format_shape(tokens));
  if (tokens[0] > kMaxViews) fail(op, "tokens must hold at most 2^20 views", format_shape(tokens));
  if (offsets.size() != 2 || offsets[0] != tokens[0] || offsets[1] != 2)
    fail(op, "offsets must be [V, 2] with V = " + std::to_string(tokens[0]), format_shape(offsets));
  if (given.weights && given.weights->shape != std::vector<int64_t>{tokens[0]})
    fail(op, "weights must be [V] with V = " + std::to_string(tokens[0]),
         format_shape(given.weights->shape));
  check_pair(op, "grid", grid);
  check_pair(op, "patch", patch);
  check_pair(op, "stride", stride);
  std::vector<int64_t> cells;
  for (int i = 0; i < 2; ++i) {
    if (grid[i] > kMaxPixels / patch[i])
      fail(op, "grid * patch must be at most 2^24 pixels on each axis",
           format_shape(grid) + " * " + format_shape(patch));
    const int64_t pixels = grid[i] * patch[i];
    if (pixels % stride[i] != 0)
      fail(op,
           "stride must divide grid * patch = " +
               format_shape({grid[0] * patch[0], grid[1] * patch[1]}),
           format_shape(stride));
    cells.push_back(pixels / stride[i]);
  }
  if (grid[0] * grid[1] != tokens[2])
    fail(op,
         "tokens must have N = h * w = " + std::to_string(grid[0] * grid[1]) + " for grid " +
             format_shape(grid) + ", without class or register tokens",
         format_shape(tokens));
  if (product_overflows({tokens[1], tokens[3], cells[0], cells[1], given.tokens.element_size}))
    fail(op, "the output must have fewer than 2^63 bytes",
         format_shape({tokens[1], tokens[3], cells[0], cells[1]}));
  if (product_overflows({tokens[0], tokens[1], tokens[2], tokens[3], given.tokens.element_size}))
    fail(op, "tokens must have fewer than 2^63 bytes", format_shape(tokens));
  return cells;
}

}  // namespace

void fail(const char* op, const std::string& rule, const std::string& got, Error::Kind kind) {
  throw Error("srt::" + std::string(op) + ": " + rule + "; got " + got, kind);
}

std::string format_shape(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

DType check_dtype(const char* op, const std::string& name, const ArrayView& array,
                  bool allow_uint8) {
  static constexpr struct {
    std::string_view name;
    int64_t bytes;
    DType dtype;
  } kTypes[] = {{"float32", 4, DType::f32},
                {"float16", 2, DType::f16},
                {"bfloat16", 2, DType::bf16},
                {"float64", 8, DType::f64},
                {"uint8", 1, DType::u8}};
  for (const auto& type : kTypes) {
    if (array.dtype == type.name && array.element_size == type.bytes &&
        (allow_uint8 || type.dtype != DType::u8))
      return type.dtype;
  }
  fail(op,
       name + " must be float32, float16, bfloat16" +
           (allow_uint8 ? ", float64 or uint8" : " or float64"),
       array.dtype, Error::Kind::type);
}

void check_aligned(const char* op, const std::string& name, const ArrayView& array) {
  const auto address = reinterpret_cast<uintptr_t>(array.data);
  if (address % static_cast<uintptr_t>(array.element_size) != 0)
    fail(op,
         name + " must be aligned to its element size, " + std::to_string(array.element_size) +
             " bytes",
         "address " + std::to_string(address));
}

Reduce parse_reduce(std::string_view word) {
  return parse<Reduce>("ensemble", "reduce", word,
                       {{"mean", Reduce::mean}, {"median", Reduce::median}});
}

CheckedEnsemble::CheckedEnsemble(const char* name, const EnsembleInputs& given, Reduce reduce,
                                 bool stream, int64_t least)
    : op(name), tokens(given.tokens) {
  args.reduce = reduce;
  args.dtype = check_dtype(op, "tokens", tokens, /*allow_uint8=*/false);
  if (reduce == Reduce::median && given.weights)
    fail(op, "weights must be None if reduce is 'median'",
         "weights of shape " + format_shape(given.weights->shape));
  const std::vector<int64_t>& shape = tokens.shape;
  const std::vector<int64_t> cells = check_shapes(op, given, least);
  if (std::find(shape.begin(), shape.end(), 0) == shape.end()) check_aligned(op, "tokens", tokens);
  if (tokens.strides[3] != 1 && shape[3] > 1)
    fail(op, "tokens must be contiguous in the last dimension",
         "stride " + std::to_string(tokens.strides[3]));
  args.upsample =
      parse<Upsample>(op, "upsample", given.upsample,
                      {{"nearest", Upsample::nearest}, {"bilinear", Upsample::bilinear}});
  args.border = parse<Border>(op, "border", given.border,
                              {{"coverage", Border::coverage},
                               {"zeros", Border::zeros},
                               {"clamp", Border::clamp},
                               {"circular", Border::circular}});
  args.offsets = take_numbers(op, "offsets", given.offsets, tokens, &offsets_);
  check_offsets(op, offsets_);
  if (given.weights) {
    args.weights = take_numbers(op, "weights", *given.weights, tokens, &weights_);
    const bool single = std::string_view(op) == "mean_sums";  // keeps its sums in float32
    check_weights(op, weights_, !stream ? 0 : single ? 60 : 500);
  }
  args.tokens = tokens.data;
  args.views = shape[0];
  args.batch = shape[1];
  args.channels = shape[3];
  std::copy_n(tokens.strides.begin(), 3, args.token_strides);
  std::copy_n(given.grid.begin(), 2, args.grid);
  std::copy_n(given.patch.begin(), 2, args.patch);
  std::copy_n(given.stride.begin(), 2, args.stride);
  out_shape = {shape[1], shape[3], cells[0], cells[1]};
  out_strides = {cells[0] * cells[1] * shape[3], 1, cells[1] * shape[3], shape[3]};
}

void CheckedEnsemble::set_result(void* out, void* variance) {
  args.out = out;
  args.variance = variance;
  std::copy_n(out_strides.begin(), 4, args.out_strides);
}

void CheckedEnsemble::set_out(const ArrayView& out) {
  check_written(op, "out", out, tokens.dtype, "have the dtype of tokens, " + tokens.dtype,
                out_shape, tokens);
  args.out = const_cast<void*>(out.data);
  std::copy_n(out.strides.begin(), 4, args.out_strides);
}

std::vector<const char*> CheckedEnsemble::state_names() const {
  if (args.reduce == Reduce::median) return {"window", "count"};
  if (args.reduce == Reduce::moments) return {"mean", "var", "weight"};
  return {"mean", "weight"};
}

void CheckedEnsemble::set_state(const std::vector<ArrayView>& state) {
  const bool median = args.reduce == Reduce::median, f64 = args.dtype == DType::f64;
  const std::string dtype = f64 ? "float64" : "float32";
  const std::vector<const char*> names = state_names();
  const std::vector<int64_t> cells{out_shape[2], out_shape[3]};
  std::vector<int64_t> planes = out_shape;
  if (median) planes.insert(planes.begin(), kWindowPlanes);

  const ArrayView &field = state.front(), &totals = state.back();
  for (size_t i = 0; i < state.size(); ++i) {
    const bool total = i + 1 == state.size();
    check_written(op, names[i], state[i], total ? "float64" : dtype,
                  total ? "be float64" : "be " + dtype + (f64 ? ", the dtype of tokens" : ""),
                  total ? cells : planes, tokens);
    for (size_t j = 0; j < i; ++j) {
      if (share_memory(state[i], state[j]))
        fail(op, std::string(names[j]) + " and " + names[i] + " must not share memory",
             "overlapping memory");
    }
  }
  // Contiguous; the stride of a size of 1 does not matter.
  if ((cells[1] > 1 && totals.strides[1] != 1) || (cells[0] > 1 && totals.strides[0] != cells[1]))
    fail(op, std::string(names.back()) + " must be contiguous", format_strides(totals));
  if (args.reduce == Reduce::moments) {
    for (size_t d = 0; d < 4; ++d) {
      if (out_shape[d] > 1 && state[1].strides[d] != field.strides[d])
        fail(op, "var must have the strides of mean", format_strides(state[1]));
    }
    args.variance = const_cast<void*>(state[1].data);
  }
  args.out = const_cast<void*>(field.data);
  std::copy_n(field.strides.begin() + (median ? 1 : 0), 4, args.out_strides);
  if (median) args.plane_stride = field.strides[0];
  args.total_weight = static_cast<double*>(const_cast<void*>(totals.data));
}

CheckedShift::CheckedShift(const char* op, const std::string& name, const ArrayView& image,
                           const ArrayView& offsets, std::string_view padding,
                           std::string_view interpolation, bool allow_uint8) {
  args.dtype = check_dtype(op, name, image, allow_uint8);
  const std::vector<int64_t>& shape = image.shape;
  if (shape.size() != 4)
    fail(op, name + " must have 4 dimensions, [B, C, H, W]", format_shape(shape));
  if (shape[2] > kMaxPixels || shape[3] > kMaxPixels)
    fail(op, name + " must have at most 2^24 pixels on each axis", format_shape(shape));
  if (offsets.shape.size() != 2 || offsets.shape[0] < 1 || offsets.shape[1] != 2)
    fail(op, "offsets must be [V, 2] with V >= 1", format_shape(offsets.shape));
  if (offsets.shape[0] > kMaxViews)
    fail(op, "offsets must hold at most 2^20 views", format_shape(offsets.shape));
  out_shape = {offsets.shape[0], shape[0], shape[1], shape[2], shape[3]};
  if (product_overflows(
          {offsets.shape[0], shape[0], shape[1], shape[2], shape[3], image.element_size}))
    fail(op, "the output must have fewer than 2^63 bytes", format_shape(out_shape));
  args.padding = parse_padding(op, padding);
  args.interpolation = parse<Interpolation>(op, "interpolation", interpolation,
                                            {{"nearest", Interpolation::nearest},
                                             {"bilinear", Interpolation::bilinear},
                                             {"bicubic", Interpolation::bicubic}});
  args.offsets = take_numbers(op, "offsets", offsets, image, &offsets_);
  check_offsets(op, offsets_);
  args.planes = shape[0] * shape[1];
  args.height = shape[2];
  args.width = shape[3];
  args.views = out_shape[0];
}

namespace {

// The shape of the result.
std::vector<int64_t> check_shapes(const char* op, const WindowsInputs& given) {
  const std::vector<int64_t>&image = given.image.shape, &centers = given.centers.shape;
  if (image.size() != 4)
    fail(op, "image must have 4 dimensions, [B, C, H, W]", format_shape(image));
  if (image[2] < 1 || image[3] < 1 || image[2] > kMaxPixels || image[3] > kMaxPixels)
    fail(op, "image must have 1 to 2^24 pixels on each axis", format_shape(image));
  if (centers.size() != 3 || centers[0] != image[0] || centers[2] != 2)
    fail(op, "centers must be [B, N, 2] with B = " + std::to_string(image[0]),
         format_shape(centers));
  if (centers[1] > kMaxWindows / std::max<int64_t>(1, centers[0]))
    fail(op, "centers must hold at most 2^26 windows", format_shape(centers));
  if (given.scale && given.scale->shape != std::vector<int64_t>{2} && given.scale->shape != centers)
    fail(op, "scale must be [2] or have the shape of centers, " + format_shape(centers),
         format_shape(given.scale->shape));
  check_pair(op, "size", given.size);
  if (given.size[0] > kMaxPixels || given.size[1] > kMaxPixels)
    fail(op, "size must be at most 2^24 samples on each axis", format_shape(given.size));
  const std::vector<int64_t> out{image[0], centers[1], image[1], given.size[0], given.size[1]};
  if (product_overflows({out[0], out[1], out[2], out[3], out[4], given.image.element_size}))
    fail(op, "the output must have fewer than 2^63 bytes", format_shape(out));
  if (product_overflows({image[0], image[1], image[2], image[3], given.image.element_size}))
    fail(op, "image must have fewer than 2^63 bytes", format_shape(image));
  return out;
}

}  // namespace

CheckedWindows::CheckedWindows(const char* op, const WindowsInputs& given, bool allow_uint8) {
  const ArrayView& image = given.image;
  args.dtype = check_dtype(op, "image", image, allow_uint8);
  out_shape = check_shapes(op, given);
  if (image.shape[0] > 0 && image.shape[1] > 0) check_aligned(op, "image", image);
  args.padding = parse_padding(op, given.padding);
  args.centers = take_numbers(op, "centers", given.centers, image, &centers_);
  check_pixels(op, "centers", given.centers, centers_, 25);
  if (given.scale) {
    args.scale = take_numbers(op, "scale", *given.scale, image, &scale_);
    check_pixels(op, "scale", *given.scale, scale_, 20);
    args.scale_of_each = given.scale->shape.size() == 3;
  }
  args.image = image.data;
  args.batch = image.shape[0];
  args.channels = image.shape[1];
  args.height = image.shape[2];
  args.width = image.shape[3];
  std::copy_n(image.strides.begin(), 4, args.image_strides);
  args.count = out_shape[1];
  std::copy_n(given.size.begin(), 2, args.size);
}

}  // namespace srt
