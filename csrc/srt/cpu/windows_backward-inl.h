// The inner loops of the gradients of windows, from the gradient of the windows [B, N, C, Ph, Pw].
//
// windows_backward: to the gradient of the images [B, C, H, W]. One task owns a band of rows of one
// image and some of its channels. It goes through the windows of the image in order, skips those
// that miss the band, and adds the others to sums that stay in the cache. So threads never add to
// the same element, and results are bitwise equal for any number of threads.
//
// windows_points: to the gradients of centers and scale [B, N, 2]. One task sums, over the samples
// of one window, the gradient times the spatial derivative of the image (for the center), and the
// same times the distance of the sample from the center (for the scale).
//
// vector_blocks-inl.h has the rules for code in this file.
#pragma once
#include "plan.h"
#include "simd.h"
#include "vector_blocks-inl.h"
#include "windows-inl.h"

namespace srt::cpu {
namespace {

// Whether a window certainly reads none of the rows [begin, end), decided from its first and last
// sample. Always false for windows that reach beyond the image.
SRT_INLINE bool misses_band(const WindowsPlan& plan, int64_t window, int64_t begin, int64_t end) {
  const double first = position_of(plan, 0, window, 0);
  const double last = position_of(plan, 0, window, plan.size[0] - 1);
  // A position reads pixels less than 1 away, and up to kWholePixel more.
  const double low = (first < last ? first : last) - 1.5;
  const double high = (first < last ? last : first) + 1.5;
  return low >= 0 && high < static_cast<double>(plan.height) &&
         (high < static_cast<double>(begin) || low >= static_cast<double>(end));
}

// One row of the gradient of a window, and the rows of sums to which it is added; null for none.
template <class T, class Acc>
struct SpreadRow {
  const T* grad;
  Acc* to[2];
  Acc weights[2];
};

// Adds a row to consecutive pixels: pixel m receives sample m with the first weight and sample m -
// 1 with the second weight. `line` has free elements before and after the samples.
template <class T, class Acc>
SRT_INLINE void spread_run(const WindowAxis<Acc>& x, const SpreadRow<T, Acc>& row, Acc* line) {
  constexpr int lanes = kLanes<Acc>;
  const int64_t positions = x.samples + (x.whole ? 0 : 1);
  line[-1] = 0;
  store(line + x.samples, Vec<Acc>{});
  for (int64_t j = 0; j < x.samples; j += lanes)
    store(line + j, load_part(row.grad + j, 1, least(x.samples - j, lanes)));
  for (int k = 0; k < 2; ++k) {
    if (row.to[k] == nullptr) continue;
    Acc* const to = row.to[k] + x.run;
    for (int64_t m = 0; m < positions; m += lanes) {
      Vec<Acc> value = x.weights[0][0] * load(line + m);
      if (!x.whole) value += x.weights[1][0] * load(line + m - 1);
      store(to + m, load(to + m) + row.weights[k] * value);
    }
  }
}

// Adds a row to arbitrary pixels, one sample at a time.
template <class T, class Acc>
SRT_INLINE void spread(const WindowAxis<Acc>& x, const SpreadRow<T, Acc>& row) {
  for (int64_t j = 0; j < x.samples; ++j) {
    const Acc value = load_part(row.grad + j, 1, 1)[0];
    for (int k = 0; k < 4; ++k) {
      const int64_t column = x.pixels[k % 2][j];
      if (column >= 0 && row.to[k / 2] != nullptr)
        row.to[k / 2][column] += row.weights[k / 2] * (x.weights[k % 2][j] * value);
    }
  }
}

template <class T>
void windows_backward(const WindowsBackwardPlan& plan, int64_t begin, int64_t end, void* memory) {
  using Acc = typename AccumulatorOf<T>::type;
  char* const scratch = static_cast<char*>(memory);
  Acc* const sums = reinterpret_cast<Acc*>(in(scratch, plan.sums));
  Acc* const line = reinterpret_cast<Acc*>(in(scratch, plan.scratch.lines)) + kBehind;
  const int64_t samples = plan.size[0] * plan.size[1];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / plan.bands / plan.chunks;
    const int64_t first_row = task % plan.bands * plan.band;
    const int64_t rows = least(plan.band, plan.height - first_row);
    const int64_t first_channel = task / plan.bands % plan.chunks * plan.chunk;
    const int64_t channels = least(plan.chunk, plan.channels - first_channel);
    std::memset(sums, 0, static_cast<size_t>(channels * plan.band * plan.pitch) * sizeof(Acc));

    for (int64_t window = b * plan.count; window < (b + 1) * plan.count; ++window) {
      if (misses_band(plan, window, first_row, first_row + rows)) continue;
      WindowAxis<Acc> y, x;
      fill_axis<false>(plan, 0, window, scratch, y);
      fill_axis<false>(plan, 1, window, scratch, x);
      for (int64_t c = 0; c < channels; ++c) {
        const T* const grad = static_cast<const T*>(plan.out) +
                              (window * plan.channels + first_channel + c) * samples;
        for (int64_t i = 0; i < y.samples; ++i) {
          SpreadRow<T, Acc> row{grad + i * x.samples, {}, {}};
          for (int k = 0; k < 2; ++k) {
            const int64_t r = y.pixels[k][i] - first_row;
            if (y.pixels[k][i] >= 0 && r >= 0 && r < rows)
              row.to[k] = sums + (c * plan.band + r) * plan.pitch;
            row.weights[k] = y.weights[k][i];
          }
          if (row.to[0] == nullptr && row.to[1] == nullptr) continue;
          if (x.run >= 0) {
            spread_run(x, row, line);
          } else {
            spread(x, row);
          }
        }
      }
    }

    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t r = 0; r < rows; ++r) {
        const Acc* const from = sums + (c * plan.band + r) * plan.pitch;
        const int64_t plane = b * plan.channels + first_channel + c;
        T* const to =
            static_cast<T*>(plan.grad_image) + (plane * plan.height + first_row + r) * plan.width;
        for (int64_t m = 0; m < plan.width; m += kLanes<Acc>)
          store_part(to + m, 1, least(plan.width - m, kLanes<Acc>), load(from + m));
      }
    }
  }
}

