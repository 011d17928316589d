// The inner loops of windows: images [B, C, H, W] and centers [B, N, 2] to windows [B, N, C, Ph,
// Pw], sampled bilinearly. One task computes one window. The pixels and weights of each axis are
// computed once per window and used by all channels; then the window takes the fastest path that
// fits: a copy (all samples are pixels), vectors along rows of consecutive pixels (scale 1, inside
// the image), vectors along dense channels (channels_last), or a general path. Rows are prefetched
// one channel ahead. vector_blocks-inl.h has the rules for code in this file.
#pragma once
#include "plan.h"
#include "simd.h"
#include "vector_blocks-inl.h"

namespace srt::cpu {
namespace {

// One axis of one window. Sample i is the sum over k of weights[k][i] times pixel pixels[k][i]. An
// index of -1 stands for the value 0: a padded zero, or a pixel of weight 0, which must not be
// read.
template <class Acc>
struct WindowAxis {
  int64_t* pixels[2];
  Acc* weights[2];
  int64_t samples;
  bool whole;   // whether all samples are exactly at pixels
  bool padded;  // whether some indices are -1
  int64_t run;  // the first pixel if the pixels are consecutive with equal weights, otherwise -1
};

// The scale of a window along an axis, in pixels per sample.
SRT_INLINE double step_of(const WindowsPlan& plan, int axis, int64_t window) {
  if (plan.scale == nullptr) return 1;
  return plan.scale[(plan.scale_of_each ? 2 * window : 0) + axis];
}
SRT_INLINE double position_of(const WindowsPlan& plan, int axis, int64_t window, int64_t sample) {
  return window_position(plan.centers[2 * window + axis], step_of(plan, axis, window), sample,
                         plan.size[axis]);
}

// Fills one axis of a window. With `kNext`, the second pixel is read even if its weight is 0,
// because derivatives need it.
template <bool kNext, class Acc>
void fill_axis(const WindowsPlan& plan, int axis, int64_t window, char* scratch,
               WindowAxis<Acc>& to) {
  const int64_t pixels = axis == 0 ? plan.height : plan.width;
  to.samples = plan.size[axis];
  for (int k = 0; k < 2; ++k) {
    to.pixels[k] = in(scratch, plan.scratch.axis[axis].pixels) + k * plan.length[axis];
    to.weights[k] = reinterpret_cast<Acc*>(in(scratch, plan.scratch.axis[axis].weights)) +
                    k * plan.length[axis];
  }
  const double step = step_of(plan, axis, window);
  const WindowTap first = window_tap(position_of(plan, axis, window, 0));
  to.whole = true;
  to.padded = false;
  for (int64_t i = 0; i < to.samples; ++i) {
    const WindowTap tap = step == 1 ? WindowTap{first.first + i, first.fraction}
                                    : window_tap(position_of(plan, axis, window, i));
    const bool next = kNext || tap.fraction != 0;
    to.pixels[0][i] = pad_index(tap.first, pixels, plan.padding);
    to.pixels[1][i] = next ? pad_index(tap.first + 1, pixels, plan.padding) : -1;
    to.weights[0][i] = static_cast<Acc>(1 - tap.fraction);
    to.weights[1][i] = static_cast<Acc>(tap.fraction);
    to.whole = to.whole && tap.fraction == 0;
    to.padded = to.padded || to.pixels[0][i] < 0 || to.pixels[1][i] < 0;
  }
  for (int k = 0; k < 2; ++k)  // for whole vectors
    for (int64_t i = 0; i < kLanes<Acc>; ++i) to.pixels[k][to.samples + i] = 0;
  const int64_t last = first.first + to.samples - (kNext || first.fraction != 0 ? 0 : 1);
  to.run = step == 1 && first.first >= 0 && last < pixels ? first.first : -1;
}

// Loads the pixels that the samples of a window read from one row of the image.
template <class T, class Acc>
struct WindowRow {
  const WindowAxis<Acc>& x;
  const T* pixels;
  int64_t step, width;

