#include "validation.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <utility>

#include "ensemble.h"

namespace srt {
namespace {

[[noreturn]] void fail(const char* op, const std::string& rule, const std::string& got) {
  throw Error("srt::" + std::string(op) + ": " + rule + "; got " + got);
}

// The number as Python prints it, as far as %g does.
std::string format_number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

// A size of 0 counts as 1: the strides of an empty tensor are products of the others.
bool product_overflows(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(product, std::max<int64_t>(1, size), &product)) return true;
  return false;
}

void check_pair(const char* op, const char* name, const std::vector<int64_t>& pair) {
  if (pair.size() != 2 || pair[0] < 1 || pair[1] < 1)
    fail(op, std::string(name) + " must be two integers >= 1, (y, x)", format_shape(pair));
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
Mode parse(const char* op, const char* name, std::string_view word,
           const std::string_view (&words)[N]) {
  const auto found = std::find(std::begin(words), std::end(words), word);
  if (found == std::end(words)) {
    std::string rule = std::string(name) + " must be one of ";
    for (size_t i = 0; i < N; ++i) rule += (i ? ", '" : "'") + std::string(words[i]) + "'";
    fail(op, rule, "'" + std::string(word) + "'");
  }
  return static_cast<Mode>(found - std::begin(words));
}

}  // namespace

std::string format_shape(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Field check_ensemble(const char* op, const std::vector<int64_t>& tokens,
                     const std::vector<int64_t>& offsets, const std::vector<int64_t>& grid,
                     const std::vector<int64_t>& patch, const std::vector<int64_t>* weights,
                     const std::vector<int64_t>& stride, int64_t element_size, int64_t least) {
  if (tokens.size() != 4)
    fail(op, "tokens must have 4 dimensions, [V, B, N, C]", format_shape(tokens));
  if (tokens[0] < least) fail(op, "tokens must hold at least one view", format_shape(tokens));
  if (offsets.size() != 2 || offsets[0] != tokens[0] || offsets[1] != 2)
    fail(op, "offsets must be [V, 2] with V = " + std::to_string(tokens[0]), format_shape(offsets));
  if (weights && (weights->size() != 1 || (*weights)[0] != tokens[0]))
    fail(op, "weights must be [V] with V = " + std::to_string(tokens[0]), format_shape(*weights));
  check_pair(op, "grid", grid);
  check_pair(op, "patch", patch);
  check_pair(op, "stride", stride);
  Field field{};
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
    field.grid[i] = grid[i];
    field.patch[i] = patch[i];
    field.stride[i] = stride[i];
    field.cells[i] = pixels / stride[i];
  }
  if (grid[0] * grid[1] != tokens[2])
    fail(op,
         "grid must hold the N = " + std::to_string(tokens[2]) +
             " tokens of a view, without class or register tokens",
         format_shape(grid));
  if (product_overflows({tokens[1], tokens[3], field.cells[0], field.cells[1], element_size}))
    fail(op, "the output must have fewer than 2^63 bytes",
         format_shape({tokens[1], tokens[3], field.cells[0], field.cells[1]}));
  return field;
}

void check_shift(const std::vector<int64_t>& image, const std::vector<int64_t>& offsets,
                 int64_t element_size) {
  const char* op = "shift";
  if (image.size() != 4)
    fail(op, "image must have 4 dimensions, [B, C, H, W]", format_shape(image));
  if (image[2] > kMaxPixels || image[3] > kMaxPixels)
    fail(op, "image must have at most 2^24 pixels on each axis", format_shape(image));
  if (offsets.size() != 2 || offsets[0] < 1 || offsets[1] != 2)
    fail(op, "offsets must be [V, 2] with V >= 1", format_shape(offsets));
  if (product_overflows({offsets[0], image[0], image[1], image[2], image[3], element_size}))
    fail(op, "the output must have fewer than 2^63 bytes",
         format_shape({offsets[0], image[0], image[1], image[2], image[3]}));
}

void check_dense(const char* op, const ArrayView& tokens) {
  if (tokens.strides[3] != 1 && tokens.shape[3] > 1)
    fail(op, "tokens must be dense in the last dimension",
         "stride " + std::to_string(tokens.strides[3]));
}

void check_written(const char* op, const char* name, const ArrayView& written,
                   const std::vector<int64_t>& shape, const ArrayView& tokens) {
  const std::string subject = name;
  if (written.shape != shape)
    fail(op, subject + " must be " + format_shape(shape), format_shape(written.shape));
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return;
  // Sufficient, and true of every view that slicing forwards and permuting make.
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (size_t d = 0; d < shape.size(); ++d)
    if (shape[d] > 1) dims.emplace_back(written.strides[d], shape[d]);
  std::sort(dims.begin(), dims.end());
  int64_t span = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < span)
      fail(op,
           subject +
               " must not overlap itself (each stride must step over what the smaller ones "
               "span)",
           format_strides(written));
    span += (size - 1) * stride;
  }
  if (share_memory(written, tokens))
    fail(op, subject + " must not share memory with tokens", "a view of the same memory");
}

