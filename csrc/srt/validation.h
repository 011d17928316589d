// The argument checks of all bindings. A failed check throws srt::Error.
#pragma once
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "ensemble.h"
#include "shift.h"
#include "types.h"
#include "windows.h"

namespace srt {

// The error of a wrong argument: "srt::<op>: <rule>; got <value>". For a wrong type, what() begins
// with "TypeError: ", because torch's dispatcher keeps only the message of an exception.
struct Error : std::runtime_error {
  enum class Kind { value, type };
  explicit Error(const std::string& text, Kind kind = Kind::value)
      : std::runtime_error((kind == Kind::type ? "TypeError: " : "") + text), kind(kind) {}

  // what() without the prefix.
  const char* text() const { return what() + (kind == Kind::type ? sizeof("TypeError: ") - 1 : 0); }

  const Kind kind;
};

[[noreturn]] void fail(const char* op, const std::string& rule, const std::string& got,
                       Error::Kind kind = Error::Kind::value);
std::string format_shape(const std::vector<int64_t>& shape);

// An array as passed to a binding.
struct ArrayView {
  const void* data;  // the element at index 0; an op may write to the array
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // in elements, may be negative
  int64_t element_size;
  std::string dtype;           // the name in torch and NumPy: "float32"
  std::string device = "cpu";  // the name in torch
};

// Allows float32, float16, bfloat16 and float64, and uint8 if `allow_uint8`.
DType check_dtype(const char* op, const std::string& name, const ArrayView& array,
                  bool allow_uint8);

// Checks the address of a non-empty array that is read or written in place.
void check_aligned(const char* op, const std::string& name, const ArrayView& array);

Reduce parse_reduce(std::string_view word);  // "mean" or "median", for ensemble

// The common arguments of ensemble, ensemble_moments and accumulate_*. The lengths of the lists are
// not yet checked.
struct EnsembleInputs {
  ArrayView tokens;                  // [V, B, N, C]
  ArrayView offsets;                 // [V, 2]
  std::optional<ArrayView> weights;  // [V]
  const std::vector<int64_t>&grid, &patch, &stride;
  std::string_view upsample, border;
};

// One such call with checked arguments. It owns all data that `args` points to, except the arrays.
// Offsets and weights on a device are not validated, and their pointers in `args` are null.
struct CheckedEnsemble {
  const char* op;
  ArrayView tokens;
  EnsembleArgs args{};
  std::vector<int64_t> out_shape;    // [B, C, H', W']
  std::vector<int64_t> out_strides;  // strides of a new result in elements: channels last

  // `op` names the operator in messages. `stream`: the absolute weights matter, because a stream
  // adds those of all its chunks; otherwise only their ratios matter. `least`: minimum of views.
  CheckedEnsemble(const char* op, const EnsembleInputs& given, Reduce reduce, bool stream = false,
                  int64_t least = 1);
  CheckedEnsemble(const CheckedEnsemble&) = delete;
  CheckedEnsemble& operator=(const CheckedEnsemble&) = delete;

  // Sets new memory with out_shape and out_strides. `variance` is for moments only.
  void set_result(void* out, void* variance = nullptr);
  // Checks and sets memory of the caller, with any strides.
  void set_out(const ArrayView& out);
  // Checks and sets the state of a stream, in the order of state_names(). For a mean: mean
  // [B, C, H', W']; for moments: also var with the same strides; for a median: window
  // [kWindowPlanes, B, C, H', W']. The last array is the total of each cell, [H', W'] in float64.
  void set_state(const std::vector<ArrayView>& state);
  std::vector<const char*> state_names() const;

 private:
  std::vector<double> offsets_, weights_;
};

// One call of shift or its gradient with checked arguments. The caller sets args.image and
// args.out.
struct CheckedShift {
  ShiftArgs args{};
  std::vector<int64_t> out_shape;  // [V, B, C, H, W]

  // image [B, C, H, W], called `name` in messages; offsets [V, 2].
  CheckedShift(const char* op, const std::string& name, const ArrayView& image,
               const ArrayView& offsets, std::string_view padding, std::string_view interpolation,
               bool allow_uint8);
  CheckedShift(const CheckedShift&) = delete;
  CheckedShift& operator=(const CheckedShift&) = delete;

 private:
  std::vector<double> offsets_;  // as in CheckedEnsemble
};

// The common arguments of windows and its gradients.
struct WindowsInputs {
  ArrayView image;    // [B, C, H, W]
  ArrayView centers;  // [B, N, 2]
  const std::vector<int64_t>& size;
  std::optional<ArrayView> scale;  // [2] or [B, N, 2]
  std::string_view padding;
};

// One such call with checked arguments. The caller sets args.out.
struct CheckedWindows {
  WindowsArgs args{};
  std::vector<int64_t> out_shape;  // [B, N, C, Ph, Pw]

  CheckedWindows(const char* op, const WindowsInputs& given, bool allow_uint8);
  CheckedWindows(const CheckedWindows&) = delete;
  CheckedWindows& operator=(const CheckedWindows&) = delete;

 private:
  std::vector<double> centers_, scale_;  // as in CheckedEnsemble
};

}  // namespace srt
