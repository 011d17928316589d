// Element types, modes and limits of all kernels, and the parallel runtime that a caller injects.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define SRT_HD __host__ __device__
#define SRT_HD_INLINE __host__ __device__ __forceinline__
#define SRT_INLINE __device__ __forceinline__
#else
#define SRT_HD
#define SRT_HD_INLINE __attribute__((always_inline)) inline
#define SRT_INLINE __attribute__((always_inline)) inline
#endif

namespace srt {

enum class DType : int32_t { f32, f16, bf16, f64, u8 };
enum class Reduce : int32_t { mean, median, moments };
enum class Upsample : int32_t { nearest, bilinear };
enum class Border : int32_t { coverage, zeros, clamp, circular };
enum class Padding : int32_t { zeros, border, reflect, circular };
enum class Interpolation : int32_t { nearest, bilinear, bicubic };

// Storage of the 16-bit types. The arithmetic is in float; each backend has its own conversions.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The accumulator type: double for double, float for all others.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

// Calls body(T{}) with the element type T of `dtype`.
template <class Body>
auto dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f16:
      return body(Half{});
    case DType::bf16:
      return body(BFloat16{});
    case DType::f64:
      return body(double{});
    case DType::u8:
      return body(uint8_t{});
    case DType::f32:
      break;
  }
  return body(float{});
}
// As dispatch_dtype, for floating types only: tokens, and every tensor that has a gradient.
template <class Body>
auto dispatch_floating(DType dtype, Body&& body) {
  return dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same<T, uint8_t>::value) {
      return body(float{});  // unreachable: validation raises an error
    } else {
      return body(element);
    }
  });
}

SRT_HD constexpr int64_t div_up(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Pixels of an axis, at most. It bounds the axis tables and keeps a pixel coordinate exact in every
// type that holds one.
constexpr int64_t kMaxPixels = int64_t{1} << 24;
constexpr int64_t kMaxOffset = int64_t{1} << 20;
// Views of one call, at most. With kMaxPixels and kMaxOffset, it keeps the sizes of tables and
// scratch below 2^63.
constexpr int64_t kMaxViews = int64_t{1} << 20;

// The parallel runtime, injected (torch's, a thread pool, a serial one in tests). `run` calls
// body(begin, end, context) on disjoint ranges that cover [0, n). A body must not throw.
struct Parallel {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  int64_t threads;
  void (*run)(int64_t n, Body body, void* context);
};

}  // namespace srt
