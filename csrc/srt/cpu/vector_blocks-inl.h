// Blocks of channels in registers: loads, stores, and the weighted sums of which all reductions are
// built.
//
// Rules for this file and all others that end in -inl.h. per_instruction_set.cpp compiles them once
// for each instruction set, with different compiler flags. Everything in them, and everything that
// they call, must have internal linkage. Otherwise the linker would merge templates and inline
// functions of the same name, and the copy that it keeps could contain instructions that the
// processor does not support. So these files use no std:: templates, and from other headers only
// plain structs (plan.h) and small functions that are always inlined (median_network.h,
// running_median.h). CI checks the symbols of the objects.
#pragma once
#include "plan.h"
#include "simd.h"

namespace srt::cpu {
namespace {

// Vectors of channels that are summed at a time: enough independent sums to hide the latency of an
// add, and few enough to leave free registers on every instruction set.
constexpr int kVectors = 4;
constexpr int64_t kBlockBytes = kVectors * kVectorBytes;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The address of an array in the scratch memory at `base`.
template <class T>
inline T* in(char* base, const ScratchArray<T>& array) {
  return reinterpret_cast<T*>(base + array.offset);
}

// Loops over arrays of vectors are unrolled, and functions that receive such arrays are inlined: an
// index that is not a constant would move the array from registers to memory.
//
// Stores the first n channels of a block, `stride` elements apart.
template <int N, class T, class V>
SRT_INLINE void store_block(T* to, int64_t stride, int64_t n, const V (&value)[N]) {
  constexpr int lanes = kLanes<typename AccumulatorOf<T>::type>;
  if (n >= N * lanes && stride == 1) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) store(to + v * lanes, value[v]);
    return;
  }
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    if (v * lanes >= n) break;
    store_part(to + v * lanes * stride, stride, least(n - v * lanes, lanes), value[v]);
  }
}

// Loads the first n channels of a block, `stride` elements apart. Other vectors keep their value.
template <int N, class T, class V>
SRT_INLINE void load_block(const T* from, int64_t stride, int64_t n, V (&value)[N]) {
  constexpr int lanes = kLanes<typename AccumulatorOf<T>::type>;
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    if (v * lanes >= n) break;
    value[v] = load_part(from + v * lanes * stride, stride, least(n - v * lanes, lanes));
  }
}

// Loads a block of channels. If n is less than a block, the rest is filled with zeros.
template <int N, class T, class V>
SRT_INLINE void load_inputs(const T* from, int64_t n, V (&value)[N]) {
  constexpr int lanes = kLanes<typename AccumulatorOf<T>::type>;
  if (n >= N * lanes) {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) value[v] = load(from + v * lanes);
  } else {
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) value[v] = V{};
    load_block(from, 1, n, value);
  }
}

// bfloat16 that is loaded as vectors of even and odd channels (load_pair).
struct PairedBFloat16 : BFloat16 {};
template <int N>
SRT_INLINE void load_inputs(const PairedBFloat16* from, int64_t n, Vec<float> (&value)[N]) {
  static_assert(N % 2 == 0);
  constexpr int lanes = kLanes<float>;
#pragma GCC unroll 2
  for (int v = 0; v < N; v += 2) {
    const int64_t rest = n - v * lanes;
    if (rest >= 2 * lanes) {
      load_pair(from + v * lanes, value[v], value[v + 1]);
    } else if (rest > 0) {
      load_pair_part(from + v * lanes, rest, value[v], value[v + 1]);
    } else {
      value[v] = value[v + 1] = Vec<float>{};
    }
  }
}

// Prefetches the next block of N channels, but at least two cache lines ahead.
template <int N, class T>
SRT_INLINE void prefetch_next(const T* p) {
  constexpr size_t line = 64, block = N * sizeof(T), ahead = block < 2 * line ? 2 * line : block;
  const char* const bytes = reinterpret_cast<const char*>(p) + ahead;
#pragma GCC unroll 4
  for (size_t i = 0; i < block; i += line) __builtin_prefetch(bytes + i);
}