  // Loads tap k of the samples [j, j + n), at most one vector.
  SRT_INLINE Vec<Acc> load_taps(int k, int64_t j, int64_t n) const {
    constexpr int lanes = kLanes<Acc>;
    if (x.run >= 0 && step == 1) {
      const int64_t first = x.run + k + j;
      return first + lanes <= width ? load(pixels + first)
                                    : load_part(pixels + first, 1, least(n, lanes));
    }
    const int64_t* const at = x.pixels[k] + j;
    if constexpr (sizeof(T) == sizeof(Acc)) {
      // Gathered in registers: loading a vector from elements that were just stored would stall.
      if (!x.padded) {
        Vec<Acc> value;
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) value[i] = pixels[at[i] * step];
        return value;
      }
    }
    T values[lanes] = {};
    for (int64_t i = 0; i < least(n, lanes); ++i)
      if (at[i] >= 0) values[i] = pixels[at[i] * step];
    return load(values);
  }
};

// The address of the pixel that the first sample of a window reads, clamped to the image.
template <class T>
SRT_INLINE const T* corner_of(const WindowsPlan& plan, int64_t window) {
  const T* at = static_cast<const T*>(plan.image) + window / plan.count * plan.image_strides[0];
  for (int axis = 0; axis < 2; ++axis) {
    const double last = static_cast<double>((axis == 0 ? plan.height : plan.width) - 1);
    const double position = position_of(plan, axis, window, 0);
    const double pixel = position < 0 ? 0 : position > last ? last : position;
    at += static_cast<int64_t>(pixel) * plan.image_strides[2 + axis];
  }
  return at;
}

// Prefetches rows of the image. Rows are far apart in memory, so each would be a cache miss. A row
// is prefetched while the previous channel is processed; the rows of the first channel of a window
// are prefetched during the last channel of the previous window, assuming the same shape.
template <class T, class Acc>
struct RowsAhead {
  const WindowAxis<Acc>& y;
  const T* next_window;
  const T* channel;  // the pixel of the first sample, in the next channel
  int64_t channels;  // remaining
  int64_t channel_stride, row_stride, last;

  SRT_INLINE RowsAhead(const WindowsPlan& plan, const WindowAxis<Acc>& y, const WindowAxis<Acc>& x,
                       int64_t window, int64_t end)
      : y(y),
        next_window(corner_of<T>(plan, window + 1 < end ? window + 1 : window)),
        channel(corner_of<T>(plan, window)),
        channels(plan.channels),
        channel_stride(plan.image_strides[1]),
        row_stride(plan.image_strides[2]),
        last((x.pixels[0][x.samples - 1] - x.pixels[0][0]) * plan.image_strides[3]) {}

  SRT_INLINE void next_channel() {
    channel += channel_stride;
    if (--channels == 0) channel = next_window;
  }

  SRT_INLINE void prefetch(int64_t i) const {
    const T* const row = channel + (y.pixels[0][i] - y.pixels[0][0]) * row_stride;
    __builtin_prefetch(row);
    __builtin_prefetch(row + last);
  }
};

// Rows of the image interpolated along x at the samples of one window. The last two rows are kept,
// because consecutive samples along y mostly read them again. With `kSlopes`, the derivative along
// x is stored plan.length[1] elements after the values.
template <class T, class Acc, bool kSlopes>
struct WindowLines {
  const WindowsPlan& plan;
  const WindowAxis<Acc>&y, &x;
  const T* image;
  Acc* lines;       // two rows, then a row of zeros
  int64_t held[2];  // the image rows that are kept

  SRT_INLINE WindowLines(const WindowsPlan& plan, const WindowAxis<Acc>& y,
                         const WindowAxis<Acc>& x, const T* image, char* scratch)
      : plan(plan),
        y(y),
        x(x),
        image(image),
        lines(reinterpret_cast<Acc*>(in(scratch, plan.scratch.lines))),
        held{-1, -1} {
    std::memset(at(2), 0, static_cast<size_t>(2 * plan.length[1]) * sizeof(Acc));
  }

  SRT_INLINE Acc* at(int k) const { return lines + (kSlopes ? 2 * k : k) * plan.length[1]; }

  SRT_INLINE void next_channel() {
    image += plan.image_strides[1];
    held[0] = held[1] = -1;
  }

  // The interpolated row that tap k of sample i along y reads.
  SRT_INLINE const Acc* line(int k, int64_t i) {
    const int64_t row = y.pixels[k][i];
    if (row < 0) return at(2);
    if (held[0] == row) return at(0);
    if (held[1] == row) return at(1);
    const int to = held[0] == y.pixels[1 - k][i] ? 1 : 0;
    held[to] = row;
    interpolate(image + row * plan.image_strides[2], at(to));
    return at(to);
  }

