// The inner loops of the reductions that need the value of every view in a cell, the median and the
// moments: tokens [V, B, h*w, C] to a field [B, C, H', W'] (or to mean and variance), and the same
// for chunks of a stream. For an output row, combine_views sums the token rows that each view
// reads, once per view. A cell then gathers its V values from these sums along x, a few vectors of
// channels at a time, and a Reduction selects or sums them while they are in the first-level cache.
// Cells that read the same tokens with the same weights in every view are computed once and copied.
// vector_blocks-inl.h has the rules for code in this file.
#pragma once
#include "../running_median.h"
#include "vector_blocks-inl.h"

namespace srt::cpu {
namespace {

// Vectors of channels that are gathered at a time: few enough that the values of 49 views, and the
// two tokens that each view reads, stay in the first-level cache.
constexpr int kValueVectors = 2;

// n channels of the cells [y, y_end) x [x, x_end), which have the same values in every view.
struct CellRun {
  int64_t y, y_end, x, x_end;
  int64_t at;  // offset of the first channel at cell (0, 0) in the output, in elements
  int64_t n;
};

template <class Acc>
struct CellValues {
  Acc* value;             // [count, block]; allocated for kLargestNetwork values or more
  const Acc* share;       // [count], fractions of the total weight
  WindowStep<Acc>* step;  // [count], scratch
  int64_t count;
  double total;  // total weight
  bool finite;   // whether all values are finite
};

// Calls cell(offset in the output, number of the cell) for each cell of a run.
template <class Acc, class Cell>
void for_cells(const PerViewPlan<Acc>& plan, const CellRun& run, Cell&& cell) {
  for (int64_t y = run.y; y < run.y_end; ++y)
    for (int64_t x = run.x; x < run.x_end; ++x)
      cell(run.at + y * plan.out_strides[2] + x * plan.out_strides[3], y * plan.width + x);
}

// ---- the median ---------------------------------------------------------------------------------

template <class V>
struct VectorOrder {
  static SRT_INLINE V min(V a, V b) { return a < b ? a : b; }
  static SRT_INLINE V max(V a, V b) { return a > b ? a : b; }
};

template <class Acc>
constexpr Acc kInfinity = static_cast<Acc>(__builtin_inf());

template <int N, class Acc>
__attribute__((noinline)) Vec<Acc> median_by_network(Acc* values, int64_t count, int64_t step) {
  using V = Vec<Acc>;
  for (int64_t i = count; i < N; ++i) {
    const bool low = i - count < low_padding(N, static_cast<int>(count));
    store(values + i * step, V{} + (low ? -kInfinity<Acc> : kInfinity<Acc>));
  }
  V value[N];
#pragma GCC unroll 64
  for (int i = 0; i < N; ++i) value[i] = load(values + i * step);
  return MedianOf<N, VectorOrder<V>, V>::lower(value);
}

// The median of any number of values. Determines the bits of the result from the highest to the
// lowest; for each bit it counts the values below a candidate. Floating-point numbers are compared
// by integer keys of the same order. Overwrites the values with their keys.
template <class Acc>
__attribute__((noinline)) Vec<Acc> median_by_bits(Acc* values, int64_t count, int64_t step) {
  using Key = decltype(Vec<Acc>{} < Vec<Acc>{});  // integers of the same size
  using One = std::decay_t<decltype(Key{}[0])>;
  constexpr int bits = 8 * sizeof(One);
  constexpr One top = One{1} << (bits - 2);  // the highest bit below the sign
  const auto flip = [](Key bit) { return bit ^ ((bit >> (bits - 1)) & (top - 1 + top)); };
  for (int64_t i = 0; i < count; ++i)
    store(values + i * step, bits_as<Vec<Acc>>(flip(read<Key>(values + i * step))));
  const One rank = static_cast<One>((count - 1) / 2);
  const auto reach = [&](Key key) {  // whether at most `rank` keys are below `key`
    Key below = {};
    for (int64_t i = 0; i < count; ++i) below -= read<Key>(values + i * step) < key;
    return below <= rank;
  };
  Key key = reach(Key{}) ? Key{} : Key{} - top - top;
  for (One bit = top; bit > 0; bit /= 2) key = reach(key | bit) ? key | bit : key;
  return bits_as<Vec<Acc>>(flip(key));
}

// The median of one vector of channels; NaN if one of the values is NaN. Overwrites the values.
template <class Acc>
Vec<Acc> median_of(Acc* value, int64_t count, bool finite) {
  constexpr int64_t block = kValueVectors * kLanes<Acc>;
  Vec<Acc> poison = {};
  for (int64_t i = 0; !finite && i < count; ++i) {
    const Vec<Acc> x = load(value + i * block);
    poison = x != x ? x : poison;
  }
  const Vec<Acc> median = with_network(
      count, [&](auto n) { return median_by_network<n>(value, count, block); },
      [&] { return median_by_bits(value, count, block); });
  return poison != poison ? poison : median;
}

template <class Out, class Acc>
struct Median {
  static void reduce(const PerViewPlan<Acc>& plan, const CellRun& run,
                     const CellValues<Acc>& values) {
    constexpr int lanes = kLanes<Acc>;
    Vec<Acc> result[kValueVectors] = {};
    for (int v = 0; values.count > 0 && v < kValueVectors && v * lanes < run.n; ++v)
      result[v] = median_of(values.value + v * lanes, values.count, values.finite);
    Out* const out = static_cast<Out*>(plan.out);
    for_cells(plan, run, [&](int64_t at, int64_t) {
      store_block(out + at, plan.out_strides[1], run.n, result);
    });
  }
};

template <class Acc>
struct StreamMedian {
  static void reduce(const PerViewPlan<Acc>& plan, const CellRun& run,
                     const CellValues<Acc>& values) {
    constexpr int lanes = kLanes<Acc>, block = kValueVectors * lanes;
    const int64_t count = values.count, stride = plan.out_strides[1];
    if (count == 0) return;
    for_cells(plan, run, [&](int64_t at, int64_t cell) {
      const double before = plan.total_weight[cell];  // views
      for (int64_t i = 0; i < count; ++i)
        values.step[i] = WindowStep<Acc>(before + static_cast<double>(i));
      Acc* const state = static_cast<Acc*>(plan.out) + at;
      Vec<Acc> planes[kWindowPlanes][kValueVectors] = {};
      for (int i = 0; i < kWindowPlanes; ++i) {
        if (before > 0) {
          load_block(state + i * plan.plane_stride, stride, run.n, planes[i]);
        } else if (i < kWindow) {
          for (int v = 0; v < kValueVectors; ++v) planes[i][v] += kInfinity<Acc>;
        }
      }
      // Each vector has its own window, so that their dependency chains can overlap.
      Vec<Acc> window[kValueVectors][kWindow], place[kValueVectors];
      for (int v = 0; v < kValueVectors; ++v) {
        for (int i = 0; i < kWindow; ++i) window[v][i] = planes[i][v];
        place[v] = planes[kWindow][v];
      }
      for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kValueVectors; ++v)
          add_to_window(window[v], place[v], load(values.value + i * block + v * lanes),
                        values.step[i]);
      }
      for (int v = 0; v < kValueVectors; ++v) {
        for (int i = 0; i < kWindow; ++i) planes[i][v] = window[v][i];
        planes[kWindow][v] = place[v];
      }
      for (int i = 0; i < kWindowPlanes; ++i)
        store_block(state + i * plan.plane_stride, stride, run.n, planes[i]);
    });
  }
};

