// The sums of the mean along one axis at stride 1, as a walk from pixel to pixel. Under bilinear
// upsampling, the weight of a token is linear in the pixel coordinate except for a kink where a
// view passes the centre of a token; under nearest it is constant except for a jump at the edge of
// a token. The same holds for the sum over all views: it is value + t * slope, where t is the
// distance from the centre of an interval of pixels. The walk changes `value` and `slope` only at
// kinks and where a view starts to count. In between, a pixel costs one multiply-add per channel,
// however many views there are. Host and device share this file.
#pragma once
#include <cstdint>

#include "axis.h"

namespace srt {

// Pixels of an interval: at most 16, and at most one token. The sums restart from 0 in every
// interval, so that neither rounding errors nor a very large token can spread farther.
SRT_HD inline int64_t walk_interval(const Axis& axis) { return axis.patch < 16 ? axis.patch : 16; }

// The distance of pixel y from the centre of its interval.
SRT_HD inline double walk_position(const Axis& axis, int64_t y) {
  const int64_t interval = walk_interval(axis);
  return static_cast<double>(y % interval) - 0.5 * static_cast<double>(interval - 1);
}

// The weights with which a view reads tokens around a pixel, as functions of t: place `token` + 1
// has weight after + t * slope, place `token` has 1 minus that.
struct Line {
  int32_t token;  // -1 for none
  double after, slope;

  SRT_HD double value_of(int32_t i) const {
    return token < 0 ? 0 : (i == token ? 1 - after : (i == token + 1 ? after : 0));
  }
  SRT_HD double slope_of(int32_t i) const {
    return i == token ? -slope : (i == token + 1 ? slope : 0);
  }
};

SRT_HD inline Line line_at(const Axis& axis, double offset, int64_t y) {
  const PixelRead read = read_pixel(axis, offset, y);
  return {read.token, read.after - walk_position(axis, y) * read.slope, read.slope};
}

// Whether a view reads tokens at pixel y - 1 but not at pixel y. There the sums restart from 0,
// too: subtracting a view of a very large weight could leave a rounding error larger than the other
// views.
SRT_HD inline bool stops_at(const Axis& axis, double offset, int64_t y) {
  return y > 0 && read_pixel(axis, offset, y).token < 0 &&
         read_pixel(axis, offset, y - 1).token >= 0;
}

// The step of one view to pixel y: calls tap(place, value, slope) with the change of the value and
// the slope for each token, in ascending order. With `restart` (an interval starts here, or a view
// stops) the sums are 0 before the step.
template <class Tap>
SRT_HD void visit_step(const Axis& axis, double offset, int64_t y, bool restart, Tap&& tap) {
  const Line to = line_at(axis, offset, y);
  Line from{-1, 0, 0};
  if (!restart) {
    const PixelRead before = read_pixel(axis, offset, y - 1);
    if (before.token == to.token && before.slope == to.slope) return;
    from = line_at(axis, offset, y - 1);
  }
  if (from.token < 0 && to.token < 0) return;
  const int32_t first = from.token < 0 ? to.token : from.token;
  const int32_t last = to.token < 0 ? from.token : to.token;
  for (int32_t i = first; i <= last + 1; ++i) {
    const double value = to.value_of(i) - from.value_of(i);
    const double slope = to.slope_of(i) - from.slope_of(i);
    if (value != 0 || slope != 0) tap(i, value, slope);
  }
}

}  // namespace srt
