// The lower median of N values that are held in registers. A sorting network (Batcher's merge
// exchange; Knuth, The Art of Computer Programming, volume 3, algorithm 5.2.2M) is pruned at
// compile time to the comparators that the median depends on. It has no branches and no memory
// accesses, so every lane of a vector, or thread of a warp, selects independently. 4 values need 7
// minima and maxima, 16 need 91, 49 need 578. Host and device share this file.
#pragma once
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

#include "types.h"

namespace srt {

// Networks exist for the numbers of views of the usual designs: 4 (the presets), 9 and 16 (best:N),
// 25, 36 and 49 (grid:2, grid:2.5, grid:3) and 50 (paper:3). Other numbers are padded with
// infinities of both signs.
constexpr int kNetworkSizes[] = {4, 9, 16, 25, 36, 49, 50};
constexpr int kLargestNetwork = 50;

// Calls network(N) with the smallest N of kNetworkSizes that is at least n, or other() if n is
// larger than all of them.
template <size_t I = 0, class Network, class Other>
auto with_network(int64_t n, Network&& network, Other&& other) {
  if constexpr (I == std::size(kNetworkSizes)) {
    return other();
  } else {
    if (n <= kNetworkSizes[I]) return network(std::integral_constant<int, kNetworkSizes[I]>{});
    return with_network<I + 1>(n, network, other);
  }
}

// Stores the smaller of two values in value[low] and the larger one in value[high]. A result that
// no later step needs is not computed.
struct Comparator {
  int16_t low, high;
  bool needs_low, needs_high;
};

template <int N>
struct MedianNetwork {
  static constexpr int kMost = N * 12;  // an upper bound of the number of comparators
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
    // Backwards: a comparator is needed if a later step needs one of its two results.
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

// `Order` provides min(a, b) and max(a, b). On the CPU, `Order` is in an anonymous namespace, so
// that each instruction set gets its own instantiation of this code (cpu/vector_blocks-inl.h).
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

// How many -inf to add to n values, with +inf for the rest of the N, so that the lower median of
// all N is the lower median of the n values.
SRT_HD constexpr int low_padding(int N, int n) { return (N - 1) / 2 - (n - 1) / 2; }

}  // namespace srt