  SRT_INLINE void interpolate(const T* row, Acc* to) const {
    const WindowRow<T, Acc> from{x, row, plan.image_strides[3], plan.width};
    for (int64_t j = 0; j < x.samples; j += kLanes<Acc>) {
      Vec<Acc> value = from.load_taps(0, j, x.samples - j);
      if (kSlopes || !x.whole) {
        const Vec<Acc> right = from.load_taps(1, j, x.samples - j);
        if (kSlopes) store(to + plan.length[1] + j, right - value);
        const Vec<Acc> weight = load(x.weights[1] + j);
        Vec<Acc> second = weight * right;
        if (kSlopes) second = weight == 0 ? Vec<Acc>{} : second;  // 0 * Inf
        value = load(x.weights[0] + j) * value + second;
      }
      store(to + j, value);
    }
  }
};

// Copies a window whose samples are all exactly at pixels, bit for bit.
template <class T, class Acc>
void copy_window(const WindowsPlan& plan, const WindowAxis<Acc>& y, const WindowAxis<Acc>& x,
                 const T* image, const RowsAhead<T, Acc>& ahead, T* out) {
  const int64_t step = plan.image_strides[3];
  for (int64_t i = 0; i < y.samples; ++i, out += x.samples) {
    ahead.prefetch(i);
    const T* const row = image + y.pixels[0][i] * plan.image_strides[2];
    if (y.pixels[0][i] < 0) {
      std::memset(static_cast<void*>(out), 0, static_cast<size_t>(x.samples) * sizeof(T));
    } else if (x.run >= 0 && step == 1) {
      std::memcpy(static_cast<void*>(out), row + x.run, static_cast<size_t>(x.samples) * sizeof(T));
    } else {
      for (int64_t j = 0; j < x.samples; ++j)
        out[j] = x.pixels[0][j] < 0 ? T{} : row[x.pixels[0][j] * step];
    }
  }
}

// The general path: one channel after the other, vectors along the rows of the window. A vector
// that is longer than the rest of a row overwrites the start of the next row, which is written
// later.
template <class T, class Acc>
void sample_rows(const WindowsPlan& plan, const WindowAxis<Acc>& y, const WindowAxis<Acc>& x,
                 const T* image, RowsAhead<T, Acc>& ahead, T* out, char* scratch) {
  constexpr int lanes = kLanes<Acc>;
  WindowLines<T, Acc, false> rows(plan, y, x, image, scratch);
  const T* const end = out + plan.channels * y.samples * x.samples;
  for (int64_t c = 0; c < plan.channels; ++c, rows.next_channel()) {
    ahead.next_channel();
    for (int64_t i = 0; i < y.samples; ++i, out += x.samples) {
      ahead.prefetch(i);
      const Acc *const upper = rows.line(0, i), *const lower = rows.line(1, i);
      const Acc above = y.weights[0][i], below = y.weights[1][i];
      for (int64_t j = 0; j < x.samples; j += lanes) {
        const Vec<Acc> value = above * load(upper + j) + below * load(lower + j);
        if (end - (out + j) >= lanes) {
          store(out + j, value);
        } else {
          store_part(out + j, 1, least(x.samples - j, lanes), value);
        }
      }
    }
  }
}

// As sample_rows, for a window whose columns are a run of dense pixels inside the image. The rows
// of a block of columns stay in registers. Blocks are processed from right to left: a vector that
// is longer than the rest of a row overwrites the start of the next row, which is written later.
template <bool kWhole, class T, class Acc>
void sample_run(const WindowsPlan& plan, const WindowAxis<Acc>& y, const WindowAxis<Acc>& x,
                const T* image, RowsAhead<T, Acc>& ahead, T* out) {
  constexpr int lanes = kLanes<Acc>;
  const Acc left = x.weights[0][0], right = x.weights[1][0];
  const int64_t row_stride = plan.image_strides[2];
  const T* const end = out + plan.channels * y.samples * x.samples;
  for (int64_t c = 0; c < plan.channels; ++c, image += plan.image_strides[1]) {
    ahead.next_channel();
    for (int64_t j = (x.samples - 1) / lanes * lanes; j >= 0; j -= lanes) {
      const T* const columns = image + x.run + j;
      const auto row = [&](int64_t r) -> Vec<Acc> {
        if (r < 0) return Vec<Acc>{};
        const T* const from = columns + r * row_stride;
        if (kWhole) return load(from);
        return left * load(from) + right * load(from + 1);
      };
      Vec<Acc> lower = {};
      int64_t held = -1;
      T* to = out + j;
      for (int64_t i = 0; i < y.samples; ++i, to += x.samples) {
        if (j == 0) ahead.prefetch(i);
        const int64_t first = y.pixels[0][i];
        const Vec<Acc> upper = first == held ? lower : row(first);
        held = y.pixels[1][i];
        lower = row(held);
        const Vec<Acc> value = y.weights[0][i] * upper + y.weights[1][i] * lower;
        if (end - to >= lanes) {
          store(to, value);
        } else {
          store_part(to, 1, least(x.samples - j, lanes), value);
        }
      }
    }
    out += y.samples * x.samples;
  }
}

// The pixels that one sample reads, and their weights.
template <class T, class Acc>
struct WindowTaps {
  const T* pixels[4];
  Acc weights[4];
  int count;