// A row of an image at one vector of columns of a window: the values and the derivatives along x.
template <class Acc>
struct RowPart {
  Vec<Acc> value = {}, slope = {};
};

// Sums over the samples of one channel. value[axis]: the gradient times the derivative along the
// axis. moment[axis]: the same, times the distance of the sample from the center.
template <class T, class Acc>
struct PointSums {
  static constexpr int lanes = kLanes<Acc>;
  const WindowAxis<Acc>&y, &x;
  Acc middle_y, middle_x;
  Vec<Acc> lane, value[2] = {}, moment[2] = {};

  SRT_INLINE PointSums(const WindowAxis<Acc>& y, const WindowAxis<Acc>& x)
      : y(y),
        x(x),
        middle_y(static_cast<Acc>(y.samples - 1) / 2),
        middle_x(static_cast<Acc>(x.samples - 1) / 2) {
    for (int k = 0; k < lanes; ++k) lane[k] = static_cast<Acc>(k);
  }

  // Adds one vector of samples, starting at (i, j). `end` is the end of the gradient of the window.
  SRT_INLINE void add(int64_t i, int64_t j, const RowPart<Acc>& upper, const RowPart<Acc>& lower,
                      const T* grad, const T* end) {
    const Acc above = y.weights[0][i], below = y.weights[1][i];
    const Vec<Acc> given =
        end - grad >= lanes ? load(grad) : load_part(grad, 1, least(x.samples - j, lanes));
    Vec<Acc> along_y = given * (lower.value - upper.value);
    Vec<Acc> along_x = above * upper.slope;
    if (below != 0) along_x += below * lower.slope;
    along_x *= given;
    const Vec<Acc> column = lane + static_cast<Acc>(j);
    if (j + lanes > x.samples) {  // values past the row may be non-finite
      along_y = column < static_cast<Acc>(x.samples) ? along_y : Vec<Acc>{};
      along_x = column < static_cast<Acc>(x.samples) ? along_x : Vec<Acc>{};
    }
    value[0] += along_y;
    value[1] += along_x;
    moment[0] += along_y * (static_cast<Acc>(i) - middle_y);
    moment[1] += along_x * (column - middle_x);
  }
};