// ---- the moments --------------------------------------------------------------------------------

// Mean and variance of the values of a cell, in two passes.
template <class Acc>
void moments_of(const CellValues<Acc>& values, Vec<Acc> (&mean)[kValueVectors],
                Vec<Acc> (&variance)[kValueVectors]) {
  constexpr int lanes = kLanes<Acc>, block = kValueVectors * lanes;
  for (int v = 0; v < kValueVectors; ++v) {
    const Acc* const value = values.value + v * lanes;
    Vec<Acc> sum = {}, squares = {}, rest = {};
    for (int64_t i = 0; i < values.count; ++i) sum += values.share[i] * load(value + i * block);
    for (int64_t i = 0; i < values.count; ++i) {
      const Vec<Acc> from_mean = load(value + i * block) - sum;
      const Vec<Acc> part = values.share[i] * from_mean;
      rest += part;  // the rounding error of the mean
      squares += part * from_mean;
    }
    squares -= rest * rest;
    mean[v] = sum;
    variance[v] = squares < Acc{0} ? Vec<Acc>{} : squares;
  }
}

// In a stream, the state and the chunk are combined as two samples are (Chan, Golub and LeVeque
// 1979).
template <class Out, class Acc>
struct Moments {
  static void reduce(const PerViewPlan<Acc>& plan, const CellRun& run,
                     const CellValues<Acc>& values) {
    const bool stream = plan.total_weight != nullptr;
    if (stream && values.count == 0) return;
    Vec<Acc> mean[kValueVectors] = {}, variance[kValueVectors] = {};
    moments_of(values, mean, variance);
    const int64_t stride = plan.out_strides[1];
    for_cells(plan, run, [&](int64_t at, int64_t cell) {
      Out* const state[] = {static_cast<Out*>(plan.out) + at,
                            static_cast<Out*>(plan.variance) + at};
      const double before = stream ? plan.total_weight[cell] : 0;
      const double chunk = plan.scale * values.total;
      const Acc keep = before > 0 ? static_cast<Acc>(before / (before + chunk)) : 0;
      if (keep == 0) {
        store_block(state[0], stride, run.n, mean);
        store_block(state[1], stride, run.n, variance);
        return;
      }
      const Acc added = static_cast<Acc>(chunk / (before + chunk));
      if (added == 0) return;  // below the precision of the state
      Vec<Acc> old_mean[kValueVectors] = {}, old_variance[kValueVectors] = {};
      load_block(state[0], stride, run.n, old_mean);
      load_block(state[1], stride, run.n, old_variance);
      for (int v = 0; v < kValueVectors; ++v) {
        const Vec<Acc> apart = mean[v] - old_mean[v];
        // The first form has the smaller rounding error; the second keeps an infinite mean.
        const Vec<Acc> joined = keep * old_mean[v] + added * mean[v];
        old_mean[v] = apart - apart == Acc{0} ? old_mean[v] + added * apart : joined;
        old_variance[v] =
            keep * old_variance[v] + added * variance[v] + keep * added * apart * apart;
      }
      store_block(state[0], stride, run.n, old_mean);
      store_block(state[1], stride, run.n, old_variance);
    });
  }
};