// Stores a whole block. For bfloat16, the vectors hold even and odd channels and must be finite.
template <int N, class T, class V>
SRT_INLINE void store_whole(T* to, const V (&value)[N], bool past_cache) {
  constexpr int lanes = kLanes<typename AccumulatorOf<T>::type>;
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    if (past_cache) {
      store_past_cache(to + v * lanes, value[v]);
    } else {
      store(to + v * lanes, value[v]);
    }
  }
}
template <int N>
SRT_INLINE void store_whole(BFloat16* to, const Vec<float> (&value)[N], bool past_cache) {
#pragma GCC unroll 2
  for (int v = 0; v < N; v += 2) {
    const VecU32 bits = pair_bits(value[v], value[v + 1]);
    BFloat16* const p = to + v * kLanes<float>;
    if (past_cache) {
      stream(p, bits);
    } else {
      std::memcpy(p, &bits, sizeof(bits));
    }
  }
}

// A tile of X outputs by V vectors of channels is summed in registers: kMaxTile limits X, kTileSums
// limits X * V.
#if defined(__AVX512F__)
constexpr int kMaxTile = 8, kTileSums = 16;
#else
constexpr int kMaxTile = 4, kTileSums = 8;
#endif
template <int X>
constexpr int kTileVectors = kTileSums / X < kVectors ? kTileSums / X : kVectors;

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls body with the vectors that n channels need, as a constant: half a block or a whole one.
template <class Acc, class Body>
SRT_INLINE void with_vectors(int64_t n, Body&& body) {
  n <= kVectors / 2 * kLanes<Acc> ? body(Constant<kVectors / 2>{}) : body(Constant<kVectors>{});
}

// Calls body with the outputs of a tile as a constant.
template <class Body>
SRT_INLINE auto with_tile(int64_t tile, Body&& body) {
  if constexpr (kMaxTile >= 8) {
    if (tile == 8) return body(Constant<8>{});
  }
  if (tile == 4) return body(Constant<4>{});
  if (tile == 2) return body(Constant<2>{});
  return body(Constant<1>{});
}

// Computes sum[i], the sum over k < count of weight[k * pitch + i] times the n channels at from +
// at[k] * scale. Lanes past n are 0. `kExact` (one output only) skips inputs of weight 0, which may
// be non-finite. `kFar` means that the inputs are not in the cache, and prefetches.
template <int X, bool kExact, bool kFar, int V, class T, class Acc>
SRT_INLINE void sum_inputs(const T* from, const int64_t* at, int64_t scale, const Acc* weight,
                           int64_t pitch, int64_t count, int64_t n, Vec<Acc> (&sum)[X][V]) {
  static_assert(!kExact || X == 1);
#pragma GCC unroll 8
  for (int i = 0; i < X; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = Vec<Acc>{};
  }
  for (int64_t k = 0; k < count; ++k) {
    if (kExact && weight[k * pitch] == 0) continue;
    const T* const p = from + at[k] * scale;
    Vec<Acc> in[V];
    load_inputs(p, n, in);
    if constexpr (kFar) prefetch_next<V * kLanes<Acc>>(p);
#pragma GCC unroll 8
    for (int i = 0; i < X; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += weight[k * pitch + i] * in[v];
    }
  }
}

// If the squares of the sums add up to less than this, each sum is below 2^63 (2^511 in float64),
// so that the weighted sums along the other axis are finite, too. Otherwise the sums are computed
// again by the exact path.
template <class Acc>
constexpr Acc kMaxSumOfSquares = static_cast<Acc>(sizeof(Acc) == 4 ? 0x1p126 : 0x1p1022);

// Stores the sums of X outputs over n channels at `to`, `row` elements apart, padded with zeros to
// a whole block. The inputs are described as in sum_inputs. Adds the squares of the sums to
// `squares`.
template <int X, bool kExact, class T, class Acc>
SRT_INLINE void store_sums(const T* from, const int64_t* at, const Acc* weight, int64_t pitch,
                           int64_t count, int64_t n, Acc* to, int64_t row, Vec<Acc>& squares) {
  constexpr int V = kTileVectors<X>;
  constexpr int64_t block = V * kLanes<Acc>, whole = kBlockBytes / sizeof(Acc);
  const int64_t padded = (n + whole - 1) / whole * whole;
  for (int64_t c = 0; c < padded; c += block) {
    Vec<Acc> sum[X][V];
    sum_inputs<X, kExact, true>(from + c, at, 1, weight, pitch, count, n - c, sum);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec<Acc> own = {};  // a single sum over all blocks would be one long dependency chain
#pragma GCC unroll 8
      for (int i = 0; i < X; ++i) {
        store(to + i * row + c + v * kLanes<Acc>, sum[i][v]);
        own += sum[i][v] * sum[i][v];
      }
      squares += own;
    }
  }
}

}  // namespace
}  // namespace srt::cpu
