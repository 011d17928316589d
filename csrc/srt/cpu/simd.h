// Vectors of accumulators, as wide as the registers of the instruction set for which the file is
// compiled, and their loads and stores for every element type. Built on the vector extensions of
// GCC and Clang. vector_blocks-inl.h explains why everything is in an anonymous namespace.
#pragma once
#include <cstdint>
#include <cstring>

#include "../types.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace srt::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class Acc>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Acc));

template <class Acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <class Acc>
using Vec = typename VectorOf<Acc>::type;

typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t VecU8 __attribute__((vector_size(kVectorBytes / 4)));

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Vec<float> load(const float* p) { return read<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return read<Vec<double>>(p); }
inline Vec<float> load(const uint8_t* p) {
  return __builtin_convertvector(__builtin_convertvector(read<VecU8>(p), VecI32), Vec<float>);
}
inline Vec<float> load(const BFloat16* p) {
  return bits_as<Vec<float>>(__builtin_convertvector(read<VecU16>(p), VecU32) << 16);
}

inline void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }
// Rounds half to even and saturates.
inline void store(uint8_t* p, Vec<float> v) {
  const Vec<float> magic = Vec<float>{} + 12582912.0f;  // 1.5 * 2^23: its ulp is 1
  v = (v + magic) - magic;
  v = v < 0.0f ? Vec<float>{} : v;
  v = v > 255.0f ? Vec<float>{} + 255.0f : v;
  const VecU8 bytes = __builtin_convertvector(__builtin_convertvector(v, VecI32), VecU8);
  std::memcpy(p, &bytes, sizeof(bytes));
}
// Rounds each number half to even to its upper 16 bits, which are left in place. A NaN stays NaN
// only if its lower half is 0; this holds for the NaNs that arithmetic produces.
inline VecU32 round_to_upper(Vec<float> v) {
  const VecU32 bits = bits_as<VecU32>(v), even = VecU32{} + 0x7fffu, odd = VecU32{} + 0x8000u;
  return bits + ((bits & 0x10000u) != 0 ? odd : even);
}
// Rounds half to even; a NaN keeps its sign and stays a NaN.
inline void store(BFloat16* p, Vec<float> v) {
  const VecU32 upper = v != v ? bits_as<VecU32>(v) | 0x400000u : round_to_upper(v);
  const VecU16 half = __builtin_convertvector(upper >> 16, VecU16);
  std::memcpy(p, &half, sizeof(half));
}

// Loads two vectors of bfloat16 as one vector of the even and one of the odd channels. This takes
// half the instructions of loading and storing them in order.
inline void load_pair(const BFloat16* p, Vec<float>& even, Vec<float>& odd) {
  const VecU32 both = read<VecU32>(p);
  even = bits_as<Vec<float>>(both << 16);
  odd = bits_as<Vec<float>>(both & 0xffff0000u);
}
// The inverse of load_pair. Rounds half to even; the numbers must be finite.
inline VecU32 pair_bits(Vec<float> even, Vec<float> odd) {
  return (round_to_upper(even) >> 16) | (round_to_upper(odd) & 0xffff0000u);
}
// Loads the first n channels of a pair, where n is less than all; the others are 0.
inline void load_pair_part(const BFloat16* p, int64_t n, Vec<float>& even, Vec<float>& odd) {
  BFloat16 part[2 * kLanes<float>] = {};
#if defined(__AVX512BW__)
  const __mmask32 first = (__mmask32{1} << n) - 1;
  const __m512i both = _mm512_maskz_loadu_epi16(first, p);
  std::memcpy(part, &both, sizeof(part));
#else
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
#endif
  load_pair(part, even, odd);
}
// Interleaves even and odd channels: `even` becomes the first half in order, `odd` the second.
inline void put_in_order(Vec<float>& even, Vec<float>& odd) {
  constexpr int lanes = kLanes<float>;
  float pairs[2][lanes], ordered[2 * lanes];
  store(pairs[0], even);
  store(pairs[1], odd);
  for (int i = 0; i < lanes; ++i) {
    ordered[2 * i] = pairs[0][i];
    ordered[2 * i + 1] = pairs[1][i];
  }
  even = load(ordered);
  odd = load(ordered + lanes);
}

#if defined(__AVX512F__)
inline Vec<float> load(const Half* p) {
  return bits_as<Vec<float>>(_mm512_cvtph_ps(read<__m256i>(p)));
}
inline void store(Half* p, Vec<float> v) {
  const __m256i h = _mm512_cvtps_ph(bits_as<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof(h));
}
#elif defined(__F16C__)
inline Vec<float> load(const Half* p) {
  return bits_as<Vec<float>>(_mm256_cvtph_ps(read<__m128i>(p)));
}
inline void store(Half* p, Vec<float> v) {
  const __m128i h = _mm256_cvtps_ph(bits_as<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof(h));
}
#else
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 31) return bits_as<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_as<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal, exact
  return sign ? -magnitude : magnitude;
}
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {
    // Below 2^-14, the spacing of halves is 2^-24, which is the ulp of a float at 0.5. So adding
    // 0.5 rounds to it.
    const uint32_t steps = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
    return static_cast<uint16_t>(sign | steps);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
// Not inlined: the code is long and is called wherever tokens are read.
__attribute__((noinline)) inline Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = half_to_float(p[i].bits);
  return v;
}
__attribute__((noinline)) inline void store(Half* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
}
#endif

// Stores a vector with a non-temporal store: it bypasses the cache and does not read the line
// first. `p` must be aligned, and whole lines should be written in sequence. The data is visible to
// other threads only after a fence.
template <class V>
inline void stream(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#endif
  std::memcpy(p, &v, sizeof(v));
}
template <class T, class V>
inline void store_past_cache(T* p, V v) {
  typedef uint8_t Bytes
      __attribute__((vector_size(sizeof(T) * kLanes<typename AccumulatorOf<T>::type>)));
  Bytes bytes;
  store(reinterpret_cast<T*>(&bytes), v);
  stream(p, bytes);
}
inline void fence_past_cache() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Whether no lane is NaN. Every lane must be 0 or NaN.
template <class V>
inline bool no_nan(V v) {
  auto sum = v[0];
  for (int i = 1; i < kVectorBytes / static_cast<int>(sizeof(v[0])); ++i) sum += v[i];
  return sum == 0;
}

// Whether all lanes are below a limit; false if a lane is NaN.
template <class V, class Acc>
inline bool all_below(V v, Acc limit) {
  bool below = true;
  for (int i = 0; i < kLanes<Acc>; ++i) below = below && v[i] < limit;
  return below;
}

// Loads the first n lanes; the others are 0.
template <class T>
inline auto load_part(const T* p, int64_t stride, int64_t n) {
  constexpr int all = kLanes<typename AccumulatorOf<T>::type>;
  if (n == all && stride == 1) return load(p);
  T lanes[all] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i * stride];
  return load(lanes);
}
template <class T, class V>
inline void store_part(T* p, int64_t stride, int64_t n, V v) {
  constexpr int all = kLanes<typename AccumulatorOf<T>::type>;
  if (n == all && stride == 1) return store(p, v);
  T lanes[all];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i * stride] = lanes[i];
}

}  // namespace
}  // namespace srt::cpu