// ---- the values ---------------------------------------------------------------------------------

// Functions that do not depend on the reduction are not inlined, so that they are compiled only
// once.

// Computes buffer[i], the value of view i for one block of channels starting at `c`. Returns
// whether all values are finite.
template <class Acc>
__attribute__((noinline)) bool gather(const ViewValue<Acc>* values, int64_t count, int64_t chunk,
                                      int64_t c, Acc* buffer) {
  constexpr int lanes = kLanes<Acc>;
  constexpr int64_t block = kValueVectors * lanes;
  Vec<Acc> check = {};
  for (int64_t i = 0; i < count; ++i) {
    Vec<Acc> sum[kValueVectors] = {};
    const Acc* token = values[i].sums + c;
    for (int64_t k = 0; k < values[i].taps; ++k, token += chunk) {
      const Acc weight = values[i].weight[k];
      if (weight == 0) continue;
#pragma GCC unroll 2
      for (int v = 0; v < kValueVectors; ++v) sum[v] += weight * load(token + v * lanes);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kValueVectors; ++v) store(buffer + i * block + v * lanes, sum[v]);
#pragma GCC unroll 2
    for (int v = 0; v < kValueVectors; ++v) check += sum[v] * Acc{0};  // Inf * 0 is NaN
  }
  return no_nan(check);
}

