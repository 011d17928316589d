// Blocks of channels in registers: loads, stores and weighted sums.
//
// per_instruction_set.cpp compiles this header, and the other ones that end in -inl.h, once for
// each instruction set, with other flags. Everything in them, and everything they call, has
// internal linkage: a template or inline function with one name in all the objects would be merged
// by the linker, and the copy it kept could hold instructions that the processor lacks. So no std::
// templates and no functions of other headers but small ones that are inlined (median_network.h,
// running_median.h); plan.h has plain structs. CI looks for such names.
#pragma once
#include "plan.h"
#include "simd.h"

namespace srt::cpu {
namespace {

// Four vectors of channels at a time: independent sums enough to hide the latency of an add, with
// registers left on every instruction set.
constexpr int kVectors = 4;
constexpr int64_t kBlockBytes = kVectors * kVectorBytes;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// An array in the scratch that begins at `base`.
template <class T>
inline T* in(char* base, const ScratchArray<T>& array) {
  return reinterpret_cast<T*>(base + array.offset);
}

// Loops over vectors that stay in registers are unrolled, and what they are passed to is inlined:
// an index that is not constant would put the array into memory.
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

template <int N, class T, class V>
SRT_INLINE void load_block(const T* from, int64_t stride, int64_t n, V (&value)[N]) {
  constexpr int lanes = kLanes<typename AccumulatorOf<T>::type>;
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) {
    if (v * lanes >= n) break;
    value[v] = load_part(from + v * lanes * stride, stride, least(n - v * lanes, lanes));
  }
}

// A block of n channels, or its first n and then zeros.
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

// bfloat16 that is read in pairs of vectors: see load_pair.
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

// The next block of N channels, or one behind it: two cache lines ahead at least.
template <int N, class T>
SRT_INLINE void prefetch_next(const T* p) {
  constexpr size_t line = 64, block = N * sizeof(T), ahead = block < 2 * line ? 2 * line : block;
  const char* const bytes = reinterpret_cast<const char*>(p) + ahead;
#pragma GCC unroll 4
  for (size_t i = 0; i < block; i += line) __builtin_prefetch(bytes + i);
}

// A whole block; bfloat16 from pairs of vectors, which must be finite.
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

// The sums of a tile of X outputs that stay in registers, by V vectors of channels.
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

// Calls body(how many vectors n channels take: half a block or a whole one).
template <class Acc, class Body>
SRT_INLINE void with_vectors(int64_t n, Body&& body) {
  n <= kVectors / 2 * kLanes<Acc> ? body(Constant<kVectors / 2>{}) : body(Constant<kVectors>{});
}

// Calls body(the outputs of a tile, as a constant).
template <class Body>
SRT_INLINE auto with_tile(int64_t tile, Body&& body) {
  if constexpr (kMaxTile >= 8) {
    if (tile == 8) return body(Constant<8>{});
  }
  if (tile == 4) return body(Constant<4>{});
  if (tile == 2) return body(Constant<2>{});
  return body(Constant<1>{});
}

// sum[i] = the sum over k < count of weight[k * pitch + i] * the n channels from at[k] * scale on;
// 0 in lanes past n. `kExact`, of one output: without the inputs of weight 0, which may be not
// finite. `kFar`: the inputs are not in the cache.
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

// Sums whose squares add up to less than this are below 2^63 (in float64 2^511). What the weights
// of the other axis make of them is finite, too. Larger sums are made again, exactly.
template <class Acc>
constexpr Acc kMaxSumOfSquares = static_cast<Acc>(sizeof(Acc) == 4 ? 0x1p126 : 0x1p1022);

// The sums of X outputs over n channels, from `to` on and `row` apart, with zeros up to a whole
// block; the inputs are those of sum_inputs. Adds their squares to `squares`.
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
      Vec<Acc> own = {};  // one sum over all blocks would make each wait for the one before
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
