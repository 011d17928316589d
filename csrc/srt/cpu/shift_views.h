// Setup that shift and its gradient share: the taps and the padded source indices of every view,
// with their memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "plan.h"

namespace srt::cpu {

// Positions that four taps read past the last pixel of an axis.
constexpr int64_t kPast = 3;

struct ShiftViews {
  std::vector<ShiftPlan::View> taps;
  std::vector<int64_t> source_y, source_x;

  explicit ShiftViews(const ShiftArgs& args) {
    const int64_t line_y = args.height + kPast, line_x = args.width + kPast;
    source_y.reserve(static_cast<size_t>(args.views * line_y));
    source_x.reserve(static_cast<size_t>(args.views * line_x));
    for (int64_t v = 0; v < args.views; ++v) {
      ShiftPlan::View view{};
      view.y = shift_taps(args.offsets[2 * v], args.interpolation);
      view.x = shift_taps(args.offsets[2 * v + 1], args.interpolation);
      const int64_t positions = args.width + view.x.taps - 1;
      view.inner_begin = std::clamp<int64_t>(-view.x.first, 0, positions);
      view.inner_end = std::clamp<int64_t>(args.width - view.x.first, view.inner_begin, positions);
      for (int64_t m = 0; m < line_y; ++m)
        source_y.push_back(pad_index(view.y.first + m, args.height, args.padding));
      for (int64_t m = 0; m < line_x; ++m)
        source_x.push_back(pad_index(view.x.first + m, args.width, args.padding));
      taps.push_back(view);
    }
  }

  ShiftPlan plan(const ShiftArgs& args) const {
    return {args, taps.data(), source_y.data(), source_x.data()};
  }
};

inline int64_t shift_workers(int64_t rows, const ShiftArgs& args, const Parallel& parallel) {
  return rows * args.width < (1 << 16) ? 1 : parallel.threads;
}

}  // namespace srt::cpu