// Sums the token rows that each view reads in output row y, for n channels starting at `tokens`.
// Writes sums [views that count, places_x, chunk], padded with zeros to a whole block.
template <class T, class Acc>
__attribute__((noinline)) void combine_views(const PerViewPlan<Acc>& plan, int64_t y,
                                             const T* tokens, int64_t n, char* base) {
  const int64_t stride_n = plan.token_strides[2];
  Vec<Acc> unused = {};
  Acc* sums = in(base, plan.scratch.sums);
  int64_t* const at = in(base, plan.scratch.at);
  int64_t* const row_of = in(base, plan.scratch.row_of);
  int64_t rows = 0;
  for (int64_t i = 0; i < plan.counted; ++i) {
    const auto& view = plan.counted_views[i];
    const int64_t slot = view.dy * plan.height + y, count = plan.y.taps[slot];
    row_of[i] = -1;
    if (!(plan.y.count[slot] > 0)) continue;
    row_of[i] = rows++;
    const int64_t* const token_y = plan.token_y + view.dy * plan.places_y + plan.y.first[slot];
    const int64_t* const token_x = plan.token_x + view.group * plan.places_x;
    for (int64_t k = 0; k < count; ++k)
      at[k] = view.index * plan.token_strides[0] + token_y[k] * plan.tokens_x * stride_n;
    for (int64_t j = 0; j < plan.places_x; ++j, sums += plan.chunk)
      store_sums<1, true>(tokens + token_x[j] * stride_n, at,
                          plan.y.weight + slot * plan.y.max_taps, 1, count, n, sums, 0, unused);
  }
}

// Collects the views that count in a cell. combine_views must have been called for its row.
template <class Acc>
__attribute__((noinline)) CellValues<Acc> views_of_cell(const PerViewPlan<Acc>& plan, int64_t y,
                                                        int64_t x, char* base) {
  const auto& scratch = plan.scratch;
  const int64_t* const row_of = in(base, scratch.row_of);
  const Acc* const sums = in(base, scratch.sums);
  ViewValue<Acc>* const values = in(base, scratch.values);
  double* const weights = in(base, scratch.weights);
  Acc* const shares = in(base, scratch.shares);
  CellValues<Acc> cell{in(base, scratch.buffer), shares, in(base, scratch.steps), 0, 0, true};
  for (int64_t k = 0; k < plan.counted; ++k) {
    const int64_t i = plan.order ? plan.order[k] : k;
    const auto& view = plan.counted_views[i];
    const int64_t slot = view.group * plan.width + x;
    if (row_of[i] < 0 || !(plan.x.count[slot] > 0)) continue;
    const int64_t place = row_of[i] * plan.places_x + plan.x.first[slot];
    values[cell.count] = {sums + place * plan.chunk, plan.x.weight + slot * plan.x.max_taps,
                          plan.x.taps[slot]};
    const double weight = static_cast<double>(view.weight) * plan.x.count[slot] *
                          plan.y.count[view.dy * plan.height + y];
    weights[cell.count++] = weight;
    cell.total += weight;
  }
  for (int64_t i = 0; i < cell.count; ++i) shares[i] = static_cast<Acc>(weights[i] / cell.total);
  return cell;
}

template <class T, class Reduction, class Acc>
void per_view(const PerViewPlan<Acc>& plan, int64_t begin, int64_t end, void* scratch) {
  constexpr int64_t block = kValueVectors * kLanes<Acc>;
  char* const base = static_cast<char*>(scratch);
  const int64_t chunks = (plan.channels + plan.chunk - 1) / plan.chunk;
  const int64_t bands = (plan.height + plan.band - 1) / plan.band;

  for (int64_t task = begin; task < end; ++task) {
    const int64_t c = task % chunks * plan.chunk;
    const int64_t band = task / chunks % bands;
    const int64_t b = task / chunks / bands;
    const int64_t n = least(plan.channels - c, plan.chunk);
    const T* tokens = static_cast<const T*>(plan.tokens) + b * plan.token_strides[1] + c;
    const int64_t band_end = least((band + 1) * plan.band, plan.height);

    CellRun run{};
    for (run.y = band * plan.band; run.y < band_end; run.y = run.y_end) {
      run.y_end = least(plan.end_y[run.y], band_end);
      combine_views(plan, run.y, tokens, n, base);
      for (run.x = 0; run.x < plan.width; run.x = run.x_end) {
        run.x_end = plan.end_x[run.x];
        CellValues<Acc> cell = views_of_cell(plan, run.y, run.x, base);
        for (int64_t from = 0; from < n; from += block) {
          run.n = least(n - from, block);
          run.at = b * plan.out_strides[0] + (c + from) * plan.out_strides[1];
          cell.finite =
              gather(in(base, plan.scratch.values), cell.count, plan.chunk, from, cell.value);
          Reduction::reduce(plan, run, cell);
        }
      }
    }
  }
}

}  // namespace
}  // namespace srt::cpu