template <class V>
SRT_INLINE double total(V v) {
  double sum = 0;
  for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(v[0])); ++i)
    sum += static_cast<double>(v[i]);
  return sum;
}

// Adds one channel from interpolated rows. `end` is the end of the gradient of the window.
template <class T, class Acc>
SRT_INLINE void sum_rows(WindowLines<T, Acc, true>& rows, const RowsAhead<T, Acc>& ahead,
                         const T* grad, const T* end, PointSums<T, Acc>& sums) {
  const WindowAxis<Acc>&y = rows.y, &x = rows.x;
  const int64_t slope = rows.plan.length[1];
  for (int64_t i = 0; i < y.samples; ++i, grad += x.samples) {
    ahead.prefetch(i);
    const Acc *const upper = rows.line(0, i), *const lower = rows.line(1, i);
    for (int64_t j = 0; j < x.samples; j += kLanes<Acc>)
      sums.add(i, j, {load(upper + j), load(upper + slope + j)},
               {load(lower + j), load(lower + slope + j)}, grad + j, end);
  }
}

// Adds one channel of a window whose columns are a run of pixels, as in sample_run. `channel`
// points to the channel of the image.
template <class T, class Acc>
SRT_INLINE void sum_run(const WindowsPlan& plan, const RowsAhead<T, Acc>& ahead, const T* channel,
                        const T* grad, const T* end, PointSums<T, Acc>& sums) {
  const WindowAxis<Acc>&y = sums.y, &x = sums.x;
  const Acc left = x.weights[0][0], right = x.weights[1][0];
  for (int64_t j = 0; j < x.samples; j += kLanes<Acc>) {
    const auto row = [&](int64_t r) -> RowPart<Acc> {
      if (r < 0) return {};
      const T* const from = channel + r * plan.image_strides[2] + x.run + j;
      const Vec<Acc> first = load(from), second = load(from + 1);
      return {right != 0 ? left * first + right * second : left * first, second - first};
    };
    RowPart<Acc> lower;
    int64_t held = -1;
    for (int64_t i = 0; i < y.samples; ++i) {
      if (j == 0) ahead.prefetch(i);
      const RowPart<Acc> upper = y.pixels[0][i] == held ? lower : row(y.pixels[0][i]);
      held = y.pixels[1][i];
      lower = row(held);
      sums.add(i, j, upper, lower, grad + i * x.samples + j, end);
    }
  }
}

// The derivatives of one sample along y and x times its gradient, summed over dense channels.
// `grad` points to channel 0 of the sample; channels are `samples` elements apart.
template <class T, class Acc>
struct SampleSlopes {
  static constexpr int lanes = kLanes<Acc>;
  const T* pixels[2][2];  // null for a padded zero
  Acc rows[2], columns[2];

  SRT_INLINE SampleSlopes(const WindowsPlan& plan, const WindowAxis<Acc>& y,
                          const WindowAxis<Acc>& x, const T* image, int64_t i, int64_t j) {
    for (int k = 0; k < 2; ++k) {
      rows[k] = y.weights[k][i];
      columns[k] = x.weights[k][j];
      for (int m = 0; m < 2; ++m) {
        const int64_t row = y.pixels[k][i], column = x.pixels[m][j];
        const bool exists = row >= 0 && column >= 0;
        pixels[k][m] =
            exists ? image + row * plan.image_strides[2] + column * plan.image_strides[3] : nullptr;
      }
    }
  }

  SRT_INLINE Vec<Acc> pixel(int k, int m, int64_t c, int64_t n) const {
    if (pixels[k][m] == nullptr) return Vec<Acc>{};
    return n >= lanes ? load(pixels[k][m] + c) : load_part(pixels[k][m] + c, 1, n);
  }

