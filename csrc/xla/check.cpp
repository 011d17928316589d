// The argument checks that srt_ext.jax calls when a program is traced, and the version of the
// interface. A check returns null or the message of an error, which is valid until the next check
// of the thread.
#include "handlers.h"

namespace srt::xla {
namespace {

// As in srt_ext/_ffi.py.
struct Array {
  const char* dtype;  // "float32"; null for None
  int64_t element_size, rank;
  const int64_t* shape;
  const double* values;  // null for an array of the program
};

ArrayView view_of(const Array& array) {
  const List shape(array.shape, array.shape + array.rank);
  return {array.values,       shape,       dense_strides(shape),
          array.element_size, array.dtype, array.values ? "cpu" : "xla"};
}

std::optional<ArrayView> optional_view_of(const Array& array) {
  if (!array.dtype) return std::nullopt;
  return view_of(array);
}

template <class Body>
const char* message_of(Body&& body) {
  thread_local std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace
}  // namespace srt::xla

using namespace srt;
using namespace srt::xla;

// `arrays`: tokens, offsets, weights. `pairs`: grid, patch, stride.
SRT_XLA_EXPORT const char* srt_check_ensemble(const char* op, const Array* arrays,
                                              const int64_t* pairs, const char* reduce,
                                              const char* upsample, const char* border) {
  return message_of([&] {
    const bool moments = std::string_view(op) == "ensemble_moments";
    const bool stream = std::string_view(op) == "mean_sums";
    const List grid(pairs, pairs + 2), patch(pairs + 2, pairs + 4), stride(pairs + 4, pairs + 6);
    CheckedEnsemble(op,
                    {view_of(arrays[0]), view_of(arrays[1]), optional_view_of(arrays[2]), grid,
                     patch, stride, upsample, border},
                    moments ? Reduce::moments : parse_reduce(reduce), stream);
  });
}

// `arrays`: image, offsets.
SRT_XLA_EXPORT const char* srt_check_shift(const Array* arrays, const char* padding,
                                           const char* interpolation) {
  return message_of([&] {
    CheckedShift("shift", "image", view_of(arrays[0]), view_of(arrays[1]), padding, interpolation,
                 /*allow_uint8=*/true);
  });
}

// `arrays`: image, centers, scale.
SRT_XLA_EXPORT const char* srt_check_windows(const Array* arrays, const int64_t* size_pair,
                                             const char* padding) {
  return message_of([&] {
    const List size(size_pair, size_pair + 2);
    CheckedWindows(
        "windows",
        {view_of(arrays[0]), view_of(arrays[1]), size, optional_view_of(arrays[2]), padding},
        /*allow_uint8=*/true);
  });
}

// The version of XLA's interface that the handlers were compiled for.
SRT_XLA_EXPORT void srt_interface_version(int64_t* major, int64_t* minor) {
  *major = XLA_FFI_API_MAJOR;
  *minor = XLA_FFI_API_MINOR;
}
