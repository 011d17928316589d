// The lower median of a stream of values in constant memory. The state is a window of the kWindow
// sorted values around the median; values below and above the window are only counted. While the
// median stays inside the window, it is exact. If it leaves the window (the stream drifts), the
// window follows in steps of the mean gap between its values, and the result is approximate. After
// Munro and Paterson, "Selection and sorting with limited storage", 1980, whose window finds the
// exact median of n values in random order if it holds about sqrt(n) values; the steps beyond the
// window are not in their paper. Host and device share this file; V is a scalar or a vector.
#pragma once
#include <cmath>

#include "ensemble.h"
#include "median_network.h"

namespace srt {

// Views are sorted by dx, and in that order their values would drift. So the views of a chunk are
// added in steps of about the golden ratio times their number. Returns that step, which is coprime
// to the number of views.
SRT_HD inline int64_t spread_step(int64_t views) {
  const auto golden = static_cast<int64_t>(static_cast<double>(views) * 0.6180339887498949 + 0.5);
  for (int64_t step = golden < 1 ? 1 : golden;; ++step) {
    int64_t a = views, b = step;
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    if (a == 1) return step;
  }
}

// The constants of one update, which depend only on `count`, the number of earlier values. All
// elements of a cell share them. `Acc` is float or double.
template <class Acc>
struct WindowStep {
  Acc rank;   // of the median among the earlier values, from 0
  Acc move;   // 0 or 1: by how much this rank increases now
  Acc above;  // count - kWindow: the values above the window, if none is below it

  explicit SRT_HD WindowStep(double count) {
    const double before = count > 0 ? std::floor((count - 1) / 2) : 0;
    rank = static_cast<Acc>(before);
    move = static_cast<Acc>(std::floor(count / 2) - before);
    above = static_cast<Acc>(count - kWindow);
  }
};

// Adds a value x. `place` is the position of the median in the window. The caller initialises the
// window to +inf and `place` to 0. A NaN makes `place` NaN permanently.
template <class V, class Acc>
SRT_INLINE void add_to_window(V (&window)[kWindow], V& place, V x, const WindowStep<Acc>& step) {
  constexpr int last = kWindow - 1;
  const V none = {}, infinity = none + Acc(__builtin_inf());
  const V below = step.rank - place;  // values below the window
  const V above = step.above - below;
  const V target = place + step.move;
  // Adding x moves the median by at most one rank. If the new rank is outside of the window, its
  // value was dropped earlier. It is estimated as the edge of the window plus or minus the mean gap
  // of the window, but not beyond x. If all seven values are equal, the gap is 0; then the dropped
  // values are assumed to be spaced evenly between the edge and x. The comparisons are written so
  // that a NaN, which an infinite window causes, changes nothing.
  const V gap = (window[last] - window[0]) * (Acc{1} / last);
  const V gap_low = gap > Acc{0} ? gap : (window[0] - x) / (below + Acc{1});
  const V gap_high = gap > Acc{0} ? gap : (x - window[last]) / (above + Acc{1});
  const V lost_low = target < Acc{1} ? window[0] - gap_low : -infinity;
  const V lost_high = target > Acc{last} ? window[last] + gap_high : infinity;
  const V lowest = below > Acc{0} ? lost_low : -infinity;
  const V highest = above > Acc{0} ? lost_high : infinity;
  V value = lowest > x ? lowest : x;
  value = highest < value ? highest : value;
  // One of the eight values must be dropped: x itself if it is beyond an end of the window at which
  // values were dropped before, otherwise the end whose loss keeps the median nearest to the
  // middle.
  const V middle = none + Acc{kWindow / 2};
  const V if_below = below > Acc{0} ? none : middle;
  const V if_above = above > Acc{0} ? none + Acc{last} : middle;
  const V inside = x > window[last] ? if_above : middle;
  const V most = x < window[0] ? if_below : inside;  // if target > most, the lowest is dropped
  // Insertion: `before` and `after` are numbers i and i + 1 of the eight sorted values. Each
  // `after` depends on the old window only, so there is no chain of dependent operations.
  V before = value < window[0] ? value : window[0];
  SRT_UNROLL
  for (int i = 0; i < kWindow; ++i) {
    V after = value;
    if (i < last) after = value < window[i + 1] ? value : window[i + 1];
    after = window[i] > after ? window[i] : after;
    window[i] = target > most ? after : before;
    before = after;
  }
  const V next = target > most ? target - Acc{1} : target;
  place = x == x ? next : x;
}

}  // namespace srt