void check_state(const char* op, const ArrayView& field, const ArrayView* variance,
                 const ArrayView& seen, Reduce reduce, const std::vector<int64_t>& shape,
                 const ArrayView& tokens) {
  const bool median = reduce == Reduce::median;
  const char* const name = median ? "window" : "mean";
  const char* const seen_name = median ? "count" : "weight";
  std::vector<int64_t> planes = shape;
  if (median) planes.insert(planes.begin(), kWindowPlanes);
  check_written(op, name, field, planes, tokens);
  check_written(op, seen_name, seen, {shape[2], shape[3]}, tokens);
  // Dense in the order of its dimensions; a size of 1 steps nowhere.
  if ((shape[3] > 1 && seen.strides[1] != 1) || (shape[2] > 1 && seen.strides[0] != shape[3]))
    fail(op, std::string(seen_name) + " must be contiguous", format_strides(seen));
  std::vector<std::pair<const char*, const ArrayView*>> state{{name, &field}};
  if (variance) {
    check_written(op, "var", *variance, shape, tokens);
    for (size_t d = 0; d < 4; ++d) {
      if (shape[d] > 1 && variance->strides[d] != field.strides[d])
        fail(op, "var must have the strides of mean", format_strides(*variance));
    }
    state.emplace_back("var", variance);
  }
  state.emplace_back(seen_name, &seen);
  for (size_t i = 0; i < state.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (share_memory(*state[i].second, *state[j].second))
        fail(op, std::string(state[j].first) + " and " + state[i].first + " must not share memory",
             "views of the same memory");
    }
  }
}

Reduce parse_reduce(std::string_view word, bool weighted) {
  const Reduce reduce = parse<Reduce>("ensemble", "reduce", word, {"mean", "median"});
  if (reduce == Reduce::median && weighted)
    fail("ensemble", "weights must be None where reduce is 'median'", "weights");
  return reduce;
}
Upsample parse_upsample(const char* op, std::string_view word) {
  return parse<Upsample>(op, "upsample", word, {"nearest", "bilinear"});
}
Border parse_border(const char* op, std::string_view word) {
  return parse<Border>(op, "border", word, {"coverage", "zeros", "clamp"});
}
Padding parse_padding(std::string_view word) {
  return parse<Padding>("shift", "padding", word, {"zeros", "border", "reflect", "circular"});
}
Interpolation parse_interpolation(std::string_view word) {
  return parse<Interpolation>("shift", "interpolation", word, {"nearest", "bilinear", "bicubic"});
}

void check_offsets(const char* op, const double* offsets, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    // Written so that NaN fails.
    if (!(std::fabs(offsets[i]) <= static_cast<double>(kMaxOffset)))
      fail(op, "offsets must be finite and at most 2^20 pixels in size",
           format_number(offsets[i]) + " at [" + std::to_string(i / 2) + ", " +
               std::to_string(i % 2) + "]");
  }
}

void check_weights(const char* op, const double* weights, int64_t count, bool stream) {
  const auto got = [&](int64_t i) {
    return format_number(weights[i]) + " at [" + std::to_string(i) + "]";
  };
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!(weights[i] >= 0) || std::isinf(weights[i]))
      fail(op, "weights must be finite and >= 0", got(i));
    if (stream && weights[i] != 0 && !(weights[i] >= 0x1p-500 && weights[i] <= 0x1p500))
      fail(op, "weights must be 0 or between 2^-500 and 2^500", got(i));
    largest = std::max(largest, weights[i]);
  }
  // Smaller ones would vanish beside the others in float32, but still count as coverage.
  for (int64_t i = 0; i < count; ++i) {
    if (weights[i] != 0 && weights[i] < largest * 0x1p-80)
      fail(op, "weights must be 0 or at least 2^-80 of the largest", got(i));
  }
}

}  // namespace srt
