// The lower median of N values in registers, by a network of comparators: Batcher's merge exchange
// (Knuth, The Art of Computer Programming, volume 3, algorithm 5.2.2M), less what does not reach
// the result. 4 values take 7 minima and maxima, 16 take 91, 49 take 578. Host and device share
// this file.
#pragma once
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

#include "types.h"

namespace srt {

// Networks exist for the counts of the usual designs: the presets have 4 views, best:N is used with
// 9 and 16, grid:2, grid:2.5 and grid:3 have 25, 36 and 49, and paper:3 has 50. Other counts are
// filled up with infinities of both signs.
constexpr int kNetworkSizes[] = {4, 9, 16, 25, 36, 49, 50};
constexpr int kLargestNetwork = 50;

// network(N), N the smallest of kNetworkSizes that holds n values; beyond the largest, other().
template <size_t I = 0, class Network, class Other>
auto with_network(int64_t n, Network&& network, Other&& other) {
  if constexpr (I == std::size(kNetworkSizes)) {
    return other();
  } else {
    if (n <= kNetworkSizes[I]) return network(std::integral_constant<int, kNetworkSizes[I]>{});
    return with_network<I + 1>(n, network, other);
  }
}

// value[low] becomes the smaller one of the two and value[high] the larger one, where it is needed.
struct Comparator {
  int16_t low, high;
  bool needs_low, needs_high;
};

template <int N>
struct MedianNetwork {
  static constexpr int kMost = N * 12;  // comparators, more than there are
  Comparator at[kMost]{};
  size_t count = 0;

  constexpr MedianNetwork() {
    int top = 1;
    while (2 * top < N) top *= 2;
    Comparator all[kMost]{};
    int total = 0;
    for (int p = top; p > 0; p /= 2) {
      for (int q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
        for (int i = 0; i + d < N; ++i)
          if ((i & p) == r)
            all[total++] = {static_cast<int16_t>(i), static_cast<int16_t>(i + d), false, false};
        if (q == p) break;
      }
    }
    // Backwards: a comparator is needed if one of its places still is.
    bool needed[N]{};
    needed[(N - 1) / 2] = true;
    for (int i = total - 1; i >= 0; --i) {
      Comparator& c = all[i];
      c.needs_low = needed[c.low];
      c.needs_high = needed[c.high];
      if (c.needs_low || c.needs_high) needed[c.low] = needed[c.high] = true;
    }
    for (int i = 0; i < total; ++i)
      if (all[i].needs_low || all[i].needs_high) at[count++] = all[i];
  }
};

#if defined(__CUDACC__)
#define SRT_UNROLL _Pragma("unroll")
#else
#define SRT_UNROLL _Pragma("GCC unroll 8")
#endif

// `Order` has min(a, b) and max(a, b). On the CPU it is in an anonymous namespace, so that each
// instruction set has its own copy of this code (cpu/vector_blocks-inl.h).
template <int N, class Order, class V>
struct MedianOf {
  static constexpr MedianNetwork<N> network{};

  template <size_t I>
  static SRT_INLINE void compare(V (&value)[N]) {
    constexpr Comparator c = network.at[I];
    const V a = value[c.low], b = value[c.high];
    if constexpr (c.needs_low) value[c.low] = Order::min(a, b);
    if constexpr (c.needs_high) value[c.high] = Order::max(a, b);
  }
  template <size_t... I>
  static SRT_INLINE void run(V (&value)[N], std::index_sequence<I...>) {
    (compare<I>(value), ...);
  }
  static SRT_INLINE V lower(V (&value)[N]) {
    run(value, std::make_index_sequence<network.count>{});
    return value[(N - 1) / 2];
  }
};

// With n values and this many -inf before them, the rest +inf, the lower median of all N is theirs.
SRT_HD constexpr int low_padding(int N, int n) { return (N - 1) / 2 - (n - 1) / 2; }

}  // namespace srt
