// The lower median of a stream in constant memory: the kWindow values around it, in order. Values
// below and above the window are only counted. As long as the median stays inside it is exact;
// where it leaves (a stream that drifts), the window follows it by steps of the mean gap between
// its values. After Munro and Paterson, "Selection and sorting with limited storage", 1980, whose
// window finds the exact median of n values in random order if it holds about sqrt(n) of them; the
// steps beyond are ours. Host and device share this file; V is a number or a vector of them.
#pragma once
#include <cmath>

#include "ensemble.h"
#include "median_network.h"

namespace srt {

// A chunk is added in steps of the golden ratio through its views, which are sorted by dx: in that
// order they would drift. spread_step finds the step, prime to the number of views.
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

// What the number of earlier values decides; the same for all elements of a cell. `Acc` is float or
// double.
template <class Acc>
struct WindowStep {
  Acc rank;   // of the median among the earlier values, from 0
  Acc move;   // 0 or 1: how far its rank moves now
  Acc above;  // values that were in the window or above it, less the window, if none was below it

  explicit SRT_HD WindowStep(double count) {
    const double before = count > 0 ? std::floor((count - 1) / 2) : 0;
    rank = static_cast<Acc>(before);
    move = static_cast<Acc>(std::floor(count / 2) - before);
    above = static_cast<Acc>(count - kWindow);
  }
};

// Adds x. `place` is the position of the median in the window, which starts as +inf; a NaN makes it
// NaN for good. The caller starts it at 0.
template <class V, class Acc>
SRT_INLINE void add_to_window(V (&window)[kWindow], V& place, V x, const WindowStep<Acc>& step) {
  constexpr int last = kWindow - 1;
  const V none = {}, infinity = none + Acc(__builtin_inf());
  const V below = step.rank - place;  // values below the window
  const V above = step.above - below;
  const V target = place + step.move;
  // Adding x moves the median by at most one rank. If the new rank is outside of the window, its
  // value was dropped earlier: it is estimated as the edge of the window plus or minus the mean gap
  // of the window, but not beyond x. If seven equal values have no gap, the dropped ones are taken
  // to lie evenly up to x. (Comparisons are chosen so that a NaN, of an infinite window, changes
  // nothing.)
  const V gap = (window[last] - window[0]) * (Acc{1} / last);
  const V gap_low = gap > Acc{0} ? gap : (window[0] - x) / (below + Acc{1});
  const V gap_high = gap > Acc{0} ? gap : (x - window[last]) / (above + Acc{1});
  const V lost_low = target < Acc{1} ? window[0] - gap_low : -infinity;
  const V lost_high = target > Acc{last} ? window[last] + gap_high : infinity;
  const V lowest = below > Acc{0} ? lost_low : -infinity;
  const V highest = above > Acc{0} ? lost_high : infinity;
  V value = lowest > x ? lowest : x;
  value = highest < value ? highest : value;
  // One of the eight values has to go: x itself if it lies beyond the window and others do so too;
  // otherwise the one whose loss leaves the median nearest to the middle.
  const V middle = none + Acc{kWindow / 2};
  const V if_below = below > Acc{0} ? none : middle;
  const V if_above = above > Acc{0} ? none + Acc{last} : middle;
  const V inside = x > window[last] ? if_above : middle;
  const V most = x < window[0] ? if_below : inside;  // the lowest goes where the target is beyond
  // The eight in order, by two steps that do not wait for each other.
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
