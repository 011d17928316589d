// One axis of one view as a small table: for each output cell, the tokens it reads, their summed
// weights, and how many of its pixels count. Upsampling, border and stride end here; the kernels
// that read the table contain no modes. Host and device share this file.
#pragma once
#include <cmath>
#include <cstdint>

#include "types.h"

namespace srt {

// std::floor, which is a call where the compiler may not use SSE4.1.
SRT_HD inline double floor_of(double x) {
  const double whole = static_cast<double>(static_cast<int64_t>(x));
  return whole > x ? whole - 1 : whole;
}

struct Axis {
  int64_t tokens;  // h or w
  int64_t patch;   // pixels per token
  int64_t stride;  // pixels per output cell; divides tokens * patch
  Upsample upsample;
  Border border;

  SRT_HD int64_t pixels() const { return tokens * patch; }
  SRT_HD int64_t cells() const { return pixels() / stride; }

  // Pixels read tokens by their places, which ascend along the axis. Place i is token i, except
  // under circular: there the tokens are rolled by the whole tokens of the offset, with one more
  // token at each end, wrapped around.
  SRT_HD bool wraps() const { return border == Border::circular; }
  SRT_HD int64_t places() const { return tokens + (wraps() ? 2 : 0); }
  // The whole tokens of an offset: at least -patch / 2 and less than patch / 2 pixels are left.
  SRT_HD double roll(double offset) const {
    const bool rolls = wraps() && std::fabs(offset) <= static_cast<double>(kMaxOffset);
    return rolls ? floor_of(offset / static_cast<double>(patch) + 0.5) : 0;
  }
  // The token of place 0, counted on beyond the ends of the axis: at most half of its length away,
  // so it may be negative.
  SRT_HD int64_t start(double offset) const {
    if (!wraps()) return 0;
    int64_t roll_by = static_cast<int64_t>(roll(offset)) % tokens;
    if (roll_by < 0) roll_by += tokens;
    return (2 * roll_by > tokens ? roll_by - tokens : roll_by) - 1;
  }
  SRT_HD int64_t token_at(int64_t start, int64_t place) const {
    int64_t token = start + place;
    if (token < 0) token += tokens;
    while (token >= tokens) token -= tokens;
    return token;
  }

  // A cell spans (stride - 1) / patch tokens; interpolation adds one at each end.
  SRT_HD int64_t max_taps() const {
    const int64_t taps = stride == 1 ? 2 : (stride - 1) / patch + 3;
    return taps < places() ? taps : places();
  }
};

// What pixel y of a view reads: a token with weight 1 - after, the one behind it with weight after.
struct PixelRead {
  bool counts;    // in the weight of its cell
  int32_t token;  // its place, -1 for none
  double after;
  double slope;  // from pixel to pixel `after` grows by so much; 0 at the edges, and under nearest
};

// `offset`: pixels that the view's content moved. An axis has at most kMaxPixels, so positions fit
// 32 bits.
SRT_HD inline PixelRead read_pixel(const Axis& axis, double offset, int64_t y) {
  // A non-finite offset covers nothing. On CUDA values are not validated.
  if (!(std::fabs(offset) <= static_cast<double>(kMaxOffset))) return {false, -1, 0, 0};
  const double patch = static_cast<double>(axis.patch);
  const bool nearest = axis.upsample == Upsample::nearest;
  if (axis.wraps()) {
    const double p = static_cast<double>(y) + 0.5 + (offset - axis.roll(offset) * patch);
    const double q = p / patch - (nearest ? 0 : 0.5), token = floor_of(q);
    return {true, static_cast<int32_t>(token) + 1, nearest ? 0 : q - token,
            nearest ? 0 : 1 / patch};
  }
  const double last = static_cast<double>(axis.tokens - 1);
  const double p = static_cast<double>(y) + 0.5 + offset;
  const bool covered = p >= 0 && p < static_cast<double>(axis.pixels());
  if (!covered && axis.border != Border::clamp) return {axis.border == Border::zeros, -1, 0, 0};

  const double q = p / patch - (nearest ? 0 : 0.5);
  const double inside = q < 0 ? 0 : (q > last ? last : q);
  const int32_t token = static_cast<int32_t>(inside);
  if (nearest) return {true, token, 0, 0};
  return {true, token, inside - static_cast<double>(token), q < 0 || q >= last ? 0 : 1 / patch};
}

// What one output cell reads. Calls tap(place, weight) for each token of positive weight,
// ascending, and returns the number of pixels that count.
template <class Tap>
SRT_HD int32_t visit_axis_cell(const Axis& axis, double offset, int64_t cell, Tap&& tap) {
  // Pixels of a cell read non-decreasing tokens, so two running sums, for token `at` and the one
  // after it, hold the weights in double and each is rounded once.
  int32_t counted = 0, at = -1;
  double here = 0, next = 0;
  for (int64_t y = cell * axis.stride; y < (cell + 1) * axis.stride; ++y) {
    const PixelRead read = read_pixel(axis, offset, y);
    counted += read.counts;
    if (read.token < 0) continue;
    if (at < 0) at = read.token;
    for (; at < read.token; ++at) {
      if (here > 0) tap(at, here);
      here = next;
      next = 0;
    }
    here += 1 - read.after;
    next += read.after;
  }
  // A tap of weight zero is no tap: it would let a non-finite token reach a cell that ignores it.
  if (here > 0) tap(at, here);
  if (next > 0) tap(at + 1, next);
  return counted;
}

// The tables of one axis for D offsets. A cell reads places first .. first + taps - 1, those of
// weight 0 excepted: with patch 1 the rounding of a coordinate can step over a token.
template <class Acc>
struct AxisTable {
  int32_t* first;  // [D, cells]
  int32_t* taps;   // [D, cells]; 0 where no pixel of the cell reads a token
  Acc* weight;     // [D, cells, max_taps]
  double* count;   // [D, cells], counted pixels
  int64_t cells;
  int64_t max_taps;

  // The weight with which a cell of offset number `d` reads a place.
  SRT_HD Acc weight_of(int64_t d, int64_t cell, int64_t place) const {
    const int64_t slot = d * cells + cell, tap = place - first[slot];
    return tap >= 0 && tap < taps[slot] ? weight[slot * max_taps + tap] : 0;
  }
};

// Fills one cell of the table of offset number `d`.
template <class Acc>
SRT_HD void fill_axis_cell(const Axis& axis, double offset, int64_t d, int64_t cell,
                           const AxisTable<Acc>& table) {
  const int64_t slot = d * table.cells + cell;
  Acc* weight = table.weight + slot * table.max_taps;
  int32_t first = 0, taps = 0;
  const int32_t counted = visit_axis_cell(axis, offset, cell, [&](int32_t place, double value) {
    if (taps == 0) first = place;
    while (first + taps < place) weight[taps++] = 0;
    weight[taps++] = static_cast<Acc>(value);
  });
  table.first[slot] = first;
  table.taps[slot] = taps;
  table.count[slot] = static_cast<double>(counted);
}

}  // namespace srt