  SRT_INLINE void sum(const T* grad, int64_t samples, int64_t channels, double (&along)[2]) const {
    Vec<Acc> sums[2] = {};
    for (int64_t c = 0; c < channels; c += lanes) {
      const int64_t n = least(channels - c, lanes);
      const Vec<Acc> given = load_part(grad + c * samples, samples, n);
      Vec<Acc> value[2][2];
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) value[k / 2][k % 2] = pixel(k / 2, k % 2, c, n);
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {  // skip pixels of weight 0, which may be non-finite
        if (columns[k] != 0) sums[0] += given * (columns[k] * (value[1][k] - value[0][k]));
        if (rows[k] != 0) sums[1] += given * (rows[k] * (value[k][1] - value[k][0]));
      }
    }
    for (int axis = 0; axis < 2; ++axis) along[axis] = total(sums[axis]);
  }
};

// Computes the sums of windows_points for a window of an image with dense channels.
template <class T, class Acc>
SRT_INLINE void sum_channels(const WindowsPlan& plan, const WindowAxis<Acc>& y,
                             const WindowAxis<Acc>& x, const T* image, const T* grad,
                             double (&value)[2], double (&moment)[2]) {
  const int64_t samples[2] = {y.samples, x.samples};
  for (int64_t i = 0; i < y.samples; ++i) {
    for (int64_t j = 0; j < x.samples; ++j, ++grad) {
      const int64_t at[2] = {i, j};
      double along[2];
      SampleSlopes<T, Acc>(plan, y, x, image, i, j)
          .sum(grad, y.samples * x.samples, plan.channels, along);
      for (int axis = 0; axis < 2; ++axis) {
        const double middle = static_cast<double>(samples[axis] - 1) / 2;
        value[axis] += along[axis];
        moment[axis] += along[axis] * (static_cast<double>(at[axis]) - middle);
      }
    }
  }
}

// Computes the sums of windows_points one channel after the other.
template <class T, class Acc>
SRT_INLINE void sum_planes(const WindowsPlan& plan, const WindowAxis<Acc>& y,
                           const WindowAxis<Acc>& x, const T* image, const T* grad,
                           RowsAhead<T, Acc>& ahead, char* scratch, double (&value)[2],
                           double (&moment)[2]) {
  const int64_t samples = y.samples * x.samples;
  const T* const end = grad + plan.channels * samples;
  const bool run = reads_whole_vectors(plan, x);
  WindowLines<T, Acc, true> rows(plan, y, x, image, scratch);
  for (int64_t c = 0; c < plan.channels; ++c, rows.next_channel(), grad += samples) {
    ahead.next_channel();
    PointSums<T, Acc> sums(y, x);
    if (run) {
      sum_run(plan, ahead, image + c * plan.image_strides[1], grad, end, sums);
    } else {
      sum_rows(rows, ahead, grad, end, sums);
    }
    for (int axis = 0; axis < 2; ++axis) {
      value[axis] += total(sums.value[axis]);
      moment[axis] += total(sums.moment[axis]);
    }
  }
}

template <class T>
void windows_points(const WindowsPointsPlan& plan, int64_t begin, int64_t end, void* memory) {
  using Acc = typename AccumulatorOf<T>::type;
  char* const scratch = static_cast<char*>(memory);
  const int64_t samples = plan.size[0] * plan.size[1];
  for (int64_t window = begin; window < end; ++window) {
    WindowAxis<Acc> y, x;
    fill_axis<true>(plan, 0, window, scratch, y);
    fill_axis<true>(plan, 1, window, scratch, x);
    const T* const image =
        static_cast<const T*>(plan.image) + window / plan.count * plan.image_strides[0];
    const T* const grad = static_cast<const T*>(plan.out) + window * plan.channels * samples;
    RowsAhead<T, Acc> ahead(plan, y, x, window, end);
    double value[2] = {}, moment[2] = {};
    if (has_dense_channels(plan)) {
      sum_channels(plan, y, x, image, grad, value, moment);
    } else {
      sum_planes(plan, y, x, image, grad, ahead, scratch, value, moment);
    }
    for (int axis = 0; axis < 2; ++axis) {
      plan.grad_centers[2 * window + axis] = value[axis];
      plan.grad_scale[2 * window + axis] = moment[axis];
    }
  }
}

}  // namespace
}  // namespace srt::cpu
