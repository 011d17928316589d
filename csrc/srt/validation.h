// The rules for arguments, for every binding. Each throws srt::Error with the rule and the value
// received; the words are the same as in srt_ext/checks.py.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "types.h"

namespace srt {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Sizes of the field that ensemble makes.
struct Field {
  int64_t grid[2], patch[2], stride[2];  // (y, x)
  int64_t cells[2];                      // H', W'
};

// tokens [V, B, N, C]; the lists have whatever length the caller passed. `op` names the operator in
// messages. `least`: views.
Field check_ensemble(const char* op, const std::vector<int64_t>& tokens,
                     const std::vector<int64_t>& offsets, const std::vector<int64_t>& grid,
                     const std::vector<int64_t>& patch, const std::vector<int64_t>* weights,
                     const std::vector<int64_t>& stride, int64_t element_size, int64_t least = 1);
// image [B, C, H, W], offsets [V, 2].
void check_shift(const std::vector<int64_t>& image, const std::vector<int64_t>& offsets,
                 int64_t element_size);

// For ensemble: the mean, or the median, which takes no weights.
Reduce parse_reduce(std::string_view word, bool weighted);
Upsample parse_upsample(const char* op, std::string_view word);
Border parse_border(const char* op, std::string_view word);
Padding parse_padding(std::string_view word);
Interpolation parse_interpolation(std::string_view word);

// An array, as a binding was given it.
struct ArrayView {
  const void* data;  // the first element, in the order of the dimensions
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // in elements, of either sign
  int64_t element_size;
};

// tokens [V, B, N, C]: the rule for their strides.
void check_dense(const char* op, const ArrayView& tokens);
// What an op writes to: of this shape, a place for each element, and none of them of the tokens.
void check_written(const char* op, const char* name, const ArrayView& written,
                   const std::vector<int64_t>& shape, const ArrayView& tokens);
// The state of a stream for a field of this shape, [B, C, H', W']: mean and, for moments, var of
// the same strides, or for a median window [kWindowPlanes, B, C, H', W']; seen [H', W'].
void check_state(const char* op, const ArrayView& field, const ArrayView* variance,
                 const ArrayView& seen, Reduce reduce, const std::vector<int64_t>& shape,
                 const ArrayView& tokens);

// By value, for arguments on the host.
void check_offsets(const char* op, const double* offsets, int64_t count);
// Of one call only the ratios matter; those of a stream are added up over its chunks.
void check_weights(const char* op, const double* weights, int64_t count, bool stream);

std::string format_shape(const std::vector<int64_t>& shape);

}  // namespace srt
