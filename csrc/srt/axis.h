// One axis (y or x) of one view as a small table. For each output cell it holds the tokens that the
// cell reads, their weights summed over the pixels of the cell, and the number of pixels that count
// in the mean. Upsampling, border and stride are resolved here, once per call and distinct offset,
// so the kernels that read the tables contain no modes. Coordinates are float64; the centre of
// pixel y is y + 0.5. Host and device share this file.
#pragma once
#include <cmath>
#include <cstdint>

#include "types.h"

namespace srt {

// As std::floor, which is a function call if the compiler may not use SSE4.1.
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

  // Tables number the tokens by `place`, which never decreases from pixel to pixel. Place i is
  // token i, except under Border::circular: there the axis is rolled by the offset rounded to whole
  // tokens and extended by one wrapped token at each end.
  SRT_HD bool wraps() const { return border == Border::circular; }
  SRT_HD int64_t places() const { return tokens + (wraps() ? 2 : 0); }
  // The offset rounded to whole tokens: the remainder is in [-patch / 2, patch / 2) pixels. 0
  // unless the border is circular.
  SRT_HD double roll(double offset) const {
    const bool rolls = wraps() && std::fabs(offset) <= static_cast<double>(kMaxOffset);
    return rolls ? floor_of(offset / static_cast<double>(patch) + 0.5) : 0;
  }
  // The token at place 0. The roll is reduced modulo the axis to the number closest to 0, so the
  // result may be negative.
  SRT_HD int64_t start(double offset) const {
    if (!wraps()) return 0;
    int64_t roll_by = static_cast<int64_t>(roll(offset)) % tokens;
    if (roll_by < 0) roll_by += tokens;
    return (2 * roll_by > tokens ? roll_by - tokens : roll_by) - 1;
  }
  // The token at a place, given start().
  SRT_HD int64_t token_at(int64_t start, int64_t place) const {
    int64_t token = start + place;
    if (token < 0) token += tokens;
    while (token >= tokens) token -= tokens;
    return token;
  }

  // Tokens that a cell reads, at most: it spans (stride - 1) / patch tokens, and interpolation adds
  // one at each end.
  SRT_HD int64_t max_taps() const {
    const int64_t taps = stride == 1 ? 2 : (stride - 1) / patch + 3;
    return taps < places() ? taps : places();
  }
};

// How one output pixel reads a view along one axis: the token at place `token` with weight 1 -
// after and the next one with weight `after`.
struct PixelRead {
  bool counts;    // whether the pixel counts in the weight of its cell
  int32_t token;  // a place; -1 if the pixel reads no token
  double after;
  double slope;  // the change of `after` per pixel; 0 at the edges and under nearest
};

// How output pixel y reads a view whose content moved by `offset` pixels. An axis has at most
// kMaxPixels pixels, so places fit 32 bits.
SRT_HD inline PixelRead read_pixel(const Axis& axis, double offset, int64_t y) {
  // CUDA offsets are not validated: one that is not finite or too large covers no pixel.
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

// Visits the tokens that one output cell reads: calls tap(place, weight) for each place of positive
// weight, in ascending order. Returns the number of pixels of the cell that count.
template <class Tap>
SRT_HD int32_t visit_axis_cell(const Axis& axis, double offset, int64_t cell, Tap&& tap) {
  // The places that the pixels of a cell read never decrease. So two running sums in double are
  // enough, for place `at` and the next one, and each weight is rounded only once.
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
  // Taps of weight 0 are omitted: 0 * Inf is NaN, so a non-finite token would reach a cell that
  // does not read it.
  if (here > 0) tap(at, here);
  if (next > 0) tap(at + 1, next);
  return counted;
}

// The tables of one axis for D offsets. A cell reads places first .. first + taps - 1. A weight in
// between can be 0, and readers must skip that place: at patch 1, rounding can step over a token.
template <class Acc>
struct AxisTable {
  int32_t* first;  // [D, cells]
  int32_t* taps;   // [D, cells]; 0 where no pixel of the cell reads a token
  Acc* weight;     // [D, cells, max_taps]
  double* count;   // [D, cells]; pixels of the cell that count
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