  SRT_INLINE WindowTaps(const WindowsPlan& plan, const WindowAxis<Acc>& y, const WindowAxis<Acc>& x,
                        const T* image, int64_t i, int64_t j)
      : count(0) {
    for (int k = 0; k < 4; ++k) {
      const int64_t row = y.pixels[k / 2][i], column = x.pixels[k % 2][j];
      if (row < 0 || column < 0) continue;
      pixels[count] = image + row * plan.image_strides[2] + column * plan.image_strides[3];
      weights[count++] = y.weights[k / 2][i] * x.weights[k % 2][j];
    }
  }

  // Computes n channels starting at c. A single pixel of weight 1 is copied.
  SRT_INLINE void sum(int64_t c, int64_t n, T* to) const {
    constexpr int lanes = kLanes<Acc>;
    if (count == 1 && weights[0] == 1) {
      std::memcpy(static_cast<void*>(to), pixels[0] + c, static_cast<size_t>(n) * sizeof(T));
      return;
    }
    for (int64_t k = 0; k < n; k += lanes) {
      const int64_t part = least(n - k, lanes);
      Vec<Acc> total = {};
      for (int t = 0; t < count; ++t) total += weights[t] * load_part(pixels[t] + c + k, 1, part);
      store_part(to + k, 1, part, total);
    }
  }
};

// Vectors along dense channels. Samples and channels are computed in tiles, which are transposed
// when they are written.
template <class T, class Acc>
void sample_channels(const WindowsPlan& plan, const WindowAxis<Acc>& y, const WindowAxis<Acc>& x,
                     const T* image, T* out, char* scratch) {
  constexpr int64_t tile = WindowsPlan::kTile;
  T* const values = reinterpret_cast<T*>(in(scratch, plan.scratch.tile));
  const int64_t samples = y.samples * x.samples;
  if (samples == 1) {
    WindowTaps<T, Acc>(plan, y, x, image, 0, 0).sum(0, plan.channels, out);
    return;
  }
  for (int64_t i = 0; i < y.samples; ++i) {
    for (int64_t begin = 0; begin < x.samples; begin += tile) {
      const int64_t columns = least(x.samples - begin, tile);
      for (int64_t c = 0; c < plan.channels; c += tile) {
        const int64_t n = least(plan.channels - c, tile);
        for (int64_t j = 0; j < columns; ++j)
          WindowTaps<T, Acc>(plan, y, x, image, i, begin + j).sum(c, n, values + j * tile);
        T* const to = out + c * samples + i * x.samples + begin;
        for (int64_t k = 0; k < n; ++k)
          for (int64_t j = 0; j < columns; ++j) to[k * samples + j] = values[j * tile + k];
      }
    }
  }
}

// Whether sample_channels is used: channels are dense and pixels are not.
SRT_INLINE bool has_dense_channels(const WindowsPlan& plan) {
  return plan.image_strides[1] == 1 && plan.image_strides[3] != 1 && plan.channels >= 8;
}

// Whether whole vectors can be loaded from the rows of the window, including past its last sample.
template <class Acc>
SRT_INLINE bool reads_whole_vectors(const WindowsPlan& plan, const WindowAxis<Acc>& x) {
  constexpr int lanes = kLanes<Acc>;
  return plan.image_strides[3] == 1 && x.run >= 0 &&
         x.run + (x.samples + lanes - 1) / lanes * lanes + 1 <= plan.width;
}

template <class T>
void windows(const WindowsPlan& plan, int64_t begin, int64_t end, void* memory) {
  using Acc = typename AccumulatorOf<T>::type;
  char* const scratch = static_cast<char*>(memory);
  const int64_t elements = plan.channels * plan.size[0] * plan.size[1];
  const bool dense_channels = has_dense_channels(plan);
  for (int64_t window = begin; window < end; ++window) {
    WindowAxis<Acc> y, x;
    fill_axis<false>(plan, 0, window, scratch, y);
    fill_axis<false>(plan, 1, window, scratch, x);
    const T* const image =
        static_cast<const T*>(plan.image) + window / plan.count * plan.image_strides[0];
    T* const out = static_cast<T*>(plan.out) + window * elements;
    RowsAhead<T, Acc> ahead(plan, y, x, window, end);
    if (dense_channels) {
      sample_channels(plan, y, x, image, out, scratch);
    } else if (y.whole && x.whole) {
      for (int64_t c = 0; c < plan.channels; ++c) {
        ahead.next_channel();
        copy_window(plan, y, x, image + c * plan.image_strides[1], ahead,
                    out + c * y.samples * x.samples);
      }
    } else if (reads_whole_vectors(plan, x)) {
      (x.whole ? sample_run<true, T, Acc> : sample_run<false, T, Acc>)(plan, y, x, image, ahead,
                                                                       out);
    } else {
      sample_rows(plan, y, x, image, ahead, out, scratch);
    }
  }
}

}  // namespace
}  // namespace srt::cpu
