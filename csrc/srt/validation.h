// The rules for arguments, for every binding. Each throws srt::Error.
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

// A wrong argument: "srt::<op>: <rule>; got <value>". For a wrong type, what() begins with
// "TypeError: ": torch's dispatcher passes on the message of an exception and no more.
struct Error : std::runtime_error {
  enum class Kind { value, type };
  explicit Error(const std::string& text, Kind kind = Kind::value)
      : std::runtime_error((kind == Kind::type ? "TypeError: " : "") + text), kind(kind) {}

  // what() without the kind.
  const char* text() const { return what() + (kind == Kind::type ? sizeof("TypeError: ") - 1 : 0); }

  const Kind kind;
};

[[noreturn]] void fail(const char* op, const std::string& rule, const std::string& got,
                       Error::Kind kind = Error::Kind::value);
std::string format_shape(const std::vector<int64_t>& shape);

// An array, as a binding was given it.
struct ArrayView {
  const void* data;  // the first element, in the order of the dimensions; an op may write to it
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // in elements, of either sign
  int64_t element_size;
  std::string dtype;           // as torch and NumPy name it: "float32"
  std::string device = "cpu";  // as torch names it
};

// float32, float16, bfloat16, float64, and uint8 where `allow_uint8`.
DType check_dtype(const char* op, const std::string& name, const ArrayView& array,
                  bool allow_uint8);

// The address of an array that is not empty, which is read or written in place.
void check_aligned(const char* op, const std::string& name, const ArrayView& array);

Reduce parse_reduce(std::string_view word);  // mean or median, of ensemble

// What ensemble, ensemble_moments and accumulate_* are given alike. The lists have whatever length
// the caller passed.
struct EnsembleInputs {
  ArrayView tokens;                  // [V, B, N, C]
  ArrayView offsets;                 // [V, 2]
  std::optional<ArrayView> weights;  // [V]
  const std::vector<int64_t>&grid, &patch, &stride;
  std::string_view upsample, border;
};

// One such call, after the rules. It owns what `args` points to, except the arrays. Where offsets
// or weights lie on a device, their values are not validated, and the pointer in `args` is null.
struct CheckedEnsemble {
  const char* op;
  ArrayView tokens;
  EnsembleArgs args{};
  std::vector<int64_t> out_shape;    // [B, C, H', W']
  std::vector<int64_t> out_strides;  // of a new result, in elements: channels last

  // `op` names the operator in messages. A `stream` adds up the weights of its chunks; of one call
  // only their ratios matter. `least`: views.
  CheckedEnsemble(const char* op, const EnsembleInputs& given, Reduce reduce, bool stream = false,
                  int64_t least = 1);
  CheckedEnsemble(const CheckedEnsemble&) = delete;
  CheckedEnsemble& operator=(const CheckedEnsemble&) = delete;

  // New memory of out_shape and out_strides; `variance` of moments only.
  void set_result(void* out, void* variance = nullptr);
  // Memory of the caller, of any strides.
  void set_out(const ArrayView& out);
  // The state of a stream, in the order of state_names(): mean [B, C, H', W'] and, of moments, var
  // of the same strides, or of a median window [kWindowPlanes, B, C, H', W']; last what each cell
  // has got, [H', W'] in float64.
  void set_state(const std::vector<ArrayView>& state);
  std::vector<const char*> state_names() const;

 private:
  std::vector<double> offsets_, weights_;
};

// One call of shift or of its gradient, after the rules. The caller sets args.image and args.out.
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

// What windows and its gradients are given alike.
struct WindowsInputs {
  ArrayView image;    // [B, C, H, W]
  ArrayView centers;  // [B, N, 2]
  const std::vector<int64_t>& size;
  std::optional<ArrayView> scale;  // [2] or [B, N, 2]
  std::string_view padding;
};

// One such call, after the rules. The caller sets args.out.
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
